"""Noise ratio and jackknife on displacements made to order."""

import math

import pytest
import torch

from torch_singlim import compare
from torch_singlim.measure.agreement import jackknife, noise_ratio


def test_the_noise_ratio_is_the_share_of_the_induced_drift():
    generator = torch.Generator().manual_seed(0)
    baseline, induced = torch.randn(2, 500, generator=generator, dtype=torch.float64)
    across = torch.randn(3, 500, generator=generator, dtype=torch.float64)
    across -= (across @ induced)[:, None] * induced / induced.square().sum()
    shares = (0.8, 1.0, 1.3)
    runs = [baseline + s * induced + 10 * a for s, a in zip(shares, across, strict=True)]
    found = noise_ratio(runs, baseline + induced, baseline)
    assert found.mean == pytest.approx(0.8)
    assert found.stderr == pytest.approx(torch.tensor(shares).std().item())
    assert math.isnan(noise_ratio(runs[:1], baseline + induced, baseline).stderr)
    assert math.isnan(noise_ratio(runs, baseline, baseline).mean)


def test_the_jackknife_finds_the_scatter_of_repetitions():
    """Parts with independent errors of known size: its mean over many windows is the true standard deviation."""
    generator = torch.Generator().manual_seed(0)
    predicted = torch.randn(8, 50, generator=generator, dtype=torch.float64) + 1
    found, speeds, cosines = [], [], []
    for _ in range(300):
        measured = predicted + 2 * torch.randn(8, 50, generator=generator, dtype=torch.float64)
        found.append(jackknife(list(measured.cumsum(0)), list(predicted.cumsum(0))))
        whole = compare(measured.sum(0), predicted.sum(0))
        speeds.append(whole.speed)
        cosines.append(whole.cosine)
    stated = math.sqrt(sum(f.speed**2 for f in found) / len(found))
    assert stated == pytest.approx(torch.tensor(speeds).std().item(), rel=0.3)
    stated = math.sqrt(sum(f.cosine**2 for f in found) / len(found))
    assert 0.7 < stated / torch.tensor(cosines).std().item() < 3  # conservative: a part is a shorter window
    assert math.isnan(jackknife(list(measured[:1]), list(predicted[:1])).cosine)
    without = [compare(measured.sum(0) - m, predicted.sum(0) - q) for m, q in zip(measured, predicted, strict=True)]
    by_hand = torch.tensor([agreement.cosine for agreement in without]).std(correction=0).item() * math.sqrt(7)
    assert found[-1].cosine == pytest.approx(by_hand, rel=1e-6)
