"""How much time measurements may take, and how much they are expected to take."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from torch_singlim.geometry import MAX_DENSE, gram_flops, worth_factoring
from torch_singlim.measure.reasons import Code, Reason
from torch_singlim.measure.states import check_keys
from torch_singlim.network import ZeroLossProblem

__all__ = ["Budget", "expected_seconds"]

# seconds that measurements may take in any case: two per cent of half a minute
_GRACE = 0.5
# approximate costs, in gradients of all samples: a linearised distance; matrix functions by Lanczos and a nearest point
# by products; a draw of the limit's potential (third derivatives); long steps over a window; and, in gradients of two
# samples, the check of the derivatives
_LINEARISED, _LANCZOS, _DRAW, _LONG_STEPS, _CHECK = 130, 300, 12, 300, 100
# seconds for the figures of one measurement
_FIGURES = 2.0
# gradients per step of unit-step integration: the baseline, and several paths of the effective flow
_PATHS = 8
# operations of an eigendecomposition and of a Cholesky factorisation, in units of M^3
_EIGENVECTORS, _FACTOR = 10.0, 1.0
# what is skipped, and what is measured instead
_SKIPPED = {
    "check": "the check of the derivatives, and with it everything but the excess loss",
    "limit": "the limit's prediction",
    "distance": "the nearest point and the relaxed part (instead the linearised distance, if there was time for it)",
    "linearised": "any distance",
    "window": "the drift",
    "steps": "unit-step integration of windows with inaccurate long steps",
    "figures": "the figures",
}


class Budget:
    """A limit for the time of measurements, as a share of the wall time since the budget was made.

        spent + cost <= grace + share * elapsed

    The cost of a measurement is the time that it took last, or before that its expected time.

    Args:
        share: None: no limit; 0: nothing is affordable.
        clock: a function that returns the time in seconds.

    >>> budget = Budget(0.1, clock=iter([0.0, 20.0, 20.0]).__next__)
    >>> budget.expect({"distance": 2.4, "limit": 2.6})
    >>> budget.affords("distance"), budget.affords("limit")  # half a second of grace and a tenth of 20 s
    (True, False)
    """

    def __init__(self, share: float | None, *, clock: Callable[[], float] = time.perf_counter) -> None:
        self.share, self.clock = share, clock
        self.skipped: dict[str, int] = {}
        self._began, self._past = clock(), 0.0
        self._since: float | None = None
        self._expected: dict[str, float] = {}
        self._known: dict[str, float] = {}

    def state_dict(self) -> dict[str, Any]:
        """The time that was spent, the time that has passed, known costs and what was skipped, for resuming a run."""
        known, skipped = dict(self._known), dict(self.skipped)
        return {"spent": self.spent, "elapsed": self.clock() - self._began, "known": known, "skipped": skipped}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Add a state to the time since this budget was made.

        Args:
            state: as returned by `state_dict`.

        Raises:
            ValueError: an incomplete state. Nothing has changed then.
        """
        check_keys(state, self.state_dict())
        self._past += state["spent"]
        self._began -= state["elapsed"]
        self._known, self.skipped = dict(state["known"]), dict(state["skipped"])

    @contextmanager
    def spending(self) -> Iterator[None]:
        """Count the time of the block."""
        self._since = self.clock()
        try:
            yield
        finally:
            self._past, self._since = self.spent, None

    @property
    def spent(self) -> float:
        """Seconds that were spent so far, including a block in progress."""
        return self._past + (0.0 if self._since is None else self.clock() - self._since)

    def expect(self, seconds: Mapping[str, float]) -> None:
        """Set the expected times of measurements that have not been timed yet."""
        self._expected |= seconds

    def affords(self, kind: str) -> bool:
        """Whether there is time for this now; if not, it is counted in `skipped`."""
        if self.share is None:
            return True
        cost = self._known.get(kind, self._expected.get(kind, 0.0))
        if self.share > 0 and self.spent + cost <= _GRACE + self.share * (self.clock() - self._began):
            return True
        self.skipped[kind] = self.skipped.get(kind, 0) + 1
        return False

    @contextmanager
    def timed(self, kind: str) -> Iterator[None]:
        """Time the block, for the decision whether there is time for it again."""
        start = self.clock()
        yield
        self._known[kind] = self.clock() - start

    @property
    def overhead(self) -> float:
        """The share of the wall time that was spent."""
        return self.spent / max(self.clock() - self._began, 1e-9)

    @property
    def reason(self) -> Reason | None:
        """What was skipped to stay within the budget; None: nothing."""
        if not self.skipped or self.share is None:
            return None
        parts = [f"{_SKIPPED[kind]} at {count} step{'s' * (count > 1)}" for kind, count in self.skipped.items()]
        return Code.TIME(share=self.share, what=", ".join(parts))


def expected_seconds(problem: ZeroLossProblem, *, window: int, num_draws: int, runs: float = 0.0) -> dict[str, float]:
    """Approximate times of the parts of a measurement, in seconds, from the time of one gradient.

    "check": the check of the derivatives. "linearised": the linearised distance. "distance": the nearest point and the
    relaxed part. "limit": the same with the limit's prediction. "window": the prediction for a window. "steps":
    unit-step integration of a window. "figures": those for TensorBoard.

    Args:
        problem: loss and samples.
        window: steps of a window.
        num_draws: random directions for the limit's potential.
        runs: further gradients of all samples per step of a window: replicas, the reference.
    """
    gradient = _seconds(problem)
    rate = max(3 * problem.flops * problem.num_samples, 1) / gradient  # operations per second
    M = problem.num_residuals
    exact = M <= MAX_DENSE
    decompositions = 0.0
    if exact or worth_factoring(problem):
        # for the modes at w, for those at the nearest point, and for the search, once or at every step
        times, each = (3, _EIGENVECTORS) if exact else (8, _FACTOR)
        decompositions = times * (gram_flops(problem) + each * float(M) ** 3) / rate
    distance = decompositions + _LANCZOS * gradient
    return {
        "check": _CHECK * _seconds(problem.subset(2)),
        "linearised": _LINEARISED * gradient,
        "distance": distance,
        "limit": distance + num_draws * _DRAW * gradient,
        "window": (2 * min(window, _LONG_STEPS) + runs * window) * gradient,
        "steps": _PATHS * window * gradient,
        "figures": _FIGURES,
    }


def _seconds(problem: ZeroLossProblem) -> float:
    """Time of one gradient, in seconds."""
    w = problem.weights()
    problem.gradient(w)  # the first call of a function takes longer
    start = time.perf_counter()
    problem.gradient(w)
    if w.device.type == "cuda":
        torch.cuda.synchronize(w.device)
    return time.perf_counter() - start
