"""How long measurements may take: the accounts on a clock of their own, and the estimates from one gradient."""

import itertools

import pytest
import torch
from torch import nn

from torch_singlim import ZeroLossProblem
from torch_singlim.measure import Account, Budget, Code, Kind
from torch_singlim.measure.budget import expected_seconds


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_half_of_the_time_is_for_everything_but_paths():
    clock = Clock()
    budget = Budget(0.1, clock=clock)
    budget.expect({"distance": 7.5, "limit": 7.6})
    assert budget.affords("distance")  # half of 15 seconds
    assert not budget.affords("limit")
    clock.now = 100.0
    assert budget.left(Account.GEOMETRY) == budget.left(Account.PATHS) == 12.5
    with budget.spending():
        clock.now = 105.0
        assert budget.spent == 5.0
        clock.now = 106.0
    assert budget.spent == 6.0
    assert budget.overhead == pytest.approx(6 / 106)
    clock.now = 116.0
    with budget.timed("distance"):  # it takes 7, whatever was expected
        clock.now = 123.0
    assert budget.affords("distance")  # 6 + 7 < (15 + 11.7) / 2, training has taken 117
    assert not budget.affords("distance", part=0.9)
    clock.now = 105.0
    assert not budget.affords("distance")  # 6 + 7 > (15 + 9.9) / 2
    assert budget.skipped == {"limit": 1, "distance": 2}


def test_time_that_is_not_measured_is_counted_in_both_accounts():
    budget = Budget(0.1, clock=Clock())
    budget.add(3.0)
    assert budget.spent == 3.0
    assert budget.left(Account.PATHS) == budget.left(Account.GEOMETRY) == pytest.approx((15 - 0.3) / 2 - 1.5)


def test_each_account_has_its_own_half_and_all_if_the_other_is_closed():
    clock = Clock()
    budget = Budget(0.1, clock=clock)
    with budget.spending(Account.PATHS):
        clock.now = 5.0
        assert budget.left(Account.PATHS) == pytest.approx(15 / 2 - 5)  # no training so far
    with budget.spending(Account.GEOMETRY):
        clock.now = 8.0
    clock.now = 58.0
    assert (budget.left(Account.PATHS), budget.left(Account.GEOMETRY)) == (10 - 5, 10 - 3)
    assert budget.spent == 8.0
    budget.close(Account.GEOMETRY)
    assert (budget.left(Account.PATHS), budget.left(Account.GEOMETRY)) == (20 - 5, 0.0)
    budget.expect({"distance": 1.0})
    assert not budget.affords("distance")


def test_without_a_limit_and_without_any_time():
    clock = Clock()
    free, none = Budget(None, clock=clock), Budget(0.0, clock=clock)
    for budget in (free, none):
        budget.expect({"distance": 1e9, "loss": 0.1})
    clock.now = 1e12
    assert free.affords("distance")
    assert free.left(Account.PATHS) == float("inf")
    assert not none.affords("distance")
    assert not none.affords("anything")  # though it costs nothing
    assert none.affords("loss")  # alone
    free.skip("paths")
    assert free.reason is None


def test_what_was_skipped_in_words():
    budget = Budget(0.1, clock=Clock())
    assert budget.reason is None
    budget.expect({"distance": 10.0})
    for _ in range(2):
        assert not budget.affords("distance")
    assert budget.skip("paths") is False
    reason = budget.reason
    assert (reason.code, reason.code.kind) == (Code.TIME, Kind.SKIPPED)
    assert "below 15 s and 10% of the wall time" in str(reason)
    assert "the nearest point and the relaxed part at 2 steps, the paths beside the training, and" in str(reason)
    assert "the drift's prediction at 1 step;" in str(reason)


def test_a_run_that_goes_on_elsewhere():
    first, clock = Clock(), Clock()
    budget = Budget(0.1, clock=first)
    with budget.spending(), budget.timed("distance"):
        first.now = 6.0
    with budget.spending(Account.PATHS):
        first.now = 7.0
    first.now = 50.0
    assert not budget.affords("distance")
    clock.now = 1000.0  # of another machine
    again = Budget(0.1, clock=clock)
    with again.spending():
        clock.now = 1001.0
    again.load_state_dict(budget.state_dict())
    assert (again.spent, again.overhead) == (8.0, pytest.approx(8 / 51))
    assert again.left(Account.PATHS) == pytest.approx((15 + 4.3) / 2 - 1)
    assert again.left(Account.GEOMETRY) == pytest.approx((15 + 4.3) / 2 - 7)
    assert again.skipped == {"distance": 1}
    assert not again.affords("distance")  # what it took is known
    whole = again.state_dict()
    for changed, message in (
        ({"spent": 1.0}, "missing: elapsed, known, skipped"),
        ({"left": 1}, "unknown: left"),
        ({**whole, "spent": {"PATHS": 1.0}}, "missing: GEOMETRY"),
    ):
        with pytest.raises(ValueError, match=message):
            again.load_state_dict(changed)
    assert again.spent == 8.0


def test_expected_seconds_follow_from_one_gradient(monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr("torch_singlim.measure.budget.time.perf_counter", lambda: float(next(ticks)))
    net = nn.Sequential(nn.Linear(50, 100), nn.Tanh(), nn.Linear(100, 10))
    problem = ZeroLossProblem(net, "mse", torch.randn(100, 50), torch.randn(100, 10))
    expected = expected_seconds(problem, num_draws=8)  # a gradient, or a product of two matrices, takes one tick
    samples = 100 / 16  # a gradient of 16 samples is timed
    assert [expected[kind] / samples for kind in ("gradient", "half", "tenth")] == [1.3, 78, 260]
    assert expected["loss"] == pytest.approx(0.35 * samples)
    assert expected["check"] == 100
    assert expected["limit"] == expected["distance"] + 96 * samples
    # three eigendecompositions of 1,000 x 1,000 at the operations per second of a product, and 300 products
    rate = 2 * 512**3
    assert expected["distance"] == pytest.approx(300 * samples + 3 * 1e10 / rate, rel=0.1)
