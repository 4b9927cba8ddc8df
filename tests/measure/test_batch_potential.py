"""Gradients of the potential on the batches of a step: against dense formulas of a small network."""

import pytest
import torch
from torch import nn

from tests.problems import Dense, chain
from torch_singlim import Dropout, LabelNoise, Langevin, WeightDecay
from torch_singlim.measure.paths import Path
from torch_singlim.measure.second_order import BatchPotential, without_potential
from torch_singlim.measure.steps import Step

LR, STD = 0.1, 0.2


@pytest.fixture(scope="module")
def dense():
    """A batch of four samples of a network with four hidden units, so that four directions are all there are."""
    net = chain([3, 4, 1], nn.Tanh, [0.2], bias=True, seed=1)
    x, y = torch.randn(4, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64).split([3, 1], dim=1)
    return Dense(net, "mse", x, y)


def added(dense, noise, *, first, momentum=0.0, processes=1):
    """What is added to the gradients by a step of two micro-batches; the problem itself has other samples."""
    net = dense.net
    optimizer = torch.optim.SGD(net.parameters(), lr=LR, momentum=momentum)
    path = Path(net, optimizer)
    halves = [(dense.inputs[i : i + 2], dense.targets[i : i + 2]) for i in (0, 2)]
    for p in path.parameters:
        p.grad = torch.ones_like(p)
    problem = Dense(net, "mse", torch.ones(3, 3).double(), torch.ones(3, 1).double()).problem
    # the others have the same batch
    potential = BatchPotential(problem, noise, lambda batch: batch, processes, lambda own: processes * own)
    potential.add(path, Step.of(net, optimizer, halves), 0, first=first)
    return torch.cat([p.grad.reshape(-1) for p in path.parameters]) - 1


def test_label_noise_adds_the_gradient_of_the_trace(dense):
    """alpha c_H/4 grad tr H with H = 2 mean J^T J and c_H = 2 std^2/B, B over all processes."""
    w = dense.weights().requires_grad_()
    rows = [torch.autograd.grad(f, w, create_graph=True)[0] for f in dense.outputs(w)[:, 0]]
    trace = 2 * torch.stack([row.square().sum() for row in rows]).mean()
    (gradient,) = torch.autograd.grad(trace, w)
    for momentum, processes in ((0.0, 1), (0.5, 2)):
        alpha, batch = LR / (1 - momentum), 4 * processes
        found = added(dense, LabelNoise(STD), first=False, momentum=momentum, processes=processes)
        torch.testing.assert_close(found, alpha * 2 * STD**2 / batch / 4 * gradient)


def test_noise_of_order_one_is_added_if_asked(dense):
    truth = dense.dropout_potential_gradient(dense.weights())
    assert not added(dense, Dropout(), first=False).any()
    torch.testing.assert_close(added(dense, Dropout(), first=True), truth, rtol=1e-6, atol=1e-8)
    both = added(dense, Dropout() + LabelNoise(STD), first=True)
    torch.testing.assert_close(both, truth + added(dense, LabelNoise(STD), first=False), rtol=1e-6, atol=1e-8)
    # the optimizer of every path does it
    assert not added(dense, WeightDecay(0.1), first=True).any()


def test_noise_without_a_potential_is_named(dense):
    noise = Dropout() + LabelNoise(STD) + Langevin(0.01)
    assert without_potential(noise, dense.problem) == ["Langevin(std=0.01)"]
    torch.testing.assert_close(added(dense, noise, first=False), added(dense, LabelNoise(STD), first=False))
    assert not BatchPotential(dense.problem, Langevin(0.01), lambda batch: batch).second
    assert BatchPotential(dense.problem, noise, lambda batch: batch).second
