"""finite_window against dense integration of the flow on L_eff, whose noise average is taken over every mask."""

import math

import pytest
import torch

from tests.problems import DTYPE, make
from torch_singlim import (
    DropConnect,
    Dropout,
    InputNoise,
    LabelNoise,
    Langevin,
    Minibatch,
    Result,
    SGDSettings,
    WeightDecay,
    compare,
    effective_flow,
    finite_window,
)
from torch_singlim.noise import stratified_noise


def gradient_flow(gradient, w, time, steps=1000):
    """Classical Runge-Kutta, steps far below what stability asks for."""
    h, v = time / steps, w.clone()
    for _ in range(steps):
        k1 = -gradient(v)
        k2 = -gradient(v + h / 2 * k1)
        k3 = -gradient(v + h / 2 * k2)
        k4 = -gradient(v + h * k3)
        v = v + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return v - w


def start(name="scalar"):
    dense, w = make(name)
    return dense, w + 0.05 * torch.linspace(-1, 1, len(w), dtype=w.dtype)


def mean_loss(dense):
    """E L over all 2^D masks, sample by sample."""
    D, p = dense.widths[0], dense.rates[0]
    bits = (torch.arange(2**D)[:, None] >> torch.arange(D)) & 1
    probability = torch.where(bits == 1, 1 - p, p).prod(1).to(DTYPE)
    etas = bits.to(DTYPE) / (1 - p) - 1
    each = torch.vmap(lambda v, eta: dense.L(v, eta.expand(len(dense.inputs), -1)), in_dims=(None, 0))
    return lambda v: torch.dot(probability, each(v, etas))


def test_without_noise_it_is_the_gradient_flow_of_L():
    dense, w = start("two_layers")
    truth = gradient_flow(torch.func.grad(dense.L), w, 40.0)
    window = finite_window(dense.problem, w, Minibatch(), SGDSettings(lr=0.02), steps=2000, rtol=1e-3)
    error = (window.displacement - truth).norm().item()
    assert error < 0.03 * truth.norm().item()
    assert error < 3 * window.error
    assert (window.stderr, window.status) == (0.0, Result.SUCCESSFUL)


def test_second_order_in_the_length_of_the_sub_steps():
    """Windows one after another, of three sub-steps each: halving them divides the error by about four, and the
    estimate follows."""
    dense, w = start("two_layers")
    truth = gradient_flow(torch.func.grad(dense.L), w, 1.0)
    errors, estimates = [], []
    for count in (8, 16, 32):
        at, estimate, sgd = w, 0.0, SGDSettings(lr=1.0 / (10 * count))
        for _ in range(count):
            window = finite_window(dense.problem, at, Minibatch(), sgd, steps=10, rtol=1e9)
            at, estimate = at + window.displacement, math.hypot(estimate, window.error)
        errors.append((at - w - truth).norm().item())
        estimates.append(estimate)
    assert errors[0] / errors[2] > 10
    assert errors[2] < estimates[2] * 4


@pytest.mark.parametrize("noise", [Dropout(), Dropout() + WeightDecay(0.01)], ids=str)
def test_against_the_flow_of_the_mean_over_all_masks(noise):
    dense, w = start()
    mean = mean_loss(dense)
    decay = 0.005 if noise != Dropout() else 0.0
    truth = gradient_flow(torch.func.grad(lambda v: mean(v) + decay * v.square().sum()), w, 20.0, steps=300)
    baseline = gradient_flow(torch.func.grad(dense.L), w, 20.0, steps=300)
    generator = torch.Generator().manual_seed(0)
    window = finite_window(
        dense.problem, w, noise, SGDSettings(lr=0.01), steps=2000, num_draws=400, rtol=0.02, generator=generator
    )
    error = (window.displacement - truth).norm().item()
    assert error < 3 * (window.stderr + window.error)
    induced = compare(truth - baseline, window.displacement - baseline)
    assert induced.cosine > 0.97
    assert induced.speed == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize(
    "noise", [DropConnect(0.1), DropConnect.from_rate(0.01), InputNoise(0.1), LabelNoise(0.2)], ids=str
)
def test_every_noise_goes_where_its_flow_goes(noise):
    dense, w = start("two_layers")
    sgd, generator = SGDSettings(lr=0.01, batch_size=2), torch.Generator().manual_seed(1)
    window = finite_window(dense.problem, w, noise, sgd, steps=500, num_draws=200, rtol=0.02, generator=generator)
    flow = effective_flow(dense.problem, w, noise, sgd, steps=500, replicas=8, generator=generator)
    error = (window.displacement - flow.displacement).norm().item()
    assert error < 4 * (math.hypot(window.stderr, flow.stderr) + window.error)
    assert compare(flow.displacement, window.displacement).cosine > 0.99


@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_against_its_own_recursion(nesterov):
    dense, w = start("two_layers")
    sgd = SGDSettings(lr=0.002, momentum=0.9, nesterov=nesterov)
    v, velocity = w, None
    for _ in range(30):  # a velocity that has built up
        v, velocity = sgd.step(v, velocity, dense.problem.gradient(v))
    exact = effective_flow(dense.problem, v, Minibatch(), sgd, steps=400, velocity=velocity)
    window = finite_window(dense.problem, v, Minibatch(), sgd, steps=400, velocity=velocity, rtol=1e-3)
    blind = finite_window(dense.problem, v, Minibatch(), sgd, steps=400, rtol=1e-3)
    miss = (window.displacement - exact.displacement).norm()
    assert miss < 0.02 * exact.displacement.norm()
    assert miss < 0.6 * (blind.displacement - exact.displacement).norm()


def test_marks_are_points_of_the_path():
    dense, w = start("two_layers")
    sgd, marks = SGDSettings(lr=0.02), (100, 250, 1000)
    window = finite_window(dense.problem, w, Minibatch(), sgd, steps=1000, marks=marks, rtol=1e-3)
    flow = effective_flow(dense.problem, w, Minibatch(), sgd, steps=1000, marks=marks)
    for k, at, exact in zip(marks, window.path, flow.path, strict=True):
        alone = effective_flow(dense.problem, w, Minibatch(), sgd, steps=k)
        torch.testing.assert_close(exact, alone.displacement)
        assert (at - exact).norm() < 0.05 * exact.norm()
    torch.testing.assert_close(window.displacement, window.path[-1])


def test_the_standard_error_is_that_of_repetitions():
    dense, w = start("two_layers")
    sgd = SGDSettings(lr=0.02)
    windows = [
        finite_window(dense.problem, w, Dropout(), sgd, steps=1000, generator=torch.Generator().manual_seed(seed))
        for seed in range(20)
    ]
    ends = torch.stack([window.displacement for window in windows])
    spread = (ends - ends.mean(0)).square().sum(1).mean().sqrt().item()
    stated = math.sqrt(sum(window.stderr**2 for window in windows) / len(windows))
    # an upper bound: errors of early sub-steps decay in later ones
    assert 0.8 * spread < stated < 3 * spread


def test_it_ends_where_single_steps_are_cheaper():
    dense, w = start("two_layers")
    window = finite_window(dense.problem, w, Minibatch(), SGDSettings(lr=0.02), steps=60, rtol=1e-12)
    assert window.status is Result.INACCURATE
    assert math.isinf(window.error)


def test_bad_arguments():
    dense, w = start()
    sgd = SGDSettings(lr=0.02)
    with pytest.raises(ValueError, match="steps must be at least 1"):
        finite_window(dense.problem, w, Dropout(), sgd, steps=0)
    with pytest.raises(ValueError, match="outputs are not finite"):
        finite_window(dense.problem, w * math.inf, Dropout(), sgd, steps=10)
    with pytest.raises(ValueError, match="no effective loss"):
        finite_window(dense.problem, w, Langevin(0.1), sgd, steps=10)
    for marks in [(5,), (0, 10), (7, 3, 10)]:
        with pytest.raises(ValueError, match="marks must ascend"):
            finite_window(dense.problem, w, Dropout(), sgd, steps=10, marks=marks)
        with pytest.raises(ValueError, match="marks must ascend"):
            effective_flow(dense.problem, w, Dropout(), sgd, steps=10, marks=marks)


# --- stratified draws -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [Dropout(), DropConnect(0.3), InputNoise(0.3)], ids=str)
def test_a_stratified_block_visits_every_stratum(noise):
    """Its mean is nearly zero in every component: far below the 1/sqrt(n) of independent draws."""
    dense, _ = make("two_layers")
    problem, generator = dense.problem, torch.Generator().manual_seed(0)
    block = [etas[0] for etas in stratified_noise(noise, problem, 5, strata=100, generator=generator)]
    assert len(block) == 101  # the next prime
    mean, scale = torch.stack(block).mean(0), noise.scale(problem)
    assert (mean / scale).abs().max() < 0.05
    assert torch.stack(block).var(0).mean() == pytest.approx(scale.square().mean().item(), rel=0.1)


def test_a_single_stratified_draw_is_distributed_as_any_other():
    """Moments over many blocks of the first draw alone, and its components are independent."""
    dense, _ = make("scalar")
    problem, generator = dense.problem, torch.Generator().manual_seed(0)
    draws = [next(iter(stratified_noise(Dropout(), problem, 400, strata=7, generator=generator)))[0] for _ in range(50)]
    eta = torch.cat(draws)
    p = dense.rates[0]
    dropped = (eta == -1).double()
    error = math.sqrt(p * (1 - p) / len(eta))
    assert (dropped.mean(0) - p).abs().max() < 4 * error
    correlation = torch.corrcoef(eta.T) - torch.eye(eta.shape[1], dtype=DTYPE)
    assert correlation.abs().max() < 5 / math.sqrt(len(eta))


def test_pairs_of_stratified_draws_are_as_those_of_a_permutation():
    """Over a block, products of two components average to zero as those of random permutations do."""
    dense, _ = make("scalar")
    problem, generator = dense.problem, torch.Generator().manual_seed(1)
    products = []
    for _ in range(30):
        block = torch.stack(
            [etas[0] for etas in stratified_noise(InputNoise(1.0), problem, 300, strata=13, generator=generator)]
        )
        products.append((block[..., 0] * block[..., 1]).mean(0))
    # two standardised permutations of n values: variance 1/(n - 1) of their mean product
    assert torch.cat(products).var().item() == pytest.approx(1 / 12, rel=0.1)


def test_where_nothing_moves():
    dense, w = make("two_layers")
    window = finite_window(dense.problem, w, Minibatch(), SGDSettings(lr=0.05), steps=400)
    assert window.status is Result.SUCCESSFUL
    assert torch.linalg.vector_norm(window.displacement) < 1e-12
