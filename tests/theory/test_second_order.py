"""(1/2) D^2 Phi[Sigma]: against the dense formula, against differences of the gradient flow's limit, closed forms."""

import math
from dataclasses import replace

import pytest
import torch

from tests.problems import DTYPE, NAMES, chain, make
from torch_singlim import (
    LabelFlips,
    LabelNoise,
    Langevin,
    SGDSettings,
    ZeroLossProblem,
    gauss_newton,
    linearize,
    singular_limit,
)
from torch_singlim.linalg import CholeskyFactored
from torch_singlim.noise import Covariance
from torch_singlim.theory import covariance_potential, ito_drift
from torch_singlim.theory.on_gamma import trace
from torch_singlim.theory.second_order import log_pseudo_determinant


def dense_ito(dense, w, sigma):
    """The formula of arXiv 2110.06914 on full tensors: eigenbasis of the whole Hessian, T = D^3 L [P, P, P]."""
    H = torch.func.hessian(dense.L)(w)
    T = torch.func.jacfwd(torch.func.hessian(dense.L))(w)
    values, Q = torch.linalg.eigh(H)
    values = torch.where(values > 1e-10 * values[-1], values, 0.0)
    T = torch.einsum("abc,ai,bj,ck->ijk", T, Q, Q, Q)
    S = Q.T @ sigma @ Q
    sums = values[:, None] + values
    tangential = -(T * torch.where(sums > 0, S / sums.where(sums > 0, 1), 0)).sum((1, 2))
    flat = (values == 0).to(DTYPE)
    normal = -(T * (S * flat[:, None] * flat)).sum((1, 2)) / values.where(values > 0, 1)
    return 0.5 * Q @ torch.where(values == 0, tangential, normal)


def flow_limit(dense, w, step, time):
    """Phi of each row of w: Runge-Kutta for the gradient flow of L, then the shortest step onto Gamma."""
    velocity = torch.func.vmap(lambda v: -torch.func.grad(dense.L)(v))
    for _ in range(math.ceil(time / step)):
        k1 = velocity(w)
        k2 = velocity(w + step / 2 * k1)
        k3 = velocity(w + step / 2 * k2)
        k4 = velocity(w + step * k3)
        w = w + step / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    out = []
    for v in w:
        H, g = torch.func.hessian(dense.L)(v), torch.func.grad(dense.L)(v)
        out.append(v - torch.linalg.pinv(H, rtol=1e-6) @ g)
    return torch.stack(out)


def factors(dense, count=3, seed=0):
    return torch.randn(count, len(dense.weights()), generator=torch.Generator().manual_seed(seed), dtype=DTYPE)


@pytest.mark.parametrize("name", NAMES)
def test_general_term_against_the_dense_formula(name):
    dense, w = make(name)
    F = factors(dense)
    truth = dense_ito(dense, w, F.T @ F)
    ours = ito_drift(dense.problem, w, F, gauss_newton(dense.problem, w))
    assert torch.linalg.vector_norm(ours - truth) < 1e-8 * torch.linalg.vector_norm(truth)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "step", "time"), [("scalar", 0.1, 120.0), ("rank_deficient", 0.1, 250.0)])
def test_general_term_against_differences_of_the_gradient_flow(name, step, time):
    dense, w = make(name)
    F = factors(dense, 2)
    h = 2e-3
    ends = flow_limit(dense, torch.cat([w + h * F, w - h * F, w[None]]), step, time)
    forth, back, at = ends[:2], ends[2:4], ends[4]
    truth = 0.5 * (forth - 2 * at + back).sum(0) / h**2
    ours = ito_drift(dense.problem, w, F, gauss_newton(dense.problem, w))
    assert torch.linalg.vector_norm(ours - truth) < 1e-3 * torch.linalg.vector_norm(truth)


@pytest.mark.parametrize("name", NAMES)
def test_closed_forms_are_the_general_term(name):
    """Sigma = H has -grad tr H / 4, Sigma = I has -grad log pdet H / 4, along Gamma."""
    dense, w = make(name)
    problem = dense.problem
    hessian = gauss_newton(problem, w)
    # F with F^T F = H, and the identity
    root = torch.stack([hessian.operator.rmatvec(e) for e in torch.eye(problem.num_residuals, dtype=DTYPE)])
    for covariance, factor in ((Covariance(hessian=1.0), root), (Covariance(identity=1.0), torch.eye(len(w)).to(w))):
        general = hessian.project_kernel(ito_drift(problem, w, factor, hessian))
        V = covariance_potential(covariance, problem, w, hessian, num_draws=1000)
        closed = -hessian.project_kernel(V.gradient.mean)
        assert torch.linalg.vector_norm(closed - general) < 1e-8 * torch.linalg.vector_norm(general)
        truth = dense_ito(dense, w, factor.T @ factor)
        assert torch.linalg.vector_norm(closed - hessian.project_kernel(truth)) < 1e-8 * torch.linalg.vector_norm(
            closed
        )


@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_trace_and_log_pseudo_determinant(name):
    """Against differences of the dense values; tr H along Gamma alone, log pdet H with its normal part."""
    dense, w = make(name)
    problem = dense.problem
    rank = gauss_newton(problem, w).rank

    def values(v):
        spectrum = torch.linalg.eigvalsh(dense.gauss_newton(v))[-rank:]
        return torch.stack([spectrum.sum(), spectrum.log().sum()])

    h = 1e-4
    slopes = torch.stack(
        [
            (values(w - 2 * h * e) - 8 * values(w - h * e) + 8 * values(w + h * e) - values(w + 2 * h * e)) / (12 * h)
            for e in torch.eye(len(w), dtype=DTYPE)
        ]
    ).T
    tr = trace(problem, w, num_draws=1000)
    logs = log_pseudo_determinant(problem, w, gauss_newton(problem, w), num_draws=1000)
    for found, value in zip((tr, logs), values(w), strict=True):
        assert found.value.mean == pytest.approx(value.item(), rel=1e-9)
    along = gauss_newton(problem, w).project_kernel
    for error, size in ((along(tr.gradient.mean - slopes[0]), slopes[0]), (logs.gradient.mean - slopes[1], slopes[1])):
        assert torch.linalg.vector_norm(error) < 1e-6 * torch.linalg.vector_norm(size)


@pytest.mark.parametrize("which", ["trace", "log_pseudo_determinant"])
def test_sampled_potentials_are_unbiased_and_their_error_is_honest(which):
    net = chain([3, 6, 8], torch.nn.Tanh, [0.2], bias=True, seed=5)
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0), dtype=DTYPE)
    problem = ZeroLossProblem(net, "mse", x, net.eval()(x).detach())
    w, generator = problem.weights(), torch.Generator().manual_seed(0)
    hessian = gauss_newton(problem, w)

    def estimate(draws):
        if which == "trace":
            return trace(problem, w, num_draws=draws, generator=generator)
        return log_pseudo_determinant(problem, w, hessian, num_draws=draws, generator=generator)

    exact = estimate(16)
    assert exact.gradient.stderr == exact.value.stderr == 0.0
    sampled = [estimate(4) for _ in range(200)]
    error = torch.stack([s.gradient.mean for s in sampled]).mean(0) - exact.gradient.mean
    spread = sum((s.gradient.mean - exact.gradient.mean).square().sum().item() for s in sampled) / 200
    assert sum(s.gradient.stderr**2 for s in sampled) / 200 / spread == pytest.approx(1, abs=0.25)
    assert error.square().sum().item() < 4 * spread / 200


@pytest.mark.parametrize("cheap", [True, False])
def test_krylov_gives_the_same_potential_and_refuses_the_dense_term(cheap):
    dense, w = make("two_layers")
    problem = dense.problem
    at = replace(linearize(problem, w), cheap_gram=cheap)
    krylov = gauss_newton(problem, w, at=at, max_dense=0, rtol=1e-12)
    assert isinstance(krylov, CholeskyFactored) == cheap
    for covariance in (Covariance(hessian=1.0), Covariance(identity=1.0)):
        exact = covariance_potential(covariance, problem, w, gauss_newton(problem, w), num_draws=1000)
        other = covariance_potential(covariance, problem, w, krylov, num_draws=1000)
        assert other.value.mean == pytest.approx(exact.value.mean, rel=1e-6)
        torch.testing.assert_close(other.gradient.mean, exact.gradient.mean, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="needs H decomposed"):
        ito_drift(problem, w, factors(dense), krylov)


def test_order_two_settings_enter_as_the_formulas_say():
    dense, w = make("two_layers")
    problem, C = dense.problem, 2
    trace_H = torch.trace(dense.gauss_newton(w)).item()
    sgd = SGDSettings(lr=0.01, momentum=0.5, batch_size=3)
    label = singular_limit(problem, w, LabelNoise(0.3), sgd)
    assert label.potential.mean == pytest.approx(0.09 / (2 * C * 3) * trace_H)
    assert (label.order, label.degenerate, label.diffusion) == (2, True, 0.0)
    assert label.time_scale == pytest.approx(1 / (0.02**2 * 0.09))
    langevin = singular_limit(problem, w, Langevin(0.3), sgd, num_draws=1000)
    assert langevin.diffusion == pytest.approx((0.02 * 0.3) ** 2)
    assert langevin.dimension == len(w) - gauss_newton(problem, w).rank
    assert langevin.spread(100) == pytest.approx(math.sqrt(100 * langevin.diffusion * langevin.dimension))
    both = singular_limit(problem, w, LabelNoise(0.3) + Langevin(0.3), sgd, num_draws=1000)
    torch.testing.assert_close(both.drift, label.drift + langevin.drift)
    dense_ce, w_ce = make("cross_entropy")
    with pytest.raises(ValueError, match="averages the targets to label smoothing"):
        singular_limit(dense_ce.problem, w_ce, LabelFlips(0.1), sgd)
