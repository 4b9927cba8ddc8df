"""Layers that replace dropout in a copy of a module."""

from __future__ import annotations

from torch import Tensor, nn

from torch_singlim.network.sites import Tape

__all__ = ["DROPOUT_KINDS", "ActivationNoise", "stochastic_depth_rate"]

# number of trailing dimensions that share one mask value
DROPOUT_KINDS: dict[type[nn.Module], int] = {nn.Dropout: 0, nn.Dropout1d: 1, nn.Dropout2d: 2, nn.Dropout3d: 3}


def stochastic_depth_rate(layer: nn.Module) -> float | None:
    """The rate at which a layer drops whole samples (stochastic depth); None for any other layer.

    Known are torchvision's StochasticDepth in its mode "row", and the layers named DropPath with a `drop_prob`, if they
    divide by the probability to be kept.
    """
    name = type(layer).__name__
    if name == "StochasticDepth" and getattr(layer, "mode", None) == "row":
        return float(layer.p)  # type: ignore[arg-type]  # a number
    if name == "DropPath" and getattr(layer, "scale_by_keep", True) and hasattr(layer, "drop_prob"):
        return float(layer.drop_prob or 0.0)  # type: ignore[arg-type]  # a number, or None
    return None


class ActivationNoise(nn.Module):
    """Replaces a dropout layer: multiplies the activation by 1 + eta, with eta from the tape.

    Args:
        name: of the noise site.
        rate: p.
        tape: of the noise sites.
        shared: number of trailing dimensions that share one mask value, or all but the samples if negative.
    """

    def __init__(self, name: str, rate: float, tape: Tape, *, shared: int = 0) -> None:
        super().__init__()
        self.site, self.rate, self.tape, self.shared = name, rate, tape, shared

    def forward(self, x: Tensor) -> Tensor:
        if self.rate == 0.0:
            return x
        if self.shared > 0 and x.ndim != self.shared + 2:
            raise ValueError(
                f"channel dropout {self.site!r} expects batched input with {self.shared + 2} dimensions, "
                f"got shape {tuple(x.shape)}"
            )
        return self.tape.visit(self.site, self.rate, x, shared=self.shared)
