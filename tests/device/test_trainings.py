"""Trainings on another device are measured, followed and refused as on the CPU, and none is changed by a monitor."""

import dataclasses

import pytest
import torch

from tests.callbacks import test_coupling as coupling
from tests.callbacks import test_setups as setups
from tests.callbacks.setups import MEASURED, NO_PROBLEM, RAISES, UNSUPPORTED
from tests.device.fake_device import random_numbers_of_the_cpu
from tests.device.training import assert_same_path, largest_difference, on_device
from tests.zoo import Trace, assert_identical, monitor_of
from torch_singlim import LabelNoise

RTOL = 1e-6
TABLE = RAISES | {f"{name} (no problem)": case for name, case in NO_PROBLEM.items()} | UNSUPPORTED | MEASURED
# the rest is slow
OFTEN = {
    *RAISES,
    "wrong derivatives (no problem)",
    "bf16-mixed",
    "injected noise",
    "dict batches with noise",
}

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # Lightning's own, about trainings this small


def rows(names, often):
    return [name if name in often else pytest.param(name, marks=pytest.mark.slow) for name in names]


def outcome(case):
    """All that is said, the figures, and the training."""
    monitor = monitor_of(**case.monitor)
    try:
        trace, _ = setups.run(case, monitor)
    except ValueError as error:
        return [str(error)], {}, Trace()
    return list(monitor.reasons), monitor.history, trace


@pytest.mark.parametrize("name", rows(TABLE, OFTEN))
def test_every_set_up_has_the_outcome_that_it_has_on_the_cpu(name):
    """With the random numbers of the CPU: the same training, the same figures, the same refusals."""
    case = TABLE[name]
    said, figures, trace = outcome(case)
    with random_numbers_of_the_cpu():
        said_there, figures_there, trace_there = outcome(dataclasses.replace(case, trainer=on_device(case.trainer)))
    assert [getattr(each, "code", each) for each in said_there] == [getattr(each, "code", each) for each in said]
    assert_same_path(trace, trace_there)
    assert largest_difference(figures, figures_there) <= (RTOL,)


# --- paths beside the training -------------------------------------------------------------------------------------


# torch's compiler writes no code for the device; set-ups with its backend "eager" are in the table above
HABITS = {name: case for name, case in coupling.FOLLOWED.items() if "compiled" not in name} | {
    "label noise, injected": {"make": coupling.still, "callbacks": [lambda: coupling.InjectNoise(LabelNoise(0.1))]},
    "minibatches alone": {"make": coupling.still},
    "adam": {"make": coupling.changed(configure_optimizers=lambda self: torch.optim.Adam(self.parameters(), 1e-3))},
    "bf16-true": {"options": {"precision": "bf16-true"}},
}
FOLLOWED_OFTEN = {
    "label noise, injected",
    "momentum, decay",
    "16-mixed",
}


def follow(case, *, device=True, watch=True):
    options = case.get("options", {})
    options = options() if callable(options) else options
    options = (on_device(options) if device else options) | {"steps": 24, "window": 10}
    return coupling.run(case | {"options": options}, watch=watch)


def replay_errors(monitor):
    return [point["window/replay_error"] for point in monitor.history.values() if "window/replay_error" in point]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", rows(HABITS, FOLLOWED_OFTEN))
def test_habits_are_followed_as_on_the_cpu(name):
    """Replayed as exactly, with the same figures; with random numbers of the device's own, nothing is disturbed."""
    case = HABITS[name]
    here, trace = follow(case, device=False)
    with random_numbers_of_the_cpu():
        there, trace_there = follow(case)
    assert_same_path(trace, trace_there)
    assert largest_difference(here.history, there.history) <= (RTOL,)
    assert replay_errors(there) == replay_errors(here)
    assert replay_errors(here)

    own, trace_own = follow(case)
    assert max(replay_errors(own)) < 1e-5
    assert_identical(trace_own, follow(case, watch=False)[1])
