"""The noises of the recipes by name, each with a default level."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch_singlim import (
    AntiCorrelated,
    DropConnect,
    InputNoise,
    LabelFlips,
    LabelNoise,
    Langevin,
    NoiseSystem,
)

Noise = Literal[
    "dropout",
    "drop_connect",
    "anti_correlated",
    "input_noise",
    "label_noise",
    "label_flips",
    "langevin",
    "minibatch",
]
DROPOUT_RATE = 0.1
# the noises that a callback injects, and their default level: a rate for label flips, else a standard deviation
INJECTED: dict[str, tuple[Callable[[float], NoiseSystem], float]] = {
    "drop_connect": (DropConnect, 0.2),
    "anti_correlated": (AntiCorrelated, 0.02),
    "input_noise": (InputNoise, 0.3),
    "label_noise": (LabelNoise, 0.5),
    "label_flips": (LabelFlips, 0.2),
    "langevin": (Langevin, 0.002),
}


@dataclass(frozen=True)
class ChosenNoise:
    """What a recipe trains under besides minibatches; as a string, for titles.

    Args:
        dropout: rate of the network's dropout layers.
        injected: what `InjectNoise` has to inject; None: nothing.
    """

    dropout: float = 0.0
    injected: NoiseSystem | None = None

    def __str__(self) -> str:
        if self.injected is not None:
            return str(self.injected)
        return f"dropout {self.dropout:g}" if self.dropout else "minibatches alone"


def choose(noise: Noise, level: float | None) -> ChosenNoise:
    """The noise of this name at a level, or at its default.

    >>> str(choose("label_noise", None)), str(choose("dropout", 0.2)), str(choose("minibatch", None))
    ('LabelNoise(std=0.5)', 'dropout 0.2', 'minibatches alone')
    """
    if noise in INJECTED:
        system, default = INJECTED[noise]
        return ChosenNoise(injected=system(default if level is None else level))
    if noise == "minibatch":
        return ChosenNoise()
    return ChosenNoise(dropout=DROPOUT_RATE if level is None else level)
