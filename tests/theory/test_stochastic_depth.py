"""Stochastic depth as a noise site: the potential and an ensemble of trainings written out by hand."""

import pytest
import torch
from torch import nn
from torch.func import grad, hessian, vmap
from torchvision.ops import StochasticDepth

from torch_singlim import (
    Dropout,
    SGDSettings,
    ZeroLossProblem,
    compare,
    gauss_newton,
    limit_flow,
    nearest_point,
    singular_limit,
)
from torch_singlim.theory import potential

N, RATE, REPLICAS = 4, 0.02, 128


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.block, self.last = (nn.Linear(*size, bias=False) for size in ((3, 6), (6, 6), (6, 1)))
        self.depth = StochasticDepth(RATE, "row")

    def forward(self, x):
        h = self.first(x).tanh()
        return self.last(h + self.depth(self.block(h).tanh()))


def outputs(w, x, eta):
    """The same, with the block's output times 1 + eta  [N]."""
    first, block, last = w.split([18, 36, 6])
    h = (x @ first.view(6, 3).T).tanh()
    return (h + (1 + eta[:, None]) * (h @ block.view(6, 6).T).tanh()) @ last.view(1, 6).T


@pytest.fixture(scope="module")
def toy():
    torch.manual_seed(0)
    net, x = Residual().double(), torch.randn(N, 3, dtype=torch.float64)
    for p in net.parameters():
        nn.init.normal_(p, std=0.7)
    w = torch.cat([p.detach().reshape(-1) for p in net.parameters()])
    y = outputs(w, x, torch.zeros(N, dtype=torch.float64))

    def loss(w, eta):
        return (outputs(w, x, eta) - y).square().mean()

    return ZeroLossProblem(net, "mse", x, y), w, loss


def test_the_potential_is_that_of_one_factor_for_each_sample(toy):
    """V = (1/2) sum_i (p / (1 - p)) d^2 L / d eta_i^2, by a dense Hessian in eta."""
    problem, w, loss = toy
    assert [(site.rate, site.dimension) for site in problem.sites] == [(RATE, 1)]

    def V(w):
        return 0.5 * RATE / (1 - RATE) * hessian(loss, argnums=1)(w, torch.zeros(N, dtype=w.dtype)).trace()

    found = potential(Dropout(), problem, w, num_draws=8)
    assert found.value.mean == pytest.approx(V(w).item())
    torch.testing.assert_close(found.gradient.mean, grad(V)(w))


@pytest.mark.slow
def test_an_ensemble_follows_the_limit(toy):
    problem, w, loss = toy
    sgd = SGDSettings(lr=0.3 / gauss_newton(problem, w).largest)
    limit = singular_limit(problem, w, Dropout(), sgd, num_draws=8)
    steps, generator = int(0.5 * limit.time_scale), torch.Generator().manual_seed(1)
    gradient, W = vmap(grad(loss)), w.repeat(REPLICAS, 1)
    for _ in range(steps):
        kept = torch.rand(REPLICAS, N, generator=generator, dtype=w.dtype) >= RATE
        W = W - sgd.lr * gradient(W, kept.to(w.dtype) / (1 - RATE) - 1)
    motions = torch.stack([nearest_point(problem, v, rtol=1e-4).point for v in W]) - w
    mean = motions.mean(0)
    error = ((motions.std(0) / REPLICAS**0.5).norm() / mean.norm()).item()
    flow = limit_flow(problem, w, Dropout(), sgd, steps=steps, num_draws=8, finite_step=True)
    found = compare(mean, flow.displacement)
    print(f"\nstochastic depth: {steps} steps, {found}, relative error {error:.2g}")
    assert found.cosine >= 0.99
    assert found.speed == pytest.approx(1, abs=0.05)
