"""The classes of noises: the decision on motions that are known, and the recipe at the size of a test."""

import math

import pytest
import torch

from recipes import classification
from recipes.classification import DIFFUSING, FIRST, REST, SECOND

RUNS, WEIGHTS = 400, 30
DRIFT = torch.nn.functional.normalize(torch.arange(1.0, WEIGHTS + 1).double(), dim=0)


def motions(clock, sigma_exponent, *, drift, spread):
    """K, 4 K and 2 K steps: the drift is ~ K alpha^clock sigma^2, the variance ~ sigma^s at fixed K sigma^2."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for drifts, variances in ((1, 1), (1, 2.0**-sigma_exponent), (2.0 ** (1 - clock), 2.0 ** (1 - clock))):
        noise = torch.randn(RUNS, WEIGHTS, generator=generator, dtype=torch.float64) / math.sqrt(WEIGHTS)
        found.append(drifts * drift * DRIFT + math.sqrt(variances) * spread * noise)
    return found


@pytest.mark.parametrize(
    ("clock", "s", "drift", "spread", "expected"),
    [
        (1, 2, 0.1, 0.01, FIRST),
        (1, 0, 0.1, 0.05, FIRST),  # dropout: its variance does not fall with the level
        (2, 2, 0.1, 0.01, SECOND),
        (2, 0, 0.01, 0.1, DIFFUSING),
        (2, 0, 0.1, 0.1, DIFFUSING),
        (1, 0, 1e-6, 1e-6, REST),
    ],
)
def test_classes(clock, s, drift, spread, expected):
    found = classification.measured(motions(clock, s, drift=drift, spread=spread), 1e-3)
    assert found[0] == expected
    if expected != REST:
        assert found[1] == pytest.approx(clock, abs=0.1)
        assert found[2] == pytest.approx(s, abs=0.1)


def test_copies_halve_the_noise_and_leave_the_loss():
    system = classification.SYSTEMS["label flips"]
    one, four = (classification.random_problem(system, system.sigma, copies, 3) for copies in (1, 4))
    w = one.weights()
    assert four.num_samples == 4 * one.num_samples
    assert torch.equal(w, four.weights())
    assert four.loss(w).item() == pytest.approx(one.loss(w).item(), rel=1e-12)


def test_quick(tmp_path, capsys, monkeypatch):
    systems = {name: classification.SYSTEMS[name] for name in ("DropConnect", "label flips", "Langevin", "minibatches")}
    monkeypatch.setattr(classification, "SYSTEMS", systems)
    monkeypatch.setattr(classification, "MOST", 20)
    classification.main(runs=4, out=tmp_path, quick=True, check=False)
    printed = capsys.readouterr().out
    assert "| DropConnect | order 1 |" in printed
    assert "| label flips | order 2, deterministic |" in printed
    assert "| Langevin | order 2, diffusing | order 2, diffusing |" in printed
    assert "| minibatches | rest |" in printed
    assert (tmp_path / "classification.png").stat().st_size > 10_000
    assert "| Langevin |" in (tmp_path / "classification.md").read_text()
