"""Per-sample losses l(f, y), convex in f, with their infimum subtracted: value, curvature factor, weighted residual.

For each sample, A = d^2 l / df^2 is factored as A = R^T R. The Gauss-Newton matrix is then a sum of squares,
H = (1/N) sum_i J_i^T A_i J_i = B^T B with B = N^{-1/2} [R_i J_i]_i.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["CustomLoss", "MeanSquaredError", "SampleLoss", "SoftCrossEntropy", "resolve_loss"]


@runtime_checkable
class SampleLoss(Protocol):
    """What a problem needs from its loss. Outputs are f ``[n, C]``, targets y are those returned by `prepare`."""

    def prepare(self, targets: Tensor, outputs: Tensor) -> Tensor:
        """The targets in the form that the other methods take; they are checked against example outputs ``[n, C]``."""
        ...

    def num_rows(self, num_outputs: int) -> int:
        """Rows of R: the number of residuals of one sample."""
        ...

    def value(self, f: Tensor, y: Tensor) -> Tensor:
        """l(f, y) with its infimum subtracted ``[n]``, differentiable in f."""
        ...

    def shifted(self, f: Tensor, y: Tensor, shift: Tensor) -> Tensor:
        """l(f, y + shift) up to a term that does not depend on f ``[n]``; shift ``[n, C]`` may have any sign."""
        ...

    def infimum(self, y: Tensor) -> Tensor:
        """The infimum that was subtracted ``[n]``."""
        ...

    def attained(self, f: Tensor, y: Tensor) -> bool:
        """Whether l(., y) attains its infimum for all samples.

        Args:
            f: outputs of the first samples, where a search for the infimum begins.
            y: targets of all samples.

        Raises:
            ValueError: the infimum is not 0.
        """
        ...

    def optimum(self, y: Tensor) -> Tensor:
        """f*, the minimiser of l(., y)  ``[n, C]``."""
        ...

    def curvature(self, f: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """v^T A v ``[n]`` for v ``[n, C]``, differentiable in f and v."""
        ...

    def whiten(self, f: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """R v: ``[n, C]`` -> ``[n, rows]``."""
        ...

    def unwhiten(self, f: Tensor, y: Tensor, u: Tensor) -> Tensor:
        """R^T u: ``[n, rows]`` -> ``[n, C]``."""
        ...

    def deviation(self, f: Tensor, y: Tensor) -> Tensor:
        """f - f* with the minimiser f* of l, up to directions that do not change l  ``[n, C]``.

        If f* is unknown, the Newton step A^+ dl/df, which agrees with it to first order.
        """
        ...

    def residual(self, f: Tensor, y: Tensor) -> Tensor:
        """R (f - f*) ``[n, rows]``: zero exactly where l is zero."""
        ...

    def newton(self, f: Tensor, y: Tensor) -> Tensor:
        """R A^+ dl/df ``[n, rows]``, so that R^T of it is dl/df; for a quadratic l this is the residual."""
        ...


@dataclass(frozen=True)
class MeanSquaredError:
    """l = |f - y|^2 / C;  A = (2/C) I;  R = sqrt(2/C) I."""

    def prepare(self, targets: Tensor, outputs: Tensor) -> Tensor:
        flat = targets.reshape(targets.shape[0], -1) if targets.ndim else targets
        if not targets.is_floating_point() or flat.shape[1:] != outputs.shape[1:]:
            hint = ""
            if not targets.is_floating_point() and targets.ndim == 1:
                hint = f"; for class labels pass F.one_hot(targets, {outputs.shape[1]}).float()"
            raise ValueError(
                f"mse targets must be floating point, one value per output: got {targets.dtype} of shape "
                f"{tuple(targets.shape)} for outputs of shape {tuple(outputs.shape)}{hint}"
            )
        return flat.to(outputs)

    def num_rows(self, num_outputs: int) -> int:
        return num_outputs

    def value(self, f: Tensor, y: Tensor) -> Tensor:
        return (f - y).square().mean(1)

    def shifted(self, f: Tensor, y: Tensor, shift: Tensor) -> Tensor:
        return self.value(f, y + shift)

    def infimum(self, y: Tensor) -> Tensor:
        return y.new_zeros(y.shape[0])

    def attained(self, f: Tensor, y: Tensor) -> bool:
        return True

    def optimum(self, y: Tensor) -> Tensor:
        return y

    def curvature(self, f: Tensor, y: Tensor, v: Tensor) -> Tensor:
        return 2 * v.square().mean(1)

    def whiten(self, f: Tensor, y: Tensor, v: Tensor) -> Tensor:
        return (2 / f.shape[1]) ** 0.5 * v

    def unwhiten(self, f: Tensor, y: Tensor, u: Tensor) -> Tensor:
        return self.whiten(f, y, u)  # R is symmetric

    def deviation(self, f: Tensor, y: Tensor) -> Tensor:
        return f - self.optimum(y)

    def residual(self, f: Tensor, y: Tensor) -> Tensor:
        return self.whiten(f, y, self.deviation(f, y))

    def newton(self, f: Tensor, y: Tensor) -> Tensor:
        return self.residual(f, y)


def _reflect(s: Tensor, x: Tensor) -> Tensor:
    """Householder reflection along s + sign(s_C) e_C: maps the unit vector s to a multiple of e_C  ``[n, C]``."""
    h = s.clone()
    h[:, -1] += torch.where(s[:, -1] < 0, -1.0, 1.0)  # the sign that avoids cancellation (Golub & Van Loan, 5.1.3)
    return x - h * (2 * (h * x).sum(1, keepdim=True) / h.square().sum(1, keepdim=True))


@dataclass(frozen=True)
class SoftCrossEntropy:
    """l = KL(q || softmax f) for targets q >= 0;  A = diag(p) - p p^T, p = softmax f, of rank C - 1.

    The infimum 0 is attained if all q are positive. With hard labels, f has to go to infinity.

    With s = sqrt(p): A = diag(s) (I - s s^T) diag(s), so R = G diag(s), where the rows of G are an orthonormal basis
    of the orthogonal complement of s. R has C - 1 rows and maps constants, which do not change the softmax, to zero.
    """

    label_smoothing: float = 0.0

    def prepare(self, targets: Tensor, outputs: Tensor) -> Tensor:
        if outputs.ndim != 2 or outputs.shape[1] < 2:
            raise ValueError(f"cross-entropy needs outputs [n, C] with C >= 2 classes, got {tuple(outputs.shape)}")
        classes = outputs.shape[1]
        if targets.is_floating_point():
            if targets.shape[1:] != outputs.shape[1:]:
                raise ValueError(
                    f"soft targets must have the outputs' shape [n, {classes}], got {tuple(targets.shape)}"
                )
            onehot = targets.to(outputs)
            if not torch.allclose(onehot.sum(1), onehot.new_ones(()), atol=1e-4) or bool((onehot < 0).any()):
                raise ValueError("soft targets must be probabilities: non-negative rows that sum to 1")
            onehot = onehot / onehot.sum(1, keepdim=True)
        else:
            if targets.ndim != 1:
                raise ValueError(f"class labels must have shape [n], got {tuple(targets.shape)}")
            if targets.numel() and not (int(targets.min()) >= 0 and int(targets.max()) < classes):
                raise ValueError(
                    f"class labels must lie in 0..{classes - 1} (the network has {classes} outputs), "
                    f"got {int(targets.min())}..{int(targets.max())}"
                )
            onehot = F.one_hot(targets.long(), classes).to(outputs)
        return (1 - self.label_smoothing) * onehot + self.label_smoothing / classes

    def num_rows(self, num_outputs: int) -> int:
        return num_outputs - 1

    def value(self, f: Tensor, y: Tensor) -> Tensor:
        return (torch.xlogy(y, y) - y * F.log_softmax(f, 1)).sum(1)

    def shifted(self, f: Tensor, y: Tensor, shift: Tensor) -> Tensor:
        return self.value(f, y) - (shift * F.log_softmax(f, 1)).sum(1)

    def infimum(self, y: Tensor) -> Tensor:
        return -torch.xlogy(y, y).sum(1)

    def attained(self, f: Tensor, y: Tensor) -> bool:
        return bool((y > 0).all())

    def optimum(self, y: Tensor) -> Tensor:
        return y.log()

    def curvature(self, f: Tensor, y: Tensor, v: Tensor) -> Tensor:
        p = F.softmax(f, 1)
        return (p * v.square()).sum(1) - (p * v).sum(1).square()

    def whiten(self, f: Tensor, y: Tensor, v: Tensor) -> Tensor:
        s = F.softmax(f, 1).sqrt()
        return _reflect(s, s * v)[:, :-1]

    def unwhiten(self, f: Tensor, y: Tensor, u: Tensor) -> Tensor:
        s = F.softmax(f, 1).sqrt()
        return s * _reflect(s, F.pad(u, (0, 1)))

    def deviation(self, f: Tensor, y: Tensor) -> Tensor:
        return f - self.optimum(y)

    def residual(self, f: Tensor, y: Tensor) -> Tensor:
        return self.whiten(f, y, self.deviation(f, y))

    def newton(self, f: Tensor, y: Tensor) -> Tensor:
        p = F.softmax(f, 1)
        s = p.sqrt().clamp_min(torch.finfo(f.dtype).tiny ** 0.5)  # dl/df = p - y = R^T c with R^T = diag(s) G^T
        return _reflect(s, (p - y) / s)[:, :-1]


# descent that looks for the infimum of a function: number of steps, and the share of the value that may be left
_INFIMUM_STEPS, _INFIMUM = 200, 1e-3
# the infimum counts as attained if Newton's step from where this descent ends is at most this share of its way. Losses
# that fall exponentially, the fastest of those that do not attain theirs, leave more than 1e-3 of the way: the step is
# then of constant length, and the value underflows after a way of 745 of them
_ATTAINED = 1e-3


@dataclass(frozen=True)
class CustomLoss:
    """A user's l(f_i, y_i): maps one sample's outputs ``[C]`` and target to a scalar; convex and smooth, infimum 0.

    R = A^{1/2} from the eigendecomposition of A = d^2 l / df^2, and the residual is the Newton step R A^+ dl/df.
    """

    function: Callable[[Tensor, Tensor], Tensor]

    def prepare(self, targets: Tensor, outputs: Tensor) -> Tensor:
        y = targets.to(outputs) if targets.is_floating_point() else targets.to(outputs.device)
        try:
            values = self.value(outputs, y[: len(outputs)])
            self.residual(outputs, y[: len(outputs)])  # takes the first and the second derivative
        except RuntimeError as error:
            raise ValueError(
                "the loss function must take one sample's outputs [C] and target, and the function and its derivatives "
                "must run under torch.func.vmap: no .item(), no indexing by the target (compare with torch.arange, or "
                "pass one-hot targets)"
            ) from error
        if values.shape != outputs.shape[:1] or bool((values < 0).any()):
            raise ValueError(
                "the loss function must return one non-negative number per sample, its infimum 0, "
                f"got shape {tuple(values.shape[1:])} per sample, smallest value {values.min().item():.3g}"
            )
        return y

    def _descend(self, start: Tensor, y: Tensor) -> Tensor:
        """The end of a descent on the loss from outputs ``[n, C]``."""
        f = start.clone().requires_grad_()
        descent = torch.optim.LBFGS(
            [f], max_iter=_INFIMUM_STEPS, tolerance_grad=0, tolerance_change=0, line_search_fn="strong_wolfe"
        )

        def closure() -> Tensor:
            descent.zero_grad()
            with torch.enable_grad():
                total = self.value(f, y).sum()
                total.backward()
            return total

        descent.step(closure)
        return f.detach()

    def attained(self, f: Tensor, y: Tensor) -> bool:
        start, y = f.detach().double() + 1, y[: len(f)]  # the outputs themselves may be optimal
        y = y.double() if y.is_floating_point() else y
        end = self._descend(start, y)
        first, found = self.value(start, y).sum().item(), self.value(end, y)
        if found.sum().item() > _INFIMUM * first or bool((found < -_INFIMUM * abs(first)).any()):
            raise ValueError(
                f"the infimum of the loss function must be 0, got about {found.min().item():.3g} per sample by descent "
                "in the outputs: subtract the infimum, which may depend on the target, within the function"
            )
        return bool((self.deviation(end, y).norm(dim=1) <= _ATTAINED * (end - start).norm(dim=1)).all())

    def num_rows(self, num_outputs: int) -> int:
        return num_outputs

    def value(self, f: Tensor, y: Tensor) -> Tensor:
        return torch.func.vmap(self.function)(f, y)

    def shifted(self, f: Tensor, y: Tensor, shift: Tensor) -> Tensor:
        return self.value(f, y + shift.reshape(y.shape))

    def infimum(self, y: Tensor) -> Tensor:
        return torch.zeros(y.shape[0], device=y.device)

    def optimum(self, y: Tensor) -> Tensor:
        raise ValueError(
            "the potential of label noise needs the minimiser of the loss, which is unknown for a loss that is given "
            "as a function: use mse with LabelNoise, or cross-entropy with LabelFlips"
        )

    def curvature(self, f: Tensor, y: Tensor, v: Tensor) -> Tensor:
        A = torch.func.vmap(torch.func.hessian(self.function))(f, y)  # [n, C, C]
        return torch.einsum("ni,nij,nj->n", v, A, v)

    def _root(self, f: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        A = torch.func.vmap(torch.func.hessian(self.function))(f, y)  # [n, C, C]
        values, vectors = torch.linalg.eigh(A)
        kept = values > values.amax(1, keepdim=True).clamp_min(0) * f.shape[1] * torch.finfo(f.dtype).eps
        return values.where(kept, 0).sqrt(), vectors

    def whiten(self, f: Tensor, y: Tensor, v: Tensor) -> Tensor:
        root, vectors = self._root(f, y)
        return torch.einsum("nij,nj,nkj,nk->ni", vectors, root, vectors, v)

    def unwhiten(self, f: Tensor, y: Tensor, u: Tensor) -> Tensor:
        return self.whiten(f, y, u)  # R is symmetric

    def deviation(self, f: Tensor, y: Tensor) -> Tensor:
        return self._inverse_root_gradient(f, y, power=2)

    def residual(self, f: Tensor, y: Tensor) -> Tensor:
        return self._inverse_root_gradient(f, y, power=1)

    def _inverse_root_gradient(self, f: Tensor, y: Tensor, *, power: int) -> Tensor:
        """(R^+)^power dl/df."""
        gradient = torch.func.vmap(torch.func.grad(self.function))(f, y)
        root, vectors = self._root(f, y)
        inverse = torch.where(root > 0, 1 / root.where(root > 0, 1), 0) ** power
        return torch.einsum("nij,nj,nkj,nk->ni", vectors, inverse, vectors, gradient)

    def newton(self, f: Tensor, y: Tensor) -> Tensor:
        return self.residual(f, y)


def resolve_loss(loss: str | nn.Module | SampleLoss | Callable[[Tensor, Tensor], Tensor]) -> SampleLoss:
    """The loss that a name, a torch.nn loss or a per-sample function denotes.

    >>> resolve_loss("mse")
    MeanSquaredError()
    >>> resolve_loss(nn.CrossEntropyLoss(label_smoothing=0.1))
    SoftCrossEntropy(label_smoothing=0.1)
    """
    if isinstance(loss, SampleLoss) and not isinstance(loss, nn.Module):
        return loss
    if loss == "mse":
        return MeanSquaredError()
    if loss == "cross_entropy":
        return SoftCrossEntropy()
    if isinstance(loss, nn.MSELoss | nn.CrossEntropyLoss) and loss.reduction != "mean":
        raise ValueError(
            f"the loss must be a mean over samples, got reduction={loss.reduction!r}; use reduction='mean'"
        )
    if isinstance(loss, nn.MSELoss):
        return MeanSquaredError()
    if isinstance(loss, nn.CrossEntropyLoss):
        if loss.weight is not None or loss.ignore_index != -100:
            raise ValueError("class weights and ignore_index are not supported: pass nn.CrossEntropyLoss without them")
        return SoftCrossEntropy(label_smoothing=loss.label_smoothing)
    if isinstance(loss, str | nn.Module) or not callable(loss):
        raise ValueError(
            f"unknown loss {loss!r}: expected 'mse', 'cross_entropy', nn.MSELoss(), "
            "nn.CrossEntropyLoss(label_smoothing=...) or a function of one sample's (outputs, target)"
        )
    return CustomLoss(loss)
