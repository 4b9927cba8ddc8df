"""The effective flow and replicas against dense recursions and against one another."""

import math

import pytest
import torch

from tests.problems import make
from torch_singlim import (
    AntiCorrelated,
    CustomNoise,
    DropConnect,
    Dropout,
    InputNoise,
    LabelNoise,
    Langevin,
    Minibatch,
    Result,
    SGDSettings,
    WeightDecay,
    ZeroLossProblem,
    compare,
    effective_flow,
    simulate,
)
from torch_singlim.noise import draw_noise
from torch_singlim.theory import has_effective_flow


def descend(gradient, w, alpha, steps):
    v = w.clone()
    for _ in range(steps):
        v = v - alpha * gradient(v)
    return v - w


def start(name="two_layers"):
    dense, w = make(name)
    return dense, w + 0.05 * torch.linspace(-1, 1, len(w), dtype=w.dtype)


def test_baseline_is_gradient_descent_on_L():
    dense, w = start()
    flow = effective_flow(dense.problem, w, Minibatch(), SGDSettings(lr=0.05, batch_size=2), steps=30)
    torch.testing.assert_close(flow.displacement, descend(torch.func.grad(dense.L), w, 0.05, 30), rtol=0, atol=1e-13)
    assert (flow.stderr, flow.gradients, flow.status) == (0.0, 30, Result.SUCCESSFUL)


def test_averaged_flow_is_descent_on_the_exact_mean_over_all_masks():
    """Seven units give 128 masks per sample: the mean over them in closed form, sample by sample."""
    dense, w = make("scalar")
    w = w + 0.05 * torch.linspace(-1, 1, len(w), dtype=w.dtype)
    D, p = dense.widths[0], dense.rates[0]
    bits = (torch.arange(2**D)[:, None] >> torch.arange(D)) & 1
    probability = torch.where(bits == 1, 1 - p, p).prod(1).double()
    etas = bits.double() / (1 - p) - 1

    def mean_loss(v):
        each = torch.stack([dense.L(v, eta.expand(len(dense.inputs), -1)) for eta in etas])
        return (probability * each).sum()

    truth = descend(torch.func.grad(mean_loss), w, 0.02, 100)
    flow = effective_flow(
        dense.problem,
        w,
        Dropout(),
        SGDSettings(lr=0.02),
        steps=100,
        replicas=40,
        generator=torch.Generator().manual_seed(0),
    )
    error = torch.linalg.vector_norm(flow.displacement - truth).item()
    assert error < 3 * flow.stderr
    assert compare(truth, flow.displacement).cosine > 0.995
    assert flow.gradients == 4000


def test_second_order_flow_is_descent_on_L_plus_V():
    dense, w = start("scalar")
    target = torch.func.grad(lambda v: dense.L(v) + dense.dropout_potential(v))
    truth = descend(target, w, 0.02, 40)
    flow = effective_flow(
        dense.problem,
        w,
        Dropout(),
        SGDSettings(lr=0.02),
        steps=40,
        expansion="second_order",
        replicas=30,
        generator=torch.Generator().manual_seed(0),
    )
    assert torch.linalg.vector_norm(flow.displacement - truth).item() < 3 * flow.stderr
    assert compare(truth, flow.displacement).cosine > 0.99


def test_order_two_flow_is_descent_on_L_plus_alpha_V():
    """Label noise: V = std^2/(2 C B) tr H, from dense Jacobians; its mean path has no other noise."""
    dense, w = start("two_layers")
    alpha, std, batch, steps = 0.02, 0.4, 2, 40
    weight = alpha * std**2 / (2 * 2 * batch)
    target = torch.func.grad(
        lambda v: dense.L(v) + weight * torch.func.jacrev(dense.outputs)(v).square().sum() / len(dense.inputs)
    )
    truth = descend(target, w, alpha, steps)
    baseline = descend(torch.func.grad(dense.L), w, alpha, steps)
    sgd = SGDSettings(lr=alpha, batch_size=batch)
    flow = effective_flow(
        dense.problem,
        w,
        LabelNoise(std),
        sgd,
        steps=steps,
        replicas=30,
        generator=torch.Generator().manual_seed(0),
    )
    assert torch.linalg.vector_norm(flow.displacement - truth).item() < 3 * flow.stderr
    induced = compare(truth - baseline, flow.displacement - baseline)
    assert induced.cosine > 0.99
    assert induced.speed == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize(
    "noise", [DropConnect(0.1), AntiCorrelated(0.05), InputNoise(0.1), Dropout() + LabelNoise(0.2)], ids=str
)
def test_replicas_of_every_noise_average_to_its_flow(noise):
    """Full batches: off Gamma the sampling of small ones adds a noise of its own, which the flow does not have."""
    dense, w = start()
    sgd = SGDSettings(lr=0.01, momentum=0.5)
    generator = torch.Generator().manual_seed(2)
    ensemble = simulate(dense.problem, w, noise, sgd, steps=150, replicas=300, generator=generator)
    flow = effective_flow(dense.problem, w, noise, sgd, steps=150, replicas=10, generator=generator)
    agreement = compare(ensemble.mean.mean, flow.displacement)
    assert agreement.cosine > 0.99
    assert agreement.speed == pytest.approx(1, abs=0.03)


def test_noise_without_an_effective_flow():
    dense, w = start()
    sgd = SGDSettings(lr=0.01)
    own = CustomNoise(lambda loss, w, x, y, eta: loss(w, x, y) + eta @ w, std=0.1, claimed_order=2)
    for noise in (Langevin(0.1), Dropout() + Langevin(0.1), own):
        assert not has_effective_flow(noise, dense.problem)
        with pytest.raises(ValueError, match="no effective loss"):
            effective_flow(dense.problem, w, noise, sgd, steps=2)


def test_an_ensemble_goes_on_and_has_its_covariance():
    """Linear problem, Langevin noise: every component is an autoregression with a known variance."""
    problem = ZeroLossProblem(torch.nn.Linear(2, 1, bias=False), "mse", torch.tensor([[1.0, 0.0]]), torch.zeros(1, 1))
    w, generator = torch.zeros(2).double(), torch.Generator().manual_seed(0)
    noise, sgd = Langevin(0.5), SGDSettings(lr=0.1)
    first = simulate(problem, w, noise, sgd, steps=20, replicas=4000, generator=generator)
    second = simulate(problem, first.weights, noise, sgd, steps=20, replicas=4000, generator=generator)
    a = 1 - 0.1 * 2  # H = diag(2, 0)
    stationary = (0.1 * 0.5) ** 2 / (1 - a**2)
    covariance, error = second.covariance()
    truth = torch.tensor([2 * stationary * (1 - a**20), 20 * (0.1 * 0.5) ** 2]).double()
    assert ((covariance.diagonal() - truth).abs() < 4 * error.diagonal()).all()
    assert abs(covariance[0, 1]) < 4 * error[0, 1]
    assert error.diagonal().max() < 0.05 * covariance.diagonal().max()
    along, _ = second.covariance(torch.tensor([[0.6, 0.8]]).double())
    u = torch.tensor([0.6, 0.8]).double()
    assert along.item() == pytest.approx((u @ covariance @ u).item())
    assert abs(second.spread.mean - truth.sum().item()) < 4 * second.spread.stderr


def test_progress_is_shown_on_request(capsys):
    dense, w = start()
    for progress in (False, True):
        simulate(dense.problem, w, Minibatch(), SGDSettings(lr=0.01), steps=3, replicas=2, progress=progress)
        assert ("2 runs: 100%" in capsys.readouterr().err) == progress


def test_few_runs_at_once_are_as_good_as_all():
    dense, w = start()
    sgd = SGDSettings(lr=0.01, batch_size=2)
    for memory in (1, 2**30):
        generator = torch.Generator().manual_seed(3)
        ensemble = simulate(
            dense.problem, w, Dropout(), sgd, steps=60, replicas=150, memory=memory, generator=generator
        )
        assert ensemble.displacements.shape == (150, len(w))
        flow = effective_flow(dense.problem, w, Dropout(), sgd, steps=60, replicas=10, generator=generator)
        assert compare(ensemble.mean.mean, flow.displacement).cosine > 0.98


def test_stderr_of_the_flow_is_its_spread():
    dense, w = start("scalar")
    generator = torch.Generator().manual_seed(1)
    flows = [
        effective_flow(dense.problem, w, Dropout(), SGDSettings(lr=0.02), steps=20, generator=generator)
        for _ in range(60)
    ]
    paths = torch.stack([f.displacement for f in flows])
    spread = (paths - paths.mean(0)).square().sum(1).mean().item()
    assert sum(f.stderr**2 for f in flows) / 60 / spread == pytest.approx(1, abs=0.35)
    single = effective_flow(dense.problem, w, Dropout(), SGDSettings(lr=0.02), steps=3, replicas=1)
    assert math.isnan(single.stderr)


def test_weight_decay_and_momentum_follow_torch_sgd():
    dense, w = start()
    parameters = [torch.nn.Parameter(w.clone())]
    optimizer = torch.optim.SGD(parameters, lr=0.02, momentum=0.9, weight_decay=0.01)
    for _ in range(25):
        optimizer.zero_grad()
        dense.L(parameters[0]).backward()
        optimizer.step()
    sgd = SGDSettings(lr=0.02, momentum=0.9)
    flow = effective_flow(dense.problem, w, WeightDecay(0.01), sgd, steps=25)
    torch.testing.assert_close(flow.displacement, parameters[0].detach() - w, rtol=0, atol=1e-12)
    # and from the middle, with the momentum that the optimizer has there
    middle = parameters[0].detach().clone()
    velocity = optimizer.state[parameters[0]]["momentum_buffer"].clone()
    for _ in range(5):
        optimizer.zero_grad()
        dense.L(parameters[0]).backward()
        optimizer.step()
    rest = effective_flow(dense.problem, middle, WeightDecay(0.01), sgd, steps=5, velocity=velocity)
    torch.testing.assert_close(rest.displacement, parameters[0].detach() - middle, rtol=0, atol=1e-12)


def test_divergence_is_reported():
    dense, w = start()
    flow = effective_flow(dense.problem, w, Minibatch(), SGDSettings(lr=1e4), steps=1000)
    assert flow.status is Result.DIVERGED
    assert flow.gradients < 1000


def test_replicas_average_to_the_flow():
    """Minibatches with replacement of noise: the mean of many runs agrees with the full-batch flow."""
    dense, w = start()
    sgd = SGDSettings(lr=0.01, batch_size=2)
    generator = torch.Generator().manual_seed(2)
    ensemble = simulate(dense.problem, w, Dropout(), sgd, steps=150, replicas=400, generator=generator)
    flow = effective_flow(dense.problem, w, Dropout(), sgd, steps=150, replicas=10, generator=generator)
    agreement = compare(ensemble.mean.mean, flow.displacement)
    assert agreement.cosine > 0.99
    assert agreement.speed == pytest.approx(1, abs=0.03)


def test_an_epoch_sees_every_sample_once_ragged_batch_included():
    dense, w = make("two_layers")  # 5 samples, on Gamma: gradients vanish without noise
    w = w + 1e-6
    sgd = SGDSettings(lr=1e-3, batch_size=2)
    one_epoch = simulate(dense.problem, w, Minibatch(), sgd, steps=3, replicas=50).displacements
    # to first order in lr: batches of 2, 2 and 1 weigh their samples 1/2, 1/2, 1, whichever they are
    assert one_epoch.shape == (50, len(w))
    full = simulate(dense.problem, w, Minibatch(), SGDSettings(lr=1e-3), steps=3, replicas=2).displacements
    torch.testing.assert_close(full[0], descend(torch.func.grad(dense.L), w, 1e-3, 3), rtol=0, atol=1e-16)
    mean = one_epoch.mean(0)
    assert compare(mean, full[0]).cosine > 0.95


@pytest.mark.parametrize(
    ("options", "message"),
    [({"expansion": "third"}, "expansion must be"), ({"steps": 0}, "at least 1"), ({"replicas": 0}, "at least 1")],
)
def test_bad_arguments(options, message):
    dense, w = start()
    arguments = {"steps": 2} | options
    with pytest.raises(ValueError, match=message):
        effective_flow(dense.problem, w, Dropout(), SGDSettings(lr=0.1), **arguments)
    if "expansion" not in options:
        with pytest.raises(ValueError, match=message):
            simulate(dense.problem, w, Dropout(), SGDSettings(lr=0.1), **({"replicas": 1} | arguments))


@pytest.mark.parametrize("noise", [Langevin(0.5), LabelNoise(0.5), Langevin(0.5) + LabelNoise(0.5)], ids=str)
@pytest.mark.parametrize("batch_size", [None, 2])
def test_what_is_linear_in_the_noise_cancels_in_antithetic_pairs(noise, batch_size):
    """Linear network: the mean of each pair is descent on the same batches without noise."""
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    problem = ZeroLossProblem(torch.nn.Linear(6, 1, bias=False), "mse", x, torch.zeros(5, 1))
    w, sgd = torch.ones(6).double(), SGDSettings(lr=0.05, batch_size=batch_size)
    run = {"steps": 7, "replicas": 6, "memory": 3000}
    runs = simulate(problem, w, noise, sgd, antithetic=True, generator=torch.Generator().manual_seed(1), **run)
    assert runs.displacements.std(0).min() > 1e-3
    pairs = runs.independent
    assert pairs.shape == (3, 6)
    if batch_size is None:
        quiet = simulate(problem, w, Minibatch(), sgd, **run).displacements[0]
        torch.testing.assert_close(pairs, quiet.expand(3, -1), rtol=1e-10, atol=1e-12)
        assert runs.mean.stderr < 1e-10
    else:
        assert pairs.std(0).min() > 1e-6  # each pair has batches of its own
    with pytest.raises(ValueError, match="even number"):
        simulate(problem, w, noise, sgd, steps=1, replicas=3, antithetic=True)


def test_opposite_masks_have_opposite_quantiles():
    """Dropout .5 has symmetric masks: what one run of a pair drops, the other keeps."""
    net = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.Linear(4, 1, bias=False))
    problem = ZeroLossProblem(net, "mse", torch.ones(3, 4), torch.zeros(3, 1))
    (eta,) = draw_noise(Dropout(), problem, 3, replicas=6, antithetic=True, generator=torch.Generator().manual_seed(0))
    assert eta.shape == (6, 3, 4)
    torch.testing.assert_close(eta[::2], -eta[1::2])
    assert {-1.0, 1.0} == set(eta.flatten().tolist())
