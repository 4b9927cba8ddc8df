"""How long measurements may take: the account on a clock of its own, and the estimates from one gradient."""

import itertools

import pytest
import torch
from torch import nn

from torch_singlim import ZeroLossProblem
from torch_singlim.measure import Budget, Code, Kind
from torch_singlim.measure.budget import expected_seconds


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_the_account():
    clock = Clock()
    budget = Budget(0.1, clock=clock)
    budget.expect({"distance": 0.4, "limit": 0.6})
    assert budget.affords("distance")
    assert not budget.affords("limit")  # half a second of grace, nothing earned so far
    clock.now = 100.0
    with budget.spending():
        clock.now = 105.0
        assert budget.spent == 5.0
        clock.now = 106.0
    assert budget.spent == 6.0
    assert budget.overhead == pytest.approx(6 / 106)
    with budget.timed("distance"):  # it takes 6, whatever was expected
        clock.now = 112.0
    assert not budget.affords("distance")  # 6 + 6 > 0.5 + 11.2
    clock.now = 120.0
    assert budget.affords("distance")
    assert budget.skipped == {"limit": 1, "distance": 1}


def test_without_a_limit_and_without_any_time():
    clock = Clock()
    free, none = Budget(None, clock=clock), Budget(0.0, clock=clock)
    for budget in (free, none):
        budget.expect({"distance": 1e9})
    clock.now = 1e12
    assert free.affords("distance")
    assert not none.affords("distance")
    assert not none.affords("anything")  # though it costs nothing
    assert free.reason is None


def test_what_was_skipped_in_words():
    budget = Budget(0.1, clock=Clock())
    assert budget.reason is None
    budget.expect({"distance": 1.0, "window": 1.0})
    for kind in ("distance", "distance", "window"):
        budget.affords(kind)
    reason = budget.reason
    assert (reason.code, reason.code.kind) == (Code.TIME, Kind.SKIPPED)
    assert "below 10% of the wall time" in str(reason)
    assert "if there was time for it) at 2 steps, the drift at 1 step;" in str(reason)


def test_a_run_that_goes_on_elsewhere():
    first, clock = Clock(), Clock()
    budget = Budget(0.1, clock=first)
    with budget.spending(), budget.timed("distance"):
        first.now = 5.0
    first.now = 50.0
    assert not budget.affords("distance")
    clock.now = 1000.0  # of another machine
    again = Budget(0.1, clock=clock)
    with again.spending():
        clock.now = 1001.0
    again.load_state_dict(budget.state_dict())
    assert (again.spent, again.overhead) == (6.0, pytest.approx(6 / 51))
    assert again.skipped == {"distance": 1}
    assert not again.affords("distance")  # what it took is known
    for changed, message in (({"spent": 1.0}, "missing: elapsed, known, skipped"), ({"left": 1}, "unknown: left")):
        with pytest.raises(ValueError, match=message):
            again.load_state_dict(changed)
    assert again.spent == 6.0


def test_expected_seconds_follow_from_one_gradient(monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr("torch_singlim.measure.budget.time.perf_counter", lambda: float(next(ticks)))
    net = nn.Sequential(nn.Linear(50, 100), nn.Tanh(), nn.Linear(100, 10))
    problem = ZeroLossProblem(net, "mse", torch.randn(100, 50), torch.randn(100, 10))
    expected = expected_seconds(problem, window=1000, num_draws=8)  # a gradient takes one tick
    assert expected["window"] == 600
    assert expected["steps"] == 8000
    assert expected["linearised"] == 130
    assert expected["check"] == 100
    assert expected["limit"] == expected["distance"] + 96
    assert expected_seconds(problem, window=1000, num_draws=8, runs=4.0)["window"] == 4600
    # three eigendecompositions of 1,000 x 1,000 at the gradient's operations per second, and 300 products
    rate = 3 * 100 * problem.flops
    assert expected["distance"] == pytest.approx(300 + 3 * 1e10 / rate, rel=0.1)
