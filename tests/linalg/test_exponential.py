"""Linear descent against the dense matrix exponential."""

import pytest
import torch

from torch_singlim.linalg import LinearOperator, descent_norm, linear_descent, phi1, phi2

DTYPE = torch.float64


def case(name):
    g = torch.Generator().manual_seed(3)
    B = torch.randn(12, 30, generator=g, dtype=DTYPE) * torch.logspace(0.5, -3, 12, dtype=DTYPE)[:, None]
    if name == "rank_deficient":
        B[5] = B[4]
    if name == "zero":
        B = torch.zeros_like(B)
    return B, torch.randn(30, generator=g, dtype=DTYPE)


def exact(B, r, t):
    """(u, 1)' = [[-H, -r], [0, 0]] (u, 1): one matrix exponential (Van Loan 1978)."""
    n = len(r)
    A = torch.zeros(n + 1, n + 1, dtype=DTYPE)
    A[:n, :n], A[:n, n] = -B.T @ B, -r
    return torch.linalg.matrix_exp(t * A)[:n, n]


@pytest.mark.parametrize("name", ["full", "rank_deficient", "zero"])
@pytest.mark.parametrize("t", [1e-3, 1.0, 300.0])
def test_descent(name, t):
    B, r = case(name)
    descent = linear_descent(LinearOperator.from_matrix(B), r, time=t, rtol=1e-10)
    for time in (t, t / 2, 1.5 * t):
        torch.testing.assert_close(descent.at(time), exact(B, r, time), rtol=1e-7, atol=1e-9 * t)
    norm = descent_norm(LinearOperator.from_matrix(B), r, time=t, steps=12)
    assert norm == pytest.approx(exact(B, r, t).norm().item(), rel=1e-6)


def test_the_residual_bounds_the_error():
    B, r = case("full")
    for most in (3, 6, 9):
        descent = linear_descent(LinearOperator.from_matrix(B), r, time=300.0, rtol=1e-14, max_steps=most)
        truth = exact(B, r, 300.0)
        error = ((descent.at(300.0) - truth).norm() / truth.norm()).item()
        assert error <= max(2 * descent.residual, 1e-12)
        assert descent.products == pytest.approx(most + 0.5)


def test_zero_slope():
    B, r = case("full")
    assert linear_descent(LinearOperator.from_matrix(B), 0 * r, time=2.0, rtol=1e-3).at(2.0).norm() == 0


def test_phi_near_zero():
    z = torch.tensor([0.0, 1e-13, 1e-9, 1e-4, 9e-3, 1.1e-2, 1.0, 50.0], dtype=DTYPE)
    powers = [
        sum((-1) ** k * z**k / torch.lgamma(torch.tensor(k + m + 1.0, dtype=DTYPE)).exp() for k in range(12))
        for m in (1, 2)
    ]
    near = z < 2
    torch.testing.assert_close(phi1(z)[near], powers[0][near], rtol=1e-8, atol=0)
    torch.testing.assert_close(phi2(z)[near], powers[1][near], rtol=1e-8, atol=0)
