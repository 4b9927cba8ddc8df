"""The tangent space of the zero-loss set at one of its points."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from torch_singlim.geometry.curvature import gauss_newton
from torch_singlim.geometry.gram import MAX_DENSE
from torch_singlim.linalg import FactoredOperator
from torch_singlim.network.problem import ZeroLossProblem

__all__ = ["TangentSpace", "tangent_space"]


@dataclass(frozen=True)
class TangentSpace:
    """T = ker H at a point of Gamma, H = B^T B the Gauss-Newton matrix there, which is the Hessian of L.

    `hessian` holds H. Where `exact` is False it was too large to decompose: `rank` is a lower bound, `spectrum` the
    part that Lanczos resolved, `unresolved` the share of it that is not, and `project` as accurate as the steps allow.
    What `project` leaves of normal directions then has little curvature, see `curvature`.
    """

    hessian: FactoredOperator

    def project(self, v: Tensor) -> Tensor:
        """P_T v = v - B^T (B B^T)^+ B v  ``[P]``, orthogonal projection on the tangent space."""
        return self.hessian.project_kernel(v)

    @property
    def rank(self) -> int:
        """r, the codimension of Gamma: number of nonzero eigenvalues of H."""
        return self.hessian.rank

    @property
    def exact(self) -> bool:
        """Whether the whole spectrum was resolved."""
        return self.hessian.exact

    @property
    def unresolved(self) -> float:
        """Share of the normal modes whose eigenvalue is not known to a tenth; 0: all are."""
        return self.hessian.unresolved

    def curvature(self, v: Tensor) -> float:
        """v^T H v / v^T v: 0 for a tangent vector; 1 / (lr curvature) steps show that v is not quite one."""
        return (self.hessian.operator.matvec(v).square().sum() / v.square().sum()).item()

    def spectrum(self) -> Tensor:
        """Nonzero eigenvalues of H, descending ``[r]``, in units of loss per squared weight norm."""
        return self.hessian.spectrum()


def tangent_space(
    problem: ZeroLossProblem, w: Tensor, *, max_dense: int = MAX_DENSE, rtol: float = 1e-6, max_steps: int = 300
) -> TangentSpace:
    """The tangent space of Gamma at w, which is taken to lie on Gamma: the kernel of the Gauss-Newton matrix there.

    Args:
        problem: the loss and its samples.
        w: weights on Gamma ``[P]``, see `nearest_point`.
        max_dense: up to this many residuals everything is exact (one eigendecomposition of an M x M matrix).
        rtol: above that, relative accuracy of each projection.
        max_steps: above that, most products per projection.

    >>> import torch
    >>> from torch import nn
    >>> problem = ZeroLossProblem(nn.Linear(2, 1, bias=False), "mse", torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0]]))
    >>> T = tangent_space(problem, torch.tensor([3.0, 5.0], dtype=torch.float64))
    >>> T.rank, round(T.spectrum().item(), 9), T.project(torch.ones(2, dtype=torch.float64))
    (1, 2.0, tensor([0., 1.], dtype=torch.float64))
    """
    return TangentSpace(gauss_newton(problem, w, max_dense=max_dense, rtol=rtol, max_steps=max_steps))
