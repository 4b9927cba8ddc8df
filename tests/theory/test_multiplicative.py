"""Stochastic depth and Gaussian noise on activations: the potential, and ensembles of trainings written out by hand."""

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

N, RATE, STD, REPLICAS = 4, 0.02, 0.1, 128


class Gaussian(nn.Module):
    def forward(self, x):
        return x * (1 + STD * torch.randn_like(x)) if self.training else x


# the layer, its noise for one sample, its variance, and draws of it
KINDS = {
    "stochastic depth": (
        lambda: StochasticDepth(RATE, "row"),
        1,
        RATE / (1 - RATE),
        lambda *shape, **kind: (torch.rand(*shape, **kind) >= RATE).double() / (1 - RATE) - 1,
    ),
    "Gaussian": (Gaussian, 6, STD**2, lambda *shape, **kind: STD * torch.randn(*shape, **kind)),
}


class Residual(nn.Module):
    def __init__(self, noise):
        super().__init__()
        self.first, self.block, self.last = (nn.Linear(*size, bias=False) for size in ((3, 6), (6, 6), (6, 1)))
        self.noise = noise

    def forward(self, x):
        h = self.first(x).tanh()
        return self.last(h + self.noise(self.block(h).tanh()))


def outputs(w, x, eta):
    """The same, with the block's output times 1 + eta  [N, 1] or [N, 6]."""
    first, block, last = w.split([18, 36, 6])
    h = (x @ first.view(6, 3).T).tanh()
    return (h + (1 + eta) * (h @ block.view(6, 6).T).tanh()) @ last.view(1, 6).T


@pytest.fixture(scope="module", params=KINDS)
def toy(request):
    torch.manual_seed(0)
    layer, dimension, variance, draw = KINDS[request.param]
    net, x = Residual(layer()).double(), torch.randn(N, 3, dtype=torch.float64)
    for p in net.parameters():
        nn.init.normal_(p, std=0.7)
    w = torch.cat([p.detach().reshape(-1) for p in net.parameters()])
    y = outputs(w, x, torch.zeros(N, 1, dtype=torch.float64))

    def loss(w, eta):
        return (outputs(w, x, eta) - y).square().mean()

    return ZeroLossProblem(net, "mse", x, y), w, loss, (dimension, variance, draw)


def test_the_potential_is_the_trace_of_a_dense_hessian(toy):
    """V = (1/2) sum_j sigma_j^2 d^2 L / d eta_j^2, with sigma^2 = p / (1 - p) for stochastic depth."""
    problem, w, loss, (dimension, variance, _) = toy
    (site,) = problem.sites
    assert site.dimension == dimension
    assert site.variance == pytest.approx(variance, rel=1e-4)
    assert bool(site.std) == (dimension == 6)

    def V(w):
        return 0.5 * variance * hessian(lambda eta: loss(w, eta.view(N, -1)))(torch.zeros(N * dimension).to(w)).trace()

    found = potential(Dropout(), problem, w, num_draws=8)
    assert found.value.mean == pytest.approx(V(w).item(), rel=1e-4)
    torch.testing.assert_close(found.gradient.mean, grad(V)(w), rtol=1e-4, atol=1e-9)


@pytest.mark.slow
def test_an_ensemble_follows_the_limit(toy):
    problem, w, loss, (dimension, _, draw) = toy
    sgd = SGDSettings(lr=0.3 / gauss_newton(problem, w).largest)
    limit = singular_limit(problem, w, Dropout(), sgd, num_draws=8)
    steps, generator = int(0.5 * limit.time_scale), torch.Generator().manual_seed(1)
    gradient, W = vmap(grad(loss)), w.repeat(REPLICAS, 1)
    for _ in range(steps):
        W = W - sgd.lr * gradient(W, draw(REPLICAS, N, dimension, generator=generator, dtype=w.dtype))
    motions = torch.stack([nearest_point(problem, v, rtol=1e-4).point for v in W]) - w
    mean = motions.mean(0)
    error = ((motions.std(0) / REPLICAS**0.5).norm() / mean.norm()).item()
    flow = limit_flow(problem, w, Dropout(), sgd, steps=steps, num_draws=8, finite_step=True)
    found = compare(mean, flow.displacement)
    print(f"\n{problem.sites[0]}: {steps} steps, {found}, relative error {error:.2g}")
    assert found.cosine >= 0.99
    assert found.speed == pytest.approx(1, abs=0.05)
