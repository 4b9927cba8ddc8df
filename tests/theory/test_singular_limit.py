"""Order, potential, drift, offset and spread against dense brute force; sampled against exact; momentum and sums."""

import math

import pytest
import torch

from tests.problems import NAMES, lyapunov_trace, make
from torch_singlim import (
    Dropout,
    Minibatch,
    SGDSettings,
    WeightDecay,
    compare,
    gauss_newton,
    linearize,
    singular_limit,
    tangent_space,
)
from torch_singlim.measure.distance import compare_expansion
from torch_singlim.theory import averaged_gradient, expected_distance, gradient_noise, potential


@pytest.mark.parametrize("name", NAMES)
def test_dropout_against_brute_force(name):
    dense, w = make(name)
    alpha, batch = 0.05, 3
    sgd = SGDSettings(lr=alpha, batch_size=batch)
    limit = singular_limit(dense.problem, w, Dropout(), sgd, num_draws=1000)
    H = dense.gauss_newton(w)
    values, vectors = torch.linalg.eigh(H)
    kept = values > 1e-11 * values[-1]
    kernel, normal = vectors[:, ~kept], vectors[:, kept]
    gradient = dense.dropout_potential_gradient(w)
    drift = -alpha * kernel @ (kernel.T @ gradient)
    offset = normal @ ((normal.T @ gradient) / values[kept])
    variance = lyapunov_trace(H, dense.dropout_noise_covariance(w, batch), alpha, int(kept.sum()))

    assert (limit.order, limit.degenerate, limit.diffusion, limit.drift_stderr) == (1, False, 0.0, 0.0)
    assert limit.potential.mean == pytest.approx(dense.dropout_potential(w).item(), rel=1e-9)
    assert torch.linalg.vector_norm(limit.drift - drift) <= 1e-6 * torch.linalg.vector_norm(drift)
    assert limit.mean_offset_norm == pytest.approx(torch.linalg.vector_norm(offset).item(), rel=1e-5)
    assert limit.normal_variance.mean == pytest.approx(variance, rel=1e-8)
    assert limit.distance == pytest.approx(math.sqrt(offset.square().sum().item() + variance), rel=1e-5)
    assert limit.time_scale == pytest.approx(1 / (alpha * max(dense.sigma_squared()).item()))


@pytest.mark.parametrize("name", ["two_layers", "cross_entropy"])
def test_potential_off_gamma_has_the_residual_part(name):
    dense, w = make(name)
    w = w + 0.1 * torch.linspace(-1, 1, len(w), dtype=w.dtype)
    V = potential(Dropout(), dense.problem, w, num_draws=1000)
    assert V.value.mean == pytest.approx(dense.dropout_potential(w).item(), rel=1e-9)
    truth = dense.dropout_potential_gradient(w)
    assert torch.linalg.vector_norm(V.gradient.mean - truth) < 1e-6 * torch.linalg.vector_norm(truth)


def test_sampled_draws_are_unbiased_and_their_error_is_honest():
    dense, w = make("two_layers")
    exact = potential(Dropout(), dense.problem, w, num_draws=1000)
    generator = torch.Generator().manual_seed(0)
    sampled = [potential(Dropout(), dense.problem, w, num_draws=8, generator=generator) for _ in range(60)]
    values = torch.tensor([s.value.mean for s in sampled])
    assert values.mean().item() == pytest.approx(exact.value.mean, abs=4 * values.std().item() / 60**0.5)
    spread = sum((s.gradient.mean - exact.gradient.mean).square().sum().item() for s in sampled) / 60
    stated = sum(s.gradient.stderr**2 for s in sampled) / 60
    assert stated / spread == pytest.approx(1, abs=0.35)
    with pytest.raises(ValueError, match="at least 2"):
        potential(Dropout(), dense.problem, w, num_draws=1)


def test_averaged_gradient_is_the_mean_over_all_masks():
    dense, w = make("scalar")
    D, p = dense.widths[0], dense.rates[0]
    bits = (torch.arange(2**D)[:, None] >> torch.arange(D)) & 1
    probability = torch.where(bits == 1, 1 - p, p).prod(1).to(w)
    etas = bits.to(w) / (1 - p) - 1
    shift = torch.func.grad(
        lambda v: (
            sum(q * dense.L(v, e.expand(len(dense.inputs), -1)) for q, e in zip(probability, etas, strict=True))
            - dense.L(v)
        )
    )
    truth = shift(w)
    generator = torch.Generator().manual_seed(0)
    estimate = averaged_gradient(Dropout(), dense.problem, w, num_draws=16_000, generator=generator)
    assert torch.linalg.vector_norm(estimate.mean - truth) < 4 * estimate.stderr
    assert estimate.stderr < 0.05 * torch.linalg.vector_norm(truth)
    # on Gamma, small noise: grad V to leading order
    expanded = potential(Dropout(), dense.problem, w, num_draws=16_000, generator=generator).gradient
    small = compare_expansion(estimate, expanded)
    exact = compare(truth, dense.dropout_potential_gradient(w))
    assert small.cosine == pytest.approx(exact.cosine, abs=0.01)
    assert small.ratio == pytest.approx(exact.predicted / exact.measured, rel=0.05)


def test_krylov_path_gives_the_same_prediction():
    dense, w = make("two_layers")
    sgd = SGDSettings(lr=0.05, batch_size=2)
    exact = singular_limit(dense.problem, w, Dropout(), sgd, num_draws=1000)
    assert not linearize(dense.problem, w).cheap_gram
    hessian = gauss_newton(dense.problem, w, max_dense=0, rtol=1e-12)
    other = singular_limit(dense.problem, w, Dropout(), sgd, num_draws=1000, hessian=hessian)
    torch.testing.assert_close(other.drift, exact.drift, rtol=0, atol=1e-9)
    assert other.mean_offset_norm == pytest.approx(exact.mean_offset_norm, rel=1e-5)
    sampled = other.normal_variance
    assert abs(sampled.mean - exact.normal_variance.mean) < 4 * sampled.stderr < exact.normal_variance.mean


def test_distance_on_the_relaxed_modes():
    dense, w = make("two_layers")
    sgd = SGDSettings(lr=0.05, batch_size=2)
    T = tangent_space(dense.problem, w)
    noise = gradient_noise(Dropout(), dense.problem, w, batch_size=2)
    gradient = potential(Dropout(), dense.problem, w, num_draws=1000).gradient
    level = T.spectrum()[3].item()
    part = expected_distance(T.hessian, gradient, noise, sgd=sgd, level=level)
    values, vectors = torch.linalg.eigh(dense.gauss_newton(w))
    normal = values > 1e-11 * values[-1]
    V, l = vectors[:, normal], values[normal]  # noqa: E741  # lambda, as in the formula
    share = 1 / (1 + (level / l) ** 4)
    offset = -V @ (share * (V.T @ dense.dropout_potential_gradient(w)) / l)
    S = dense.dropout_noise_covariance(w, 2)
    variance = (share**2 * 0.05 * torch.diagonal(V.T @ S @ V) / (2 * l - 0.05 * l**2)).sum().item()
    torch.testing.assert_close(part.offset.mean, offset, rtol=0, atol=1e-6)
    assert part.variance.mean == pytest.approx(variance, rel=1e-8)
    unstable = expected_distance(T.hessian, gradient, noise, sgd=SGDSettings(lr=1e3))
    assert unstable.rms == math.inf


def test_momentum_is_a_larger_step():
    dense, w = make("scalar")
    plain = singular_limit(dense.problem, w, Dropout(), SGDSettings(lr=0.05), num_draws=1000)
    heavy = singular_limit(dense.problem, w, Dropout(), SGDSettings(lr=0.005, momentum=0.9), num_draws=1000)
    torch.testing.assert_close(heavy.drift, plain.drift)
    assert heavy.time_scale == pytest.approx(plain.time_scale)


def test_sums_add_their_potentials():
    dense, w = make("scalar")
    sgd = SGDSettings(lr=0.05)
    drop = singular_limit(dense.problem, w, Dropout(), sgd, num_draws=1000)
    decay = singular_limit(dense.problem, w, WeightDecay(0.01), sgd)
    both = singular_limit(dense.problem, w, Dropout() + WeightDecay(0.01), sgd, num_draws=1000)
    assert decay.potential.mean == pytest.approx(0.005 * w.square().sum().item())
    T = tangent_space(dense.problem, w)
    torch.testing.assert_close(decay.drift, -0.05 * 0.01 * T.project(w), rtol=0, atol=1e-14)
    torch.testing.assert_close(both.drift, drop.drift + decay.drift, rtol=1e-9, atol=1e-14)


def test_minibatch_is_trivial():
    dense, w = make("scalar")
    limit = singular_limit(dense.problem, w, Minibatch(), SGDSettings(lr=0.05, batch_size=1))
    assert limit.order is None
    assert limit.degenerate
    assert (limit.time_scale, limit.potential.mean, limit.distance, limit.diffusion) == (math.inf, 0.0, 0.0, 0.0)
    assert not limit.drift.any()


def test_bad_point():
    dense, w = make("scalar")
    with pytest.raises(ValueError, match="24 weights in one vector"):
        singular_limit(dense.problem, w[:2], Dropout(), SGDSettings(lr=0.05))
