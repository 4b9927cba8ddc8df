"""Noise systems: what they draw, closed forms against the generic path, measured order, and refusals."""

import math

import pytest
import torch
from torch import nn

from tests.problems import DTYPE, make
from tests.test_reference import load
from tests.theory.test_second_order import dense_ito
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
    SGDSettings,
    WeightDecay,
    ZeroLossProblem,
    degeneracy,
    gauss_newton,
    linearize,
    singular_limit,
)
from torch_singlim.network import FunctionalModule
from torch_singlim.noise import draw_noise, noisy_loss
from torch_singlim.theory import potential, time_scale, with_measured_order
from torch_singlim.theory.gradient_noise import gradient_noise, noise_factor, output_noise

SMOOTHING = 0.2


def smoothed():
    """Cross-entropy on smoothed labels, at a point of its Gamma."""
    reference, problem, _ = load("tanh_smoothed_ce")
    return problem, torch.tensor(reference["nearest_point"], dtype=DTYPE)


def test_drawn_noise_has_the_training_distribution():
    dense, _ = make("two_layers")
    problem = dense.problem
    eta = Dropout().draw(problem, 200_000, generator=torch.Generator().manual_seed(0))
    variance = dense.sigma_squared()
    assert eta.shape == (200_000, 9)
    error = (variance / 200_000).sqrt()
    assert ((eta.mean(0)).abs() < 4 * error).all()
    torch.testing.assert_close(eta.var(0), variance, rtol=0.02, atol=0)
    torch.testing.assert_close(Dropout().scale(problem).square(), variance)
    assert set((1 + eta[:, 0]).unique().tolist()) == {0.0, 1 / 0.9}
    again = Dropout().draw(problem, 200_000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(eta, again)


def test_noise_reaches_the_activations():
    dense, w = make("two_layers")
    problem = dense.problem
    eta = Dropout().draw(problem, problem.num_samples, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(problem.function(w, problem.inputs, eta), dense.outputs(w, eta))


def test_a_layer_called_twice_has_two_sites_and_channel_dropout_one_value_a_channel():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.channels = nn.Conv2d(1, 3, 3), nn.Dropout2d(0.25)
            self.drop, self.out = nn.Dropout(0.5), nn.Linear(3, 2)

        def forward(self, x):
            h = self.channels(self.conv(x)).mean((2, 3))
            return self.out(self.drop(self.drop(h)))

    f = FunctionalModule(Net(), dtype=DTYPE)
    sites = f.sites(torch.zeros(2, 1, 5, 5, dtype=DTYPE))
    assert [(s.rate, s.shape) for s in sites] == [(0.25, (3, 1, 1)), (0.5, (3,)), (0.5, (3,))]


def test_order_and_clock():
    dense, _ = make("two_layers")
    problem = dense.problem
    assert Dropout().order == 1
    assert Minibatch().order is None
    both = Dropout() + WeightDecay(5e-4) + Minibatch()
    assert both.order == 1
    assert both.variance(problem) == pytest.approx(0.3 / 0.7)  # the layer with the larger rate sets the pace
    assert time_scale(SGDSettings(lr=0.1, momentum=0.9), 1, 0.5) == pytest.approx(2)
    assert time_scale(SGDSettings(lr=0.1), 2, 0.5) == pytest.approx(200)
    assert time_scale(SGDSettings(lr=0.1), None, 0.0) == math.inf


@pytest.mark.parametrize(
    "noise",
    [
        DropConnect(0.3),
        DropConnect.from_rate(0.2),
        AntiCorrelated(0.2),
        InputNoise(0.1),
        LabelNoise(0.4),
        Langevin(0.5),
    ],
    ids=repr,
)
def test_draws_have_mean_zero_and_the_stated_variance(noise):
    problem = make("two_layers")[0].problem
    eta = noise.draw(problem, 40_000, generator=torch.Generator().manual_seed(0))
    scale = noise.scale(problem)
    assert (eta.mean(0).abs() < 5 * scale / 200).all()
    covariance = torch.cov(eta.T)
    torch.testing.assert_close(covariance, torch.diag(scale.square()), rtol=0, atol=6 * scale.max().item() ** 2 / 200)


def test_flipped_labels_average_to_the_smoothed_targets():
    """Every label that a draw can give is a class, with the probability that the rate says."""
    problem, _ = smoothed()
    noise, C = LabelFlips(SMOOTHING), 3
    eta = noise.draw(problem, 60_000, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(torch.cov(eta.T), torch.eye(C, dtype=DTYPE), rtol=0, atol=0.03)
    shifts = []

    def record(w, x, y, *, shift, activations=None):
        shifts.append(shift)
        return w.sum()

    y = problem.targets[:1].expand(len(eta), -1)  # label 0
    noise.noisy_loss(record, problem.weights(), problem.inputs, y, eta)
    drawn = y + shifts[0]
    torch.testing.assert_close(drawn, drawn.round(), rtol=0, atol=1e-9)  # one-hot
    torch.testing.assert_close(drawn.mean(0), y[0], rtol=0, atol=0.01)
    torch.testing.assert_close(torch.cov(drawn.T), torch.diag(y[0]) - torch.outer(y[0], y[0]), rtol=0, atol=0.01)


@pytest.mark.parametrize("batch", [1, 3])
def test_covariances_in_closed_form_are_the_generic_ones(batch):
    """c_H H, c_I I and B^T G B against M diag(sigma^2) M^T from mixed derivatives of the noisy loss, dense."""
    dense, w = make("two_layers")
    problem, H = dense.problem, dense.gauss_newton(w)
    for noise in (LabelNoise(0.3), Langevin(0.3)):
        F = noise_factor(noise, problem, w, batch_size=batch)
        known = noise.covariance(problem, batch)
        torch.testing.assert_close(
            F.T @ F, known.hessian * H + known.identity * torch.eye(len(w)).to(w), atol=1e-12, rtol=0
        )
    flips, v = smoothed()
    F = noise_factor(LabelFlips(SMOOTHING), flips, v, batch_size=batch)
    B = linearize(flips, v).operator
    H = torch.stack([B.rmatvec(B.matvec(e)) for e in torch.eye(len(v), dtype=DTYPE)])
    torch.testing.assert_close(F.T @ F, H / batch, atol=1e-12, rtol=0)
    for noise in (Dropout(), InputNoise(0.3)):
        F = noise_factor(noise, problem, w, batch_size=batch)
        G = torch.block_diag(*output_noise(noise, problem, w)) / batch
        B = torch.stack([linearize(problem, w).operator.rmatvec(e) for e in torch.eye(len(G), dtype=DTYPE)])
        torch.testing.assert_close(F.T @ F, B.T @ G @ B, atol=1e-12, rtol=0)
    for noise in (DropConnect(0.3), AntiCorrelated(0.3)):  # H (sigma w)^2 H and sigma^2 H^2
        F = noise_factor(noise, problem, w, batch_size=batch)
        H = dense.gauss_newton(w)
        inner = torch.diag(w.square()) if isinstance(noise, DropConnect) else torch.eye(len(w)).to(w)
        torch.testing.assert_close(F.T @ F, 0.09 * H @ inner @ H, atol=1e-11, rtol=0)


CUSTOM = {
    "drop_connect": (DropConnect(0.3), lambda loss, w, x, y, eta: loss(w * (1 + eta), x, y), "weights"),
    "anti_correlated": (AntiCorrelated(0.3), lambda loss, w, x, y, eta: loss(w + eta, x, y), "weights"),
    "input_noise": (InputNoise(0.3), lambda loss, w, x, y, eta: loss(w, x + eta, y), "inputs"),
    "label_noise": (LabelNoise(0.3), lambda loss, w, x, y, eta: loss(w, x, y + eta), "outputs"),
    "langevin": (Langevin(0.3), lambda loss, w, x, y, eta: loss(w, x, y) + eta @ w, "weights"),
    "multiplicative": (Minibatch(), lambda loss, w, x, y, eta: loss(w, x, y) * (1 + eta[0]), "weights"),
}


@pytest.mark.parametrize("kind", CUSTOM)
@pytest.mark.parametrize("name", ["scalar", "two_layers"])
def test_a_users_own_noise_gives_what_the_named_system_gives(name, kind):
    """Order measured; drift, spread, offset and variance by the generic path alone."""
    dense, w = make(name)
    named, function, like = CUSTOM[kind]
    own = CustomNoise(function, std=0.3, like=like)
    sgd = SGDSettings(lr=0.02, batch_size=3)
    expected = singular_limit(dense.problem, w, named, sgd, num_draws=1000)
    found = singular_limit(dense.problem, w, own, sgd, num_draws=1000)
    assert found.order == expected.order
    size = torch.linalg.vector_norm(expected.drift)
    assert torch.linalg.vector_norm(found.drift - expected.drift) <= 1e-8 * size + 1e-16
    assert found.diffusion == pytest.approx(expected.diffusion, abs=1e-20)
    assert found.mean_offset_norm == pytest.approx(expected.mean_offset_norm, rel=1e-8, abs=1e-12)
    if kind == "anti_correlated":  # the function does not say that xi is among the weights: r sigma^2 more
        rank = gauss_newton(dense.problem, w).rank
        assert found.normal_variance.mean == pytest.approx(expected.normal_variance.mean - rank * 0.09, rel=1e-8)
    else:
        assert found.normal_variance.mean == pytest.approx(expected.normal_variance.mean, rel=1e-8, abs=1e-20)


def test_an_anisotropic_noise_of_order_two_against_the_dense_formula():
    dense, w = make("two_layers")
    width = torch.linspace(0.5, 2, len(w), dtype=DTYPE)
    noise = CustomNoise(lambda loss, w, x, y, eta: loss(w, x, y) + (width * eta) @ w, std=0.1)
    limit = singular_limit(dense.problem, w, noise, SGDSettings(lr=0.02), num_draws=1000)
    S = 0.01 * torch.diag(width.square())
    H = dense.gauss_newton(w)
    values, vectors = torch.linalg.eigh(H)
    kernel = vectors[:, values < 1e-10 * values[-1]]
    drift = 0.02**2 * kernel @ (kernel.T @ dense_ito(dense, w, S))
    assert limit.order == 2
    assert torch.linalg.vector_norm(limit.drift - drift) < 1e-8 * torch.linalg.vector_norm(drift)
    assert limit.diffusion == pytest.approx(0.02**2 * torch.trace(kernel.T @ S @ kernel).item() / kernel.shape[1])


def test_a_measured_order_has_its_standard_error():
    dense, w = make("two_layers")
    P = len(w)
    generator = torch.Generator().manual_seed(0)
    few, many = (degeneracy(dense.problem, w, DropConnect(0.3), num_draws=n, generator=generator) for n in (4, P - 1))
    exact = degeneracy(dense.problem, w, DropConnect(0.3), num_draws=P)
    assert (exact.order, exact.resolved, exact.tangential.stderr) == (1, True, 0.0)
    assert 0 < many.tangential.stderr < few.tangential.stderr
    assert abs(many.tangential.mean - exact.tangential.mean) < 4 * many.tangential.stderr
    # too few draws are reported, and decide nothing
    assert not few.resolved
    # and more are taken until it is clear
    own = CustomNoise(CUSTOM["drop_connect"][1], std=0.3)
    assert singular_limit(dense.problem, w, own, SGDSettings(lr=0.1), num_draws=4, generator=generator).order == 1


def test_an_order_that_no_draws_decide_is_refused():
    dense, w = make("two_layers")
    own, generator = CustomNoise(CUSTOM["drop_connect"][1], std=0.3), torch.Generator().manual_seed(0)
    with pytest.raises(ValueError, match=r"4 draws do not tell the order.*raise num_draws"):
        with_measured_order(own, dense.problem, w, num_draws=4, most_draws=4, generator=generator)
    assert degeneracy(dense.problem, w, Minibatch()).order is None


@pytest.mark.parametrize("size", [2, 5])
def test_sampled_gradient_noise_agrees_with_the_basis(size):
    dense, w = make("two_layers")
    hessian = gauss_newton(dense.problem, w)
    generator = torch.Generator().manual_seed(0)
    own = CustomNoise(CUSTOM["drop_connect"][1], std=0.3, like="weights")
    exact = gradient_noise(own, dense.problem, w, batch_size=size, num_draws=1000)
    sampled = gradient_noise(own, dense.problem, w, batch_size=size, num_draws=40, generator=generator)
    truth, found = (noise.normal_variance(hessian, SGDSettings(lr=0.05)) for noise in (exact, sampled))
    assert truth.stderr == 0.0
    assert abs(found.mean - truth.mean) < 4 * found.stderr < 2 * truth.mean


def test_penalties_see_the_weights_themselves():
    """In a sum with noise on the weights, the decay is that of the optimizer: of w, not of w (1 + eta)."""
    dense, w = make("scalar")
    problem = dense.problem
    both = WeightDecay(0.1) + DropConnect(0.3)
    etas = draw_noise(both, problem, problem.num_samples, generator=torch.Generator().manual_seed(0))
    found = noisy_loss(both, problem.batch_loss, w, problem.inputs, problem.targets, etas)
    assert found.item() == pytest.approx((dense.L(w * (1 + etas[1])) + 0.05 * w.square().sum()).item())
    mixed = potential(both, problem, w, num_draws=1000).value.mean
    single = [potential(part, problem, w, num_draws=1000).value.mean for part in both.systems]
    assert mixed == pytest.approx(sum(single))


def test_the_lowest_order_leads():
    dense, w = make("scalar")
    sgd = SGDSettings(lr=0.05)
    both = singular_limit(dense.problem, w, Dropout() + LabelNoise(0.3), sgd, num_draws=1000)
    alone = singular_limit(dense.problem, w, Dropout(), sgd, num_draws=1000)
    assert both.order == 1
    torch.testing.assert_close(both.drift, alone.drift)
    assert both.normal_variance.mean > alone.normal_variance.mean  # but all noises are felt across Gamma


POSITIVE = [DropConnect, AntiCorrelated, InputNoise, LabelNoise, Langevin, WeightDecay]


@pytest.mark.parametrize("system", POSITIVE)
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_a_size_that_is_not_positive(system, value):
    with pytest.raises(ValueError, match="must be positive and finite"):
        system(value)


@pytest.mark.parametrize("rate", [0.0, 1.0, -0.1, 1.5])
def test_a_rate_outside_its_range(rate):
    for make_system in (DropConnect.from_rate, LabelFlips):
        with pytest.raises(ValueError, match=r"must be in \(0, 1\)"):
            make_system(rate)


def test_systems_that_do_not_fit_the_problem():
    mse, ce = make("two_layers")[0].problem, smoothed()[0]
    plain = ZeroLossProblem(nn.Linear(2, 1), "mse", torch.ones(1, 2), torch.ones(1, 1))
    sgd = SGDSettings(lr=0.1)
    cases = [
        (plain, Dropout(), r"needs nn\.Dropout layers"),
        (ce, LabelNoise(0.1), r"use LabelFlips\(rate=\.\.\.\), which redraws them"),
        (mse, LabelFlips(0.1), r"use LabelNoise\(std=\.\.\.\) with mse"),
        (ce, LabelFlips(0.1), "averages the targets to label smoothing 0.1"),
        (
            mse,
            CustomNoise(lambda loss, w, x, y, eta: loss(w + eta + 0.1, x, y), std=0.1),
            "without noise the noisy loss",
        ),
        (mse, CustomNoise(lambda loss, w, x, y, eta: loss(w, x, y) + eta, std=0.1), "one number for the batch"),
    ]
    for problem, noise, message in cases:
        with pytest.raises(ValueError, match=message):
            singular_limit(problem, problem.weights(), noise, sgd)
    with pytest.raises(ValueError, match="one each"):
        Langevin(0.1) + Langevin(0.2)
    with pytest.raises(ValueError, match="has not been measured yet"):
        CustomNoise(lambda loss, w, x, y, eta: loss(w, x, y), std=0.1).order  # noqa: B018  # reading it is what raises
    with pytest.raises(ValueError, match="like must be"):
        CustomNoise(lambda loss, w, x, y, eta: loss(w, x, y), std=0.1, like="bias")  # type: ignore[arg-type]  # wrong on purpose
    with pytest.raises(ValueError, match="form must be"):
        DropConnect(0.1, form="uniform")  # type: ignore[arg-type]  # wrong on purpose
