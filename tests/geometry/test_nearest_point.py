"""The nearest point against dense linear algebra and a general constrained optimiser."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from tests.problems import NAMES, displaced, make
from torch_singlim import Result, ZeroLossProblem, gauss_newton, linearize, nearest_point


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


@pytest.mark.parametrize(("name", "max_dense"), [("two_layers", 4096), ("many_outputs", 4096), ("many_outputs", 0)])
def test_a_search_that_begins_at_the_nearest_point_of_weights_nearby(name, max_dense):
    dense, point = make(name)
    count = len(dense.inputs)
    problem = ZeroLossProblem(dense.net, dense.loss, dense.inputs, dense.targets, batch_size=count)
    w = displaced(point, 0.02)
    start = nearest_point(problem, displaced(point, 0.018), rtol=1e-9, max_steps=60).point
    cold, warm = (
        nearest_point(problem, w, rtol=1e-3, max_steps=60, max_dense=max_dense, start=s) for s in (None, start)
    )
    exact = nearest_point(problem, w, rtol=1e-9, max_steps=60).distance
    assert warm.status is Result.SUCCESSFUL
    assert warm.distance == pytest.approx(exact, abs=2 * warm.error + 1e-12)
    assert warm.steps <= cold.steps
    assert warm.linearised is None
    # exact to begin with: nothing is left to do
    again = nearest_point(problem, w, rtol=1e-3, start=nearest_point(problem, w, rtol=1e-9, max_steps=60).point)
    assert (again.steps, again.status) == (1, Result.SUCCESSFUL)
    assert again.distance == pytest.approx(exact, rel=1e-6)


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


class Map(nn.Module):
    """Weights a -> the outputs f(a), whatever the input."""

    def __init__(self, start, function):
        super().__init__()
        self.a, self.function = nn.Parameter(torch.tensor(start, dtype=torch.float64)), function

    def forward(self, x):
        return self.function(self.a).expand(len(x), -1)


def mapped(start, function, target):
    problem = ZeroLossProblem(Map(start, function), "mse", torch.ones(1, 1), torch.tensor([target]).double())
    return problem, problem.weights()


def sphere(a):
    return a.square().sum()[None]


def ellipse(a):
    return (a[0] ** 2 / 4 + a[1] ** 2)[None]


def test_the_point_of_a_sphere():
    problem, w = mapped([0.3, 0.4, 0.0], sphere, [1.0])
    nearest = nearest_point(problem, w)
    assert nearest.status is Result.SUCCESSFUL
    torch.testing.assert_close(nearest.point, w / 0.5)
    assert nearest.error < 1e-9


@pytest.mark.parametrize(("start", "distance"), [([0.01, 0.0], 0.99), ([0.006, 0.008, 0.0], 0.99)])
def test_next_to_the_centre_of_a_sphere_the_distance_is_flat(start, distance):
    nearest = nearest_point(*mapped(start, sphere, [1.0]), max_steps=80)
    assert nearest.status is Result.NEAR_FOCAL_POINT
    assert not nearest.converged
    assert nearest.distance == pytest.approx(distance, abs=1e-6)


def test_a_saddle_of_the_distance_is_no_nearest_point():
    """From (1, 0) to x^2/4 + y^2 = 1: (2, 0) is stationary, 1 away; the nearest points have x = 4/3, at sqrt(2/3)."""
    nearest = nearest_point(*mapped([1.0, 0.0], ellipse, [1.0]))
    assert nearest.status is Result.NEAR_FOCAL_POINT
    assert nearest.distance == pytest.approx(1.0)
    assert nearest.distance - nearest.error <= math.sqrt(2 / 3)
    beside = nearest_point(*mapped([1.0, 1e-4], ellipse, [1.0]))
    assert beside.converged
    assert beside.distance == pytest.approx(math.sqrt(2 / 3), abs=1e-4)


@pytest.mark.parametrize(
    ("start", "function", "target"),
    [
        ([1.0, 1.0], lambda a: (a[0] * a[1])[None], [0.0]),  # by symmetry to the crossing of the two lines
        ([1.0, 0.3, 0.5], lambda a: torch.stack([a[0] * a[1], a[0] - a[1]]), [0.0, 0.0]),  # a double root
        ([0.0, 0.0], sphere, [1.0]),  # B = 0
        ([0.1, 0.2, 0.3], lambda a: a.softmax(0), [1.0, 0.0, 0.0]),  # reached at infinity
    ],
)
def test_where_b_loses_rank(start, function, target):
    nearest = nearest_point(*mapped(start, function, target), max_steps=100)  # steps are short next to a double root
    assert nearest.status is Result.SINGULAR
    assert nearest.error == math.inf
    assert "loses rank" in nearest.status.message


def test_the_lines_of_a_product_away_from_their_crossing():
    nearest = nearest_point(*mapped([1.0, 0.7], lambda a: (a[0] * a[1])[None], [0.0]))
    assert nearest.converged
    assert nearest.distance == pytest.approx(0.7)


def test_from_far_away_where_full_steps_diverge():
    """A point of a1 = sin(5 a0); the truth by a grid."""
    problem, w = mapped([0.0, 3.0], lambda a: (a[1] - torch.sin(5 * a[0]))[None], [0.0])
    x = torch.linspace(-4, 4, 400_001, dtype=torch.float64)
    squared = x**2 + (torch.sin(5 * x) - 3) ** 2
    assert nearest_point(problem, w).distance == pytest.approx(squared.min().sqrt().item(), rel=1e-6)


@pytest.mark.parametrize("name", ["scalar", "two_layers", "cross_entropy", "many_outputs"])
@pytest.mark.parametrize("size", [0.02, 0.1, 0.3])
def test_the_error_covers_what_is_missing(name, size):
    """Stopped early, against the search to the end."""
    dense, point = make(name)
    w = displaced(point, size)
    truth = nearest_point(dense.problem, w, rtol=1e-8, max_steps=200)
    assert truth.converged
    covered = []
    for steps in range(2, truth.steps):
        early = nearest_point(dense.problem, w, rtol=1e-8, max_steps=steps)
        assert early.status in (Result.MAX_STEPS, Result.NEAR_FOCAL_POINT)
        assert early.steps == steps
        assert early.products > 2 * steps
        covered.append(abs(early.distance - truth.distance) <= early.error + 1e-12)
    assert sum(covered) >= 0.9 * len(covered)


@pytest.mark.parametrize("rtol", [0.3, 0.1, 1e-2, 1e-4])
def test_the_tolerance_bounds_the_error(rtol):
    dense, point = make("two_layers")
    w = displaced(point, 0.3)
    truth = nearest_point(dense.problem, w, rtol=1e-8, max_steps=200)
    nearest = nearest_point(dense.problem, w, rtol=rtol, max_steps=200)
    assert nearest.converged
    assert nearest.error <= rtol**2 / 2 * nearest.distance * 1.1
    assert abs(nearest.distance - truth.distance) <= nearest.error + 1e-12


def test_one_step_is_not_enough():
    dense, w = make("two_layers")
    nearest = nearest_point(dense.problem, displaced(w, 2.0), max_steps=1)
    assert nearest.status is Result.MAX_STEPS
    assert (nearest.steps, nearest.error) == (1, math.inf)
    assert nearest.residual > 1e-6


def test_bad_weights():
    dense, w = make("scalar")
    with pytest.raises(ValueError, match="nan or infinity"):
        nearest_point(dense.problem, w / 0)
    with pytest.raises(ValueError, match="24 weights in one vector"):
        nearest_point(dense.problem, w[:3])
