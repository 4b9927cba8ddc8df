"""A module as a pure function of its flat weight vector, its inputs and the noise on its activations."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from torch_singlim.network.copying import no_checkpointing, structural_copy
from torch_singlim.network.elementary import ElementaryMode
from torch_singlim.network.layers import ActivationNoise, noise_of
from torch_singlim.network.randomness import RandomState
from torch_singlim.network.sites import ActivationSite, Call, Tape, find_layout
from torch_singlim.network.weight_space import WeightSpace

__all__ = ["FunctionalModule", "LinearCall"]

_NOT_MULTIPLICATIVE = (nn.AlphaDropout, nn.FeatureAlphaDropout)


@dataclass(frozen=True)
class LinearCall:
    """A call of a linear layer; gradients with respect to the layer's weight are sums of outer products g_n a_n^T.

    Args:
        input: a ``[n, fan_in]``.
        shift: a zero that was added to the layer's output ``[n, fan_out]``; g is the gradient with respect to it.
        weight: name of the layer's weight; None if it is not among the weights of the problem.
        bias: name of the layer's bias; None if there is none, or if it is not among the weights of the problem.
        weight_rate: relative step size r of the weight; the gradient in its coordinate is sqrt(r) g a^T. 0: no weight.
        bias_rate: relative step size of the bias.
    """

    input: Tensor
    shift: Tensor
    weight: str | None
    bias: str | None
    weight_rate: float
    bias_rate: float


def the_tensor(out: object) -> Tensor | None:
    """The outputs in what forward returns: a tensor, its `logits`, or the only tensor in it; None: there is none.

    >>> the_tensor({"logits": torch.ones(2), "hidden": torch.ones(3)})
    tensor([1., 1.])
    """
    if isinstance(out, Tensor):
        return out
    fields: dict[Any, Any]
    if isinstance(out, Mapping):
        fields = dict(out)
    elif isinstance(out, tuple | list):
        fields = dict(zip(getattr(out, "_fields", range(len(out))), out, strict=True))
    else:
        fields = vars(out) if hasattr(out, "__dict__") else {}
    if isinstance(fields.get("logits"), Tensor):
        return fields["logits"]
    tensors = [value for value in fields.values() if isinstance(value, Tensor)]
    return tensors[0] if len(tensors) == 1 else None


class FunctionalModule(WeightSpace):
    """f(w; x, eta) for a module: evaluation mode, weights from a flat vector, activations times 1 + eta.

    It works on a copy of the module's structure, which shares the parameters (they are never written to) and has a copy
    of the buffers in `dtype`. Every call of dropout is a noise site: of a layer (``nn.Dropout``, stochastic depth), or
    of a function, within attention and recurrent layers, too; so are layers of multiplicative Gaussian noise. The
    columns of eta ``[n, D]`` are split among the sites in the order of the calls. Parts that are in evaluation mode
    while the module trains have no noise. Fused functions are evaluated by elementary operations (`ElementaryMode`),
    and nothing is checkpointed. The arguments are those of `WeightSpace`.

    >>> net = nn.Sequential(nn.Linear(2, 3), nn.Dropout(0.5), nn.Linear(3, 1))
    >>> f = FunctionalModule(net, dtype=torch.float64)
    >>> f.num_weights, [(s.rate, s.shape) for s in f.sites(torch.ones(1, 2).double())]
    (13, [(0.5, (3,))])
    >>> f(f.weights(), torch.ones(4, 2, dtype=torch.float64)).shape
    torch.Size([4, 1])
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
        step_ratios: Mapping[str, float | Tensor] | None = None,
    ) -> None:
        super().__init__(module, dtype=dtype, device=device, step_ratios=step_ratios)
        self._tape = Tape()
        self._elementary = ElementaryMode(self._tape)
        self._is_elementary = self._checkpoints = True  # until a pass has shown what is needed
        self._copy = self._evaluation_copy()
        self.refresh_constants()

    def _evaluation_copy(self) -> nn.Module:
        # a parent, in case the module itself is a dropout layer
        holder = nn.ModuleDict({"root": structural_copy(self.module)})
        for parent_name, parent in list(holder.named_modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, _NOT_MULTIPLICATIVE):
                    raise ValueError(
                        f"{type(child).__name__} is not multiplicative mean-one noise, which the theory does not "
                        "cover: use nn.Dropout"
                    )
                noise = noise_of(child)
                if noise is not None and (child.training or not self.module.training):
                    site = f"{parent_name}.{name}".removeprefix("root.")
                    parent._modules[name] = ActivationNoise(site, self._tape, **noise)
        root = holder["root"]
        # parts that the module holds in evaluation mode while it trains
        self._held = [part for part in root.modules() if self.module.training and not part.training]
        return root.eval()

    @contextmanager
    def _training_mode(self) -> Iterator[None]:
        """The copy in the modes of training, without effect on random state and buffers."""
        self._copy.train()
        for part in self._held:
            part.training = False
        try:
            with torch.no_grad(), RandomState.isolated():
                yield
        finally:
            self._copy.eval()
            self.refresh_constants()

    def refresh_constants(self) -> None:
        """Read the module's present buffers and frozen parameters (running statistics change during training)."""
        constants = [(n, p) for n, p in self.module.named_parameters() if n not in self.step_ratios]
        constants += list(self.module.named_buffers())
        self.constants = {name: self._cast(tensor) for name, tensor in constants}

    def at_precision(self, dtype: torch.dtype) -> FunctionalModule:
        """The same function in another floating point type, with the same copy of the module.

        A new copy could not always be made: in the course of a training a module may hold what cannot be copied.
        """
        other = copy.copy(self)
        other.dtype, other._scale = dtype, None if self._scale is None else self._scale.to(dtype)
        other.refresh_constants()
        return other

    def in_metric(self, ratios: Tensor) -> FunctionalModule:
        """The same function in the coordinates in which each weight has a step size of its own, with the same copy.

        Args:
            ratios: of each coordinate's step size to its present one  ``[P]``.
        """
        other = copy.copy(self)
        other._scale = ratios.sqrt() if self._scale is None else self._scale * ratios.sqrt()
        parts = zip(self.names, self.shapes, ratios.split([shape.numel() for shape in self.shapes]), strict=True)
        other.step_ratios = {name: self.step_ratios[name] * r.view(shape) for name, shape, r in parts}
        other.uniform = False
        return other

    @contextmanager
    def elementary(self) -> Iterator[None]:
        """Within it, fused functions that the module calls are evaluated by elementary operations."""
        with (
            self._elementary if self._is_elementary else nullcontext(),
            no_checkpointing() if self._checkpoints else nullcontext([]) as skipped,
        ):
            yield
        self._skipped = bool(skipped)

    def __call__(self, w: Tensor, x: Tensor, eta: Tensor | None = None) -> Tensor:
        """Outputs ``[n, C]`` at weights w ``[P]``, inputs x, noise eta ``[n, D]``; trailing dimensions flattened."""
        if eta is not None:
            sites = self._noise_sites
            self._tape.noise = list(zip(sites, eta.split([s.dimension for s in sites], dim=1), strict=True))
        try:
            with self.elementary():
                found = torch.func.functional_call(self._copy, {**self.unflatten(w), **self.constants}, (x,))
        finally:
            self._tape.noise = None
        out = the_tensor(found)
        if out is None or out.ndim == 0 or out.shape[0] != x.shape[0]:
            got = type(found).__name__ if out is None else f"a tensor of shape {tuple(out.shape)}"
            raise ValueError(
                f"forward must return one tensor [n, ...] for n = {x.shape[0]} inputs, or an object that has one as "
                f"its logits, got {got}"
            )
        return out.reshape(x.shape[0], -1)

    def _dropout_calls(self, x: Tensor) -> list[Call]:
        self._tape.calls = []
        try:
            with torch.no_grad(), RandomState.isolated():
                self(self.weights(), x)
            return self._tape.calls
        finally:
            self._tape.calls = None

    def sites(self, x: Tensor) -> list[ActivationSite]:
        """The calls of dropout in one forward pass on x, in order. They are stored, to split the noise of later calls.

        Args:
            x: a few inputs, not all the same.

        Raises:
            ValueError: the samples cannot be told apart in an activation.
        """
        self._is_elementary = self._checkpoints = True
        self._dropout_calls(x)
        if self._elementary.asked:  # by function calls, which tell their rates in training mode
            with self._training_mode():
                self._elementary.record(lambda: self(self.weights(), x))
        calls, other = self._dropout_calls(x), x.clone()
        other[-1] = x[0]
        if torch.equal(other, x) and x.is_floating_point():
            other[-1] += 1
        changed = self._dropout_calls(other)
        self._is_elementary, self._checkpoints = self._elementary.used, self._skipped
        self._noise_sites = []
        for call, there in zip(calls, changed, strict=True):
            layout = find_layout(call, there.activation, len(x))
            shape = layout.of_samples(call.mask_like(call.activation)).shape[1:]
            self._noise_sites.append(ActivationSite(call.name, call.rate, tuple(shape), layout, call.std))
        return self._noise_sites

    def is_random(self, x: Tensor, *, training: bool = False) -> bool:
        """Whether two forward passes on x differ, with dropout switched off; `training`: in training mode.

        In training mode, such a difference is due to randomness outside dropout.
        """
        w = self.weights()
        with self._training_mode() if training else nullcontext(), torch.no_grad(), RandomState.isolated():
            first = self(w, x)
            self.refresh_constants()  # training mode changes buffers: both passes start from the same ones
            second = self(w, x)
        return not torch.equal(first.nan_to_num(), second.nan_to_num())

    def check_deterministic(self, x: Tensor) -> None:
        """Raise ValueError if two evaluation-mode passes on x differ."""
        if self.is_random(x):
            raise ValueError(
                "the module is random in evaluation mode: two forward passes on the same inputs differ; make forward "
                "deterministic under module.eval() (nn.Dropout rather than F.dropout without training=self.training)"
            )

    def layers(self, x: Tensor) -> list[tuple[nn.Module, Tensor]]:
        """Copies of the leaf modules that one pass on x calls, in `dtype`, each with its first input."""
        called: list[tuple[nn.Module, Tensor]] = []

        def visit(layer: nn.Module, args: tuple) -> None:
            if args and isinstance(args[0], Tensor):
                called.append((layer, args[0].detach()))

        leaves = [part for part in self._copy.modules() if next(part.children(), None) is None]
        hooks = [leaf.register_forward_pre_hook(visit) for leaf in leaves]
        try:
            with torch.no_grad():
                self(self.weights(), x)
        finally:
            for hook in hooks:
                hook.remove()
        copies = [(copy.deepcopy(layer).to(self.dtype), value) for layer, value in called]
        for layer, _ in copies:
            if hasattr(layer, "inplace"):  # the recorded inputs must not be overwritten
                layer.inplace = False  # type: ignore[assignment]  # a flag
        return copies

    def linear_calls(self, w: Tensor, x: Tensor) -> tuple[Tensor, list[LinearCall]]:
        """Outputs ``[n, C]`` at weights w, inputs x, and every call of a linear layer on a matrix ``[n, fan_in]``."""
        calls: list[LinearCall] = []

        def visit(prefix: str, layer: nn.Module, args: tuple, out: Tensor) -> Tensor:
            weight, bias = (n if n in self.names else None for n in (f"{prefix}weight", f"{prefix}bias"))
            if args[0].ndim != 2 or (weight is None and bias is None):
                return out
            shift = torch.zeros_like(out, requires_grad=True)
            rates = [0.0 if n is None else float(self.step_ratios[n]) for n in (weight, bias)]
            calls.append(LinearCall(args[0].detach(), shift, weight, bias, *rates))
            return out + shift

        hooks = [
            layer.register_forward_hook(partial(visit, f"{name}." if name else ""))
            for name, layer in self._copy.named_modules()
            if type(layer) is nn.Linear
        ]
        try:
            return self(w, x), calls
        finally:
            for hook in hooks:
                hook.remove()

    def linear_layers(self, x: Tensor) -> list[tuple[int, int]]:
        """(fan_in, fan_out) of the linear layers, if every weight belongs to a layer that is called once on a matrix.

        Otherwise, or if the weights of a layer have step sizes of their own, the list is empty. The gradient on x is
        compared with that from the layers, to detect weights that are also used elsewhere, such as tied ones.
        """
        if not self.uniform:
            return []
        w = self.weights().requires_grad_()
        out, calls = self.linear_calls(w, x)
        if sorted(n for call in calls for n in (call.weight, call.bias) if n is not None) != sorted(self.names):
            return []
        cotangent = torch.arange(1.0, 1 + out.numel(), dtype=out.dtype, device=out.device).cos().view_as(out)
        gradient, *slopes = torch.autograd.grad(out, [w, *(call.shift for call in calls)], cotangent)
        parts: dict[str | None, Tensor] = {}
        for call, g in zip(calls, slopes, strict=True):
            parts |= {
                call.weight: call.weight_rate**0.5 * g.T @ call.input,
                call.bias: call.bias_rate**0.5 * g.sum(0),
            }
        assembled = torch.cat([parts[name].reshape(-1) for name in self.names])
        scale = torch.linalg.vector_norm(gradient)
        if torch.linalg.vector_norm(assembled - gradient) > 1e3 * torch.finfo(out.dtype).eps * scale:
            return []
        return [(call.input.shape[1], call.shift.shape[1]) for call in calls]

    @property
    def normalises_over_batch(self) -> bool:
        """Whether training mode couples the samples of a batch: batch normalisation that is not held in evaluation."""
        parts = (part for part in self._copy.modules() if part not in self._held)
        return any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in parts)
