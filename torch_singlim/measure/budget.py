"""How much time measurements may take, and how much they are expected to take."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from typing import Any

import torch

from torch_singlim.geometry import MAX_DENSE, gram_flops, worth_factoring
from torch_singlim.measure.reasons import Code, Reason
from torch_singlim.measure.states import check_keys
from torch_singlim.network import ZeroLossProblem

__all__ = ["Account", "Budget", "expected_seconds"]

# seconds that all measurements of a run may take in any case
_GRACE = 15.0
# approximate costs, in gradients of all samples: the loss; in single precision, the distances to a half, a tenth and a
# hundredth of it, and the largest eigenvalue; matrix functions by Lanczos and a nearest point by products; a draw of
# the limit's potential (third derivatives); and, in gradients of two samples, the check of the derivatives
_LOSS, _HALF, _TENTH, _HUNDREDTH, _LARGEST, _LANCZOS, _DRAW, _CHECK = 0.35, 60, 200, 800, 20, 300, 12, 100
# number of drifts in the integrated limit over a window of a few hundred steps, and the gradients that a direction of
# one of them takes
_DRIFTS, _DIRECTION = 30, 6
# what a gradient costs in a search in single precision, with the vectors that it takes, in gradients
_SEARCH = 1.3
# seconds for the figures of one measurement
_FIGURES = 2.0
# operations of an eigendecomposition and of a Cholesky factorisation, in units of M^3
_EIGENVECTORS, _FACTOR = 10.0, 1.0
# size of the matrices whose product is timed; how often what is short is timed
_SQUARE, _REPEATS = 512, 3
# gradients are timed with so many samples, and with all samples if these are expected to take no longer than this (an
# estimate that is too high for small networks); what takes no longer than the last number is timed three times
_TIMED_SAMPLES, _ALL_SECONDS, _SHORT_SECONDS = 16, 1.0, 0.05
# what is skipped, and what is measured instead
_SKIPPED = {
    "loss": "the excess loss",
    "check": "the check of the derivatives, and with it the nearest point",
    "half": "the distance to half of the loss",
    "tenth": "the distance to a tenth of the loss",
    "hundredth": "the distance to a hundredth of the loss",
    "whole": "the loss of the whole training set at these points",
    "subsets": "the nearest points of fewer samples",
    "stability": "the largest eigenvalue",
    "limit": "the limit's prediction",
    "flow": "the limit integrated over the window",
    "distance": "the nearest point and the relaxed part",
    "paths": "the paths beside the training, and with them the drift's prediction",
    "figures": "the figures",
}


class Account(Enum):
    """The two accounts of a budget; each may spend half of the time, or all of it if the other is closed."""

    PATHS = "paths beside the training"
    GEOMETRY = "everything else"


class Budget:
    """A limit for the time of measurements, as a share of the time that training takes without them.

        spent + cost <= (15 s + share * time of the training itself) / 2          in each of two accounts

    The cost of a measurement is the time that it took last, or before that its expected time.

    Args:
        share: None: no limit; 0: only the excess loss is affordable.
        clock: a function that returns the time in seconds.

    >>> budget = Budget(0.1, clock=iter([0.0, 50.0, 50.0]).__next__)
    >>> budget.expect({"distance": 9.0, "limit": 11.0})
    >>> budget.affords("distance"), budget.affords("limit")  # half of 15 s and of a tenth of 50 s
    (True, False)
    """

    def __init__(self, share: float | None, *, clock: Callable[[], float] = time.perf_counter) -> None:
        self.share, self.clock = share, clock
        self.skipped: dict[str, int] = {}
        self._began = clock()
        self._past = dict.fromkeys(Account, 0.0)
        self._closed: set[Account] = set()
        self._since: tuple[Account, float] | None = None
        self._expected: dict[str, float] = {}
        self._known: dict[str, float] = {}

    def state_dict(self) -> dict[str, Any]:
        """The time that was spent, the time that has passed, known costs and what was skipped, for resuming a run."""
        spent = {account.name: self._spent(account) for account in Account}
        known, skipped = dict(self._known), dict(self.skipped)
        return {"spent": spent, "elapsed": self.elapsed, "known": known, "skipped": skipped}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Add a state to the time since this budget was made.

        Args:
            state: as returned by `state_dict`.

        Raises:
            ValueError: an incomplete state. Nothing has changed then.
        """
        check_keys(state, self.state_dict())
        check_keys(state["spent"], [account.name for account in Account])
        for account in Account:
            self._past[account] += state["spent"][account.name]
        self._began -= state["elapsed"]
        self._known, self.skipped = dict(state["known"]), dict(state["skipped"])

    @contextmanager
    def spending(self, account: Account = Account.GEOMETRY) -> Iterator[None]:
        """Count the time of the block."""
        self._since = account, self.clock()
        try:
            yield
        finally:
            self._past[account], self._since = self._spent(account), None

    def add(self, seconds: float) -> None:
        """Count time that is too short to be measured, half of it in each account."""
        for account in Account:
            self._past[account] += seconds / len(Account)

    def _spent(self, account: Account) -> float:
        running = 0.0 if self._since is None or self._since[0] is not account else self.clock() - self._since[1]
        return self._past[account] + running

    @property
    def spent(self) -> float:
        """Seconds that were spent so far, including a block in progress."""
        return sum(self._spent(account) for account in Account)

    @property
    def elapsed(self) -> float:
        """Seconds since the budget was made."""
        return self.clock() - self._began

    def close(self, account: Account) -> None:
        """Leave all of the time to the other account."""
        self._closed.add(account)

    def left(self, account: Account) -> float:
        """Seconds that an account may still spend; infinite without a limit."""
        if self.share is None:
            return float("inf")
        if account in self._closed:
            return 0.0
        training = self.elapsed - self.spent
        allowed = (_GRACE + self.share * training) / (1 if self._closed else 2)
        return allowed - self._spent(account)

    def expect(self, seconds: Mapping[str, float]) -> None:
        """Set the expected times of measurements that have not been timed yet."""
        self._expected |= seconds

    def cost(self, kind: str) -> float:
        """Seconds that a measurement is expected to take."""
        return self._known.get(kind, self._expected.get(kind, 0.0))

    def affords(self, kind: str, *, part: float = 1.0) -> bool:
        """Whether this takes no more than a part of the time that is left; if not, it is counted in `skipped`."""
        if self.share == 0 and kind != "loss":
            return self.skip(kind)
        return self.cost(kind) <= part * self.left(Account.GEOMETRY) or self.skip(kind)

    def gradients(self, *, part: float = 1.0) -> float:
        """How many gradients of a search for a level fit into a part of the time that is left; infinite if unknown."""
        each = self.cost("gradient")
        return part * max(self.left(Account.GEOMETRY), 0.0) / each if each else math.inf

    def skip(self, kind: str) -> bool:
        """Count what there was no time for; returns False."""
        self.skipped[kind] = self.skipped.get(kind, 0) + 1
        return False

    @contextmanager
    def timed(self, kind: str) -> Iterator[None]:
        """Time the block, for the decision whether there is time for it again."""
        start = self.clock()
        yield
        self._known[kind] = self.clock() - start

    def scale(self, kind: str, factor: float) -> None:
        """Expect the next measurement of a kind to take this multiple of the time of the last one."""
        self._known[kind] *= factor

    @property
    def overhead(self) -> float:
        """The share of the wall time that was spent."""
        return self.spent / max(self.elapsed, 1e-9)

    @property
    def reason(self) -> Reason | None:
        """What was skipped to stay within the budget; None: nothing."""
        if not self.skipped or self.share is None:
            return None
        if self.share == 0:
            return Code.LOSS_ALONE()
        parts = [f"{_SKIPPED[kind]} at {count} step{'s' * (count > 1)}" for kind, count in self.skipped.items()]
        return Code.TIME(share=self.share, grace=_GRACE, what=", ".join(parts))


def expected_seconds(problem: ZeroLossProblem, *, num_draws: int, total: int = 0) -> dict[str, float]:
    """Approximate times of the parts of a measurement, in seconds, from the time of one gradient.

    "gradient": one of the searches for levels. "loss": the excess loss. "half", "tenth", "hundredth": the distance to
    this level of it. "stability": the largest eigenvalue. "check": the check of the derivatives. "distance": the
    nearest point and the relaxed part. "limit": the same with the limit's prediction. "flow": the limit integrated over
    a window. "whole": the loss of the whole training set, twice. "subsets": the nearest points of fewer samples.
    "figures": those for TensorBoard.

    Args:
        problem: loss and samples.
        num_draws: random directions for the limit's potential.
        total: number of samples in the whole training set.
    """
    N, gradient = problem.num_samples, _gradient(problem)
    single = _SEARCH * _gradient(problem.at_precision(torch.float32))
    M = problem.num_residuals
    exact = M <= MAX_DENSE
    decompositions = factor = 0.0
    if exact or worth_factoring(problem):
        # for the modes at w, for those at the nearest point, and for the search; or, of factors, about seven in single
        # precision, each in half of the time
        times, each = (3, _EIGENVECTORS) if exact else (3.5, _FACTOR)
        rate, gram = _rate(problem), gram_flops(problem)
        factor = (gram + _FACTOR * float(M) ** 3) / rate
        decompositions = times * (gram + each * float(M) ** 3) / rate
    distance = decompositions + _LANCZOS * gradient
    return {
        "gradient": single,
        "loss": _LOSS * gradient,
        "check": _CHECK * _seconds(problem.subset(min(N, 2))),
        "half": _HALF * single,
        "tenth": _TENTH * single,
        "hundredth": _HUNDREDTH * single,
        "stability": _LARGEST * single,
        "distance": distance,
        "whole": 2 * _LOSS * gradient * total / N,
        "subsets": distance,
        "limit": distance + num_draws * _DRAW * gradient,
        "flow": _DRIFTS * (factor + min(num_draws, M // N) * _DIRECTION * gradient),
        "figures": _FIGURES,
    }


def _gradient(problem: ZeroLossProblem) -> float:
    """Time of one gradient of all samples, in seconds."""
    N, few = problem.num_samples, min(problem.num_samples, _TIMED_SAMPLES)
    estimated = _seconds(problem.subset(few, dtype=problem.dtype)) * N / few
    return _seconds(problem) if few < N and estimated <= _ALL_SECONDS else estimated


def _seconds(problem: ZeroLossProblem) -> float:
    """Time of one gradient, in seconds: the shortest of three if it is short, since other processes interfere."""
    w = problem.weights()
    problem.gradient(w)  # the first call of a function takes longer
    found: list[float] = []
    while not found or (len(found) < _REPEATS and found[-1] <= _SHORT_SECONDS):
        start = time.perf_counter()
        problem.gradient(w).sum().item()  # the sum waits for the device
        found.append(time.perf_counter() - start)
    return min(found)


def _rate(problem: ZeroLossProblem) -> float:
    """Floating point operations per second of dense matrices, by a product of two."""
    A = torch.ones(_SQUARE, _SQUARE, dtype=problem.dtype, device=problem.device)
    (A @ A).sum().item()  # the first product takes longer; the sum waits for the device
    found = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        (A @ A).sum().item()
        found.append(time.perf_counter() - start)
    return 2 * float(_SQUARE) ** 3 / min(found)
