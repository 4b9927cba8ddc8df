"""How the drift scales: the exponents of step size and noise level in a measured rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import torch

from torch_singlim.linalg import Estimate

__all__ = ["Exponents", "Rate", "Scaling", "fit_exponents", "scaling_table"]


@dataclass(frozen=True)
class Rate:
    """Motion along Gamma per optimizer step, measured at one step size and noise level.

    Args:
        alpha: step size.
        sigma: noise level.
        measured: the rate with its standard error: that of the drift in weight norm per step, or that of the spread in
            squared weight norm per step.
        predicted: the same by the singular limit.
    """

    alpha: float
    sigma: float
    measured: Estimate
    predicted: float


@dataclass(frozen=True)
class Exponents:
    """The fit rate = c alpha^a sigma^b: a and b with standard errors.

    Args:
        alpha: a.
        sigma: b.
        misfit: root of chi^2 per degree of freedom; if it is above 1, the standard errors are multiplied by it.
    """

    alpha: Estimate
    sigma: Estimate
    misfit: float

    def interval(self, which: str, *, level: float, comparisons: int = 1) -> tuple[float, float]:
        """Confidence interval of "alpha" or "sigma". With several comparisons it is wider, so that all intervals
        hold simultaneously at this level (Bonferroni).
        """
        tail = (1 - level) / (2 * comparisons)
        width = NormalDist().inv_cdf(1 - tail)
        exponent: Estimate = getattr(self, which)
        return exponent.mean - width * exponent.stderr, exponent.mean + width * exponent.stderr


def fit_exponents(rates: Sequence[Rate], *, remainder: float = 0.05) -> Exponents:
    """Fit a power law to rates by least squares, with a prior for the terms that the limit neglects.

        log rate = log c + a log alpha + b log sigma + p alpha/alpha_max + q (sigma/sigma_max)^2
        p, q ~ N(0, remainder^2)

    The theorems are about alpha, sigma -> 0. At finite values the next terms change the rate by a few percent. If the
    data are more precise than that, they determine p and q; otherwise the intervals of a and b grow accordingly.

    Args:
        rates: at least four, at two step sizes and two noise levels or more.
        remainder: relative change of the rate by the next terms at the largest step size and noise level (one standard
            deviation).

    Raises:
        ValueError: too few rates, or a rate that is not positive.

    >>> grid = [(a, s) for a in (0.1, 0.2) for s in (0.1, 0.3)]
    >>> fit = fit_exponents([Rate(a, s, Estimate(3 * a**2 * s, 1e-6), 0.0) for a, s in grid])
    >>> round(fit.alpha.mean, 3), round(fit.sigma.mean, 3)
    (2.0, 1.0)
    """
    if len(rates) < 4 or len({r.alpha for r in rates}) < 2 or len({r.sigma for r in rates}) < 2:
        raise ValueError(
            f"two exponents need at least four rates, at two step sizes and two noise levels or more, got {len(rates)}"
        )
    if not all(r.measured.mean > 0 and r.measured.stderr > 0 for r in rates):
        raise ValueError("a power law can only be fitted to positive rates with positive standard errors")
    if not remainder > 0:
        raise ValueError(f"the remainder must be positive, got {remainder}")
    largest = max(r.alpha for r in rates), max(r.sigma for r in rates)
    rows, values, weights = [], [], []
    for r in rates:
        rows.append([1.0, math.log(r.alpha), math.log(r.sigma), r.alpha / largest[0], (r.sigma / largest[1]) ** 2])
        values.append(math.log(r.measured.mean))
        weights.append(r.measured.mean / r.measured.stderr)  # 1 / error of the logarithm
    X, y, weight = (torch.tensor(data, dtype=torch.float64) for data in (rows, values, weights))
    prior = torch.eye(5, dtype=torch.float64)[3:] / remainder
    A = torch.cat([weight[:, None] * X, prior])
    coefficients = torch.linalg.lstsq(A, torch.cat([weight * y, y.new_zeros(2)])[:, None]).solution[:, 0]
    misfit = math.sqrt((weight * (y - X @ coefficients)).square().sum().item() / max(len(rates) - 3, 1))
    errors = torch.linalg.inv(A.T @ A).diagonal().sqrt() * max(misfit, 1.0)
    _, a, b, _, _ = coefficients.tolist()
    _, da, db, _, _ = errors.tolist()
    return Exponents(Estimate(a, da), Estimate(b, db), misfit)


@dataclass(frozen=True)
class Scaling:
    """One system: its measured rates, the fitted exponents, and the exponents of the theorem."""

    name: str
    rates: tuple[Rate, ...]
    fit: Exponents
    expected: tuple[int, int]

    def holds(self, *, tolerance: float, level: float, comparisons: int) -> bool:
        """Whether both exponents are within `tolerance` of the theorem's and their intervals contain these."""
        ok = True
        for which, truth in zip(("alpha", "sigma"), self.expected, strict=True):
            low, high = self.fit.interval(which, level=level, comparisons=comparisons)
            fitted: Estimate = getattr(self.fit, which)
            ok = ok and low <= truth <= high and abs(fitted.mean - truth) <= tolerance
        return ok


def scaling_table(scalings: Sequence[Scaling], *, level: float = 0.95) -> str:
    """A markdown table of the fitted exponents and the theorem's; all intervals hold simultaneously at `level`."""
    comparisons = 2 * len(scalings)
    lines = [
        "| noise | a (step size) | theory | b (noise) | theory | measured/limit |",
        "|:---|---:|---:|---:|---:|---:|",
    ]
    for s in scalings:
        cells = []
        for which, truth in zip(("alpha", "sigma"), s.expected, strict=True):
            low, high = s.fit.interval(which, level=level, comparisons=comparisons)
            cells.append(f"{getattr(s.fit, which).mean:.3f} [{low:.2f}, {high:.2f}] | {truth}")
        ratios = [r.measured.mean / r.predicted for r in s.rates]
        lines.append(f"| {s.name} | {' | '.join(cells)} | {min(ratios):.3f} to {max(ratios):.3f} |")
    return "\n".join(lines)
