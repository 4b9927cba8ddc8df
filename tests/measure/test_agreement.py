"""The noise ratio on displacements made to order."""

import math

import pytest
import torch

from torch_singlim.measure import noise_ratio


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
