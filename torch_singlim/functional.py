"""A module as a pure function of its flat weight vector, its inputs and noise on its activations."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

__all__ = ["ActivationSite", "FunctionalModule", "LinearCall", "in_precision", "structural_copy"]

# dimensions after the channel that one mask value covers
_DROPOUT_KINDS: dict[type[nn.Module], int] = {nn.Dropout: 0, nn.Dropout1d: 1, nn.Dropout2d: 2, nn.Dropout3d: 3}
_NOT_MULTIPLICATIVE = (nn.AlphaDropout, nn.FeatureAlphaDropout)


@dataclass(frozen=True)
class ActivationSite:
    """One call of a dropout layer in the forward pass: its rate p and the shape of one sample's mask."""

    name: str
    rate: float
    shape: tuple[int, ...]

    @property
    def dimension(self) -> int:
        """Number of mask values per sample."""
        return int(torch.Size(self.shape).numel())

    @property
    def variance(self) -> float:
        """sigma^2 = p / (1 - p): the variance of eta where the activation is multiplied by 1 + eta."""
        return self.rate / (1 - self.rate)


@dataclass(frozen=True)
class LinearCall:
    """A linear layer in one pass: the gradient of anything in its weight is the sum of outer products g_n a_n^T.

    Args:
        input: a ``[n, fan_in]``.
        probe: a zero that was added to its output ``[n, fan_out]``: g is the gradient in it.
        weight: name of its weight, None if that is not probed.
        bias: of its bias, None if there is none that is probed.
        weight_rate: relative step size r of the weight: the gradient in its coordinate is sqrt(r) g a^T; 0: not probed.
        bias_rate: of the bias.
    """

    input: Tensor
    probe: Tensor
    weight: str | None
    bias: str | None
    weight_rate: float
    bias_rate: float


class _Tape:
    """What the noise layers of one copy share: the noise to apply, in call order, and the sites they saw."""

    def __init__(self) -> None:
        self.noise: list[Tensor] | None = None
        self.sites: list[ActivationSite] | None = None

    def visit(self, name: str, rate: float, shape: tuple[int, ...], x: Tensor) -> Tensor:
        if self.sites is not None:
            self.sites.append(ActivationSite(name, rate, shape))
        if self.noise is None:
            return x
        eta = self.noise.pop(0)
        return x * (1 + eta.reshape(x.shape[:1] + shape))


class _ActivationNoise(nn.Module):
    """Stands where a dropout layer stood: multiplies the activation by 1 + eta with the eta that it is handed."""

    def __init__(self, name: str, dropout: nn.modules.dropout._DropoutNd, tape: _Tape) -> None:
        super().__init__()
        self.site = name
        self.p = float(dropout.p)
        self.trailing = _DROPOUT_KINDS[type(dropout)]
        self.tape = tape

    def forward(self, x: Tensor) -> Tensor:
        if self.p == 0.0:
            return x
        if self.trailing and x.ndim != self.trailing + 2:
            raise ValueError(
                f"channel dropout {self.site!r} expects batched input with {self.trailing + 2} dimensions, "
                f"got shape {tuple(x.shape)}"
            )
        shape = tuple(x.shape[1:]) if not self.trailing else (x.shape[1],) + (1,) * self.trailing
        return self.tape.visit(self.site, self.p, shape, x)


class _DecomposedLayerNorm(nn.Module):
    """Layer normalisation in elementary operations: torch's fused one has wrong derivatives of second and third order.

    Shares the layer's parameters, under the same names.
    """

    def __init__(self, layer: nn.LayerNorm) -> None:
        super().__init__()
        self.dims = tuple(range(-len(layer.normalized_shape), 0))
        self.eps = layer.eps
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(self.dims, keepdim=True)
        x = centred / (centred.square().mean(self.dims, keepdim=True) + self.eps).sqrt()
        x = x if self.weight is None else x * self.weight
        return x if self.bias is None else x + self.bias


@contextmanager
def _no_global_randomness() -> Iterator[None]:
    """A forward pass that draws random numbers leaves the global generators as they were."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        yield


def structural_copy(module: nn.Module) -> nn.Module:
    """A copy of a module that shares its parameters (never write them) and has modes and buffers of its own.

    >>> net = nn.Linear(2, 1)
    >>> twin = structural_copy(net)
    >>> twin.weight is net.weight, twin is net
    (True, False)
    """
    shared: dict[int, object] = {id(p): p for p in module.parameters()}
    for part in module.modules():
        # results kept as attributes may hang on a graph, which deepcopy refuses
        shared |= {id(v): v for v in vars(part).values() if isinstance(v, Tensor) and v.grad_fn is not None}
    twin = copy.deepcopy(module, shared)  # a LightningModule drops its trainer
    for part in twin.modules():
        _uncompile(part)
    return twin


def _uncompile(part: nn.Module) -> None:
    """Undo torch.compile: derivatives of every order are taken of the module itself, hooks and all."""
    if hasattr(part, "_orig_mod"):  # what torch.compile makes of a module
        part.forward = part._orig_mod.__call__  # type: ignore[union-attr]  # a module
    elif getattr(part, "_compiler_ctx", None) is not None:  # what Lightning makes of a compiled LightningModule
        for name in ("forward", "training_step", "validation_step", "test_step", "predict_step"):
            vars(part).pop(name, None)


def in_precision(twin: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A structural copy, changed in place to parameters and buffers of its own in another floating point type.

    >>> net = nn.Linear(2, 1)
    >>> in_precision(structural_copy(net), torch.float64).weight.dtype, net.weight.dtype
    (torch.float64, torch.float32)
    """
    for part in twin.modules():
        for held in (part._parameters, part._buffers):
            for name, tensor in held.items():
                if tensor is not None and tensor.is_floating_point() and tensor.dtype != dtype:
                    value = tensor.detach().to(dtype)
                    held[name] = (  # type: ignore[assignment]  # of the kind that this dict holds
                        nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value
                    )
    return twin


class FunctionalModule:
    """f(w; x, eta) for a module: evaluation mode, weights from a flat vector, activations times 1 + eta.

    Works on a copy of the module's structure that shares its parameters (they are never written) and snapshots its
    buffers in `dtype`. Weights are the parameters that require a gradient, in the order of ``module.parameters()``.
    Every ``nn.Dropout`` of the copy is a noise site; in the order of calls, sites split the columns of eta ``[n, D]``.

    With `step_ratios` r (parameter name -> its step size relative to alpha) the coordinates are those in which steps of
    different sizes are one descent: w = sqrt(r) u, where

        w <- w - alpha r grad_w L      is      u <- u - alpha grad_u L(sqrt(r) u)

    and |u| is the norm of the metric 1/r. Parameters that it does not name are held where the module has them.

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
        step_ratios: Mapping[str, float] | None = None,
    ) -> None:
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        if step_ratios is not None:
            unknown = sorted(step_ratios.keys() - dict(named).keys())
            if unknown or not all(ratio > 0 for ratio in step_ratios.values()):
                raise ValueError(
                    "step_ratios must give a positive number for names of trainable parameters, got "
                    f"{', '.join(unknown) or dict(step_ratios)}"
                )
            named = [(name, p) for name, p in named if name in step_ratios]
        if not named:
            raise ValueError("the module has no trainable parameters: there is no weight space to measure in")
        self.module = module
        self.step_ratios = {name: 1.0 if step_ratios is None else float(step_ratios[name]) for name, _ in named}
        self.dtype = dtype
        self.device = torch.device(device) if device is not None else named[0][1].device
        self.names = [name for name, _ in named]
        self.shapes = [p.shape for _, p in named]
        self.num_weights = sum(p.numel() for _, p in named)
        self._tape = _Tape()
        self._copy = self._evaluation_copy()
        sizes = [p.new_full(p.shape, self.step_ratios[name] ** 0.5, dtype=dtype).reshape(-1) for name, p in named]
        plain = all(ratio == 1 for ratio in self.step_ratios.values())
        self._scale = None if plain else torch.cat(sizes).to(self.device)  # sqrt(r) [P]
        self.refresh_constants()

    def _evaluation_copy(self) -> nn.Module:
        holder = nn.ModuleDict(
            {"root": structural_copy(self.module)}
        )  # a parent, should the module be a dropout itself
        for parent_name, parent in list(holder.named_modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, _NOT_MULTIPLICATIVE):
                    raise ValueError(
                        f"{type(child).__name__} is not multiplicative mean-one noise, the theory does not cover it: "
                        "use nn.Dropout"
                    )
                if isinstance(child, nn.modules.dropout._DropoutNd) and type(child) in _DROPOUT_KINDS:
                    site = f"{parent_name}.{name}".removeprefix("root.")
                    parent._modules[name] = _ActivationNoise(site, child, self._tape)
                if type(child) is nn.LayerNorm:
                    parent._modules[name] = _DecomposedLayerNorm(child)
        return holder["root"].eval()

    def refresh_constants(self) -> None:
        """Take the module's present buffers and other parameters (running statistics move while it trains)."""
        constants = [(n, p) for n, p in self.module.named_parameters() if n not in self.step_ratios]
        constants += list(self.module.named_buffers())
        self.constants = {name: self._cast(tensor) for name, tensor in constants}

    def _cast(self, tensor: Tensor) -> Tensor:
        dtype = self.dtype if tensor.is_floating_point() else tensor.dtype
        return tensor.detach().to(self.device, dtype, copy=True)

    def at_precision(self, dtype: torch.dtype) -> FunctionalModule:
        """The same function in another floating point type."""
        return FunctionalModule(self.module, dtype=dtype, device=self.device, step_ratios=self.step_ratios)

    def weights(self) -> Tensor:
        """The module's present weights ``[P]``, a copy."""
        parameters = dict(self.module.named_parameters())
        return self.flatten([parameters[name] for name in self.names])

    def flatten(self, tensors: list[Tensor], *, gradients: bool = False) -> Tensor:
        """Weights, or gradients, of the weights' shapes, in their order, as one vector ``[P]``."""
        flat = torch.cat([self._cast(t).reshape(-1) for t in tensors])
        if self._scale is None:
            return flat
        return flat * self._scale if gradients else flat / self._scale

    def unflatten(self, w: Tensor) -> dict[str, Tensor]:
        """The weights by name, from w ``[P]``."""
        sizes = [shape.numel() for shape in self.shapes]
        parts = (w if self._scale is None else w * self._scale).split(sizes)
        return {name: part.view(shape) for name, part, shape in zip(self.names, parts, self.shapes, strict=True)}

    def __call__(self, w: Tensor, x: Tensor, eta: Tensor | None = None) -> Tensor:
        """Outputs ``[n, C]`` at weights w ``[P]``, inputs x, noise eta ``[n, D]``; trailing dimensions flattened."""
        if eta is not None:
            self._tape.noise = list(eta.split([s.dimension for s in self._noise_sites], dim=1))
        try:
            out = torch.func.functional_call(self._copy, {**self.unflatten(w), **self.constants}, (x,))
        finally:
            self._tape.noise = None
        if not isinstance(out, Tensor) or out.ndim == 0 or out.shape[0] != x.shape[0]:
            got = f"a tensor of shape {tuple(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
            raise ValueError(f"forward must return one tensor [n, ...] for n = {x.shape[0]} inputs, got {got}")
        return out.reshape(x.shape[0], -1)

    def sites(self, x: Tensor) -> list[ActivationSite]:
        """The dropout calls of one forward pass on x, in order; remembered for the noise that is passed later."""
        self._tape.sites = []
        try:
            with torch.no_grad(), _no_global_randomness():
                self(self.weights(), x)
            self._noise_sites = list(self._tape.sites)
        finally:
            self._tape.sites = None
        return self._noise_sites

    def is_random(self, x: Tensor, *, training: bool = False) -> bool:
        """Whether two forward passes on x differ, dropout layers switched off; `training`: in training mode.

        In training mode this finds randomness that does not come from a dropout layer.
        """
        w = self.weights()
        self._copy.train(training)
        try:
            with torch.no_grad(), _no_global_randomness():
                first = self(w, x)
                self.refresh_constants()  # training mode writes buffers: both passes start from the same ones
                second = self(w, x)
        finally:
            self._copy.eval()
            self.refresh_constants()
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
            if hasattr(layer, "inplace"):  # their input is not theirs here
                layer.inplace = False  # type: ignore[assignment]  # a flag
        return copies

    def linear_calls(self, w: Tensor, x: Tensor) -> tuple[Tensor, list[LinearCall]]:
        """Outputs ``[n, C]`` at weights w, inputs x, and every call of a linear layer on a matrix ``[n, fan_in]``."""
        calls: list[LinearCall] = []

        def visit(prefix: str, layer: nn.Module, args: tuple, out: Tensor) -> Tensor:
            weight, bias = (n if n in self.names else None for n in (f"{prefix}weight", f"{prefix}bias"))
            if args[0].ndim != 2 or (weight is None and bias is None):
                return out
            probe = torch.zeros_like(out, requires_grad=True)
            rates = [0.0 if n is None else self.step_ratios[n] for n in (weight, bias)]
            calls.append(LinearCall(args[0].detach(), probe, weight, bias, *rates))
            return out + probe

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
        """(fan_in, fan_out) of the linear layers, if every weight belongs to one that is called once on a matrix.

        Else empty. That no weight is used in another way besides, as a tied one is, is seen from the gradient on x.
        """
        w = self.weights().requires_grad_()
        out, calls = self.linear_calls(w, x)
        if sorted(n for call in calls for n in (call.weight, call.bias) if n is not None) != sorted(self.names):
            return []
        cotangent = torch.arange(1.0, 1 + out.numel(), dtype=out.dtype, device=out.device).cos().view_as(out)
        gradient, *pulled = torch.autograd.grad(out, [w, *(call.probe for call in calls)], cotangent)
        parts: dict[str | None, Tensor] = {}
        for call, g in zip(calls, pulled, strict=True):
            parts |= {
                call.weight: call.weight_rate**0.5 * g.T @ call.input,
                call.bias: call.bias_rate**0.5 * g.sum(0),
            }
        assembled = torch.cat([parts[name].reshape(-1) for name in self.names])
        scale = torch.linalg.vector_norm(gradient)
        if torch.linalg.vector_norm(assembled - gradient) > 1e3 * torch.finfo(out.dtype).eps * scale:
            return []
        return [(call.input.shape[1], call.probe.shape[1]) for call in calls]

    @property
    def normalises_over_batch(self) -> bool:
        """Whether training mode couples the samples of a batch (batch normalisation)."""
        return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in self._copy.modules())
