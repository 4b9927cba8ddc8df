"""What was measured against what was predicted, on displacements made to order."""

import math
from dataclasses import replace

import pytest
import torch

from tests.problems import make
from torch_singlim import AntiCorrelated, Dropout, Langevin, SGDSettings, compare
from torch_singlim.measure.agreement import jackknife, noise_pull
from torch_singlim.measure.distance import observe, observe_window
from torch_singlim.measure.verdict import verdict, window_scalars


def test_the_pull_of_the_noise_is_its_share_of_the_motion():
    generator = torch.Generator().manual_seed(0)
    null, pull = torch.randn(2, 500, generator=generator, dtype=torch.float64)
    across = torch.randn(3, 500, generator=generator, dtype=torch.float64)
    across -= (across @ pull)[:, None] * pull / pull.square().sum()
    shares = (0.8, 1.0, 1.3)
    runs = [null + s * pull + 10 * a for s, a in zip(shares, across, strict=True)]
    found = noise_pull(runs, null + pull, null)
    assert found.mean == pytest.approx(0.8)
    assert found.stderr == pytest.approx(torch.tensor(shares).std().item())
    assert math.isnan(noise_pull(runs[:1], null + pull, null).stderr)
    assert math.isnan(noise_pull(runs, null, null).mean)


def test_a_diffusing_noise_has_a_length_and_no_flow():
    """A window whose end is put where the limit says the ensemble is, on average: the two lengths are equal."""
    dense, w = make("two_layers")
    problem, noise, sgd = dense.problem, Langevin(0.01), SGDSettings(lr=0.05)
    start = observe(problem, w, step=0, noise=noise, sgd=sgd, num_draws=1000)
    steps = 50
    tangential = start.tangent.project(torch.randn(len(w), generator=torch.Generator().manual_seed(0)).double())
    length = math.hypot(steps * start.limit.drift.norm().item(), start.limit.spread(steps))
    end = w + length * tangential / tangential.norm()
    window = observe_window(problem, w, end, start=0, stop=steps, noise=noise, sgd=sgd, forecast=start.forecast)
    assert window.flow is None
    assert window.drift is None
    assert window.spread.measured == pytest.approx(window.spread.predicted, rel=1e-6)
    scalars = window_scalars(window)
    assert "singlim/drift/cosine" not in scalars
    assert scalars["singlim/limit/spread_measured"] == pytest.approx(length, rel=1e-6)


def test_what_the_weights_carry_does_not_drift():
    dense, w = make("scalar")
    carried = torch.linspace(-0.1, 0.1, len(w), dtype=w.dtype)
    seen = observe(
        dense.problem, w + carried, step=5, noise=AntiCorrelated(0.1), sgd=SGDSettings(lr=0.05), carried=carried
    )
    torch.testing.assert_close(seen.drifting, w)
    torch.testing.assert_close(seen.weights, w + carried)
    plain = observe(dense.problem, w, step=5)
    assert plain.drifting is plain.weights


def test_a_verdict_without_drift_is_a_table_still():
    history = {
        0: {"singlim/loss_gap": 1.0, "singlim/distance/measured": 2.0, "singlim/quality/converged": 1.0},
        10: {
            "singlim/loss_gap": 0.5,
            "singlim/distance/measured": 1.0,
            "singlim/quality/converged": 1.0,
            "singlim/drift/window": 10.0,
        },
    }
    assert "| 0-10 | - | - | - | - | - | - | - |" in verdict(history)


def test_the_jackknife_tells_the_scatter_of_repetitions():
    """Parts with independent errors of known size: its mean over many windows is the true standard deviation."""
    generator = torch.Generator().manual_seed(0)
    predicted = torch.randn(8, 50, generator=generator, dtype=torch.float64) + 1
    found, speeds, cosines = [], [], []
    for _ in range(300):
        measured = predicted + 2 * torch.randn(8, 50, generator=generator, dtype=torch.float64)
        found.append(jackknife(list(measured.cumsum(0)), list(predicted.cumsum(0))))
        whole = compare(measured.sum(0), predicted.sum(0))
        speeds.append(whole.speed_ratio)
        cosines.append(whole.cosine)
    told = math.sqrt(sum(f.speed_ratio**2 for f in found) / len(found))
    assert told == pytest.approx(torch.tensor(speeds).std().item(), rel=0.3)
    told = math.sqrt(sum(f.cosine**2 for f in found) / len(found))
    assert 0.7 < told / torch.tensor(cosines).std().item() < 3  # conservative: a part is a shorter window
    assert math.isnan(jackknife(list(measured[:1]), list(predicted[:1])).cosine)
    left_out = [compare(measured.sum(0) - m, predicted.sum(0) - q) for m, q in zip(measured, predicted, strict=True)]
    by_hand = torch.tensor([agreement.cosine for agreement in left_out]).std(correction=0).item() * math.sqrt(7)
    assert found[-1].cosine == pytest.approx(by_hand, rel=1e-6)


def test_long_steps_that_tell_nothing_are_withdrawn():
    dense, w = make("two_layers")
    window = observe_window(
        dense.problem, w, w + 0.01, start=0, stop=400, noise=Dropout(), sgd=SGDSettings(lr=0.05), accurate=False
    )
    size = torch.linalg.vector_norm(window.prediction.displacement).item()
    for off, withdrawn in ((0.4 * size, False), (0.6 * size, True)):
        uncertain = replace(window, prediction=replace(window.prediction, stderr=off, error=1e-3 * size))
        assert (uncertain.withdrawn is not None) == withdrawn
        assert ("singlim/drift/cosine" in window_scalars(uncertain)) != withdrawn
    followed = replace(window, prediction=replace(window.prediction, stderr=size, error=0.0))
    assert followed.withdrawn is None
