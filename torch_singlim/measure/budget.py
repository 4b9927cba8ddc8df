"""How long measurements may take, and how long they will."""

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
# gradients of all samples, about: a linearised distance; matrix functions by Lanczos and a nearest point by products;
# a draw of the limit's potential (third derivatives); long steps over a window; and of two samples, the check of the
# derivatives
_LINEARISED, _LANCZOS, _DRAW, _LONG_STEPS, _CHECK = 130, 300, 12, 300, 100
# seconds, the figures of one measurement
_FIGURES = 2.0
# gradients a step by unit-step integration: the loss alone, and several paths of the effective flow
_PATHS = 8
# operations of an eigendecomposition and of a Cholesky factorisation, in units of M^3
_EIGENVECTORS, _FACTOR = 10.0, 1.0
# what is skipped, in words, and what is measured instead
_SKIPPED = {
    "check": "the check of the derivatives, and with it everything but the excess loss",
    "limit": "the limit's prediction",
    "distance": "the nearest point and the relaxed part (the linearised distance instead, where there was time)",
    "linearised": "any distance",
    "window": "the drift",
    "steps": "unit-step integration, should long steps be inaccurate,",
    "figures": "the figures",
}


class Budget:
    """A share of the wall time since it was made, within which measurements must stay.

        spent + cost <= grace + share * elapsed

    A cost is what the same thing took last time; before that, what it is expected to take.

    Args:
        share: None: no limit; 0: nothing.
        clock: seconds.

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
        """What was spent, of how much time, on what: for a run that goes on elsewhere."""
        known, skipped = dict(self._known), dict(self.skipped)
        return {"spent": self.spent, "elapsed": self.clock() - self._began, "known": known, "skipped": skipped}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with it, the time since this budget was made on top.

        Raises:
            ValueError: a state that is not whole. Nothing has changed then.
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
        """Seconds so far, those of a block in progress included."""
        return self._past + (0.0 if self._since is None else self.clock() - self._since)

    def expect(self, seconds: Mapping[str, float]) -> None:
        """What things will take, until they have been timed."""
        self._expected |= seconds

    def affords(self, kind: str) -> bool:
        """Whether this may be done now; what may not is counted in `skipped`."""
        if self.share is None:
            return True
        cost = self._known.get(kind, self._expected.get(kind, 0.0))
        if self.share > 0 and self.spent + cost <= _GRACE + self.share * (self.clock() - self._began):
            return True
        self.skipped[kind] = self.skipped.get(kind, 0) + 1
        return False

    @contextmanager
    def timed(self, kind: str) -> Iterator[None]:
        """Learn from the block what this takes, for the next time."""
        start = self.clock()
        yield
        self._known[kind] = self.clock() - start

    @property
    def overhead(self) -> float:
        """Share of the wall time that was spent."""
        return self.spent / max(self.clock() - self._began, 1e-9)

    @property
    def reason(self) -> Reason | None:
        """What was skipped to keep the share; None: nothing."""
        if not self.skipped or self.share is None:
            return None
        parts = [f"{_SKIPPED[kind]} at {count} step{'s' * (count > 1)}" for kind, count in self.skipped.items()]
        return Code.TIME(share=self.share, what=", ".join(parts))


def expected_seconds(problem: ZeroLossProblem, *, window: int, num_draws: int, runs: float = 0.0) -> dict[str, float]:
    """Rough times of what measurements consist of, in seconds, from one gradient.

    "check" of the derivatives; "linearised" distance; "distance" to the nearest point, with the relaxed part; "limit",
    the two together with the limit's prediction; "window"; "steps", unit-step integration of a window; "figures" for
    TensorBoard.

    Args:
        problem: loss and samples.
        window: steps.
        num_draws: random directions for the limit's potential.
        runs: gradients of all samples that every step of a window takes besides: replicas, the reference.
    """
    gradient = _seconds(problem)
    rate = max(3 * problem.flops * problem.num_samples, 1) / gradient  # operations per second
    M = problem.num_residuals
    exact = M <= MAX_DENSE
    decompositions = 0.0
    if exact or worth_factoring(problem):
        # for the modes at w and at the nearest point; and on the way there, once or at every step
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
    """Of one gradient."""
    w = problem.weights()
    problem.gradient(w)  # the first call of a function takes longer
    start = time.perf_counter()
    problem.gradient(w)
    if w.device.type == "cuda":
        torch.cuda.synchronize(w.device)
    return time.perf_counter() - start
