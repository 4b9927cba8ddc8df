"""When paths are opened, and what of a window is kept: on windows and clocks made to order."""

import pytest
import torch

from tests.measure.test_budget import Clock
from torch_singlim import Snapshot
from torch_singlim.measure import Account, Budget, Schedule, StepSums
from torch_singlim.measure.windows import Windows

W = torch.zeros(3, dtype=torch.float64)


def opened(schedule, start=0, budget=None):
    """Windows of which that from `start` on has just begun."""
    windows = Windows(schedule)
    windows.turn(Snapshot(start, W, sums=StepSums(lr=1.0)), None, None, None)
    assert windows.open.start == start
    return windows


def with_time(seconds):
    """A budget that leaves so much for paths."""
    budget = Budget(1.0, clock=Clock())
    budget.clock.now = 2 * seconds - 15.0  # half of 15 s and of all the time that has passed
    assert budget.left(Account.PATHS) == pytest.approx(seconds)
    return budget


AUTO = Schedule.of_run(window="auto", every_n_steps=None, total=800)  # 0-200, 200-400, 400-600, 600-800
GIVEN = Schedule.of_run(window=200, every_n_steps=None, total=800)


def test_without_a_limit_paths_are_opened_where_the_window_begins():
    windows, free = opened(GIVEN), Budget(None)
    assert windows.opens(0, None, free) == 200
    assert windows.opens(1, 1e-9, free) is None
    assert Windows(GIVEN).opens(0, None, free) is None  # no window is in progress
    windows.give_up()
    assert windows.opens(0, None, free) is None


@pytest.mark.parametrize("schedule", [AUTO, GIVEN])
def test_windows_wait_until_there_is_time_or_become_shorter(schedule):
    """A second a step: the first of four windows may take a quarter of the time, and 50 steps of it are worth it."""
    assert opened(schedule).opens(0, None, with_time(1e6)) is None  # how long a step takes is not known yet
    for step, seconds, stop in (
        (0, 800.5, 200),
        (0, 600.5, 150),
        (0, 200.5, 50),
        (0, 198.0, None),
        (50, 601.0, 200),
        (10, 600.5, 160),
        (150, 200.5, 200),
        (151, 1e6, None),
    ):
        assert opened(schedule).opens(step, 1.0, with_time(seconds)) == stop, (step, seconds)
    assert opened(schedule).opens(0, 1.0, Budget(0.0, clock=Clock())) is None
    assert opened(schedule).opens(0, 1e-300, with_time(1.0)) == 200  # however fast


def test_the_last_window_begins_later_instead_and_takes_all_the_time():
    assert opened(AUTO, start=400).opens(400, 1.0, with_time(400.5)) == 600  # half, for the last but one
    last = opened(AUTO, start=600)
    assert last.opens(600, 1.0, with_time(200.5)) == 800
    assert last.opens(600, 1.0, with_time(199)) is None
    assert last.opens(650, 1.0, with_time(150.5)) == 800
    assert last.opens(750, 1.0, with_time(50.5)) == 800
    assert last.opens(751, 1.0, with_time(1e6)) is None


def test_a_window_with_paths_is_not_opened_again_and_ends_where_they_do():
    windows = opened(AUTO)
    windows.follow(None, None, 20, 120)
    assert windows.followed.start == 20
    assert not windows.ends(119)
    assert windows.ends(120)
    assert windows.opens(20, 1e-9, with_time(1e6)) is None
    assert [step for step in range(120) if windows.replays(step)][:3] == [21, 25, 30]  # the first, and each logged one
    windows.give_up()
    assert windows.followed is None
    assert not windows.replays(21)
    assert windows.opens(30, 1e-9, with_time(1e6)) is None


def test_a_window_that_ends_makes_room():
    windows = opened(Schedule.of_run(window=10, every_n_steps=20, total=40))
    ended = windows.open.at(Snapshot(10, W + 1))
    assert (ended.start, ended.stop, ended.measured) == (0, 10, pytest.approx(3**0.5))
    windows.turn(Snapshot(10, W + 1), None, ended, None)
    assert windows.open is None
    assert windows.last is ended
    windows.turn(Snapshot(23, W), 18, None, None)  # steps were skipped
    assert (windows.open.start, windows.open.stop) == (23, 33)
    windows.abandon(23)
    assert windows.open is not None
    windows.abandon(33)
    assert windows.open is None
