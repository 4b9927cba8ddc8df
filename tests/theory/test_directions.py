"""Directions at once: the values of the loop, one at a time where memory or the user's code require it."""

import pytest
import torch
from torch import nn

from tests.problems import make
from torch_singlim import (
    AntiCorrelated,
    CustomNoise,
    DropConnect,
    Dropout,
    InputNoise,
    LabelNoise,
    Langevin,
    SGDSettings,
    WeightDecay,
    ZeroLossProblem,
    finite_window,
    gauss_newton,
)
from torch_singlim.theory import averaged_gradient, gradient_noise, potential, sampled_potential
from torch_singlim.theory.directions import batched, directions_at_once
from torch_singlim.theory.gradient_noise import noise_factor
from torch_singlim.theory.on_gamma import trace
from torch_singlim.theory.second_order import log_pseudo_determinant


def seeded():
    return torch.Generator().manual_seed(0)


def pair(net, inputs, targets, loss="mse"):
    """The same problem with directions at once, and with one at a time, in chunks of a few samples."""
    at_once = ZeroLossProblem(net, loss, inputs, targets)
    one = ZeroLossProblem(net, loss, inputs, targets, batch_size=max(1, len(inputs) // 2))
    assert directions_at_once(at_once) > 1 == directions_at_once(one)
    return at_once, one


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def same(a, b):
    close(a.value.mean, b.value.mean)
    close(a.value.stderr, b.value.stderr)
    close(a.gradient.groups, b.gradient.groups)
    assert a.passes == b.passes


def through_outputs(loss, w, x, y, eta):
    return loss(w, x * (1 + eta.reshape(x.shape)), y)


NOISES = [
    Dropout(),
    DropConnect(0.1),
    DropConnect.from_rate(0.2),
    AntiCorrelated(0.1),
    InputNoise(0.1),
    LabelNoise(0.1),
    Langevin(0.1),
    WeightDecay(0.1),
    CustomNoise(through_outputs, std=0.1, like="inputs"),
    Dropout() + DropConnect(0.1) + WeightDecay(0.1),
]
OF_ORDER_ONE = [noise for noise in NOISES if not isinstance(noise, LabelNoise | Langevin | WeightDecay)]
NETWORKS = {
    "tanh": lambda: (nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Dropout(0.1), nn.Linear(5, 2)), (4,)),
    "norms": lambda: (
        nn.Sequential(
            nn.Linear(4, 8), nn.LayerNorm(8), nn.GELU(), nn.Dropout(0.1), nn.BatchNorm1d(8), nn.GroupNorm(2, 8),
            nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 2),
        ),
        (4,),
    ),
    "convolutions": lambda: (
        nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.SiLU(), nn.Dropout2d(0.1), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3, padding=1),
            nn.BatchNorm2d(4), nn.Softplus(), nn.AvgPool2d(2), nn.Flatten(), nn.Dropout(0.1), nn.Linear(4, 2),
        ),
        (1, 4, 4),
    ),
}  # fmt: skip


@pytest.mark.parametrize("noise", OF_ORDER_ONE, ids=lambda noise: str(noise).split(" at 0x")[0])
@pytest.mark.parametrize("network", NETWORKS)
def test_single_precision_changes_nothing_that_is_sampled(network, noise):
    torch.manual_seed(0)
    net, shape = NETWORKS[network]()
    x = torch.randn(6, *shape)
    problem = ZeroLossProblem(net.eval(), "mse", x, torch.randn(6, 2))
    w = problem.weights()

    def of(function, draws):
        return function(noise, problem, w, num_draws=draws, generator=torch.Generator().manual_seed(0))

    full, single = of(potential, 4), of(sampled_potential, 4)
    assert single.gradient.mean.dtype == torch.float64
    torch.testing.assert_close(
        single.gradient.mean, full.gradient.mean, rtol=0, atol=1e-4 * full.gradient.mean.norm().item()
    )
    assert single.value.mean == pytest.approx(full.value.mean, rel=1e-5)
    # a sum over a basis is exact, in full precision
    assert torch.equal(of(sampled_potential, 10_000).gradient.mean, of(potential, 10_000).gradient.mean)


@pytest.mark.parametrize("noise", NOISES, ids=lambda noise: str(noise).split(" at 0x")[0])
@pytest.mark.parametrize("network", NETWORKS)
def test_the_values_are_those_of_one_direction_at_a_time(network, noise):
    torch.manual_seed(0)
    net, shape = NETWORKS[network]()
    at_once, one = pair(net, torch.randn(5, *shape), torch.randn(5, 2))
    w = at_once.weights()
    for num_draws in (6, 1000) if network == "tanh" else (6,):  # random directions, in four groups, and a basis
        a, b = (potential(noise, p, w, num_draws=num_draws, generator=seeded()) for p in (at_once, one))
        same(a, b)
    a, b = (averaged_gradient(noise, p, w, num_draws=5, generator=seeded()) for p in (at_once, one))
    close(a.groups, b.groups)
    for num_draws in (6, 300) if network == "tanh" else (6,):
        a, b = (
            gradient_noise(noise, p, w, batch_size=2, num_draws=num_draws, generator=seeded()) for p in (at_once, one)
        )
        assert (a.draws is None) == (b.draws is None)
        if a.draws is not None:
            close(a.draws, b.draws)


@pytest.mark.parametrize("name", ["two_layers", "cross_entropy"])
def test_traces_of_h_and_its_factor(name):
    dense, w = make(name)
    p = dense.problem
    at_once, one = pair(dense.net, p.inputs, p.targets, dense.loss)
    for num_draws in (4, 1000):
        same(*(trace(q, w, num_draws=num_draws, generator=seeded()) for q in (at_once, one)))
        hessians = [gauss_newton(q, w) for q in (at_once, one)]
        logs = [
            log_pseudo_determinant(q, w, hessian, num_draws=num_draws, generator=seeded())
            for q, hessian in zip((at_once, one), hessians, strict=True)
        ]
        torch.testing.assert_close(logs[0].gradient.groups, logs[1].gradient.groups, rtol=1e-6, atol=1e-8)
    for noise in (Dropout(), DropConnect(0.1)):
        close(*(noise_factor(noise, q, w, batch_size=2) for q in (at_once, one)))


def test_finite_window_is_the_same():
    dense, w = make("two_layers")
    p = dense.problem
    windows = [
        finite_window(q, w, Dropout(), SGDSettings(lr=0.05, batch_size=2), steps=40, generator=seeded())
        for q in pair(dense.net, p.inputs, p.targets, dense.loss)
    ]
    torch.testing.assert_close(windows[0].displacement, windows[1].displacement, rtol=1e-6, atol=1e-10)


def test_as_many_directions_as_memory_allows():
    net = nn.Sequential(nn.Linear(4, 9), nn.Tanh(), nn.Dropout(0.1), nn.Linear(9, 2))
    data = torch.randn(5, 4), torch.randn(5, 2)
    free = ZeroLossProblem(net, "mse", *data)
    whole = 5 * 12 * free.sample_bytes  # all samples once

    def at_once(memory, **options):
        return directions_at_once(ZeroLossProblem(net, "mse", *data, memory=int(memory), **options))

    assert at_once(3.5 * whole) == 3
    assert at_once(1.5 * whole) == at_once(0.5 * whole) == at_once(0) == 1
    assert at_once(3.5 * whole, batch_size=4) == 1  # samples in chunks
    assert at_once(0.5 * whole, batch_size=5) == 1
    wide = nn.Sequential(nn.Linear(4, 40_000), nn.Dropout(0.1), nn.Linear(40_000, 2))
    assert directions_at_once(ZeroLossProblem(wide, "mse", *data)) == 1


def refusing(kind):
    def noisy(loss, w, x, y, eta):
        size = eta.detach().square().sum()
        if kind == "item" and size.item() < 0:
            return 2 * loss(w, x, y)
        if kind == "decision" and size < 0:
            return 2 * loss(w, x, y)
        if kind == "in place":
            x = x.clone()
            x += eta.reshape(x.shape)
            return loss(w, x, y)
        return loss(w, x + eta.reshape(x.shape), y)

    return CustomNoise(noisy, std=0.1, like="inputs")


@pytest.mark.parametrize("kind", ["item", "decision", "in place"])
def test_code_that_cannot_be_batched_is_evaluated_one_direction_at_a_time(kind):
    net = nn.Sequential(nn.Linear(4, 9), nn.Tanh(), nn.Linear(9, 2))
    problem = ZeroLossProblem(net, "mse", torch.randn(5, 4), torch.randn(5, 2))
    w = problem.weights()
    a, b = (potential(n, problem, w, num_draws=2, generator=seeded()) for n in (refusing(kind), InputNoise(0.1)))
    same(a, b)
    close(
        *(
            averaged_gradient(n, problem, w, num_draws=8, generator=seeded()).groups
            for n in (refusing(kind), InputNoise(0.1))
        )
    )


def test_an_error_of_the_function_is_its_own():
    calls = []

    def wrong(v):
        calls.append(v.shape)
        raise RuntimeError("the network's own error")

    with pytest.raises(RuntimeError, match="the network's own error"):
        batched(wrong, torch.ones(3, 2))
    assert len(calls) == 2  # with all directions, and with the first one
    with pytest.raises(TypeError):
        batched(lambda v: v + None, torch.ones(3, 2))
    assert batched(lambda a, b: a * b, torch.ones(3, 2), 2 * torch.ones(3, 1)).shape == (3, 2)
