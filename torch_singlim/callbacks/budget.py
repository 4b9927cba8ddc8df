"""How long probes may take, and how long they will."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from torch_singlim.gram import MAX_DENSE, gram_flops, worth_factoring
from torch_singlim.problem import ZeroLossProblem

__all__ = ["Budget", "expected_seconds", "left_out_in_words"]

# seconds that probes may take in any case: two per cent of half a minute
_GRACE = 0.5
# gradients of the probe set, about: a linearised distance; matrix functions by Lanczos and a nearest point by products;
# a draw of the limit's potential (third derivatives); long steps over a window that is not followed step by step
_LINEARISED, _LANCZOS, _DRAW, _LONG_STEPS = 130, 300, 12, 300
# seconds, the figures of one probe
_FIGURES = 2.0
# gradients a step where every step is followed: the loss alone, and several paths of the effective flow
_PATHS = 8
# operations of an eigendecomposition and of a Cholesky factorisation, in units of M^3
_EIGENVECTORS, _FACTOR = 10.0, 1.0


class Budget:
    """A share of the wall time since it was made, which probes have to earn first.

        spent + cost <= grace + share * elapsed

    A cost is what the same thing took last time; before that, what it is expected to take.

    Args:
        share: None: no limit.
        clock: seconds.

    >>> budget = Budget(0.1, clock=iter([0.0, 20.0, 20.0]).__next__)
    >>> budget.affords("distance", 2.4), budget.affords("distance", 2.6)  # half a second of grace and a tenth of 20 s
    (True, False)
    """

    def __init__(self, share: float | None, *, clock: Callable[[], float] = time.perf_counter) -> None:
        self.share, self.clock = share, clock
        self.left_out: dict[str, int] = {}
        self._began, self._past = clock(), 0.0
        self._since: float | None = None
        self._known: dict[str, float] = {}

    def state_dict(self) -> dict[str, Any]:
        """What was spent, of how much time, on what: for a run that goes on elsewhere."""
        known, left_out = dict(self._known), dict(self.left_out)
        return {"spent": self.spent, "elapsed": self.clock() - self._began, "known": known, "left_out": left_out}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with it, the time since this budget was made on top."""
        self._past += state["spent"]
        self._began -= state["elapsed"]
        self._known, self.left_out = dict(state["known"]), dict(state["left_out"])

    @contextmanager
    def spending(self) -> Iterator[None]:
        """Book the time of the block."""
        self._since = self.clock()
        try:
            yield
        finally:
            self._past, self._since = self.spent, None

    @property
    def spent(self) -> float:
        """Seconds so far, those of a block in progress included."""
        return self._past + (0.0 if self._since is None else self.clock() - self._since)

    def affords(self, kind: str, expected: float) -> bool:
        """Whether this may be done now; what may not is counted in `left_out`."""
        if self.share is None:
            return True
        cost = self._known.get(kind, expected)
        if self.spent + cost <= _GRACE + self.share * (self.clock() - self._began):
            return True
        self.left_out[kind] = self.left_out.get(kind, 0) + 1
        return False

    def learn(self, kind: str, seconds: float) -> None:
        """What it took, for the next time."""
        self._known[kind] = seconds

    @property
    def overhead(self) -> float:
        """Share of the wall time that was spent."""
        return self.spent / max(self.clock() - self._began, 1e-9)


def expected_seconds(problem: ZeroLossProblem, *, window: int, num_draws: int, runs: float = 0.0) -> dict[str, float]:
    """Rough times of what probes consist of, in seconds, from one gradient.

    "linearised" distance; "distance" to the nearest point, with what has settled; "limit", on top of it; "window";
    "steps", each of a window's; "figures" for TensorBoard.

    Args:
        problem: loss and probe set.
        window: steps.
        num_draws: random directions for the limit's potential.
        runs: gradients of the whole probe set that every step of a window takes besides: replicas, the reference.
    """
    w = problem.weights()
    problem.gradient(w)  # the first call of a function takes longer
    start = time.perf_counter()
    problem.gradient(w)
    if w.device.type == "cuda":
        torch.cuda.synchronize(w.device)
    gradient = time.perf_counter() - start
    rate = max(3 * problem.flops * problem.num_samples, 1) / gradient  # operations per second
    M = problem.num_residuals
    exact = M <= MAX_DENSE
    if exact or worth_factoring(problem):
        # for the modes at w and at the nearest point; and on the way there, once or at every step
        times, each = (3, _EIGENVECTORS) if exact else (8, _FACTOR)
        decompositions = times * (gram_flops(problem) + each * float(M) ** 3) / rate
    else:
        decompositions = 0.0
    return {
        "linearised": _LINEARISED * gradient,
        "distance": decompositions + _LANCZOS * gradient,
        "limit": num_draws * _DRAW * gradient,
        "window": (2 * min(window, _LONG_STEPS) + runs * window) * gradient,
        "steps": _PATHS * window * gradient,
        "figures": _FIGURES,
    }


def left_out_in_words(left_out: dict[str, int], share: float | None) -> str | None:
    """What was left out to keep the share, in a sentence; None for nothing."""
    if not left_out or share is None:
        return None
    what = {
        "limit": "the limit's prediction",
        "distance": "the nearest point and what has settled (the linearised distance instead, where there was time)",
        "linearised": "any distance",
        "window": "the drift",
        "steps": "following every step, should long ones be inaccurate,",
        "figures": "the figures",
    }
    parts = [f"{what[kind]} at {count} probe{'s' if count > 1 else ''}" for kind, count in left_out.items()]
    return (
        f"to keep probes below {share:.0%} of the wall time these were left out: {', '.join(parts)}; pass "
        "max_overhead=None, or every_n_steps, for all of them"
    )
