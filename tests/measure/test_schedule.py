"""At which steps something is measured."""

import math

import pytest

from torch_singlim.measure import Schedule
from torch_singlim.measure.schedule import window_starts


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
    assert schedule.longest == 10


def test_marks_are_the_quarters_of_a_window():
    schedule = Schedule.of_run(window=8, every_n_steps=8, total=16)
    assert schedule.marks_of(0, 8) == {2, 4, 6}
    assert schedule.marks_of(0, 2) == {1}
    assert Schedule.between([0, 8]).marks_of(0, 8) == set()


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
    assert schedule.longest == 25
    assert schedule.losses == frozenset()


def test_the_excess_loss_is_measured_ten_times_a_decade():
    losses = Schedule.of_run(window=5, every_n_steps=None, total=100).losses
    assert {1, 2, 3, 4, 5, 6, 8, 10, 100, 1000} <= losses
    assert 7 not in losses
    assert len([step for step in losses if 100 <= step < 1000]) == 10
