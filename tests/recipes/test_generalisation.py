"""The recipe on what the drift is good for, at the size of a test."""

import dataclasses
import math

import pytest

from recipes import generalisation
from recipes.generalisation import State
from torch_singlim import Langevin


def test_quick(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(generalisation, "HIDDEN", 16)
    systems = dict(generalisation.SYSTEMS, Langevin=generalisation.System(Langevin(0.05)))
    monkeypatch.setattr(generalisation, "SYSTEMS", systems)
    generalisation.main(noises="dropout,Langevin", samples=6, slow_time=0.002, out=tmp_path, quick=True, check=False)
    printed = capsys.readouterr().out
    assert "| dropout |" in printed
    assert "| Langevin |" in printed
    assert (tmp_path / "generalisation.png").stat().st_size > 10_000
    assert "| dropout |" in (tmp_path / "generalisation.md").read_text()


def state(seed, steps, test_error):
    return State("dropout", seed, 0.01 * steps, steps, 0.1, test_error, 1 - 0.1 * steps, 5.0, 2.0, 3.0, 0.5)


def test_changes_are_paired_within_a_seed():
    states = [state(0, 0, 0.1), state(0, 1, 0.2), state(1, 0, 0.5), state(1, 1, 0.7)]
    first, change = generalisation.changes(states, "dropout")["test error"]
    assert first.mean == pytest.approx(0.3)
    assert change.mean == pytest.approx(0.15)
    assert change.stderr == pytest.approx(0.05)
    assert generalisation.promises(states) == {"dropout: V falls": True}


def test_langevin_noise_has_no_promise():
    states = [dataclasses.replace(state(0, i, 0.1), system="Langevin", potential=math.nan) for i in (0, 1)]
    assert generalisation.promises(states) == {}
    assert "| Langevin | 1 | 0.10 |" in generalisation.summary(states)
