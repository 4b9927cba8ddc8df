"""Noise systems, their sums and refusals; the descent settings against torch.optim.SGD."""

import math

import pytest
import torch
from torch import nn

from tests.problems import DTYPE, make
from torch_singlim import Dropout, Minibatch, SGDSettings, WeightDecay, ZeroLossProblem, singular_limit
from torch_singlim.functional import FunctionalModule
from torch_singlim.theory import time_scale


def test_drawn_noise_has_the_training_distribution():
    dense, _ = make("two_layers")
    problem = dense.problem
    eta = Dropout().draw(problem, 200_000, generator=torch.Generator().manual_seed(0))
    variance = dense.sigma_squared()
    assert eta.shape == (200_000, 9)
    error = (variance / 200_000).sqrt()
    assert ((eta.mean(0)).abs() < 4 * error).all()
    torch.testing.assert_close(eta.var(0), variance, rtol=0.02, atol=0)
    torch.testing.assert_close(Dropout().scale(problem).square(), variance)
    assert set((1 + eta[:, 0]).unique().tolist()) == {0.0, 1 / 0.9}
    again = Dropout().draw(problem, 200_000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(eta, again)


def test_noise_reaches_the_activations():
    dense, w = make("two_layers")
    problem = dense.problem
    eta = Dropout().draw(problem, problem.num_samples, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(problem.function(w, problem.inputs, eta), dense.outputs(w, eta))


def test_a_layer_called_twice_has_two_sites_and_channel_dropout_one_value_a_channel():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.channels = nn.Conv2d(1, 3, 3), nn.Dropout2d(0.25)
            self.drop, self.out = nn.Dropout(0.5), nn.Linear(3, 2)

        def forward(self, x):
            h = self.channels(self.conv(x)).mean((2, 3))
            return self.out(self.drop(self.drop(h)))

    f = FunctionalModule(Net(), dtype=DTYPE)
    sites = f.sites(torch.zeros(2, 1, 5, 5, dtype=DTYPE))
    assert [(s.rate, s.shape) for s in sites] == [(0.25, (3, 1, 1)), (0.5, (3,)), (0.5, (3,))]


def test_order_and_clock():
    dense, _ = make("two_layers")
    problem = dense.problem
    assert Dropout().order == 1
    assert Minibatch().order is None
    both = Dropout() + WeightDecay(5e-4) + Minibatch()
    assert both.order == 1
    assert both.variance(problem) == pytest.approx(0.3 / 0.7)  # the layer with the larger rate sets the pace
    assert time_scale(SGDSettings(lr=0.1, momentum=0.9), 1, 0.5) == pytest.approx(2)
    assert time_scale(SGDSettings(lr=0.1), 2, 0.5) == pytest.approx(200)
    assert time_scale(SGDSettings(lr=0.1), None, 0.0) == math.inf


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


def test_bad_noise():
    problem = ZeroLossProblem(nn.Linear(2, 1), "mse", torch.ones(1, 2), torch.ones(1, 1))
    with pytest.raises(ValueError, match=r"needs nn\.Dropout layers"):
        singular_limit(problem, problem.weights(), Dropout(), SGDSettings(lr=0.1))
    with pytest.raises(ValueError, match="must be positive"):
        WeightDecay(0.0)
    with pytest.raises(ValueError, match="one each"):
        Dropout() + Dropout()
