"""Level distances against closed forms, against a general optimiser, and by the loss of the point that proves them."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.problems import NAMES, displaced, make
from torch_singlim import ZeroLossProblem, level_distance, linearize

DTYPE = torch.float64


@pytest.mark.parametrize("level", [0.5, 0.1, 0.01])
def test_of_a_linear_network_it_is_that_of_regularised_least_squares(level):
    """min |u| subject to |b + B u|^2 <= eps |b|^2, by singular values; the linear model is exact then."""
    torch.manual_seed(0)
    net, x, y = nn.Linear(12, 2), torch.randn(5, 12, dtype=DTYPE), torch.randn(5, 2, dtype=DTYPE)
    problem = ZeroLossProblem(net, "mse", x, y)
    w = problem.weights()
    at = linearize(problem, w)
    U, s, _ = torch.linalg.svd(at.operator.rows(w), full_matrices=False)
    parts = U.T @ at.residual
    low, high = 1e-12, 1e12
    for _ in range(200):
        mu = math.sqrt(low * high)
        left = (mu / (s**2 + mu) * parts).square().sum()
        low, high = (mu, high) if left < level * parts.square().sum() else (low, mu)
    exact = (s / (s**2 + mu) * parts).norm().item()
    found = level_distance(problem, w, level)
    assert found.certified
    assert found.distance == pytest.approx(exact, rel=0.02)
    assert found.distance >= exact * (1 - 1e-4)
    assert found.linear == pytest.approx(exact, rel=0.05)


def by_descent(dense, w, allowed):
    """The nearest point with this loss: L-BFGS for L + mu |v - w|^2 / 2, and bisection in mu."""
    low, high, v = 1e-9, 1e3, w.clone()
    for _ in range(40):
        mu, u = math.sqrt(low * high), v.clone().requires_grad_()
        optimiser = torch.optim.LBFGS([u], max_iter=500, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

        def closure(optimiser=optimiser, u=u, mu=mu):
            optimiser.zero_grad()
            value = dense.L(u) + mu / 2 * (u - w).square().sum()
            value.backward()
            return value

        optimiser.step(closure)
        v = u.detach()
        low, high = (mu, high) if dense.L(v) < allowed else (low, mu)
    return (v - w).norm().item()


@pytest.mark.parametrize("level", [0.5, 0.1])
@pytest.mark.parametrize("name", NAMES)
def test_it_is_no_longer_than_what_a_general_optimiser_finds(name, level):
    dense, point = make(name)
    w = displaced(point, 0.3)
    allowed = level * dense.L(w).item()
    found = level_distance(dense.problem, w, level)
    assert found.certified
    assert found.loss == pytest.approx(dense.L(found.point).item(), rel=1e-9)
    assert found.loss <= allowed
    assert found.distance == pytest.approx((found.point - w).norm().item(), rel=1e-9)
    assert found.distance <= 1.03 * by_descent(dense, w, allowed)


def trained(loss, steps=300):
    """A network under dropout, and its data."""
    torch.manual_seed(0)
    x, labels = torch.randn(40, 8), torch.randint(3, (40,))
    net = nn.Sequential(nn.Linear(8, 40), nn.Tanh(), nn.Dropout(0.1), nn.Linear(40, 3))
    descent = torch.optim.SGD(net.parameters(), lr=0.3)
    for _ in range(steps):
        descent.zero_grad()
        loss(net(x), labels).backward()
        descent.step()
    return net.eval(), x, labels


LOSSES = {
    "mse": ("mse", lambda f, labels: F.mse_loss(f, F.one_hot(labels, 3).to(f))),
    "smoothed cross-entropy": (
        nn.CrossEntropyLoss(label_smoothing=0.1),
        lambda f, labels: F.cross_entropy(f, labels, label_smoothing=0.1),
    ),
    "hard-label cross-entropy": (nn.CrossEntropyLoss(), F.cross_entropy),
    "a function": (
        lambda f, y: ((f - y).square() + 0.1 * (f - y) ** 4).mean(),
        lambda f, labels: ((f - F.one_hot(labels, 3)).square() + 0.1 * (f - F.one_hot(labels, 3)) ** 4).mean(),
    ),
}


@pytest.mark.parametrize("batch_size", [None, 13])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", LOSSES)
def test_the_point_proves_the_distance(name, dtype, batch_size):
    """By the loss of the module itself with the weights of the point, in float64."""
    loss, value = LOSSES[name]
    net, x, labels = trained(value)
    targets = labels if isinstance(loss, nn.Module) else F.one_hot(labels, 3).float()
    problem = ZeroLossProblem(net, loss, x, targets, dtype=dtype, batch_size=batch_size)
    w = problem.weights()
    infimum = problem.infimum()
    for level in (0.5, 0.1):
        found = level_distance(problem, w, level)
        assert found.certified
        again = nn.Sequential(nn.Linear(8, 40), nn.Tanh(), nn.Dropout(0.1), nn.Linear(40, 3)).double().eval()
        excess = []
        for weights in (w, found.point):
            nn.utils.vector_to_parameters(weights.double(), again.parameters())
            excess.append(value(again(x.double()), labels).item() - infimum)
        assert excess[1] <= level * excess[0] * (1 + 1e-6)
        assert found.distance == pytest.approx((found.point - w).norm().item(), rel=1e-4)


def test_a_start_saves_work_and_does_not_lengthen_the_distance():
    net, x, labels = trained(LOSSES["mse"][1])
    problem = ZeroLossProblem(net, "mse", x, F.one_hot(labels, 3).float())
    w = problem.weights()
    first = level_distance(problem, w, 0.1)
    again = level_distance(problem, w + 1e-3 * torch.ones_like(w), 0.1, start=first.point)
    assert again.certified
    assert again.gradients < first.gradients
    assert again.distance <= 1.1 * first.distance


def test_a_search_that_is_too_short_proves_nothing():
    net, x, labels = trained(LOSSES["mse"][1])
    problem = ZeroLossProblem(net, "mse", x, F.one_hot(labels, 3).float())
    found = level_distance(problem, problem.weights(), 1e-6, max_gradients=1)
    assert not found.certified
    assert found.loss > 1e-6 * problem.loss(problem.weights()).item()


def test_on_the_zero_loss_set():
    dense, w = make("scalar")
    net = ZeroLossProblem(dense.net, "mse", dense.inputs, dense.outputs(w).detach())
    found = level_distance(net, w, 0.5)
    assert (found.distance, found.loss, found.certified) == (0.0, 0.0, True)


@pytest.mark.parametrize("level", [0.0, 1.0, -1.0, float("nan")])
def test_a_level_is_a_share(level):
    dense, w = make("scalar")
    with pytest.raises(ValueError, match="between 0 and 1"):
        level_distance(dense.problem, w, level)


def test_bad_weights():
    dense, w = make("scalar")
    with pytest.raises(ValueError, match="nan or infinity"):
        level_distance(dense.problem, w / 0)


@pytest.mark.parametrize("name", LOSSES)
def test_the_gradient_in_the_coordinates_of_the_residual(name):
    """B^T c = grad L for every loss; c is the residual for mse."""
    loss, value = LOSSES[name]
    net, x, labels = trained(value, steps=20)
    targets = labels if isinstance(loss, nn.Module) else F.one_hot(labels, 3).float()
    problem = ZeroLossProblem(net, loss, x, targets)
    w = problem.weights()
    at = linearize(problem, w)
    torch.testing.assert_close(at.operator.rmatvec(at.newton()), problem.gradient(w), rtol=1e-9, atol=1e-12)
    if name == "mse":
        torch.testing.assert_close(at.newton(), at.residual)
