"""What probes may take: the account on a clock of its own, the monitor's choices under it, the estimates."""

import itertools

import pytest
import torch
from torch import nn

from tests.callbacks.test_monitor import Net, Recorder, fit, seeded, weights
from torch_singlim import SingularLimitMonitor, ZeroLossProblem
from torch_singlim.measure.budget import Budget, expected_seconds, left_out_in_words


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_the_account():
    clock = Clock()
    budget = Budget(0.1, clock=clock)
    assert budget.affords("distance", 0.4)
    assert not budget.affords("distance", 0.6)  # half a second of grace, nothing earned so far
    clock.now = 100.0
    with budget.spending():
        clock.now = 105.0
        assert budget.spent == 5.0
        budget.learn("distance", 6.0)
        clock.now = 106.0
    assert budget.spent == 6.0
    assert budget.overhead == pytest.approx(6 / 106)
    assert not budget.affords("distance", 0.0)  # it took 6: 6 + 6 > 0.5 + 10.6
    clock.now = 120.0
    assert budget.affords("distance", 0.0)
    assert budget.left_out == {"distance": 2}
    assert "where there was time) at 2 probes" in left_out_in_words(budget.left_out, 0.1)
    assert Budget(None, clock=clock).affords("distance", 1e9)


# what an account that affords so much lets the monitor log
ALWAYS = {"loss_gap", "cost/overhead"}
CASES = {
    "nothing": ((), ALWAYS),
    "linearised": (("linearised",), ALWAYS | {"distance/linearised", "quality/linear_residual"}),
    "drift": (("window",), ALWAYS | {"drift/cosine", "drift/null_cosine"}),
    "distance": (("window", "distance"), ALWAYS | {"drift/cosine", "distance/measured"}),
    "all": (("window", "distance", "limit", "steps"), ALWAYS | {"distance/predicted", "limit/cosine"}),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_dropped_first(name, monkeypatch):
    afforded, tags = CASES[name]

    def affords(self, kind, expected):
        if kind not in afforded:
            self.left_out[kind] = 1
        return kind in afforded

    monkeypatch.setattr(Budget, "affords", affords)
    recorder = Recorder()
    monitor = SingularLimitMonitor(window=10)
    trained, _ = fit(seeded(Net), monitor, steps=40, logger=recorder)
    logged = {tag.removeprefix("singlim/") for _, metrics in recorder.points for tag in metrics}
    assert tags <= logged
    assert ("drift/cosine" in logged) == ("window" in afforded)
    assert ("distance/measured" in logged) == ("distance" in afforded)
    assert ("limit/cosine" in logged) == ("limit" in afforded)
    assert ("these were left out" in monitor.verdict) == (name != "all")
    assert ("distance/linearised" in logged) == bool({"linearised", "distance"} & set(afforded))
    assert ("The distance was not measured" in monitor.verdict) == (not {"linearised", "distance"} & set(afforded))
    alone, _ = fit(seeded(Net), steps=40, logger=Recorder())
    assert torch.equal(weights(trained), weights(alone))


def test_explicit_probes_are_made_whatever_they_cost():
    assert SingularLimitMonitor(window=5, every_n_steps=5, max_overhead=0.01).max_overhead is None
    with pytest.raises(ValueError, match="max_overhead must be a positive share"):
        SingularLimitMonitor(max_overhead=0.0)


def test_expected_seconds_follow_from_one_gradient(monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr("torch_singlim.measure.budget.time.perf_counter", lambda: float(next(ticks)))
    net = nn.Sequential(nn.Linear(50, 100), nn.Tanh(), nn.Linear(100, 10))
    problem = ZeroLossProblem(net, "mse", torch.randn(100, 50), torch.randn(100, 10))
    expected = expected_seconds(problem, window=1000, num_draws=8)  # a gradient takes one tick
    assert expected["window"] == 600
    assert expected["steps"] == 8000
    assert expected["limit"] == 96
    assert expected_seconds(problem, window=1000, num_draws=8, runs=4.0)["window"] == 4600
    # three eigendecompositions of 1,000 x 1,000 at the gradient's operations per second, and 300 products
    rate = 3 * 100 * problem.flops
    assert expected["distance"] == pytest.approx(300 + 3 * 1e10 / rate, rel=0.1)
