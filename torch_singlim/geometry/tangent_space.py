"""The tangent space of the zero-loss set at one of its points."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from torch_singlim.geometry.curvature import gauss_newton
from torch_singlim.geometry.gram import MAX_DENSE
from torch_singlim.linalg import CholeskyFactor, FactoredOperator
from torch_singlim.network.problem import ZeroLossProblem

__all__ = ["TangentSpace", "tangent_space"]


@dataclass(frozen=True)
class TangentSpace:
    """T = ker H at a point of Gamma, where H = B^T B is the Gauss-Newton matrix, on Gamma the Hessian of L.

    `hessian` is H. If `exact` is False, H was too large to decompose: `rank` is then a lower bound, `spectrum` has the
    eigenvalues that Lanczos resolved, `unresolved` is not 0, and the accuracy of `project` is limited by the number of
    steps. The normal directions that `project` does not remove have small curvature, see `curvature`.
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
        """Whether the spectrum is complete."""
        return self.hessian.exact

    @property
    def unresolved(self) -> float:
        """Share of the normal modes whose eigenvalue is not resolved to a relative accuracy of 1/10; 0: none."""
        return self.hessian.unresolved

    def curvature(self, v: Tensor) -> float:
        """v^T H v / v^T v: 0 for a tangent vector; otherwise v decays within about 1 / (lr curvature) steps."""
        return (self.hessian.operator.matvec(v).square().sum() / v.square().sum()).item()

    def spectrum(self) -> Tensor:
        """Nonzero eigenvalues of H, descending ``[r]``, in units of loss per squared weight norm."""
        return self.hessian.spectrum()


def tangent_space(
    problem: ZeroLossProblem,
    w: Tensor,
    *,
    max_dense: int = MAX_DENSE,
    rtol: float = 1e-6,
    max_steps: int = 300,
    factor: CholeskyFactor | None = None,
) -> TangentSpace:
    """The tangent space of Gamma at w, the kernel of the Gauss-Newton matrix; w is assumed to be on Gamma.

    Args:
        problem: the loss and its samples.
        w: weights on Gamma ``[P]``, see `nearest_point`.
        max_dense: up to this many residuals everything is exact (one eigendecomposition of an M x M matrix).
        rtol: relative accuracy of each projection above that number.
        max_steps: maximum number of products per projection above that number.
        factor: of K at a point nearby, if there is one, see `gauss_newton`.

    Raises:
        ValueError: a loss that never reaches its infimum: there is no zero-loss set.

    >>> import torch
    >>> from torch import nn
    >>> problem = ZeroLossProblem(nn.Linear(2, 1, bias=False), "mse", torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0]]))
    >>> T = tangent_space(problem, torch.tensor([3.0, 5.0], dtype=torch.float64))
    >>> T.rank, round(T.spectrum().item(), 9), T.project(torch.ones(2, dtype=torch.float64))
    (1, 2.0, tensor([0., 1.], dtype=torch.float64))
    """
    problem.check_attained()
    return TangentSpace(gauss_newton(problem, w, max_dense=max_dense, rtol=rtol, max_steps=max_steps, factor=factor))
