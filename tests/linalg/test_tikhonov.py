"""Regularised least squares against dense linear algebra."""

import pytest
import torch

from torch_singlim.linalg import tikhonov


@pytest.fixture
def dense():
    generator = torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(torch.randn(30, 30, generator=generator, dtype=torch.float64))[0]
    B = Q[:20] * torch.logspace(0, -3, 20, dtype=torch.float64)[:, None]
    return B, torch.randn(20, generator=generator, dtype=torch.float64)


def whole(B, r):
    *_, last = tikhonov(lambda y: B @ (B.T @ y), r, max_steps=40)
    return last


@pytest.mark.parametrize("mu", [1e-4, 1e-2, 1.0])
def test_the_minimiser_is_that_of_the_dense_problem(dense, mu):
    B, r = dense
    found = whole(B, r)
    y = torch.linalg.solve(B @ B.T + mu * torch.eye(20, dtype=torch.float64), r)
    torch.testing.assert_close(found.dual(mu), y, rtol=1e-8, atol=1e-10)
    u = torch.linalg.lstsq(
        torch.cat([B, mu**0.5 * torch.eye(30, dtype=torch.float64)]),
        torch.cat([-r, torch.zeros(30, dtype=torch.float64)])[:, None],
    ).solution[:, 0]
    assert found.length(mu) == pytest.approx(u.norm().item(), rel=1e-8)
    assert found.residual(mu) == pytest.approx((r + B @ u).norm().item(), rel=1e-8)
    assert found.error(mu) < 1e-8


def test_the_regularisation_leaves_the_residual_that_was_asked_for(dense):
    B, r = dense
    found = whole(B, r)
    for share in (0.9, 0.3, 0.05):
        mu = found.regularisation(share * r.norm().item())
        assert found.residual(mu) == pytest.approx(share * r.norm().item(), rel=1e-9)
    assert found.residual(found.regularisation(1e9)) == pytest.approx(r.norm().item(), rel=1e-9)  # more than there is


def test_the_error_of_a_small_krylov_space_is_its_residual(dense):
    B, r = dense
    first = next(iter(tikhonov(lambda y: B @ (B.T @ y), r, max_steps=40)))
    mu = 1e-2
    y = first.dual(mu)
    rest = B @ (B.T @ y) + mu * y - r
    assert first.error(mu) == pytest.approx((rest.norm() / (mu * y.norm())).item(), rel=1e-8)
