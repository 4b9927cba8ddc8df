"""Nearest point and linearised displacement against dense linear algebra and a general constrained optimiser."""

from dataclasses import replace

import pytest
import torch

from tests.problems import NAMES, displaced, make
from torch_singlim import Result, ZeroLossProblem, gauss_newton, linearize, nearest_point
from torch_singlim.geometry import linearised_displacement


@pytest.mark.parametrize("name", ["two_layers", "rank_deficient"])
def test_the_linearised_displacement_is_the_pseudo_inverse(name):
    dense, w = make(name)
    w = displaced(w, 0.1)
    at = linearize(dense.problem, w)
    found = linearised_displacement(dense.problem, w, rtol=1e-10, max_steps=500)
    torch.testing.assert_close(
        found.x, torch.linalg.pinv(at.operator.rows(w), rtol=1e-10) @ at.residual, rtol=0, atol=1e-7
    )
    short = linearised_displacement(dense.problem, w, max_steps=5)
    assert short.x.norm() <= found.x.norm() * (1 + 1e-9)  # it grows with the Krylov space (Hestenes & Stiefel 1952)
    residual = (at.operator.matvec(short.x) - at.residual).norm() / at.residual.norm()
    assert short.residual == pytest.approx(residual.item(), rel=1e-6)


def check(dense, problem, w, nearest):
    """On Gamma, stationary, no farther than the point that w was displaced from; by dense matrices."""
    assert nearest.converged
    assert nearest.status is Result.SUCCESSFUL
    assert abs(dense.L(nearest.point).item()) < (1e-15 if dense.loss == "cross_entropy" else 1e-20)  # log rounds
    # stationary: w - nearest is normal, no part of it in the kernel of the dense Hessian
    values, vectors = torch.linalg.eigh(dense.gauss_newton(nearest.point))
    tangent = vectors[:, values <= 1e-11 * values[-1]]
    assert torch.linalg.vector_norm(tangent.T @ (w - nearest.point)) < 1e-6 * nearest.distance
    at = linearize(problem, w)
    B = at.operator.rows(w)
    assert nearest.linearised_distance == pytest.approx(
        torch.linalg.vector_norm(torch.linalg.pinv(B, rtol=1e-8) @ at.residual).item(), rel=1e-5
    )
    assert nearest.linearised_distance == pytest.approx(nearest.distance, rel=0.1)


@pytest.mark.parametrize("way", ["eigenvectors", "cholesky", "products"])
@pytest.mark.parametrize("name", NAMES)
def test_nearest_point_is_on_gamma_and_stationary(name, way):
    """By eigenvectors, with the first Cholesky factor as a preconditioner, or by products alone."""
    dense, point = make(name)
    problem, w = dense.problem, displaced(point, 0.02)
    at = hessian = None
    if way == "cholesky":
        at = replace(linearize(problem, w), cheap_gram=True)
        hessian = gauss_newton(problem, w, at=at, max_dense=0)
    max_dense = 4096 if way == "eigenvectors" else 0
    nearest = nearest_point(problem, w, rtol=1e-9, max_steps=60, max_dense=max_dense, at=at, hessian=hessian)
    assert nearest.distance <= torch.linalg.vector_norm(w - point).item()
    check(dense, problem, w, nearest)


@pytest.mark.parametrize("memory", [None, 0])
def test_where_a_factor_is_cheap_and_where_it_does_not_fit_into_memory(memory):
    dense, point = make("many_outputs")
    count = len(dense.inputs)
    problem = ZeroLossProblem(dense.net, dense.loss, dense.inputs, dense.targets, batch_size=count, memory=memory)
    w = displaced(point, 0.02)
    nearest = nearest_point(problem, w, rtol=1e-9, max_steps=60, max_dense=0)
    assert linearize(problem, w).cheap_gram == (memory is None)
    check(dense, problem, w, nearest)


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
    nearest = nearest_point(dense.problem, w, rtol=1e-10, max_steps=60)
    assert nearest.distance == pytest.approx(torch.linalg.vector_norm(v.detach() - w).item(), rel=1e-4)
    torch.testing.assert_close(nearest.point, v.detach(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_exactly_on_gamma(name):
    dense, w = make(name)
    nearest = nearest_point(dense.problem, w)
    assert (nearest.distance, nearest.linearised_distance, nearest.converged, nearest.steps) == (0.0, 0.0, True, 0)
    assert torch.equal(nearest.point, w)


def test_what_was_not_found_is_reported():
    dense, w = make("two_layers")
    for size, status in ((2.0, Result.MAX_STEPS), (0.1, Result.MAX_STEPS)):
        nearest = nearest_point(dense.problem, displaced(w, size), max_steps=1)
        assert not nearest.converged
        assert nearest.status is status
        assert nearest.steps == 1
        assert nearest.residual > 1e-6


def test_bad_weights():
    dense, w = make("scalar")
    with pytest.raises(ValueError, match="nan or infinity"):
        nearest_point(dense.problem, w / 0)
    with pytest.raises(ValueError, match="24 weights in one vector"):
        nearest_point(dense.problem, w[:3])
