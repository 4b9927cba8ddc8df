"""At which steps something is measured."""

import itertools
import math

import pytest

from torch_singlim.measure import Schedule
from torch_singlim.measure.schedule import marks_of, window_starts


def test_windows_begin_at_powers_of_two_and_one_ends_with_the_run():
    assert list(window_starts(500, None, 4000)) == [0, 500, 1000, 2000, 3500]
    assert list(window_starts(500, None, 300)) == [0]
    assert list(window_starts(10, None, None))[:5] == [0, 10, 20, 40, 80]
    assert list(window_starts(10, 30, 100)) == [0, 30, 60, 90]


@pytest.mark.parametrize("total", [math.inf, -1, None])
def test_a_run_of_unknown_length_has_windows_all_the_same(total):
    """Lightning gives -1 for a stream without max_steps."""
    schedule = Schedule.of_run(window=10, every_n_steps=None, total=total)
    assert list(schedule.windows.items())[:4] == [(0, 10), (10, 20), (20, 30), (40, 50)]
    assert schedule.total is None
    assert not any(schedule.is_last(stop) or schedule.part_at(stop) == 1 for stop in schedule.windows.values())
    assert Schedule.of_run(window="auto", every_n_steps=None, total=total).windows[0] == 1000


@pytest.mark.parametrize(
    ("total", "every", "length", "shortest"),
    [
        (20, None, 20, 10),
        (100, None, 50, 25),
        (400, None, 100, 50),
        (10_000, None, 1000, 50),
        (10_000, 300, 300, 50),
        (10_000, 30, 30, 15),
        (None, 300, 300, 50),
    ],
)
def test_windows_of_automatic_length_are_a_quarter_of_the_run(total, every, length, shortest):
    """Between 50 and 1,000 steps, and never longer than the run or the steps from one window to the next.

    If there is not enough time they may be shortened, to half of their steps or to 50.
    """
    schedule = Schedule.of_run(window="auto", every_n_steps=every, total=total)
    assert {stop - start for start, stop in schedule.windows.items()} == {length}
    assert schedule.shortest == shortest


def test_a_window_of_given_length_is_as_long_as_the_run_at_most():
    assert Schedule.of_run(window=500, every_n_steps=None, total=30).windows == {0: 30}
    assert Schedule.of_run(window=20, every_n_steps=5, total=10).windows == {0: 5, 5: 10}
    given = Schedule.of_run(window=20, every_n_steps=None, total=100)
    assert (given.windows, given.shortest) == ({0: 20, 20: 40, 40: 60, 80: 100}, 10)


def test_the_last_window_ends_with_the_run():
    schedule = Schedule.of_run(window=20, every_n_steps=None, total=100)
    assert [step for step in range(101) if schedule.part_at(step) == 1] == list(range(80, 101))
    assert schedule.part_at(0) == 0.5
    assert [stop for stop in schedule.windows.values() if schedule.is_last(stop)] == [100]


def test_windows_share_the_time_evenly():
    schedule = Schedule.of_run(window=20, every_n_steps=None, total=100)
    assert [schedule.part(start) for start in schedule.windows] == [1 / 4, 1 / 3, 1 / 2, 1]
    assert Schedule.of_run(window=20, every_n_steps=None, total=None).part(0) == 0.5


def test_a_window_is_logged_at_twenty_steps():
    assert marks_of(100, 600) == set(range(125, 601, 25))
    assert marks_of(0, 8) == set(range(1, 9))
    uneven = sorted(marks_of(7, 40))
    assert len(uneven) == 20
    assert uneven[-1] == 40
    assert {b - a for a, b in itertools.pairwise(uneven)} == {1, 2}


def test_a_window_begins_when_its_step_is_passed():
    """Under manual optimization a batch makes several steps."""
    schedule = Schedule.of_run(window=5, every_n_steps=5, total=20)
    assert schedule.begins(4, 5) == 5
    assert schedule.begins(4, 6) == 5
    assert schedule.begins(5, 6) is None
    uneven = Schedule.between([0, 4, 10, 12])
    assert uneven.begins(3, 11) == 2  # of several the last


def test_between_checkpoints():
    schedule = Schedule.between([0, 5, 30])
    assert schedule.windows == {0: 5, 5: 30}
    assert (schedule.total, schedule.losses) == (None, frozenset())


def test_the_excess_loss_is_measured_ten_times_a_decade():
    losses = Schedule.of_run(window=5, every_n_steps=None, total=100).losses
    assert {1, 2, 3, 4, 5, 6, 8, 10, 100, 1000} <= losses
    assert 7 not in losses
    assert len([step for step in losses if 100 <= step < 1000]) == 10
