"""Drifts at finite step size: closed forms on dense matrices, every batch of a small data set, and ensembles."""

import functools
import importlib
import itertools
import math

import pytest
import torch

from tests.problems import DTYPE, make
from tests.test_reference import load
from torch_singlim import (
    AntiCorrelated,
    CustomNoise,
    DropConnect,
    Dropout,
    LabelNoise,
    Langevin,
    SGDSettings,
    compare,
    gauss_newton,
    nearest_point,
    simulate,
    singular_limit,
    tangent_space,
)
from torch_singlim.theory import finite_step_potential, fluctuation_covariance, gradient_noise, step_ratio
from torch_singlim.theory.gradient_noise import noise_factor

MU = 0.6


def logdet(H, factor):
    return torch.linalg.slogdet(torch.eye(len(H), dtype=H.dtype) + factor * H)[1]


def of_label_noise(H, c, lr):
    return -c / (2 * lr) * logdet(H, -lr / 2)


def of_heavy_ball(H, c, lr):
    inside = lr / (1 + MU)
    return -c / (2 * inside) * logdet(H, -inside / 2)


def of_nesterov(H, c, lr):
    first = 4 * MU**2 * (1 - MU) * logdet(H, MU * lr / (1 - MU))
    second = 2 * (1 - MU**2) * (1 + 2 * MU) * logdet(H, -(1 + 2 * MU) * lr / (2 * (1 + MU)))
    return c / (4 * lr * (1 + 3 * MU)) * (first - second)


def of_anti_correlated(H, variance, lr):
    return -variance / lr * logdet(H, -lr / 2)


FORMS = {
    "plain": (LabelNoise(0.3), {}, of_label_noise),
    "heavy ball": (LabelNoise(0.3), {"momentum": MU}, of_heavy_ball),
    "nesterov": (LabelNoise(0.3), {"momentum": MU, "nesterov": True}, of_nesterov),
    "anti-correlated": (AntiCorrelated(0.3), {}, of_anti_correlated),
}


@pytest.mark.parametrize("name", ["scalar", "two_layers"])
@pytest.mark.parametrize("form", FORMS)
def test_closed_forms(name, form):
    """Value and tangential gradient against the formula of the dense Hessian and its finite differences."""
    dense, w = make(name)
    noise, options, formula = FORMS[form]
    hessian = gauss_newton(dense.problem, w)
    lr = 0.9 / hessian.largest * (0.3 if "nesterov" in options else 1.0)
    sgd = SGDSettings(lr=lr, **options)
    V = finite_step_potential(noise, dense.problem, w, sgd, hessian, num_draws=10_000)
    N, C = len(dense.inputs), dense.problem.num_outputs
    strength = 0.09 if form == "anti-correlated" else 2 * 0.09 / (C * N)

    def value(v):
        return formula(dense.gauss_newton(v), strength, lr)

    assert V.value.mean == pytest.approx(value(w).item(), rel=1e-7)
    T = tangent_space(dense.problem, w)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        u = T.project(torch.randn(w.shape, generator=generator, dtype=DTYPE))
        u, h = u / u.norm(), 1e-5
        slope = (value(w + h * u) - value(w - h * u)) / (2 * h)
        assert torch.dot(V.gradient.mean, u).item() == pytest.approx(slope.item(), rel=1e-5, abs=1e-9)


def test_small_steps_are_the_limit():
    dense, w = make("two_layers")
    for noise in (LabelNoise(0.2), AntiCorrelated(0.2)):
        for options in ({}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}, {"batch_size": 2}):
            if options == {"batch_size": 2} and isinstance(noise, AntiCorrelated):
                continue
            sgd = SGDSettings(lr=1e-7, **options)
            limit, finite = (
                singular_limit(dense.problem, w, noise, sgd, num_draws=10_000, finite_step=finite)
                for finite in (False, True)
            )
            torch.testing.assert_close(finite.drift, limit.drift, rtol=1e-4, atol=1e-6 * limit.drift.norm().item())


# noises, and Sigma for batches of B of N samples: of dropout (1/(B N)) sum_n M_n diag(sigma^2) M_n^T
SOURCES = {
    "label noise": LabelNoise(0.3),
    "dropout": Dropout(),
    "both": LabelNoise(0.3) + Dropout(),
    "custom": CustomNoise(lambda loss, w, x, y, eta: loss(w, x, y + eta), std=0.3, like="outputs"),
}


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("kind", SOURCES)
def test_the_covariance_under_batches_by_every_batch(kind, size):
    """H X + X H - alpha mean(H_b X H_b) = alpha Sigma, over all batches, as one linear system for all entries of X."""
    dense, w = make("scalar")
    problem, N, noise = dense.problem, len(dense.inputs), SOURCES[kind]
    w = nearest_point(problem, w, rtol=1e-8, max_steps=100).point
    hessian = gauss_newton(problem, w)
    sgd = SGDSettings(lr=0.3 / hessian.largest, batch_size=size)
    B = hessian.operator.rows(w)
    rows = B.reshape(N, -1, B.shape[1])
    Q = torch.linalg.qr(B.T)[0]  # of the normal space
    H = Q.T @ B.T @ B @ Q
    sigma = gradient_noise(noise, problem, w, batch_size=size, num_draws=100)
    Sigma = torch.zeros_like(H)
    if kind != "dropout":
        Sigma += 2 * 0.09 / (size * problem.num_outputs) * H
    if kind in ("dropout", "both"):
        factor = noise_factor(Dropout(), problem, w, batch_size=size) @ Q
        Sigma += factor.T @ factor
    eye = torch.eye(len(H), dtype=DTYPE)
    system = torch.kron(H, eye) + torch.kron(eye, H)
    batches = list(itertools.combinations(range(N), size))
    for batch in batches:
        own = torch.cat([rows[n] for n in batch]) @ Q
        H_b = N / size * own.T @ own
        system -= sgd.lr / len(batches) * torch.kron(H_b, H_b)
    X = torch.linalg.solve(system, sgd.lr * Sigma.reshape(-1)).reshape(H.shape)
    found = sigma.normal_variance(hessian, sgd, random_batches=True).mean
    assert found == pytest.approx(X.trace().item(), rel=1e-6)
    if kind == "label noise":
        Y = fluctuation_covariance(hessian, torch.eye(len(B), dtype=DTYPE), sgd, num_samples=N)
        of_rows = B.T @ hessian.eigenvectors @ Y @ hessian.eigenvectors.T @ B
        torch.testing.assert_close(
            Q.T @ of_rows @ Q * 2 * 0.09 / (size * problem.num_outputs), X, rtol=1e-6, atol=1e-12
        )


def normal_basis(problem, w):
    """An orthonormal basis Q [P, r] of the normal space, H in it, and B Q for each sample [N, rows, r]."""
    B = gauss_newton(problem, w).operator.rows(w)
    U, s, _ = torch.linalg.svd(B.T, full_matrices=False)
    Q = U[:, s > 1e-7 * s[0]]
    rows = (B @ Q).reshape(problem.num_samples, -1, Q.shape[1])
    return Q, rows.flatten(0, 1).T @ rows.flatten(0, 1), rows


def every_batch(problem, size):
    return list(itertools.combinations(range(problem.num_samples), size))


def mean_covariance(dense, w, size):
    """Sigma [P, P] of DropConnect with std 0.3: H_b diag(w^2) H_b std^2, the mean over all batches."""
    J, A = dense.jacobian(w), dense.curvature(w)
    each = torch.einsum("ncp,ncd,ndq->npq", J, A, J)
    of_batches = [each[list(batch)].mean(0) * 0.3 * w for batch in every_batch(dense.problem, size)]
    return sum(M @ M.T for M in of_batches) / len(of_batches)


def by_recursion(H, rows, Sigma, sgd, problem):
    """X [r, r] of the recursion of (w, v), as one linear system for all entries of the covariance."""
    r, lr, mu = len(H), sgd.lr, sgd.momentum
    eye, zero = torch.eye(r, dtype=DTYPE), torch.zeros(r, r, dtype=DTYPE)
    size = sgd.batch(problem.num_samples)
    system = torch.eye(4 * r * r, dtype=DTYPE)
    batches = every_batch(problem, size)
    for batch in batches:
        own = torch.cat([rows[n] for n in batch])
        H_b = problem.num_samples / size * own.T @ own
        velocity = torch.cat([H_b, mu * eye], 1)
        if sgd.nesterov:
            position = torch.cat([eye - lr * H_b, zero], 1) - lr * mu * velocity
        else:
            position = torch.cat([eye, zero], 1) - lr * velocity
        A = torch.cat([position, velocity])
        system -= torch.kron(A, A) / len(batches)
    kick = torch.cat([-lr * (1 + mu if sgd.nesterov else 1) * eye, eye])
    P = torch.linalg.solve(system, (kick @ Sigma @ kick.T).reshape(-1)).reshape(2 * r, 2 * r)
    return P[:r, :r]


SETTINGS = {
    "full batch": {},
    "batches of one": {"batch_size": 1},
    "batches of two": {"batch_size": 2},
    "heavy ball": {"momentum": MU},
    "nesterov": {"momentum": MU, "nesterov": True},
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", ["scalar", "rank_deficient"])
@pytest.mark.parametrize("kind", ["dropout", "DropConnect", "DropConnect and label noise"])
def test_noise_of_order_one(kind, name, setting):
    """grad V + (1/2) T[X] along Gamma: X by the recursion, T[X] by differences of tr(X H(w)), V of the limit."""
    dense, w = make(name)
    problem = dense.problem
    noise = {
        "dropout": Dropout(),
        "DropConnect": DropConnect(0.3),
        "DropConnect and label noise": DropConnect(0.3) + LabelNoise(0.2),
    }[kind]
    hessian = gauss_newton(problem, w)
    sgd = SGDSettings(lr=0.3 / hessian.largest, **SETTINGS[setting])
    size = sgd.batch(len(dense.inputs))
    Q, H, rows = normal_basis(problem, w)
    if kind == "dropout":
        Sigma = Q.T @ dense.dropout_noise_covariance(w, size) @ Q
    else:
        Sigma = Q.T @ mean_covariance(dense, w, size) @ Q
    if "label noise" in kind:
        Sigma = Sigma + 2 * 0.04 / (size * problem.num_outputs) * H
    X = Q @ by_recursion(H, rows, Sigma, sgd, problem) @ Q.T
    limit, finite = (
        singular_limit(problem, w, noise, sgd, num_draws=1_000, finite_step=each).drift for each in (False, True)
    )
    more = (limit - finite) / sgd.effective_lr
    T, generator = tangent_space(problem, w), torch.Generator().manual_seed(1)
    for _ in range(3):
        u = T.project(torch.randn(w.shape, generator=generator, dtype=DTYPE))
        u, h = u / u.norm(), 1e-5
        slope = sum(sign * (X * dense.gauss_newton(w + sign * h * u)).sum() for sign in (1, -1)) / (2 * h)
        assert torch.dot(more, u).item() == pytest.approx(slope.item() / 2, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("few", [True, False])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_one_eta_for_the_samples_of_a_batch(few, size, monkeypatch):
    """Sigma of DropConnect is the mean over the batches, whether S is formed, or blocks of it beside products."""
    if not few:
        monkeypatch.setattr(importlib.import_module("torch_singlim.theory.gradient_noise"), "FEW_RESIDUALS", 0)
    dense, w = make("scalar")
    hessian = gauss_newton(dense.problem, w)
    found = gradient_noise(DropConnect(0.3), dense.problem, w, batch_size=size, num_draws=100)
    Sigma = mean_covariance(dense, w, size)
    B = hessian.operator.rows(w)
    torch.testing.assert_close(B.T @ found.source(hessian) @ B, Sigma, rtol=1e-8, atol=1e-12)


def test_the_variance_under_batches_grows_forever_where_the_step_is_unstable():
    dense, w = make("two_layers")
    hessian = gauss_newton(dense.problem, w)
    sigma = gradient_noise(LabelNoise(0.1), dense.problem, w, batch_size=1)
    sgd = SGDSettings(lr=1.9 / hessian.largest, batch_size=1)
    assert math.isinf(sigma.normal_variance(hessian, sgd, random_batches=True).mean)


def under_batches():
    """Label noise with batches of 2: in the limit, and at finite step size."""
    dense, w = make("scalar")
    sgd = SGDSettings(lr=0.02, batch_size=2)
    return [
        singular_limit(dense.problem, w, LabelNoise(0.2), sgd, num_draws=100, finite_step=finite)
        for finite in (False, True)
    ]


def test_the_variance_of_the_limit_neglects_random_batches():
    limit, finite = under_batches()
    assert finite.normal_variance.mean > 1.005 * limit.normal_variance.mean


def test_what_is_not_known_is_an_error():
    dense, w = make("two_layers")
    hessian = gauss_newton(dense.problem, w)

    def of(noise, **options):
        sgd = SGDSettings(**({"lr": 0.01} | options))
        return finite_step_potential(noise, dense.problem, w, sgd, hessian, num_draws=4)

    for noise in (Langevin(0.1), LabelNoise(0.1) + Langevin(0.1)):
        with pytest.raises(ValueError, match="are known for noise on outputs and labels"):
            of(noise)
    with pytest.raises(ValueError, match="is unstable"):
        of(LabelNoise(0.1), lr=2.01 / hessian.largest)
    with pytest.raises(ValueError, match="covered without momentum"):
        of(LabelNoise(0.1), momentum=0.5, batch_size=2)
    with pytest.raises(ValueError, match="on full batches, got batches of 2 of 5 samples"):
        of(AntiCorrelated(0.1), batch_size=2)
    with pytest.raises(ValueError, match=r"is unstable|grow without bound"):
        of(LabelNoise(0.1), lr=1.9 / hessian.largest, batch_size=1)
    assert math.isinf(step_ratio(SGDSettings(lr=1.0), torch.tensor([2.0], dtype=DTYPE)).item())


# noise, settings of SGD, and the slow time of the window: with momentum or small batches it moves the weights faster
ENSEMBLES = {
    "label noise": (LabelNoise(0.05), {}, 0.05),
    "heavy ball": (LabelNoise(0.01), {"momentum": 0.9}, 0.05),
    "nesterov": (LabelNoise(0.01), {"momentum": 0.9, "nesterov": True}, 0.05),
    "batches of one": (LabelNoise(0.02), {"batch_size": 1}, 0.01),
    "anti-correlated": (AntiCorrelated(0.01), {}, 0.02),
    "DropConnect, batches of one": (DropConnect(0.01), {"batch_size": 1}, 0.02),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ENSEMBLES)
def test_an_ensemble(kind):
    """At alpha lambda_1 = 0.35, nearest points of independent runs: the speed within 2 %, where the limit is off."""
    reference, problem, _ = load("tanh_scalar")
    point = torch.tensor(reference["nearest_point"], dtype=DTYPE)
    noise, settings, slow_time = ENSEMBLES[kind]
    hessian = gauss_newton(problem, point)
    sgd = SGDSettings(lr=0.35 / hessian.largest, **settings)
    run = functools.partial(simulate, problem, noise=noise, sgd=sgd, replicas=256)
    modes_relax = int(4 / (sgd.effective_lr * hessian.eigenvalues[-1]))
    generator = torch.Generator().manual_seed(0)
    relaxed = point + run(point, steps=max(modes_relax, 200), generator=generator).displacements
    steps = int(slow_time * singular_limit(problem, point, noise, sgd, num_draws=100).time_scale)

    def retract(v):
        return nearest_point(problem, v, rtol=1e-5).point

    ensemble = run(relaxed, steps=steps, retract=retract, generator=generator)
    middle = retract(relaxed.mean(0) + ensemble.mean.mean / 2)
    limit, finite = (
        singular_limit(problem, middle, noise, sgd, num_draws=100, finite_step=each).drift for each in (False, True)
    )
    found, off = (compare(ensemble.mean.mean, steps * drift) for drift in (finite, limit))
    error = ensemble.mean.stderr / ensemble.mean.norm
    print(f"\n{kind}: {steps} steps, {found}, limit {off.speed:.3f}, relative error {error:.2g}")
    assert found.speed == pytest.approx(1, abs=0.02)
    assert abs(off.speed - 1) > 0.05


def test_under_batches_the_value_is_that_of_the_limit():
    limit, finite = under_batches()
    assert finite.potential.mean == pytest.approx(limit.potential.mean, rel=1e-10)
    assert torch.linalg.vector_norm(finite.drift - limit.drift) > 1e-3 * torch.linalg.vector_norm(limit.drift)
