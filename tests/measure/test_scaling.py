"""Exponents: against synthetic power laws with known errors, and what the intervals promise."""

import math

import pytest
import torch

from torch_singlim.linalg import Estimate
from torch_singlim.measure.scaling import Exponents, Rate, Scaling, fit_exponents, scaling_table

GRID = [(a, s) for a in (0.01, 0.02, 0.04) for s in (0.1, 0.2, 0.4)]


def synthetic(a, b, *, error, generator, bend=0.0):
    rates = []
    for alpha, sigma in GRID:
        truth = 3 * alpha**a * sigma**b * (1 + bend * alpha / 0.04)
        noise = error * torch.randn((), generator=generator, dtype=torch.float64).item()
        rates.append(Rate(alpha, sigma, Estimate(truth * (1 + noise), truth * error), truth))
    return rates


@pytest.mark.parametrize(("error", "bend"), [(0.03, 0.0), (0.03, 0.05), (0.001, 0.05)])
def test_intervals_cover_the_truth_as_often_as_they_say(error, bend):
    """Also where a term that the limit leaves out bends the law by as much as the statistical error, or far more."""
    generator = torch.Generator().manual_seed(0)
    covered = {"alpha": 0, "sigma": 0}
    for _ in range(200):
        fit = fit_exponents(synthetic(1.0, 2.0, error=error, generator=generator, bend=bend))
        for which, truth in (("alpha", 1.0), ("sigma", 2.0)):
            low, high = fit.interval(which, level=0.95)
            covered[which] += low <= truth <= high
    assert min(covered.values()) >= 180  # 95 % of 200 is 190, three standard deviations are 9


def test_a_straight_fit_against_weighted_least_squares():
    """With a remainder too small to matter it is the textbook fit, standard errors included."""
    generator = torch.Generator().manual_seed(1)
    rates = synthetic(2.0, 2.0, error=0.02, generator=generator)
    X = torch.tensor([[1, math.log(r.alpha), math.log(r.sigma)] for r in rates], dtype=torch.float64)
    y = torch.tensor([math.log(r.measured.mean) for r in rates], dtype=torch.float64)
    W = torch.diag(torch.tensor([(r.measured.mean / r.measured.stderr) ** 2 for r in rates], dtype=torch.float64))
    covariance = torch.linalg.inv(X.T @ W @ X)
    coefficients = covariance @ X.T @ W @ y
    fit = fit_exponents(rates, remainder=1e-9)
    assert fit.alpha.mean == pytest.approx(coefficients[1].item(), rel=1e-8)
    assert fit.sigma.mean == pytest.approx(coefficients[2].item(), rel=1e-8)
    scale = max(fit.misfit, 1.0)
    assert fit.alpha.stderr == pytest.approx(scale * covariance[1, 1].sqrt().item(), rel=1e-6)


def test_verdict_and_table():
    fit = Exponents(Estimate(1.02, 0.02), Estimate(2.05, 0.02), 1.0)
    scaling = Scaling("dropout", (Rate(0.1, 0.1, Estimate(0.9, 0.1), 1.0),), fit, (1, 2))
    assert not scaling.holds(tolerance=0.1, level=0.95, comparisons=1)  # 2.05 - 1.96 * 0.02 > 2
    assert scaling.holds(tolerance=0.1, level=0.95, comparisons=10)  # wider, for ten of them at once
    assert not scaling.holds(tolerance=0.04, level=0.95, comparisons=10)
    assert "| dropout | 1.020 [" in scaling_table([scaling])
    low, high = fit.interval("sigma", level=0.95)
    assert (low, high) == pytest.approx((2.05 - 1.959964 * 0.02, 2.05 + 1.959964 * 0.02), abs=1e-6)


@pytest.mark.parametrize(
    ("rates", "options", "message"),
    [
        ([], {}, "at least four rates"),
        ([Rate(0.1, s, Estimate(1.0, 0.1), 1.0) for s in (1, 2, 3, 4)], {}, "at two step sizes"),
        ([Rate(a, s, Estimate(-1.0, 0.1), 1.0) for a, s in GRID], {}, "positive rates"),
        ([Rate(a, s, Estimate(1.0, 0.1), 1.0) for a, s in GRID], {"remainder": 0.0}, "must be positive"),
    ],
)
def test_bad_rates(rates, options, message):
    with pytest.raises(ValueError, match=message):
        fit_exponents(rates, **options)
