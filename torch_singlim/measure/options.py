"""What is measured, and how accurately."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Options"]


@dataclass(frozen=True)
class Options:
    """What is measured, and how accurately.

    Args:
        draws: number of noise draws per step in both averaged paths together.
        replicas: number of replicas of each window for the noise ceiling; 0: none.
        expanded: whether there is a path with the second-order expansion of the noise.
        num_draws: number of random directions for the limit's potential.
        relaxed_after: a mode counts as relaxed once alpha lambda step reaches this.
    """

    draws: int = 4
    replicas: int = 1
    expanded: bool = False
    num_draws: int = 32
    relaxed_after: float = 3.0
