"""A forward pass in elementary operations, whose derivatives of every order torch knows.

Fused functions have no forward-mode derivatives (attention, weight normalisation), none that can be batched (recurrent
layers), or wrong ones of second and third order (layer normalisation). Within `ElementaryMode` the same functions are
evaluated by elementary operations, and each functional call of dropout is a noise site, those inside attention and
between recurrent layers included.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from torch_singlim.network.sites import Tape

__all__ = ["ElementaryMode", "layer_norm"]

# applies dropout to an activation
Drop = Callable[[Tensor], Tensor]

# dropout functions, and the number of trailing dimensions that share a mask value
_DROPOUTS: dict[Any, int] = {F.dropout: 0, F.dropout1d: 1, F.dropout2d: 2, F.dropout3d: 3}
_RECURRENT = (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)
_MULTI_HEAD = inspect.signature(F.multi_head_attention_forward)


def layer_norm(
    x: Tensor, shape: Sequence[int], weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """F.layer_norm."""
    dims = tuple(range(-len(shape), 0))
    centred = x - x.mean(dims, keepdim=True)
    x = centred / (centred.square().mean(dims, keepdim=True) + eps).sqrt()
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def _weights(scores: Tensor, bias: Tensor | None) -> Tensor:
    """Softmax of scores + bias, zero where all of these are -inf: a query that attends to nothing."""
    if bias is None:
        return scores.softmax(-1)
    scores = scores + bias
    empty = (scores == -math.inf).all(-1, keepdim=True)
    return scores.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)


def _as_bias(mask: Tensor, dtype: torch.dtype, *, masks: bool) -> Tensor:
    """What a mask adds to scores: itself, or -inf where a boolean one has the value `masks`."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask == masks, -math.inf)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    drop: Drop,
) -> Tensor:
    """F.scaled_dot_product_attention; `drop` is applied to the attention weights."""
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = (each.repeat_interleave(groups, -3) for each in (key, value))
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    bias = None if attn_mask is None else _as_bias(attn_mask, scores.dtype, masks=False)
    return drop(_weights(scores, bias)) @ value


def _heads(x: Tensor, count: int) -> Tensor:
    """``[T, n, E]`` -> ``[n, heads, T, E/heads]``."""
    return x.unflatten(-1, (count, -1)).movedim(0, 2)


def _multi_head_attention(a: Mapping[str, Any], drop: Drop) -> tuple[Tensor, Tensor | None]:
    """F.multi_head_attention_forward, from all of its arguments by name; `drop` is applied to the attention weights."""
    if a["static_k"] is not None or a["static_v"] is not None:
        raise ValueError("attention with static_k or static_v is not covered: pass keys and values")
    alone = a["query"].ndim == 2  # one sequence, not a batch
    inputs = [a[name].unsqueeze(1) if alone else a[name] for name in ("query", "key", "value")]
    heads, n = a["num_heads"], inputs[0].shape[1]
    if a["use_separate_proj_weight"]:
        weights = [a[f"{letter}_proj_weight"] for letter in "qkv"]
    else:
        weights = a["in_proj_weight"].chunk(3)
    biases = (None, None, None) if a["in_proj_bias"] is None else a["in_proj_bias"].chunk(3)
    q, k, v = (F.linear(*each) for each in zip(inputs, weights, biases, strict=True))
    masks = []
    if a["attn_mask"] is not None:  # [T, S] or [n heads, T, S]
        mask = _as_bias(a["attn_mask"], q.dtype, masks=True)
        masks.append(mask if mask.ndim == 2 else mask.unflatten(0, (n, heads)))
    if a["key_padding_mask"] is not None:
        mask = _as_bias(a["key_padding_mask"], q.dtype, masks=True)
        masks.append(mask.view(n, 1, 1, -1))
    if a["bias_k"] is not None:
        k, v = (torch.cat([x, extra.expand(1, n, -1)]) for x, extra in ((k, a["bias_k"]), (v, a["bias_v"])))
        masks = [F.pad(mask, (0, 1)) for mask in masks]
    q, k, v = (_heads(x, heads) for x in (q, k, v))
    if a["add_zero_attn"]:
        k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))
        masks = [F.pad(mask, (0, 1)) for mask in masks]
    bias = torch.stack(torch.broadcast_tensors(*masks)).sum(0) if masks else None
    found = drop(_weights(q @ k.mT * q.shape[-1] ** -0.5, bias))
    out = F.linear((found @ v).movedim(2, 0).flatten(2), a["out_proj_weight"], a["out_proj_bias"])
    shown = found.mean(1) if a["average_attn_weights"] else found
    if alone:
        out, shown = out.squeeze(1), shown.squeeze(0)
    return out, shown if a["need_weights"] else None


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """torch._weight_norm: g v/|v|, with one norm for each index along `dim`."""
    others = [axis for axis in range(v.ndim) if axis != dim % v.ndim]
    return v * (g / torch.linalg.vector_norm(v, dim=others, keepdim=True))


def _cell(kind: Any, gates: Tensor, weights: Sequence[Tensor | None], state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The state (h,), or (h, c), after one element of a sequence.

    Args:
        kind: the function that is replaced.
        gates: W x + b of the input  ``[n, gates]``.
        weights: of the state, its bias, and of its projection (None: there is none).
        state: before.
    """
    recurrent, bias, projection = weights
    h = state[0]
    own = F.linear(h, recurrent, bias)  # type: ignore[arg-type]  # there always is a recurrent weight
    if kind is torch.gru:
        (r, z, new), (r_, z_, new_) = gates.chunk(3, 1), own.chunk(3, 1)
        r, z = (r + r_).sigmoid(), (z + z_).sigmoid()
        new = (new + r * new_).tanh()
        return (new + z * (h - new),)
    if kind is not torch.lstm:
        return ((gates + own).tanh() if kind is torch.rnn_tanh else (gates + own).relu(),)
    i, f, g, o = (gates + own).chunk(4, 1)
    c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
    h = o.sigmoid() * c.tanh()
    return (h if projection is None else F.linear(h, projection), c)


def _recurrent(
    kind: Any,
    x: Tensor,
    hx: Any,
    flat: Sequence[Tensor],
    bias: bool,
    layers: int,
    bidirectional: bool,
    batch_first: bool,
    *,
    drop: Drop,
) -> tuple[Tensor, ...]:
    """torch.lstm and its like on padded sequences; `drop` is applied between layers."""
    x = x.transpose(0, 1) if batch_first else x  # [T, n, fan_in]
    states = tuple(hx) if isinstance(hx, tuple | list) else (hx,)
    directions = 2 if bidirectional else 1
    each = len(flat) // (layers * directions)
    ends: list[tuple[Tensor, ...]] = []
    for layer in range(layers):
        x = drop(x) if layer else x
        found = []
        for direction in range(directions):
            k = layer * directions + direction
            own = list(flat[k * each : (k + 1) * each])
            biases = (own[2], own[3]) if bias else (None, None)
            weights = (own[1], biases[1], own[-1] if each % 2 else None)
            gates, state, path = F.linear(x, own[0], biases[0]), tuple(s[k] for s in states), []
            order = range(len(x) - 1, -1, -1) if direction else range(len(x))
            for t in order:
                state = _cell(kind, gates[t], weights, state)
                path.append(state[0])
            found.append(torch.stack(path[::-1] if direction else path))
            ends.append(state)
        x = torch.cat(found, -1)
    return (x.transpose(0, 1) if batch_first else x, *(torch.stack(s) for s in zip(*ends, strict=True)))


class ElementaryMode(TorchFunctionMode):
    """Replaces fused functions, and makes functional calls of dropout noise sites.

    In evaluation mode these calls do nothing, and do not tell their rate: it is recorded in training mode. A call whose
    rate is not recorded drops if it is told to.

    Args:
        tape: of the noise sites.
    """

    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self.tape = tape
        self.used = False
        """Whether a function was replaced so far."""
        self.rates: list[float] = []
        """Those of the functional calls of dropout in a forward pass, in order; empty if they are not known."""
        self.asked: list[float] = []
        """The rates that the calls of the last forward pass asked for."""
        self._recording = False

    def __enter__(self) -> ElementaryMode:
        self.asked = []
        return super().__enter__()

    def record(self, forward: Callable[[], object]) -> None:
        """Record the rates in a forward pass in training mode, if it has as many calls as the one before."""
        count, self._recording = len(self.asked), True
        try:
            forward()
        finally:
            self._recording = False
        self.rates = self.asked if len(self.asked) == count else []

    def _drop(self, x: Tensor, *, rate: float, shared: int = 0) -> Tensor:
        """A functional call of dropout, at the rate that this call asks for."""
        index = len(self.asked)
        self.asked.append(rate)
        if self._recording:
            return x
        known = self.rates[index] if index < len(self.rates) else 0.0
        if rate not in (0.0, known):
            return F.dropout(x, rate)  # noise that is not known: that the module is random is found out
        return self.tape.visit(f"dropout call {index + 1}", known, x, shared=shared) if known else x

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The elementary form of a function, if there is one; else the function."""
        kwargs = kwargs or {}
        form = _FORMS.get(func)
        if form is None:
            return func(*args, **kwargs)
        self.used = True
        return form(self, func, *args, **kwargs)

    def _dropout(
        self, func: Any, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> Tensor:  # the names of torch's arguments
        return self._drop(input, rate=p if training else 0.0, shared=_DROPOUTS[func])

    def _attention(
        self,
        func: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **options: Any,
    ) -> Tensor:
        drop = functools.partial(self._drop, rate=dropout_p)
        return _attention(query, key, value, attn_mask, is_causal, drop=drop, **options)

    def _multi_head_attention(self, func: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        bound = _MULTI_HEAD.bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        rate = given["dropout_p"] if given["training"] else 0.0
        return _multi_head_attention(given, functools.partial(self._drop, rate=rate))

    def _recurrent(self, func: Any, x: Tensor, hx: Any, *rest: Any) -> Any:
        if not isinstance(rest[1], bool):  # a packed sequence, with the sizes of its batches
            return func(x, hx, *rest)
        flat, bias, layers, rate, training, bidirectional, batch_first = rest
        drop = functools.partial(self._drop, rate=rate if training else 0.0)
        return _recurrent(func, x, hx, flat, bias, layers, bidirectional, batch_first, drop=drop)


def _plain(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda mode, func, *args, **kwargs: function(*args, **kwargs)


# the elementary form of each function: mode, function, its arguments -> its value
_FORMS: dict[Any, Callable[..., Any]] = {
    F.layer_norm: _plain(layer_norm),
    torch._weight_norm: _plain(_weight_norm),  # type: ignore[attr-defined]  # what parametrizations.weight_norm calls
    F.scaled_dot_product_attention: ElementaryMode._attention,
    F.multi_head_attention_forward: ElementaryMode._multi_head_attention,
    **dict.fromkeys(_DROPOUTS, ElementaryMode._dropout),
    **dict.fromkeys(_RECURRENT, ElementaryMode._recurrent),
}
