"""The effective flow and replicas against dense recursions and against one another."""

import math

import pytest
import torch

from tests.problems import make
from torch_singlim import Dropout, Minibatch, SGDSettings, WeightDecay, compare, effective_flow, simulate


def descend(gradient, w, alpha, steps):
    v = w.clone()
    for _ in range(steps):
        v = v - alpha * gradient(v)
    return v - w


def start(name="two_layers"):
    dense, w = make(name)
    return dense, w + 0.05 * torch.linspace(-1, 1, len(w), dtype=w.dtype)


def test_null_is_gradient_descent_on_L():
    dense, w = start()
    flow = effective_flow(dense.problem, w, Minibatch(), SGDSettings(lr=0.05, batch_size=2), steps=30)
    torch.testing.assert_close(flow.displacement, descend(torch.func.grad(dense.L), w, 0.05, 30), rtol=0, atol=1e-13)
    assert (flow.stderr, flow.products, flow.status) == (0.0, 30, "ok")


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
    assert flow.products == 4000


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


def test_divergence_is_said():
    dense, w = start()
    flow = effective_flow(dense.problem, w, Minibatch(), SGDSettings(lr=1e4), steps=1000)
    assert flow.status == "diverged"
    assert flow.products < 1000


def test_replicas_average_to_the_flow():
    """Minibatches with replacement of noise: the mean of many runs agrees with the full-batch flow."""
    dense, w = start()
    sgd = SGDSettings(lr=0.01, batch_size=2)
    generator = torch.Generator().manual_seed(2)
    ensemble = simulate(dense.problem, w, Dropout(), sgd, steps=150, replicas=400, generator=generator)
    flow = effective_flow(dense.problem, w, Dropout(), sgd, steps=150, replicas=10, generator=generator)
    agreement = compare(ensemble.mean.mean, flow.displacement)
    assert agreement.cosine > 0.99
    assert agreement.speed_ratio == pytest.approx(1, abs=0.03)


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
