"""Noise of order 2 under adaptive optimizers: diag H, and the correlation of the step sizes with the gradient."""

import dataclasses

import pytest
import torch
from torch import nn

from tests.problems import DTYPE, make
from torch_singlim import (
    LabelFlips,
    LabelNoise,
    Langevin,
    SecondMoments,
    SGDSettings,
    WeightDecay,
    ZeroLossProblem,
    compare,
    frozen_metric,
    gauss_newton,
    limit_flow,
    nearest_point,
    singular_limit,
)
from torch_singlim.theory import diagonal, excursion_potential

NAMES = ["scalar", "two_layers", "cross_entropy", "rank_deficient"]


def of_labels(dense, w):
    """diag of (1/N) sum J^T A J with A at the optimum, whose outputs are those of the dense problem at its own point."""
    J, A = dense.jacobian(w), dense.curvature(dense.weights())
    return torch.einsum("nap,nab,nbp->p", J, A, J) / len(J)


@pytest.mark.parametrize("name", NAMES)
def test_the_diagonal_is_that_of_the_dense_matrix(name):
    dense, w = make(name)
    torch.testing.assert_close(diagonal(dense.problem, w), dense.gauss_newton(w).diag(), rtol=1e-9, atol=1e-12)
    away = w + 0.1 * torch.linspace(-1, 1, len(w), dtype=DTYPE)
    torch.testing.assert_close(diagonal(dense.problem, away), of_labels(dense, away), rtol=1e-9, atol=1e-12)


def moments_of(w, rate=0.05):
    generator = torch.Generator().manual_seed(0)
    v, response = torch.rand(2, len(w), generator=generator, dtype=DTYPE) + 0.1
    return SecondMoments(v, response, rate)


@pytest.mark.parametrize("name", NAMES)
def test_the_correlation_is_that_of_dense_modes(name):
    """g_i = -(c^2/2) s_i sum_m f_m (grad h_i . p_m)(H p_m)_i, with differences of a dense diag H along each mode."""
    dense, w = make(name)
    problem, sgd, moments, c = dense.problem, SGDSettings(lr=0.3), moments_of(w), 0.7
    H = dense.gauss_newton(w)
    values, vectors = torch.linalg.eigh(H)
    expected, t = torch.zeros_like(w), 1e-4
    for value, p in zip(values, vectors.T, strict=True):
        if value > 1e-9 * values[-1]:
            f = moments.rate / (moments.rate + 0.3 * value)
            slope = (of_labels(dense, w + t * p) - of_labels(dense, w - t * p)) / (2 * t)
            expected -= c**2 / 2 * moments.response * f * slope * (H @ p)
    hessian = gauss_newton(problem, w)
    found = excursion_potential(problem, w, hessian, c, sgd, moments, num_draws=1_000).gradient
    torch.testing.assert_close(found.mean, expected, rtol=0, atol=1e-6 * expected.norm().item())
    assert found.stderr == 0
    draws, generator = problem.num_residuals - 1, torch.Generator().manual_seed(0)
    sampled = excursion_potential(problem, w, hessian, c, sgd, moments, num_draws=draws, generator=generator).gradient
    assert (sampled.mean - expected).norm().item() <= 4 * sampled.stderr


def test_the_drift_has_it_and_other_noises_are_refused():
    dense, w = make("scalar")
    problem, sgd, moments = dense.problem, SGDSettings(lr=0.3), moments_of(w)
    hessian = gauss_newton(problem, w)
    noise = LabelNoise(0.1)
    c = noise.covariance(problem, 4).hessian
    g = excursion_potential(problem, w, hessian, c, sgd, moments, num_draws=1_000).gradient.mean
    for finite_step in (False, True):
        alone = singular_limit(problem, w, noise, sgd, num_draws=1_000, finite_step=finite_step).drift
        found = singular_limit(problem, w, noise, sgd, num_draws=1_000, finite_step=finite_step, moments=moments).drift
        torch.testing.assert_close(found - alone, -(0.3**2) * hessian.project_kernel(g), rtol=1e-6, atol=1e-12)
    # beside weight decay, which is of order 1, it counts at finite step size
    both = noise + WeightDecay(0.1)
    with_both = [
        singular_limit(problem, w, both, sgd, num_draws=1_000, finite_step=True, moments=each).drift
        for each in (None, moments)
    ]
    torch.testing.assert_close(with_both[1] - with_both[0], found - alone, rtol=1e-6, atol=1e-12)
    with pytest.raises(ValueError, match=r"Sigma = c H, got Langevin\(std=0\.1\): use LabelNoise or LabelFlips"):
        singular_limit(problem, w, Langevin(0.1), sgd, moments=moments)


def test_moments_of_optimizers():
    """S = 1/(factor (sqrt(v) + eps)): the response is a difference quotient of log S, in the metric's coordinates."""
    for make_optimizer, rate in (
        (lambda p: torch.optim.AdamW(p, lr=0.1, betas=(0.7, 0.9), eps=0.1, weight_decay=0.0), 0.1),
        (lambda p: torch.optim.RMSprop(p, lr=0.1, alpha=0.8, eps=0.1), 0.2),
        (lambda p: torch.optim.Adagrad(p, lr=0.1, lr_decay=0.3, eps=0.1), 0.2),
        (lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True, eps=0.1), 0.001),
    ):
        torch.manual_seed(0)
        net = nn.Linear(3, 2).double()
        optimizer = make_optimizer(net.parameters())
        squares = []
        for _ in range(5):
            for p in net.parameters():
                p.grad = torch.randn_like(p)
            squares.append(torch.cat([p.grad.reshape(-1) ** 2 for p in net.parameters()]))
            optimizer.step()
        metric = frozen_metric(optimizer, net)
        r = torch.cat([each.reshape(-1) for each in metric.step_ratios.values()])
        assert metric.moments.rate == pytest.approx(rate)
        name = type(optimizer).__name__
        beta = {"AdamW": 0.9, "RMSprop": 0.8, "Adam": 0.999}.get(name)
        if beta is None:
            v, key = sum(squares) / 5, "sum"
        else:
            v = sum((1 - beta) * beta ** (4 - k) * square for k, square in enumerate(squares))
            v = v if name == "RMSprop" else v / (1 - beta**5)
            key = "square_avg" if name == "RMSprop" else "exp_avg_sq"
        torch.testing.assert_close(metric.moments.values, r * v, rtol=1e-6, atol=1e-12)
        t = 1e-6
        for p in net.parameters():
            optimizer.state[p][key] *= 1 + t
        after = frozen_metric(optimizer, net)
        S = after.scale * torch.cat([each.reshape(-1) for each in after.step_ratios.values()])
        expected = -(S / (metric.scale * r)).log() / (t * v)
        torch.testing.assert_close(metric.moments.response * r, expected, rtol=1e-5, atol=1e-9)


REPLICAS = 128


class Followed:
    """torch's Adam on replicas, in antithetic pairs, under noise on the labels; Adam acts on each number alone."""

    def __init__(self, dense, std, beta):
        self.dense, self.std, self.beta = dense, std, beta
        self.p = nn.Parameter(dense.weights().expand(REPLICAS, -1).clone())
        self.adam = torch.optim.Adam([self.p], lr=0.0, betas=(0.9, beta), eps=1e-14)
        self.gradient = torch.func.vmap(torch.func.grad(self.loss))
        self.generator = torch.Generator().manual_seed(0)

    def loss(self, w, eta):
        return ((self.dense.outputs(w) - self.dense.targets - eta) ** 2).mean()

    def steps(self, count):
        shape = REPLICAS // 2, *self.dense.targets.shape
        for _ in range(count):
            eta = self.std * torch.randn(shape, generator=self.generator, dtype=DTYPE)
            self.p.grad = self.gradient(self.p.detach(), torch.stack([eta, -eta], 1).flatten(0, 1))
            self.adam.step()

    def metric(self):
        """Of the mean second moments, as the state of one optimizer."""
        parameters = list(self.dense.net.parameters())
        rate = self.adam.param_groups[0]["lr"] or 1.0
        own = torch.optim.Adam(parameters, lr=rate, betas=(0.9, self.beta), eps=1e-14)
        v = self.adam.state[self.p]["exp_avg_sq"].mean(0)
        for q, each in zip(parameters, v.split([q.numel() for q in parameters]), strict=True):
            own.state[q] = {"exp_avg_sq": each.view(q.shape), "step": torch.tensor(1e9)}
        return frozen_metric(own, self.dense.net)

    def nearest(self, problem, root):
        return torch.stack([nearest_point(problem, w / root, rtol=1e-4).point * root for w in self.p.detach()])


@pytest.mark.slow
def test_an_ensemble_of_adam_under_noise_on_the_labels():
    """1 - beta_2 = .05, alpha lambda from .006 to .1: both the frozen step sizes alone and the sum, against replicas."""
    dense, _ = make("scalar")
    std = 0.02
    run = Followed(dense, std, 0.95)
    run.steps(200)  # second moments of the noise on the set
    metric = run.metric()
    problem = ZeroLossProblem(dense.net, "mse", dense.inputs, dense.targets, step_ratios=metric.step_ratios)
    run.adam.param_groups[0]["lr"] = 0.1 / (metric.scale * gauss_newton(problem, problem.weights()).largest)
    run.steps(2_000)
    metric = run.metric()
    root = torch.cat([r.reshape(-1) for r in metric.step_ratios.values()]).sqrt()
    problem = ZeroLossProblem(dense.net, "mse", dense.inputs, dense.targets, step_ratios=metric.step_ratios)
    before, steps = run.nearest(problem, root), 12_000
    run.steps(steps)
    motions = (run.nearest(problem, root) - before).view(-1, 2, len(root)).mean(1)
    mean = motions.mean(0)
    error = ((motions.std(0) / len(motions) ** 0.5).norm() / mean.norm()).item()
    start = nearest_point(problem, before.mean(0) / root, rtol=1e-8, max_steps=100).point
    noise = LabelNoise(std)
    c = noise.covariance(problem, 4).hessian
    ratio = compare(metric.moments.values, c * diagonal(problem, start))
    found = {}
    for name, moments in {"frozen step sizes": None, "with their correlation": metric.moments}.items():
        flow = limit_flow(problem, start, noise, metric.sgd, steps=steps, num_draws=1_000, moments=moments)
        found[name] = compare(mean, flow.displacement * root)
        print(f"\n{name}: cosine {found[name].cosine:.4f}, speed {found[name].speed:.3f}, relative error {error:.2g}")
    print(f"second moments: {ratio.speed:.3f} of c diag H, cosine {ratio.cosine:.4f}")
    assert found["with their correlation"].cosine >= 0.99
    assert found["with their correlation"].speed == pytest.approx(1, abs=0.05)
    assert found["frozen step sizes"].speed < 0.9
    # alpha lambda_1/2 of it is the gradient of the excursions themselves
    assert ratio.speed == pytest.approx(1, abs=0.1)
    assert ratio.cosine >= 0.999


def test_label_flips_have_the_same_form():
    dense, w = make("cross_entropy")
    labels = torch.tensor([0, 1, 2, 0])
    smooth = 0.9 * torch.nn.functional.one_hot(labels, 3).double() + 0.1 / 3
    problem = dataclasses.replace(dense, targets=smooth).problem
    point = nearest_point(problem, w, max_steps=100).point
    sgd, moments = SGDSettings(lr=0.1), moments_of(w)
    frozen, found = (
        singular_limit(problem, point, LabelFlips(0.1), sgd, num_draws=1_000, moments=each).drift
        for each in (None, moments)
    )
    hessian = gauss_newton(problem, point)
    g = excursion_potential(problem, point, hessian, 1 / 4, sgd, moments, num_draws=1_000).gradient.mean
    torch.testing.assert_close(found - frozen, -(0.1**2) * hessian.project_kernel(g), rtol=1e-6, atol=1e-12)
