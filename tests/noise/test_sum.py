"""A sum of noises is a noise in every method: what it gives is what applying its parts by hand gives."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import nn

from tests.problems import DTYPE, chain, displaced, make
from torch_singlim import (
    AntiCorrelated,
    CustomNoise,
    DropConnect,
    Dropout,
    InputNoise,
    LabelFlips,
    LabelNoise,
    Langevin,
    Minibatch,
    WeightDecay,
    ZeroLossProblem,
)
from torch_singlim.network import MeanSquaredError
from torch_singlim.noise import Covariance, Sum, draw_noise, noisy_loss, parts

MSE = {
    "dropout": Dropout(),
    "input_noise": InputNoise(0.2),
    "drop_connect": DropConnect(0.3),
    "anti_correlated": AntiCorrelated(0.1),
    "weight_decay": WeightDecay(0.1),
    "label_noise": LabelNoise(0.4),
    "langevin": Langevin(0.5),
    "minibatch": Minibatch(),
    "custom": CustomNoise(lambda loss, w, x, y, eta: loss(w, x, y) * (1 + eta[0]), std=0.3, claimed_order=None),
}
CROSS_ENTROPY = {name: noise for name, noise in MSE.items() if name != "label_noise"} | {"flips": LabelFlips(0.2)}
PAIRS = [("mse", *pair) for pair in itertools.permutations(MSE, 2)]
PAIRS += [("cross_entropy", *pair) for pair in itertools.permutations(CROSS_ENTROPY, 2) if "flips" in pair]


def problem_of(loss):
    """Dense network, problem, weights off Gamma, the targets that training has."""
    if loss == "mse":
        dense, w = make("two_layers")
        return dense, dense.problem, displaced(w), dense.targets
    net, x = chain([3, 6, 3], nn.Tanh, [0.2], bias=True, seed=6), make("cross_entropy")[0].inputs
    labels = torch.tensor([0, 2, 1, 0])
    problem = ZeroLossProblem(net, nn.CrossEntropyLoss(label_smoothing=0.2), x, labels)
    dense = replace(make("cross_entropy")[0], net=net, targets=problem.targets)
    return dense, problem, dense.weights(), labels


def sum_of(loss, first, second):
    noises = MSE if loss == "mse" else CROSS_ENTROPY
    return noises[first] + noises[second]


def by_hand(dense, w, etas, labels):
    """The noisy loss on dense tensors. Of two that perturb the weights, the second acts on w, the first on the result."""
    v, factor, added, y, activations = w, 1.0, 0.0, dense.targets, None
    for name, eta in reversed(etas.items()):
        if name == "drop_connect":
            v = v * (1 + eta)
        elif name == "anti_correlated":
            v = v + eta
        elif name == "input_noise":
            dense = replace(dense, inputs=dense.inputs + eta)
        elif name == "label_noise":
            y = y + eta
        elif name == "dropout":
            activations = eta
        elif name == "custom":
            factor = 1 + eta[0]
        elif name == "langevin":
            added = added + torch.dot(eta, w)
        elif name == "weight_decay":
            added = added + 0.05 * w.square().sum()
    if "flips" not in etas:
        return factor * replace(dense, targets=y).L(v, activations) + added
    # cross-entropy with the labels that were drawn, the infimum for the smoothed ones subtracted
    drawn = LabelFlips(0.2).redraw(labels, etas["flips"])
    infimum = -(y * y.log()).sum(1).mean()
    loss = nn.functional.cross_entropy(dense.outputs(v, activations), drawn) - infimum
    return factor * loss + added


def quiet_eta(noise, problem, count):
    """No noise, in the shape of one draw for each sample, or for the step."""
    return tuple(
        torch.zeros((count, s.numel()) if part.per_sample else (s.numel(),), dtype=DTYPE)
        for part, s in zip(parts(noise), noise.scale(problem), strict=True)
    )


@pytest.mark.parametrize(("loss", "first", "second"), PAIRS)
def test_the_loss_is_that_of_applying_both_by_hand(loss, first, second):
    dense, problem, w, labels = problem_of(loss)
    noise, n = sum_of(loss, first, second), problem.num_samples
    x, y = problem.inputs, problem.targets
    drawn = noise.draw(problem, n, generator=torch.Generator().manual_seed(0))
    eta = tuple(e if part.per_sample else e[0] for part, e in zip(parts(noise), drawn, strict=True))
    found = noise.noisy_loss(problem.batch_loss, w, x, y, eta)
    truth = by_hand(dense, w, dict(zip((first, second), eta, strict=True)), labels)
    assert found.item() == pytest.approx(truth.item(), rel=1e-12)
    assert found.item() == noisy_loss(noise, problem.batch_loss, w, x, y, eta).item()
    without = problem.batch_loss(w, x, y).item()
    assert found.item() != pytest.approx(without, rel=1e-6)
    penalty = 0.05 * w.square().sum().item() if "weight_decay" in (first, second) else 0.0
    quiet = noise.noisy_loss(problem.batch_loss, w, x, y, quiet_eta(noise, problem, n))
    assert quiet.item() == pytest.approx(without + penalty, rel=1e-12)


def test_four_at_once():
    dense, problem, w, _ = problem_of("mse")
    names = ("drop_connect", "input_noise", "label_noise", "weight_decay")
    noise = (MSE[names[0]] + MSE[names[1]]) + (MSE[names[2]] + MSE[names[3]])
    assert noise.systems == tuple(MSE[name] for name in names)
    eta = draw_noise(noise, problem, problem.num_samples, generator=torch.Generator().manual_seed(1))
    found = noise.noisy_loss(problem.batch_loss, w, problem.inputs, problem.targets, eta)
    shifted = replace(dense, inputs=dense.inputs + eta[1], targets=dense.targets + eta[2])
    truth = shifted.L(w * (1 + eta[0])) + 0.05 * w.square().sum()
    assert found.item() == pytest.approx(truth.item(), rel=1e-12)
    assert found.item() == pytest.approx(by_hand(dense, w, dict(zip(names, eta, strict=True)), None).item(), rel=1e-12)


@pytest.mark.parametrize(("loss", "first", "second"), PAIRS)
def test_everything_else_follows_from_the_parts(loss, first, second):
    _, problem, _, labels = problem_of(loss)
    noise = sum_of(loss, first, second)
    both = a, b = parts(noise)
    for name in ("per_sample", "additive", "moves_outputs", "scale_free"):
        assert getattr(noise, name) == (getattr(a, name) and getattr(b, name))
    for name in ("transient", "relabels", "checked_on_samples", "done_by"):
        assert getattr(noise, name) == (getattr(a, name) or getattr(b, name))
    orders = [part.order for part in both if part.order is not None]
    assert noise.order == min(orders, default=None)
    leading = [part.variance(problem) for part in both if part.order == noise.order]
    assert noise.variance(problem) == max(leading)

    scale = noise.scale(problem)
    assert len(scale) == 2
    assert all(torch.equal(s, part.scale(problem)) for s, part in zip(scale, both, strict=True))
    generator, same = torch.Generator().manual_seed(2), torch.Generator().manual_seed(2)
    eta = noise.draw(problem, 6, generator=generator)
    assert all(torch.equal(e, part.draw(problem, 6, generator=same)) for e, part in zip(eta, both, strict=True))
    u = tuple(torch.rand(6, s.numel(), generator=generator, dtype=DTYPE) for s in scale)
    quantiles = noise.quantile(problem, u)
    for quantile, part, each in zip(quantiles, both, u, strict=True):
        assert torch.equal(quantile, part.quantile(problem, each))
    noise.check(problem)
    if noise.relabels:
        flips = eta[(first, second).index("flips")]
        assert torch.equal(noise.redraw(labels, tuple(e[:4] for e in eta)), LabelFlips(0.2).redraw(labels, flips[:4]))
    else:
        assert torch.equal(noise.redraw(torch.arange(6), eta), torch.arange(6))

    known = [part.covariance(problem, 3) for part in both if part.scale(problem).numel()]
    if None in known:
        assert noise.covariance(problem, 3) is None
    else:
        total = Covariance(sum(c.hessian for c in known), sum(c.identity for c in known))
        assert noise.covariance(problem, 3) == total


def test_closed_covariances_add_up_and_penalties_have_none():
    problem = problem_of("mse")[1]
    both = LabelNoise(0.3) + Langevin(0.2) + WeightDecay(0.1) + Minibatch()
    assert both.covariance(problem, 3) == Covariance(hessian=2 * 0.09 / (2 * 3), identity=0.2**2)
    assert (both + Dropout()).covariance(problem, 3) is None
    assert (WeightDecay(0.1) + Minibatch()).covariance(problem, 3) == Covariance()


def test_a_sum_does_not_fit_where_a_part_does_not():
    problem = problem_of("mse")[1]
    smoothed = problem_of("cross_entropy")[1]
    plain = ZeroLossProblem(nn.Linear(2, 1), "mse", torch.ones(1, 2), torch.ones(1, 1))
    for unfit, noise, message in (
        (plain, WeightDecay(0.1) + Dropout(), r"needs nn\.Dropout layers"),
        (smoothed, Dropout() + LabelNoise(0.1), "LabelNoise is for mse"),
        (problem, LabelFlips(0.2) + Dropout(), "use LabelNoise"),
    ):
        with pytest.raises(ValueError, match=message):
            noise.check(unfit)
    labels = torch.arange(3)
    (LabelFlips(0.2) + Dropout()).check_targets(None, labels)
    (Dropout() + LabelNoise(0.1)).check_targets(MeanSquaredError(), torch.ones(3, 2))
    for noise, targets in ((Dropout() + LabelFlips(0.2), torch.ones(3, 2)), (LabelNoise(0.1) + Dropout(), labels)):
        with pytest.raises(ValueError, match=r"in the batches, got"):
            noise.check_targets(None, targets)
    with pytest.raises(ValueError, match="one each"):
        (Dropout() + Langevin(0.1)) + Langevin(0.2)


def test_a_sum_of_sums_is_flat_and_reads_as_it_is_written():
    noise = Dropout() + (WeightDecay(0.1) + Minibatch())
    assert isinstance(noise, Sum)
    assert parts(noise) == (Dropout(), WeightDecay(0.1), Minibatch())
    assert repr(noise) == "Dropout() + WeightDecay(coefficient=0.1) + Minibatch()"
    assert noise == (Dropout() + WeightDecay(0.1)) + Minibatch()
