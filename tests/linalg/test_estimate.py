"""Standard errors against the spread of repeated estimates."""

import math

import pytest
import torch

from torch_singlim.linalg import Estimate, VectorEstimate, rademacher


def test_estimate_covers_at_the_stated_rate():
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(2000, 25, generator=generator, dtype=torch.float64) + 3
    estimates = [Estimate.from_draws(row) for row in draws]
    inside = sum(abs(e.mean - 3) <= 2 * e.stderr for e in estimates) / len(estimates)
    assert inside == pytest.approx(0.943, abs=0.02)  # Student's t with 24 degrees of freedom
    assert math.isnan(Estimate.from_draws(torch.ones(1)).stderr)


def test_vector_estimate_error_is_the_rms_error():
    generator = torch.Generator().manual_seed(1)
    truth = torch.linspace(-1, 1, 50, dtype=torch.float64)
    errors, stated, norms = [], [], []
    for _ in range(300):
        noise = torch.randn(4, 50, generator=generator, dtype=torch.float64)
        estimate = VectorEstimate(truth + noise)
        errors.append((estimate.mean - truth).square().sum().item())
        stated.append(estimate.stderr**2)
        norms.append(estimate.mean.square().sum().item() - estimate.stderr**2)
    assert sum(stated) / sum(errors) == pytest.approx(1, abs=0.05)
    assert sum(norms) / len(norms) == pytest.approx(truth.square().sum().item(), rel=0.05)
    assert VectorEstimate(truth[None]).stderr == 0.0


def test_rademacher_is_signs_from_the_generator():
    like = torch.zeros(1, dtype=torch.float64)
    a = rademacher((1000,), generator=torch.Generator().manual_seed(2), like=like)
    b = rademacher((1000,), generator=torch.Generator().manual_seed(2), like=like)
    assert torch.equal(a, b)
    assert set(a.tolist()) == {-1.0, 1.0}
    assert abs(a.mean().item()) < 0.1
