"""A part of the training set: the growth of the distance with samples, and what its points say about the whole."""

import math

import pytest
import torch
from torch import nn

from tests.problems import DTYPE, displaced, make
from torch_singlim import ZeroLossProblem, nearest_point
from torch_singlim.measure import TrainingSet
from torch_singlim.measure.samples import distances_of_subsets, growth, subset_sizes
from torch_singlim.network import ProcessGroup


def small(count):
    """A network of 302 weights near the zero-loss set of `count` samples with two outputs."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 4), nn.Tanh(), nn.Linear(4, 2))
    x = torch.randn(count, 4)
    problem = ZeroLossProblem(net, "mse", x, net(x).detach())
    return problem, displaced(problem.weights(), 0.03)


def test_fewer_samples_are_nearer():
    """Each distance is that of the subset's own problem, and less than that of more samples."""
    problem, w = small(40)
    nearest = nearest_point(problem, w, rtol=0.14)
    found = distances_of_subsets(problem, w, nearest)
    assert list(found) == [40, 20, 10]
    assert found[40] == nearest.distance > found[20] > found[10] > 0
    for count in (20, 10):
        own = ZeroLossProblem(problem.function.module, "mse", problem.inputs[:count], problem.targets[:count])
        assert found[count] == pytest.approx(nearest_point(own, w).distance, rel=0.01)


@pytest.mark.parametrize("batch_size", [None, 3])
def test_chunks_of_samples_stay_in_subsets(batch_size):
    dense, w = make("two_layers")
    whole = ZeroLossProblem(dense.net, dense.loss, dense.inputs, dense.targets, batch_size=batch_size)
    part = whole.subset(4)
    assert part.batch_size == (batch_size or 4)
    assert part.num_residuals == 4 * whole.num_residuals // whole.num_samples
    torch.testing.assert_close(part.outputs(w), whole.outputs(w)[:4])


def test_sizes():
    assert subset_sizes(1000) == (500, 250, 125)
    assert subset_sizes(19) == ()


def test_growth_against_least_squares():
    distances = {10: 1.0, 20: 1.7, 40: 2.1, 80: 3.5}
    x = torch.tensor(list(distances), dtype=DTYPE).log()
    y = torch.tensor(list(distances.values()), dtype=DTYPE).log()
    design = torch.stack([torch.ones(4, dtype=DTYPE), x], 1)
    solution = torch.linalg.lstsq(design, y[:, None])
    covariance = torch.linalg.inv(design.T @ design) * (design @ solution.solution[:, 0] - y).square().sum() / 2
    p = growth(distances)
    assert p.mean == pytest.approx(solution.solution[1].item())
    assert p.stderr == pytest.approx(math.sqrt(covariance[1, 1].item()))
    assert growth({10: 1.0, 20: 2.0}) is growth({10: 1.0, 20: 0.0, 40: 2.0}) is None


@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
def test_the_loss_of_all_samples(loss):
    """Chunks, shares of processes, and the infimum of each sample's own target."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3))
    x, y = torch.randn(50, 3), torch.rand(50, 3, dtype=DTYPE).softmax(1)
    problem = ZeroLossProblem(net, loss, x[:7], y[:7], batch_size=4)
    w = displaced(problem.weights(), 0.3)
    torch.nn.utils.vector_to_parameters(w, net.double().parameters())
    f = net(x.double())
    if loss == "mse":
        truth = nn.functional.mse_loss(f, y)
    else:
        truth = nn.functional.cross_entropy(f, y) + (y * y.log()).sum(1).mean()
    assert TrainingSet(x, y).loss(problem, w) == pytest.approx(truth.item(), rel=1e-12)

    class Part(ProcessGroup):
        def all_reduce(self, tensor):
            return tensor

    shares = []
    for rank in range(3):
        problem.process_group = Part(rank, 3)
        shares.append(TrainingSet(x, y).loss(problem, w))
    assert sum(shares) == pytest.approx(truth.item(), rel=1e-12)
