"""The recipe on the singular limit, at the size of a test, and its fits."""

import dataclasses
import math

import pytest

from recipes import limit
from torch_singlim import Estimate

FLIPS, LANGEVIN = limit.SYSTEMS["label_flips"], limit.SYSTEMS["langevin"]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """A small network, two noises over a short slow time."""
    monkeypatch.setattr(limit, "HIDDEN", 16)
    monkeypatch.setattr(limit, "REST", 20)
    names = {"dropout": 0.02, "label_noise": 0.02}
    systems = {key: dataclasses.replace(limit.SYSTEMS[key], slow_time=time) for key, time in names.items()}
    monkeypatch.setattr(limit, "SYSTEMS", systems)
    monkeypatch.setattr(limit, "SIZES", {"quick": ((4, 8), (5, 20)), "default": ((4,), (5,)), "full": ((4,), (5,))})


def test_quick(tmp_path, capsys):
    limit.main(samples=4, out=tmp_path, quick=True, check=False)
    printed = capsys.readouterr().out
    assert printed.count("| dropout |") == printed.count("| label noise |") == 2
    assert "| 8 | 20 |" in printed
    assert "minibatches of 5 alone: distance" in printed
    assert (tmp_path / "limit.png").stat().st_size > 10_000
    assert "| dropout |" in (tmp_path / "limit.md").read_text()


def test_default_sweeps_the_step_size_too(tmp_path, capsys):
    limit.main(samples=4, runs=2, systems="dropout", out=tmp_path, check=False)
    printed = capsys.readouterr().out
    assert printed.count("| dropout |") == 3
    assert "over the step size, of the limit, 2 values" in printed


def test_flips_train_with_cross_entropy_and_are_swept_by_their_steps(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(limit, "SYSTEMS", {"label_flips": dataclasses.replace(FLIPS, slow_time=0.05)})
    limit.main(samples=4, runs=2, systems="label_flips", out=tmp_path, check=False)
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| label flips |")]
    assert [row[1] for row in rows] == ["0.2", "0.2"]
    assert float(rows[0][2]) == pytest.approx(2 * float(rows[1][2]), rel=0.01)


def test_of_langevin_noise_the_variance_is_compared():
    run = limit.train(LANGEVIN, LANGEVIN.sigma, samples=4, runs=4, seed=0)
    cell = limit.judge(LANGEVIN, LANGEVIN.sigma, run)
    assert math.isnan(cell.cosine)
    assert cell.speed.mean == pytest.approx(1, abs=4 * cell.speed.stderr)
    assert "| - | - |" in limit.limit_table([cell])
    assert not any("cosine" in promise for promise in limit.promises([cell], []))


def test_exponents_are_recovered_and_noise_gives_none():
    xs = (1.0, 2.0, 4.0)
    p = limit.rate(xs, [Estimate(0.1 * x**2, 0.01 * x**2) for x in xs])
    assert p is not None
    assert p.mean == pytest.approx(2)
    assert p.stderr == pytest.approx(0.1 / math.sqrt(2 * math.log(2) ** 2), rel=1e-6)
    assert limit.rate(xs, [Estimate(0.1, 0.2)] * 3) is None
