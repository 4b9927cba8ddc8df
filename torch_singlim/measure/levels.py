"""Distances to lower levels of the loss, each with the point that proves it."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any

from torch import Tensor

from torch_singlim.geometry import LevelPoint, NearestPoint, level_distance
from torch_singlim.network import ZeroLossProblem

__all__ = ["Level", "Levels"]

# key of the nearest point in the state
_NEAREST = "NEAREST"


class Level(Enum):
    """The levels, as shares of the present excess loss."""

    HALF = 0.5
    TENTH = 0.1
    HUNDREDTH = 0.01

    @property
    def gradients(self) -> int:
        """Cost at which the search for this level is given up, in gradients of all samples."""
        return {Level.HALF: 200, Level.TENTH: 500, Level.HUNDREDTH: 1500}[self]


class Levels:
    """Looks for the nearest points of the levels; each search begins at the last point of its level.

    Args:
        points: the last point of each level, in single precision  ``[P]``.
        nearest: the same of the zero-loss set.
    """

    def __init__(self, points: Mapping[Level, Tensor] | None = None, nearest: Tensor | None = None) -> None:
        self.points, self.nearest = dict(points or {}), nearest
        self.displacement: Tensor | None = None
        """v - w of the last point with half of the loss  ``[P]``."""

    def measure(
        self,
        problem: ZeroLossProblem,
        w: Tensor,
        level: Level,
        found: Mapping[Level, LevelPoint],
        *,
        max_gradients: float,
    ) -> LevelPoint:
        """The nearest point of one level. The next search begins there, even if this one ended before it met the level.

        Args:
            problem: loss and samples.
            w: weights  ``[P]``.
            level: the level.
            found: points of higher levels that were found at the same weights.
            max_gradients: cost at which the search is given up.
        """
        start = self.points.get(level)
        if start is None and found:  # the lowest of them
            start = min(found.values(), key=lambda each: each.level).point
        point = level_distance(problem, w, level.value, start=start, max_gradients=max_gradients)
        if point.certified or point.loss < problem.loss(w).item():
            self.points[level] = point.point.float()
        if level is Level.HALF and point.certified:
            self.displacement = (point.point - w).float()
        return point

    def keep_nearest(self, found: NearestPoint) -> None:
        """Begin the next search for the nearest point of the zero-loss set at this one, if it was found."""
        self.nearest = found.point.float() if found.converged else None

    def state_dict(self) -> dict[str, Any]:
        """The last points, by the names of their levels."""
        points = {level.name: point for level, point in self.points.items()}
        return points if self.nearest is None else points | {_NEAREST: self.nearest}

    @classmethod
    def from_state(cls, state: Mapping[str, Any], like: Tensor | None) -> Levels:
        """The levels with this state.

        Args:
            state: as `state_dict` gives it.
            like: weights of the network, on its device  ``[P]``; None: there is no problem, and nothing is kept.

        Raises:
            ValueError: points of another network.
        """
        if like is None:
            return cls()
        points = {name: point.to(like.device) for name, point in state.items()}
        if any(point.shape != like.shape for point in points.values()):
            raise ValueError(f"points of levels of another network, for {len(like)} weights")
        nearest = points.pop(_NEAREST, None)
        return cls({Level[name]: point for name, point in points.items()}, nearest)
