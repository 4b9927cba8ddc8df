"""The settings of SGD against torch.optim.SGD."""

import pytest
import torch
from torch import nn

from tests.problems import DTYPE
from torch_singlim import SGDSettings
from torch_singlim.theory import stationary_variance


@pytest.mark.parametrize(
    "options",
    [
        {"lr": 0.1},
        {"lr": 0.1, "momentum": 0.9},
        {"lr": 0.1, "momentum": 0.8, "dampening": 0.3},
        {"lr": 0.1, "momentum": 0.9, "nesterov": True},
    ],
)
def test_steps_are_those_of_torch_sgd(options):
    w = nn.Parameter(torch.tensor([1.0, -2.0], dtype=DTYPE))
    scale = torch.tensor([1.0, 3.0], dtype=DTYPE)
    optimizer = torch.optim.SGD([w], **options)
    sgd, ours, velocity = SGDSettings(**options), w.detach().clone(), None
    for _ in range(20):
        optimizer.zero_grad()
        (0.5 * scale * w.square()).sum().backward()
        optimizer.step()
        ours, velocity = sgd.step(ours, velocity, scale * ours)
    torch.testing.assert_close(ours, w.detach(), rtol=1e-13, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.0}, "lr must be positive"),
        ({"lr": float("nan")}, "lr must be positive"),
        ({"lr": 0.1, "momentum": 1.0}, "momentum must be in"),
        ({"lr": 0.1, "dampening": -0.1}, "dampening must be in"),
        ({"lr": 0.1, "batch_size": 0}, "batch_size must be at least 1"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        SGDSettings(**options)


def test_dampening_without_momentum_is_ignored_as_in_torch():
    assert SGDSettings(lr=0.1, dampening=0.5).effective_lr == 0.1


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dampening": 0.5},
        {"momentum": 0.9},
        {"momentum": 0.8, "dampening": 0.3},
        {"momentum": 0.9, "nesterov": True},
    ],
)
def test_stationary_variance_is_that_of_the_recursion(options):
    """The sum over all past kicks of the response to a single one, by running `step`, whose truth is torch.optim.SGD."""
    sgd = SGDSettings(lr=0.3, **options)
    curvature = torch.tensor([0.05, 0.7, 3.0], dtype=DTYPE)
    w = v = torch.zeros(3, dtype=DTYPE)
    total = torch.zeros(3, dtype=DTYPE)
    w, v = sgd.step(w, v, curvature * w + 1)  # a unit kick, then none
    for _ in range(20_000):
        total += w.square()
        w, v = sgd.step(w, v, curvature * w)
    torch.testing.assert_close(stationary_variance(sgd, curvature), total, rtol=1e-8, atol=0)
    small = stationary_variance(sgd, torch.tensor([1e-4], dtype=DTYPE))
    assert small.item() == pytest.approx(sgd.effective_lr / 2e-4, rel=1e-3)


def test_momentum_is_stable_where_a_plain_step_of_the_same_effect_is_not():
    stiff = torch.tensor([3.0], dtype=DTYPE)
    heavy, plain = SGDSettings(lr=0.1, momentum=0.9), SGDSettings(lr=1.0)
    assert heavy.effective_lr == pytest.approx(plain.effective_lr)
    assert torch.isfinite(stationary_variance(heavy, stiff)).all()
    assert torch.isinf(stationary_variance(plain, stiff)).all()


@pytest.mark.parametrize(
    ("momentum", "dampening", "nesterov"),  # torch has Nesterov momentum without dampening only
    [
        (0.0, 0.0, False),
        (0.5, 0.0, False),
        (0.9, 0.0, False),
        (0.9, 0.3, False),
        (0.5, 0.0, True),
        (0.9, 0.0, True),
    ],
)
def test_the_largest_stable_curvature_is_where_descent_begins_to_diverge(momentum, dampening, nesterov):
    """By torch.optim.SGD on a parabola just below and above it; there the stationary variance becomes infinite."""
    sgd = SGDSettings(lr=0.1, momentum=momentum, dampening=dampening, nesterov=nesterov)
    threshold = sgd.largest_stable_curvature
    for factor in (0.99, 1.01):
        w = torch.ones((), dtype=torch.float64, requires_grad=True)
        descent = torch.optim.SGD([w], lr=0.1, momentum=momentum, dampening=dampening, nesterov=nesterov)
        for _ in range(4000):
            descent.zero_grad()
            (factor * threshold / 2 * w**2).backward()
            descent.step()
        assert (abs(w.item()) < 1) == (factor < 1)
    variance = stationary_variance(sgd, torch.tensor([0.999, 1.001], dtype=torch.float64) * threshold)
    assert torch.isfinite(variance).tolist() == [True, False]
    assert variance[0] > 50 * stationary_variance(sgd, torch.tensor([0.5], dtype=torch.float64) * threshold)
