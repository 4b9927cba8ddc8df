"""A module, its loss and finitely many samples, as functions of a flat weight vector."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.func import grad
from torch.utils.flop_counter import FlopCounterMode

from torch_singlim.network.forward_mode import jvp
from torch_singlim.network.functional import FunctionalModule
from torch_singlim.network.loss import SampleLoss, resolve_loss
from torch_singlim.network.memory import free_memory, saved_bytes
from torch_singlim.network.process_group import ProcessGroup
from torch_singlim.network.sites import ActivationSite

__all__ = ["ZeroLossProblem", "check_samples"]

# memory of the highest derivative that is taken, the gradient of a curvature, in units of the activations that one
# backward pass keeps: 8 to 11 were measured
_PASSES = 12

with warnings.catch_warnings():
    # torch loads its forward-mode rules on first use, and some versions emit a warning about torch itself
    warnings.simplefilter("ignore")
    jvp(torch.sin, (torch.zeros(()),), (torch.ones(()),))


def check_samples(inputs: Tensor, targets: Tensor) -> None:
    """Raise ValueError unless there are as many inputs as targets, at least one, and all of them are finite."""
    if inputs.shape[0] == 0:
        raise ValueError("there are no samples: pass at least one sample")
    if targets.ndim == 0 or targets.shape[0] != inputs.shape[0]:
        raise ValueError(
            f"inputs and targets must have the same number of samples, got {inputs.shape[0]} inputs and targets "
            f"of shape {tuple(targets.shape)}"
        )
    for name, data in (("inputs", inputs), ("targets", targets)):
        if not torch.isfinite(data).all():
            raise ValueError(f"{name} contain nan or infinity")


class ZeroLossProblem:
    """The excess loss L(w) >= 0 of a module on N samples, and its zero-loss set Gamma = {w : L(w) = 0}.

        L(w) = (1/N) sum_i l(f(w; x_i), y_i)        l convex in f, its infimum subtracted

    The module is evaluated in evaluation mode, on a copy that shares its parameters: the module's mode, buffers and
    gradients do not change, and no global random state is consumed.

    Args:
        module: maps a batch of inputs to outputs ``[n, ...]``; evaluation mode must be deterministic.
        loss: ``"mse"``, ``"cross_entropy"`` (with soft targets), ``nn.MSELoss()``,
            ``nn.CrossEntropyLoss(label_smoothing=...)``, or a function of one sample's outputs ``[C]`` and target,
            convex, with infimum 0.
        inputs: ``[N, ...]``.
        targets: ``[N, ...]`` in the outputs' shape for mse; class labels ``[N]`` or probabilities ``[N, C]`` for
            cross-entropy. With hard labels and no smoothing the loss does not attain its infimum, and Gamma is empty:
            then level distances and the effective flow exist, but no nearest point and no limit.
        dtype: of every computation here; small eigenvalues need float64.
        device: of every computation here; default: that of the module's weights.
        batch_size: samples evaluated at once; default: as many as fit into `memory`. If all samples are evaluated at
            once, the pass that products with the Jacobian share is made once and cached.
        memory: bytes that evaluations may take; default: half of what is free now.
        step_ratios: parameter name -> its step size, relative to the optimizer's lr, one number or one for each weight;
            the other parameters are held fixed. Default: 1 for all trainable ones. The weights w ``[P]`` are the
            parameters divided by the square root of their ratio, see `WeightSpace`.
        process_group: the processes that share the samples: each evaluates a part; sums and outputs are exchanged.

    Raises:
        ValueError: no samples, fewer samples than processes, targets that do not fit, non-finite data, a module that
            is random in evaluation mode.

    Warns:
        UserWarning: fewer weights P than residuals M: Gamma may be empty or a single point.

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
        memory: int | None = None,
        step_ratios: Mapping[str, float | Tensor] | None = None,
        process_group: ProcessGroup = ProcessGroup(),  # noqa: B008  # frozen
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
        if self.num_samples < process_group.size:
            raise ValueError(
                f"{self.num_samples} samples cannot be shared by {process_group.size} processes: pass more samples"
            )
        self.process_group = process_group
        memory = free_memory(self.device) // 2 if memory is None else memory
        self.memory = int(process_group.all_reduce_min(memory))

        example = self.inputs[:2]
        self.function.check_deterministic(example)
        self.sites: list[ActivationSite] = self.function.sites(example)
        with torch.no_grad():
            outputs = self.function(self.weights(), example)
        self.num_outputs = outputs.shape[1]
        self.sample_bytes = saved_bytes(lambda w: self.function(w, example), self.weights(), example) / len(example)
        """Memory of the activations of one sample that a backward pass keeps."""
        self.batch_size = min(batch_size or self.samples_fitting, self.num_samples)
        self.targets = self.sample_loss.prepare(targets.detach().to(self.device), outputs)
        self.attained: bool = self.sample_loss.attained(outputs, self.targets)
        """Whether the loss attains its infimum at finite outputs; if not, Gamma is empty."""
        self.num_residuals = self.num_samples * self.sample_loss.num_rows(self.num_outputs)
        if self.num_weights < self.num_residuals:
            warnings.warn(
                f"{self.num_weights} weights for {self.num_residuals} residuals ({self.num_samples} samples): the "
                "network is not over-parameterised on these samples, and its zero-loss set may be empty or a single "
                "point; use fewer samples or a larger network",
                UserWarning,
                stacklevel=2,
            )

    def check_attained(self) -> None:
        """Raise ValueError if the loss does not attain its infimum, so that there is no zero-loss set."""
        if not self.attained:
            raise ValueError(
                "the loss never reaches its infimum, so its zero-loss set is empty (at infinity): got "
                f"{self.sample_loss} with these targets (hard labels?); level distances exist all the same; for a "
                "zero-loss set train with nn.CrossEntropyLoss(label_smoothing=0.1), soft targets that are all "
                "positive, or mse on one-hot targets"
            )

    def __repr__(self) -> str:
        return (
            f"ZeroLossProblem({type(self.function.module).__name__}, {self.sample_loss}, N={self.num_samples}, "
            f"C={self.num_outputs}, P={self.num_weights}, {self.dtype})"
        )

    def alone(self) -> ZeroLossProblem:
        """The same problem with all samples evaluated by this process, for functions that cannot communicate."""
        whole = copy.copy(self)
        whole.process_group = ProcessGroup()
        return whole

    def samples(self, part: slice) -> ZeroLossProblem:
        """The same problem on a part of its samples, all of them evaluated by this process."""
        few = self.alone()
        few.inputs, few.targets = few.inputs[part], few.targets[part]
        few.num_samples = len(few.inputs)
        few.batch_size = min(self.batch_size, few.num_samples)
        few.num_residuals = few.num_samples * (self.num_residuals // self.num_samples)
        return few

    def subset(self, count: int, *, dtype: torch.dtype = torch.float64) -> ZeroLossProblem:
        """The same problem on its first `count` samples, in another precision."""
        return self.at_precision(dtype).samples(slice(count))

    def at_precision(self, dtype: torch.dtype) -> ZeroLossProblem:
        """The same problem in another floating point type."""
        if dtype == self.dtype:
            return self
        other = copy.copy(self)
        other.function, other.dtype = self.function.at_precision(dtype), dtype
        other.inputs, other.targets = (
            each.to(dtype) if each.is_floating_point() else each for each in (self.inputs, self.targets)
        )
        return other

    def in_metric(self, ratios: Tensor) -> ZeroLossProblem:
        """The same problem in coordinates u = w / sqrt(r), in which a descent with step sizes alpha r_i is plain.

        Args:
            ratios: r, of each coordinate's step size to its present one  ``[P]``.

        >>> problem = ZeroLossProblem(nn.Linear(1, 1, bias=False), "mse", torch.ones(1, 1), torch.ones(1, 1))
        >>> u = torch.tensor([0.5], dtype=torch.float64)
        >>> problem.in_metric(torch.tensor([4.0], dtype=torch.float64)).loss(u).item()
        0.0
        """
        other = copy.copy(self)
        other.function = self.function.in_metric(ratios)
        vars(other).pop("linear_layers", None)  # they have one step size for each weight of a layer
        return other

    def on(self, inputs: Tensor, targets: Tensor) -> ZeroLossProblem:
        """The same loss on other samples, such as a batch, evaluated by this process.

        Args:
            inputs: ``[n, ...]``.
            targets: ``[n, ...]``, in the form in which they were given to this problem.
        """
        other = self.alone()
        other.inputs = inputs.detach().to(self.device)
        if other.inputs.is_floating_point():
            other.inputs = other.inputs.to(self.dtype)
        other.num_samples = len(inputs)
        other.batch_size = min(self.batch_size, len(inputs))
        other.num_residuals = len(inputs) * (self.num_residuals // self.num_samples)
        with torch.no_grad():
            outputs = self.function(self.weights(), other.inputs[:2])
        other.targets = self.sample_loss.prepare(targets.detach().to(self.device), outputs)
        return other

    @cached_property
    def flops(self) -> float:
        """Floating point operations of a forward pass of one sample; a multiply-add counts as two."""
        example = self.inputs[:2]
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            self.function(self.weights(), example)
        return counter.get_total_flops() / len(example)

    @cached_property
    def linear_layers(self) -> list[tuple[int, int]]:
        """(fan_in, fan_out) of the linear layers, if the network has no other weights; see `FunctionalModule`."""
        return self.function.linear_layers(self.inputs[:2])

    @property
    def input_shape(self) -> torch.Size:
        """Shape of one sample's input."""
        return self.inputs.shape[1:]

    @property
    def samples_fitting(self) -> int:
        """Number of samples, at least 1, that fit into the memory when the highest derivative is taken."""
        return max(1, int(self.memory / max(_PASSES * self.sample_bytes, 1)))

    @property
    def activations(self) -> float:
        """Numbers in the activations of all samples that a backward pass keeps."""
        return self.num_samples * self.sample_bytes / self.dtype.itemsize

    # --- weights and samples ---------------------------------------------------------------------------------------

    def weights(self) -> Tensor:
        """The module's present weights ``[P]``, a copy in the problem's dtype."""
        return self.function.weights()

    def chunks(self) -> Iterator[slice]:
        """Slices of this process's samples, of `batch_size` samples each; the last one may be shorter."""
        own = self.process_group.shard(self.num_samples)
        for start in range(own.start, own.stop, self.batch_size):
            yield slice(start, min(start + self.batch_size, own.stop))

    def mean(self, function: Callable[[slice], Tensor]) -> Tensor:
        """Mean over samples from the means over chunks, weighted by the sizes of the chunks."""
        total: Tensor | None = None
        for part in self.chunks():
            term, share = function(part), (part.stop - part.start) / self.num_samples
            total = (term if share == 1 else share * term) if total is None else total + share * term
        assert total is not None  # every process has samples
        return self.process_group.all_reduce(total)

    def batch_loss(
        self, w: Tensor, x: Tensor, y: Tensor, *, activations: Tensor | None = None, shift: Tensor | None = None
    ) -> Tensor:
        """Mean of l over a batch at weights w ``[P]``, a scalar; differentiable in each argument.

        `activations` is the noise on the activations ``[n, D]``; `shift` is added to the targets ``[n, C]``.
        """
        f = self.function(w, x, activations)
        if shift is None:
            return self.sample_loss.value(f, y).mean()
        return self.sample_loss.shifted(f, y, shift).mean()

    # --- the loss and its derivatives ------------------------------------------------------------------------------

    def outputs(self, w: Tensor) -> Tensor:
        """f(w; x_i) for all samples ``[N, C]``."""
        with torch.no_grad():
            own = torch.cat([self.function(w, self.inputs[part]) for part in self.chunks()])
        return self.process_group.all_gather(own, self.num_samples)

    def loss(self, w: Tensor) -> Tensor:
        """The excess loss L(w), a scalar: zero exactly on Gamma."""
        with torch.no_grad():
            return self.mean(lambda part: self.batch_loss(w, self.inputs[part], self.targets[part]))

    def infimum(self) -> float:
        """The infimum that `loss` subtracts: training loss = excess loss + infimum (the entropy of soft targets)."""
        return self.sample_loss.infimum(self.targets).mean().item()

    def gradient(self, w: Tensor) -> Tensor:
        """grad L(w)  ``[P]``."""
        return self.mean(lambda part: grad(self.batch_loss)(w, self.inputs[part], self.targets[part]))

    def loss_and_gradient(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """L(w), a scalar, and grad L(w)  ``[P]``, from one pass.

        Not for use inside of transforms of `torch.func`: the search for a level calls it hundreds of times, and without
        them it takes 0.3 instead of 0.7 ms for a small network.
        """

        def both(part: slice) -> Tensor:
            with torch.enable_grad():
                v = w.detach().requires_grad_()
                loss = self.batch_loss(v, self.inputs[part], self.targets[part])
            return torch.cat([torch.autograd.grad(loss, v)[0], loss.detach()[None]])

        joined = self.mean(both)
        return joined[-1], joined[:-1]

    def hessian_product(self, w: Tensor, v: Tensor) -> Tensor:
        """(D^2 L)(w) v  ``[P]``, forward over reverse: the derivative of the gradient along v."""

        def along(part: slice) -> Tensor:
            def gradient(u: Tensor) -> Tensor:
                return grad(self.batch_loss)(u, self.inputs[part], self.targets[part])

            return jvp(gradient, (w,), (v,))[1]

        return self.mean(along)

    # --- residual and Gauss-Newton factor --------------------------------------------------------------------------

    def residual(self, w: Tensor) -> Tensor:
        """b(w) = N^{-1/2} [R_i (f_i - f_i*)]  ``[M]``; |b|^2 = 2 L to second order, exactly so for mse."""
        self.check_attained()
        f = self.outputs(w)
        return self.sample_loss.residual(f, self.targets).reshape(-1) / math.sqrt(self.num_samples)

    def whiten(self, f: Tensor, v: Tensor) -> Tensor:
        """N^{-1/2} [R_i v_i]  ``[M]`` for output directions v ``[N, C]`` at outputs f ``[N, C]``."""
        return self.sample_loss.whiten(f, self.targets, v).reshape(-1) / math.sqrt(self.num_samples)

    def output_factor(self, f: Tensor, part: slice) -> Tensor:
        """R_i with A_i = R_i^T R_i, for a slice of the samples  ``[n, rows, C]``; f ``[N, C]``: the outputs of all."""
        f, y = f[part], self.targets[part]
        basis = torch.eye(self.num_residuals // self.num_samples, dtype=f.dtype, device=f.device)
        return torch.stack([self.sample_loss.unwhiten(f, y, e.expand(len(f), -1)) for e in basis], 1)
