"""The optimizer steps at which something is measured."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Literal

__all__ = ["Due", "Schedule", "marks_of", "window_starts"]

# a window of automatic length is at least and at most so many steps, and this part of the run if that is in between
_SHORTEST, _LONGEST, _PART = 50, 1000, 4
# a window is logged at so many of its steps
_MARKS = 20
# the excess loss alone is measured so many times per decade of steps, for so many decades
_PER_DECADE, _DECADES = 10, 8


def window_starts(window: int, every_n_steps: int | None, total: int | None) -> Iterator[int]:
    """Optimizer steps at which windows begin: 0, and then every n steps, or at `window` times powers of two.

    Without `every_n_steps`, the last window of a run of known length ends with the run.

    >>> list(window_starts(100, None, 1000))
    [0, 100, 200, 400, 800, 900]
    >>> list(window_starts(100, 300, 1000))
    [0, 300, 600, 900]
    """
    limit = math.inf if total is None else total - window
    starts = [0]
    step = every_n_steps or window
    while step <= limit and len(starts) < 10_000:
        starts.append(step)
        step += every_n_steps or step
    if every_n_steps is None and total is not None and limit > 0:
        # windows that would overlap the last one are omitted
        starts = [s for s in starts if s + window <= limit] + [int(limit)]
    yield from starts


def marks_of(start: int, stop: int) -> set[int]:
    """The steps of a window at which its values are logged: 20 of them, or all, equally spaced; the last is its end.

    >>> sorted(marks_of(10, 13))
    [11, 12, 13]
    """
    return {start + -(-(stop - start) * i // _MARKS) for i in range(1, _MARKS + 1)}


class Due(Enum):
    """What is due at a step."""

    MEASUREMENT = "a window begins or ends"
    EXCESS_LOSS = "the excess loss alone"


@dataclass(frozen=True)
class Schedule:
    """The windows of a run.

    Args:
        windows: step at which a window begins -> step at which it ends.
        total: steps of the run; None: unknown.
        shortest: steps from which on a window is worth following: windows may be shortened to what there is time for.
        losses: further steps at which the excess loss is measured.

    >>> schedule = Schedule.of_run(window=8, every_n_steps=8, total=16)
    >>> schedule.windows, schedule.begins(7, 8)
    ({0: 8, 8: 16}, 8)
    >>> Schedule.of_run(window="auto", every_n_steps=None, total=400).windows
    {0: 100, 100: 200, 200: 300, 300: 400}
    """

    windows: Mapping[int, int]
    total: int | None = None
    shortest: int = 1
    losses: frozenset[int] = field(default=frozenset(), repr=False)

    @classmethod
    def of_run(cls, *, window: int | Literal["auto"], every_n_steps: int | None, total: float | None) -> Schedule:
        """The schedule of a run, see `window_starts`, with the excess loss ten times per decade of steps.

        Args:
            window: steps of each window; "auto": a quarter of the run, but at least 50 and at most 1,000 steps.
            every_n_steps: steps from one window to the next; None: at powers of two.
            total: steps of the run; infinite, negative or None: unknown.
        """
        total = None if total is None or math.isinf(total) or total < 0 else int(total)
        longest = every_n_steps or math.inf if total is None else min(every_n_steps or total, max(total, 1))
        wanted = window
        if wanted == "auto":
            wanted = _LONGEST if total is None else min(max(total // _PART, _SHORTEST), _LONGEST)
        length = int(min(wanted, longest))
        shortest = min(_SHORTEST, -(-length // 2))
        losses = frozenset(round(10 ** (k / _PER_DECADE)) for k in range(_DECADES * _PER_DECADE))
        starts = window_starts(length, every_n_steps, total)
        return cls({start: start + length for start in starts}, total, shortest, losses)

    @classmethod
    def between(cls, steps: Sequence[int]) -> Schedule:
        """A window from each of these steps to the next, such as the steps of checkpoints."""
        return cls(dict(itertools.pairwise(steps)))

    def is_last(self, stop: int) -> bool:
        """Whether a window that ends at this step ends with the run."""
        return stop == self.total

    def part(self, start: int) -> float:
        """The part of the remaining time that is for the window that begins at a step: all later ones get as much."""
        return 0.5 if self.total is None else 1 / (1 + sum(other > start for other in self.windows))

    def part_at(self, step: int) -> float:
        """The part of the remaining time that is for a measurement at a step: the last window is worth most."""
        return 1.0 if self.total is not None and step >= max(self.windows, default=0) else 0.5

    def begins(self, before: int, step: int) -> int | None:
        """Length of the window that begins at a step, or that was due since the step `before`; None: none does."""
        # with manual optimization, more than one step may be made in between
        starts = [each for each in range(before + 1, step + 1) if each in self.windows]
        return self.windows[starts[-1]] - starts[-1] if starts else None
