"""Nearest point, tangent space and spectrum against dense linear algebra and a general constrained optimiser."""

import pytest
import torch

from tests.problems import DTYPE, NAMES, make
from torch_singlim import nearest_point, tangent_space
from torch_singlim.geometry import TangentSpace, linearised_displacement
from torch_singlim.linalg import KrylovFactored, LinearOperator


def displaced(w, size, seed=0):
    return w + size * torch.randn(w.shape, generator=torch.Generator().manual_seed(seed), dtype=DTYPE)


@pytest.fixture(params=["eigenvectors", "cholesky", "products"])
def max_dense(request, monkeypatch):
    """Each of the ways to solve with K = B B^T."""
    if request.param == "products":
        monkeypatch.setattr("torch_singlim.network.problem.worth_factoring", lambda problem: False)
    return 4096 if request.param == "eigenvectors" else 0


@pytest.mark.parametrize("name", NAMES)
def test_tangent_space_is_the_kernel_of_H(name, max_dense):
    dense, w = make(name)
    T = tangent_space(dense.problem, w, max_dense=max_dense, rtol=1e-12)
    H = dense.gauss_newton(w)
    values, vectors = torch.linalg.eigh(H)
    kept = values > 1e-11 * values[-1]
    assert T.rank == int(kept.sum())
    torch.testing.assert_close(T.spectrum(), values[kept].flip(0), rtol=1e-6, atol=0)
    P = torch.stack([T.project(e) for e in torch.eye(len(w), dtype=DTYPE)], 1)
    kernel = vectors[:, ~kept]
    torch.testing.assert_close(P, kernel @ kernel.T, atol=1e-7, rtol=0)
    torch.testing.assert_close(P @ P, P, atol=1e-8, rtol=0)
    torch.testing.assert_close(P, P.T, atol=1e-8, rtol=0)
    B = dense.problem.linearize(w).operator.rows(w)
    assert torch.linalg.vector_norm(P @ B.T) < 1e-8
    assert T.exact
    if name == "rank_deficient":
        assert T.rank < dense.problem.num_residuals


def test_separated_part_is_the_spectral_filter():
    dense, w = make("two_layers")
    T = tangent_space(dense.problem, w)
    v = displaced(torch.zeros_like(w), 1.0)
    values, vectors = torch.linalg.eigh(dense.gauss_newton(w))
    level = 2.0 / (0.1 * 300)
    share = torch.where(values > 1e-11 * values[-1], 1 / (1 + (level / values) ** 4), 0)
    part = T.separated(v, lr=0.1, steps=300, threshold=2.0)
    torch.testing.assert_close(part, vectors @ (share * (vectors.T @ v)), atol=1e-9, rtol=0)
    assert T.num_separated(lr=0.1, steps=300, threshold=2.0) == (values >= level).sum()
    assert not T.separated(v, lr=0.1, steps=0).any()


@pytest.mark.parametrize("name", ["two_layers", "rank_deficient"])
def test_the_linearised_displacement_is_the_pseudo_inverse(name):
    dense, w = make(name)
    w = displaced(w, 0.1)
    at = dense.problem.linearize(w)
    found = linearised_displacement(dense.problem, w, rtol=1e-10, max_steps=500)
    torch.testing.assert_close(
        found.x, torch.linalg.pinv(at.operator.rows(w), rtol=1e-10) @ at.residual, rtol=0, atol=1e-7
    )
    short = linearised_displacement(dense.problem, w, max_steps=5)
    assert short.x.norm() <= found.x.norm() * (1 + 1e-9)  # it grows with the Krylov space (Hestenes & Stiefel 1952)
    residual = (at.operator.matvec(short.x) - at.residual).norm() / at.residual.norm()
    assert short.residual == pytest.approx(residual.item(), rel=1e-6)


def test_the_separation_filter_is_within_reach_of_lanczos():
    values = torch.logspace(0, -6, 1500, dtype=DTYPE)
    B = torch.diag(values.sqrt())
    H = KrylovFactored(LinearOperator.from_matrix(B), like=values, rtol=1e-4, max_steps=100, cutoff=1e-12)
    v = torch.randn(1500, dtype=DTYPE, generator=torch.Generator().manual_seed(0))
    level = 1e-2
    part = TangentSpace(H).separated(v, lr=1.0, steps=1 / level)
    torch.testing.assert_close(part, v / (1 + (level / values) ** 4), atol=0.01, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_nearest_point_is_on_gamma_and_stationary(name, max_dense):
    dense, point = make(name)
    w = displaced(point, 0.02)
    foot = nearest_point(dense.problem, w, rtol=1e-9, max_steps=60, max_dense=max_dense)
    assert foot.converged
    assert abs(dense.L(foot.point).item()) < (1e-15 if dense.loss == "cross_entropy" else 1e-20)  # log rounds
    # stationary: w - foot is normal, no part of it in the kernel of the dense Hessian
    values, vectors = torch.linalg.eigh(dense.gauss_newton(foot.point))
    tangent = vectors[:, values <= 1e-11 * values[-1]]
    assert torch.linalg.vector_norm(tangent.T @ (w - foot.point)) < 1e-6 * foot.distance
    assert foot.distance <= torch.linalg.vector_norm(w - point).item()
    J = dense.problem.linearize(w)
    B = J.operator.rows(w)
    assert foot.linearised_distance == pytest.approx(
        torch.linalg.vector_norm(torch.linalg.pinv(B, rtol=1e-8) @ J.residual).item(), rel=1e-5
    )
    assert foot.linearised_distance == pytest.approx(foot.distance, rel=0.1)


def test_nearest_point_against_penalty_descent():
    """|v - w|^2 + mu L(v), mu growing: another road to the same point (L-BFGS)."""
    dense, point = make("scalar")
    w = displaced(point, 0.05)
    v = w.clone().requires_grad_()
    for mu in (1e2, 1e4, 1e6, 1e8):
        optimiser = torch.optim.LBFGS(
            [v], lr=1, max_iter=3000, tolerance_grad=1e-14, tolerance_change=1e-18, line_search_fn="strong_wolfe"
        )

        def closure(optimiser=optimiser, mu=mu):
            optimiser.zero_grad()
            value = (v - w).square().sum() + mu * dense.L(v)
            value.backward()
            return value

        optimiser.step(closure)
    foot = nearest_point(dense.problem, w, rtol=1e-10, max_steps=60)
    assert foot.distance == pytest.approx(torch.linalg.vector_norm(v.detach() - w).item(), rel=1e-4)
    torch.testing.assert_close(foot.point, v.detach(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_exactly_on_gamma(name):
    dense, w = make(name)
    foot = nearest_point(dense.problem, w)
    assert (foot.distance, foot.linearised_distance, foot.converged, foot.steps) == (0.0, 0.0, True, 0)
    assert torch.equal(foot.point, w)


def test_what_was_not_found_is_said():
    dense, w = make("two_layers")
    foot = nearest_point(dense.problem, displaced(w, 2.0), max_steps=1)
    assert not foot.converged
    assert foot.steps == 1
    assert foot.residual > 1e-6


def test_bad_weights():
    dense, w = make("scalar")
    with pytest.raises(ValueError, match="nan or infinity"):
        nearest_point(dense.problem, w / 0)
    with pytest.raises(ValueError, match="24 weights in one vector"):
        nearest_point(dense.problem, w[:3])
