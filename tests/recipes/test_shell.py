"""A recipe's exit at the shell: what it says if nothing was compared, or if theory and training disagree."""

from types import SimpleNamespace

import pytest
import torch

from recipes.shell import compared_window, require
from torch_singlim import Comparison, Model, SingularLimitMonitor, Window, compare
from torch_singlim.measure import Code

MOTION = torch.ones(3)
BASELINE = Comparison(compare(MOTION, MOTION))


def monitor(window, *reasons):
    return SimpleNamespace(last_window=window, reasons=reasons)


def test_no_window_was_completed():
    with pytest.raises(SystemExit, match="nothing was compared with the theory: no window was completed"):
        compared_window(SingularLimitMonitor())


def test_a_window_without_prediction_gives_the_reasons():
    with pytest.raises(SystemExit, match="expected one optimizer, got 2"):
        compared_window(monitor(Window(0, 20, 1.0), Code.SEVERAL_OPTIMIZERS(count=2)))
    with pytest.raises(SystemExit, match="nothing was compared"):
        compared_window(monitor(Window(0, 20, 1.0, comparisons={Model.BASELINE: BASELINE})))


def test_a_window_with_a_prediction():
    drift = Window(0, 20, 1.0, comparisons={Model.BASELINE: BASELINE, Model.AVERAGED: BASELINE})
    diffusing = Window(0, 20, 1.0, comparisons={Model.BASELINE: BASELINE}, diffuses=True)
    assert compared_window(monitor(drift)) is drift
    assert compared_window(monitor(diffusing)) is diffusing


def test_what_was_missed_is_named(capsys):
    require({"the first": True, "the second": True})
    assert "agreement with the theory: the first; the second" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"disagreement with the theory; missed: the second$"):
        require({"the first": True, "the second": False})
