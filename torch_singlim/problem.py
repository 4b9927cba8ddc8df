"""A module, its loss and a finite probe set, as functions of a flat weight vector."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.func import grad, jvp
from torch.utils.flop_counter import FlopCounterMode

from torch_singlim.functional import ActivationSite, FunctionalModule
from torch_singlim.gram import MAX_DENSE, gram_matrix, worth_factoring
from torch_singlim.linalg import (
    CholeskyFactored,
    DenseFactored,
    FactoredOperator,
    KrylovFactored,
    LinearOperator,
    cholesky,
    gram_cutoff,
)
from torch_singlim.loss import SampleLoss, resolve_loss
from torch_singlim.memory import free_memory, saved_bytes
from torch_singlim.products import JacobianProducts
from torch_singlim.team import Team

__all__ = ["Linearization", "ZeroLossProblem", "check_samples"]

# memory of the deepest derivative that is taken, the gradient of a curvature, in units of the activations that one
# backward pass keeps: 8 to 11 were measured
_PASSES = 12

with warnings.catch_warnings():
    # torch loads its forward-mode rules on first use, and some versions warn there about torch itself
    warnings.simplefilter("ignore")
    jvp(torch.sin, (torch.zeros(()),), (torch.ones(()),))


def check_samples(inputs: Tensor, targets: Tensor) -> None:
    """Raise ValueError unless these are as many finite inputs as targets, and at least one."""
    if inputs.shape[0] == 0:
        raise ValueError("the probe set is empty: pass at least one sample")
    if targets.ndim == 0 or targets.shape[0] != inputs.shape[0]:
        raise ValueError(
            f"inputs and targets must have the same number of samples, got {inputs.shape[0]} inputs and targets "
            f"of shape {tuple(targets.shape)}"
        )
    for name, data in (("inputs", inputs), ("targets", targets)):
        if not torch.isfinite(data).all():
            raise ValueError(f"{name} contain nan or infinity")


@dataclass(frozen=True)
class Linearization:
    """The weighted residual b and its derivative B at one weight vector: b(w + v) = b + B v + O(|v|^2).

    On the zero-loss set b = 0, and H = B^T B is the Hessian of the loss there.

    Args:
        operator: B, with the products v -> B v and u -> B^T u; shape [M, P].
        residual: b ``[M]``, samples first.
        gram: forms K = B B^T ``[M, M]``.
        cheap_gram: whether that and a factorisation take seconds.
    """

    operator: LinearOperator
    residual: Tensor
    gram: Callable[[], Tensor] = field(repr=False)
    cheap_gram: bool


class ZeroLossProblem:
    """The loss gap L(w) >= 0 of a module on a probe set; its zero set Gamma = {w : L(w) = 0} is what is studied.

        L(w) = (1/N) sum_i l(f(w; x_i), y_i)        l convex in f, its infimum subtracted

    The module is evaluated in evaluation mode on a copy that shares its parameters: its mode, buffers, gradients and
    hooks' owner are left alone, and no global random state is consumed.

    Args:
        module: maps a batch of inputs to outputs ``[n, ...]``; evaluation mode must be deterministic.
        loss: ``"mse"``, ``"cross_entropy"`` (with soft targets), ``nn.MSELoss()``,
            ``nn.CrossEntropyLoss(label_smoothing=...)``, or a function of one sample's outputs ``[C]`` and target,
            convex, with infimum 0.
        inputs: ``[N, ...]``.
        targets: ``[N, ...]`` in the outputs' shape for mse; class labels ``[N]`` or probabilities ``[N, C]`` for
            cross-entropy.
        dtype: of every computation here; small eigenvalues need float64.
        device: default: where the module's weights are.
        batch_size: samples evaluated at once; default: as many as fit into half of the memory that is free now. Where
            these are all, the pass that products with the Jacobian share is made once and kept.
        step_ratios: parameter name -> its step size, relative to the descent's lr; those not named are held where they
            are. Default: all trainable ones, 1. Weights w ``[P]`` are then those of the metric, divided by the root.
        team: processes that share the samples: each evaluates its own, sums and outputs are exchanged.

    Raises:
        ValueError: empty probe set, fewer samples than processes, targets that do not fit, hard labels with
            cross-entropy (Gamma is empty), non-finite data, a module that is random in evaluation mode.

    Warns:
        UserWarning: fewer weights P than residuals M: Gamma may be empty or a point.

    Source: arXiv 2404.12293, section 2.

    >>> torch.manual_seed(0) and None
    >>> problem = ZeroLossProblem(nn.Linear(3, 1), "mse", torch.eye(3)[:2], torch.zeros(2, 1))
    >>> problem.num_weights, problem.num_samples, problem.num_residuals
    (4, 2, 2)
    >>> problem.loss(torch.zeros(4, dtype=torch.float64)).item()
    0.0
    """

    def __init__(
        self,
        module: nn.Module,
        loss: str | nn.Module | SampleLoss | Callable[[Tensor, Tensor], Tensor],
        inputs: Tensor,
        targets: Tensor,
        *,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str | None = None,
        batch_size: int | None = None,
        step_ratios: Mapping[str, float] | None = None,
        team: Team = Team(),  # noqa: B008  # frozen
    ) -> None:
        check_samples(inputs, targets)
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.sample_loss = resolve_loss(loss)
        self.function = FunctionalModule(module, dtype=dtype, device=device, step_ratios=step_ratios)
        self.dtype, self.device = dtype, self.function.device
        self.inputs = inputs.detach().to(self.device)
        if self.inputs.is_floating_point():
            self.inputs = self.inputs.to(dtype)
        self.num_samples = inputs.shape[0]
        self.num_weights = self.function.num_weights
        if self.num_samples < team.size:
            raise ValueError(f"{self.num_samples} samples cannot be shared by {team.size} processes: pass more samples")
        self.team = team
        self.memory = int(team.least(free_memory(self.device) // 2, self.device))

        example = self.inputs[:2]
        self.function.check_deterministic(example)
        self.sites: list[ActivationSite] = self.function.sites(example)
        with torch.no_grad():
            outputs = self.function(self.weights(), example)
        self.num_outputs = outputs.shape[1]
        each = saved_bytes(lambda w: self.function(w, example), self.weights(), example) / len(example)
        fitting = max(1, int(self.memory / max(_PASSES * each, 1)))
        self.batch_size = min(batch_size or fitting, self.num_samples)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            self.function(self.weights(), example)
        self.flops = counter.get_total_flops() / len(example)
        self.linear_layers = self.function.linear_layers(example)
        self.targets = self.sample_loss.prepare(targets.detach().to(self.device), outputs)
        self.num_residuals = self.num_samples * self.sample_loss.num_rows(self.num_outputs)
        if self.num_weights < self.num_residuals:
            warnings.warn(
                f"{self.num_weights} weights for {self.num_residuals} residuals ({self.num_samples} samples): the "
                "network is not over-parameterised on this probe set, its zero-loss set may be empty or a point; "
                "use fewer samples or a larger network",
                UserWarning,
                stacklevel=2,
            )

    def __repr__(self) -> str:
        return (
            f"ZeroLossProblem({type(self.function.module).__name__}, {self.sample_loss}, N={self.num_samples}, "
            f"C={self.num_outputs}, P={self.num_weights}, {self.dtype})"
        )

    def alone(self) -> ZeroLossProblem:
        """The same problem, all of it evaluated here: for what cannot be exchanged in between."""
        whole = copy.copy(self)
        whole.team = Team()
        return whole

    def subset(self, count: int, *, dtype: torch.dtype = torch.float64) -> ZeroLossProblem:
        """The same problem on its first samples, all of them evaluated here."""
        part = self.alone()
        part.function = self.function.at_precision(dtype)
        part.dtype = dtype
        part.inputs = self.inputs[:count]
        if part.inputs.is_floating_point():
            part.inputs = part.inputs.to(dtype)
        part.targets = self.targets[:count].to(dtype) if self.targets.is_floating_point() else self.targets[:count]
        part.num_samples = part.batch_size = len(part.inputs)
        part.num_residuals = part.num_samples * (self.num_residuals // self.num_samples)
        part.sites = part.function.sites(part.inputs)
        return part

    @property
    def input_shape(self) -> torch.Size:
        """Shape of one sample's input."""
        return self.inputs.shape[1:]

    # --- weights and samples ---------------------------------------------------------------------------------------

    def weights(self) -> Tensor:
        """The module's present weights ``[P]``, a copy in the problem's dtype."""
        return self.function.weights()

    def chunks(self) -> Iterator[slice]:
        """Slices of this process's samples, `batch_size` each, the last one what is left."""
        own = self.team.own(self.num_samples)
        for start in range(own.start, own.stop, self.batch_size):
            yield slice(start, min(start + self.batch_size, own.stop))

    def mean(self, function: Callable[[slice], Tensor]) -> Tensor:
        """Mean over samples from means over chunks, a ragged last chunk weighted by its size."""
        total: Tensor | None = None
        for part in self.chunks():
            term, share = function(part), (part.stop - part.start) / self.num_samples
            total = (term if share == 1 else share * term) if total is None else total + share * term
        assert total is not None  # no process is without samples
        return self.team.sum(total)

    def batch_loss(
        self, w: Tensor, x: Tensor, y: Tensor, *, activations: Tensor | None = None, shift: Tensor | None = None
    ) -> Tensor:
        """Mean of l over a batch at weights w ``[P]``, a scalar; differentiable in each argument.

        With noise on its activations ``[n, D]``, and targets shifted by ``[n, C]``.
        """
        f = self.function(w, x, activations)
        if shift is None:
            return self.sample_loss.value(f, y).mean()
        return self.sample_loss.shifted(f, y, shift).mean()

    # --- the loss and its derivatives ------------------------------------------------------------------------------

    def outputs(self, w: Tensor) -> Tensor:
        """f(w; x_i) for the whole probe set ``[N, C]``."""
        with torch.no_grad():
            own = torch.cat([self.function(w, self.inputs[part]) for part in self.chunks()])
        return self.team.whole(own, self.num_samples)

    def loss(self, w: Tensor) -> Tensor:
        """The loss gap L(w), a scalar: zero exactly on Gamma."""
        with torch.no_grad():
            return self.mean(lambda part: self.batch_loss(w, self.inputs[part], self.targets[part]))

    def infimum(self) -> float:
        """What `loss` has subtracted: training loss = loss gap + infimum (the entropy of soft targets)."""
        return self.sample_loss.infimum(self.targets).mean().item()

    def gradient(self, w: Tensor) -> Tensor:
        """grad L(w)  ``[P]``."""
        return self.mean(lambda part: grad(self.batch_loss)(w, self.inputs[part], self.targets[part]))

    def hessian_product(self, w: Tensor, v: Tensor) -> Tensor:
        """(D^2 L)(w) v  ``[P]``, forward over reverse: the derivative of the gradient along v."""

        def along(part: slice) -> Tensor:
            def gradient(u: Tensor) -> Tensor:
                return grad(self.batch_loss)(u, self.inputs[part], self.targets[part])

            return jvp(gradient, (w,), (v,))[1]  # type: ignore[return-value]  # jvp is typed for any number of outputs

        return self.mean(along)

    # --- residual and Gauss-Newton factor --------------------------------------------------------------------------

    def residual(self, w: Tensor) -> Tensor:
        """b(w) = N^{-1/2} [R_i (f_i - f_i*)]  ``[M]``; |b|^2 = 2 L to second order, and equal for mse."""
        f = self.outputs(w)
        return self.sample_loss.residual(f, self.targets).reshape(-1) / math.sqrt(self.num_samples)

    def whiten(self, f: Tensor, v: Tensor) -> Tensor:
        """N^{-1/2} [R_i v_i]  ``[M]`` for output directions v ``[N, C]`` at outputs f ``[N, C]``."""
        return self.sample_loss.whiten(f, self.targets, v).reshape(-1) / math.sqrt(self.num_samples)

    def output_factor(self, f: Tensor, part: slice) -> Tensor:
        """R_i with A_i = R_i^T R_i, for some of the samples, at outputs f ``[N, C]`` of all  ``[n, rows, C]``."""
        f, y = f[part], self.targets[part]
        basis = torch.eye(self.num_residuals // self.num_samples, dtype=f.dtype, device=f.device)
        return torch.stack([self.sample_loss.unwhiten(f, y, e.expand(len(f), -1)) for e in basis], 1)

    def linearize(self, w: Tensor) -> Linearization:
        """b(w) and B = N^{-1/2} [R_i J_i] at w.

        With one chunk the pass through the network is made once and kept, each product is then about half a gradient.
        With several chunks it is made again chunk by chunk, which bounds memory.

        Raises:
            ValueError: outputs that are not finite.
        """

        def at_chunk(part: slice, *, tangent: bool) -> JacobianProducts:
            return JacobianProducts(lambda v: self.function(v, self.inputs[part]), w, tangent=tangent)

        own = self.team.own(self.num_samples)
        whole = self.batch_size >= own.stop - own.start
        # the transpose pays where it is kept
        kept = at_chunk(own, tangent=not self.linear_layers) if whole else None
        f = self.outputs(w) if kept is None else self.team.whole(kept.outputs, self.num_samples)
        if not torch.isfinite(f).all():
            raise ValueError("the network's outputs are not finite at these weights: training has probably diverged")
        scale = 1 / math.sqrt(self.num_samples)

        def jacobian(part: slice) -> JacobianProducts:
            return at_chunk(part, tangent=True) if kept is None else kept

        def matvec(v: Tensor) -> Tensor:  # v -> J v -> R J v
            Jv = torch.cat([jacobian(part).push(v) for part in self.chunks()])
            return self.whiten(f, self.team.whole(Jv, self.num_samples))

        def batched(v: Tensor) -> Tensor:  # vmap survives no exchange: over all samples here
            if self.team.size == 1:
                return self.whiten(f, torch.cat([jacobian(part).unrecorded(v) for part in self.chunks()]))
            parts = self.alone().chunks()
            return self.whiten(f, torch.cat([at_chunk(part, tangent=True).unrecorded(v) for part in parts]))

        def rmatvec(u: Tensor) -> Tensor:  # u -> R^T u -> J^T R^T u
            g = scale * self.sample_loss.unwhiten(f, self.targets, u.reshape(self.num_samples, -1))  # [N, C]
            return self.team.sum(torch.stack([jacobian(part).pull(g[part]) for part in self.chunks()]).sum(0))

        operator = LinearOperator((self.num_residuals, self.num_weights), matvec, rmatvec)
        residual = self.sample_loss.residual(f, self.targets).reshape(-1) * scale
        return Linearization(operator, residual, lambda: gram_matrix(self, w, f, batched), worth_factoring(self))

    def gauss_newton(
        self, w: Tensor, *, max_dense: int = MAX_DENSE, rtol: float = 1e-6, max_steps: int = 300
    ) -> FactoredOperator:
        """H = B^T B at w, ready for projections and matrix functions.

        Args:
            w: weights ``[P]``.
            max_dense: up to this many residuals K is formed and decomposed (exact); above, Lanczos, and where K is
                cheap to form its Cholesky factor for the projections.
            rtol: relative accuracy of each Lanczos product.
            max_steps: most products with K in each.
        """
        linearization = self.linearize(w)
        if self.num_residuals <= max_dense:
            return DenseFactored.from_gram(linearization.operator, linearization.gram())
        cutoff = gram_cutoff(self.num_residuals, self.dtype)
        lanczos = (linearization.operator, linearization.residual, rtol, max_steps, cutoff)
        factor = cholesky(linearization.gram()) if linearization.cheap_gram else None
        return KrylovFactored(*lanczos) if factor is None else CholeskyFactored(*lanczos, factor=factor)
