"""The optimizer steps at which something is measured."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

__all__ = ["Due", "Schedule", "window_starts"]

# number of equal parts of a window; standard errors are computed from their scatter
_PARTS = 4
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


class Due(Enum):
    """What is due at a step."""

    MEASUREMENT = "a window begins or ends"
    MARK = "the iterate of an open window is recorded"
    EXCESS_LOSS = "the excess loss alone"


@dataclass(frozen=True)
class Schedule:
    """The windows of a run, and the steps within them at which the iterate is recorded.

    Args:
        windows: step at which a window begins -> step at which it ends.
        marks: whether iterates within windows are recorded, for standard errors.
        losses: further steps at which the excess loss is measured.

    >>> schedule = Schedule.of_run(window=8, every_n_steps=8, total=16)
    >>> schedule.windows, schedule.begins(7, 8), sorted(schedule.marks_of(0, 8))
    ({0: 8, 8: 16}, 8, [2, 4, 6])
    """

    windows: Mapping[int, int]
    marks: bool = True
    losses: frozenset[int] = field(default=frozenset(), repr=False)

    @classmethod
    def of_run(cls, *, window: int, every_n_steps: int | None, total: float | None) -> Schedule:
        """The schedule of a run, see `window_starts`, with the excess loss ten times per decade of steps.

        Args:
            window: steps of each window.
            every_n_steps: steps from one window to the next; None: at powers of two.
            total: steps of the run; infinite, negative or None: unknown.
        """
        total = None if total is None or math.isinf(total) or total < 0 else int(total)
        losses = frozenset(round(10 ** (k / _PER_DECADE)) for k in range(_DECADES * _PER_DECADE))
        starts = window_starts(window, every_n_steps, total)
        return cls({start: start + window for start in starts}, losses=losses)

    @classmethod
    def between(cls, steps: Sequence[int]) -> Schedule:
        """A window from each of these steps to the next, such as the steps of checkpoints."""
        return cls(dict(itertools.pairwise(steps)), marks=False)

    @property
    def longest(self) -> int:
        """Steps of the longest window."""
        return max((stop - start for start, stop in self.windows.items()), default=1)

    def begins(self, before: int, step: int) -> int | None:
        """Length of the window that begins at a step, or that was due since the step `before`; None: none does."""
        # with manual optimization, more than one step may be made in between
        starts = [each for each in range(before + 1, step + 1) if each in self.windows]
        return self.windows[starts[-1]] - starts[-1] if starts else None

    def marks_of(self, start: int, stop: int) -> set[int]:
        """Steps within a window at which the iterate is recorded: its quarters."""
        steps = {start + round((stop - start) * part / _PARTS) for part in range(1, _PARTS)} if self.marks else set()
        return steps - {start, stop}
