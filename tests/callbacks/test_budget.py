"""What the monitor measures in the time that it is allowed."""

import math

import pytest

from tests.zoo import Net, Recorder, Trace, assert_identical, fit, monitor_of, seeded, tags_of
from torch_singlim import SingularLimitMonitor
from torch_singlim.measure import Account, Budget, Code

# what is logged whatever is afforded, and what each affords
ALWAYS = {"cost/overhead", "window/steps", "window/status", "drift/measured"}
CLOCK = {"clock/step_size", "clock/noise_level", "clock/slow_time", "clock/time_scale"}
CASES = {
    "nothing": ((), set()),
    "excess loss": (("loss",), {"excess_loss"}),
    "check": (("loss", "check"), {"excess_loss"}),
    "half": (("half",), {"distance/half", "distance/half_linear"}),
    "levels": (("loss", "half", "tenth", "hundredth"), {"distance/half", "distance/tenth", "distance/hundredth"}),
    "paths": (("paths",), {"drift/cosine", "drift/baseline_cosine"}),
    "distance": (("loss", "check", "distance"), {"distance/nearest"}),
    "all": (
        ("loss", "half", "tenth", "hundredth", "stability", "check", "paths", "distance", "limit", "flow"),
        {"drift/cosine", "distance/relaxed_expected", "limit/frozen_cosine"},
    ),
}


def fitted(monitor):
    """What was logged of a training that is not changed."""
    model, plain, watched, recorder = seeded(Net), Trace(), Trace(), Recorder()
    fit(model, plain, steps=20)
    fit(model, monitor, watched, steps=20, logger=recorder)
    assert_identical(plain, watched)
    assert dict(recorder.of_monitor()) == monitor.history
    return tags_of(monitor)


@pytest.mark.parametrize("name", CASES)
def test_what_is_dropped_first(name, monkeypatch):
    afforded, tags = CASES[name]

    class Allowing(Budget):
        """Affords this, whatever it costs."""

        def affords(self, kind, *, part=1.0):
            return kind in afforded or self.skip(kind)

        def left(self, account):
            return math.inf if account is Account.GEOMETRY or "paths" in afforded else 0.0

    monkeypatch.setattr("torch_singlim.callbacks.start.Budget", Allowing)
    monitor = SingularLimitMonitor(window=10, num_draws=2)
    logged = fitted(monitor)
    assert ALWAYS | CLOCK | tags <= logged
    assert ("excess_loss" in logged) == ("loss" in afforded)
    assert ("drift/cosine" in logged) == ("paths" in afforded)
    assert ("distance/nearest" in logged) == ("distance" in afforded)
    assert ("limit/frozen_cosine" in logged) == ("limit" in afforded)
    assert ("Skipped: to keep measurements below 15 s and 10% of the wall time" in monitor.verdict) == (name != "all")
    for level in ("half", "tenth", "hundredth"):
        assert (f"distance/{level}" in logged) == (level in afforded)
    measured = bool({"half", "distance"} & set(afforded))
    assert ("The distance was not measured" in monitor.verdict) == (not measured)


def test_no_time_at_all():
    """The excess loss, the motion of the weights and the clock, which cost nothing."""
    monitor = monitor_of(max_overhead=0)
    assert fitted(monitor) == ALWAYS | CLOCK | {"excess_loss"}
    assert list(monitor.reasons) == []
    assert monitor.engine.budget.reason.code is Code.LOSS_ALONE
    assert "Skipped: with max_overhead=0, all but the excess loss" in monitor.verdict
    assert monitor.last_distance is None


def test_steps_that_are_asked_for_are_measured_whatever_they_cost():
    monitor = SingularLimitMonitor(window=5, every_n_steps=5, max_overhead=0.01, num_draws=2)
    fit(seeded(Net), monitor, steps=5)
    assert {"distance/nearest", "limit/frozen_cosine", "drift/cosine"} <= monitor.history[5].keys()
    assert monitor.engine.budget.reason is None
