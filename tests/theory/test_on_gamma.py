"""Potentials on Gamma from derivatives of the outputs: against the full Laplacian, and against dense brute force."""

import math

import pytest
import torch
from torch.nn import functional as F

from tests.problems import NAMES, make
from torch_singlim import (
    AntiCorrelated,
    CustomNoise,
    DropConnect,
    Dropout,
    InputNoise,
    WeightDecay,
    ZeroLossProblem,
    tangent_space,
)
from torch_singlim.noise import parts
from torch_singlim.theory import potential, tangential_potential

NOISES = [
    Dropout(),
    InputNoise(0.3),
    DropConnect(0.2),
    AntiCorrelated(0.1),
    WeightDecay(0.1),
    Dropout() + AntiCorrelated(0.1) + WeightDecay(0.1),
    CustomNoise(lambda loss, w, x, y, eta: loss(w * (1 + eta), x, y), std=0.2, claimed_order=1),
]


def agree(problem, w, noise):
    T = tangent_space(problem, w)
    truth = potential(noise, problem, w, num_draws=1000)
    V = tangential_potential(noise, problem, w, num_draws=1000)
    assert V.value.mean == pytest.approx(truth.value.mean, rel=1e-9)
    assert V.value.stderr == V.gradient.stderr == 0
    torch.testing.assert_close(T.project(V.gradient.mean), T.project(truth.gradient.mean), rtol=1e-8, atol=1e-10)
    return V, truth


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("noise", NOISES, ids=lambda noise: " + ".join(type(part).__name__ for part in parts(noise)))
def test_tangential_gradients_are_those_of_the_full_laplacian(noise, name):
    dense, w = make(name)
    V, truth = agree(dense.problem, w, noise)
    if all(part.moves_outputs for part in parts(noise)):
        assert V.passes <= len(parts(noise)) * dense.outputs(w).shape[1] < truth.passes


def test_a_loss_given_as_a_function():
    dense, w = make("two_layers")

    def loss(f, y):
        return (F.softplus(f - y) + F.softplus(y - f) - 2 * math.log(2)).mean(-1)

    problem = ZeroLossProblem(dense.net, loss, dense.inputs, dense.targets)
    agree(problem, w, Dropout())
    agree(problem, w, AntiCorrelated(0.1))


def test_samples_in_chunks_give_the_same():
    dense, w = make("two_layers")
    chunked = ZeroLossProblem(dense.net, "mse", dense.inputs, dense.targets, batch_size=2)
    for noise in NOISES[:4]:
        a, b = (tangential_potential(noise, p, w, num_draws=1000) for p in (dense.problem, chunked))
        torch.testing.assert_close(a.gradient.mean, b.gradient.mean, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("noise", [Dropout(), DropConnect(0.2)], ids=str)
def test_sampled_draws_are_unbiased_and_their_error_is_honest(noise):
    dense, w = make("many_outputs")
    exact = tangential_potential(noise, dense.problem, w, num_draws=4).gradient.mean
    generator = torch.Generator().manual_seed(0)
    draws = [tangential_potential(noise, dense.problem, w, num_draws=2, generator=generator) for _ in range(200)]
    found = torch.stack([each.gradient.mean for each in draws])
    spread = (found - exact).square().sum(1).mean().item()
    assert (found.mean(0) - exact).square().sum().item() < 9 * spread / 200
    stated = sum(each.gradient.stderr**2 for each in draws) / 200
    assert stated / spread == pytest.approx(1, abs=0.3)
