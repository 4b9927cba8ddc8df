"""Sharpness-aware minimisation: its potential against a dense Hessian, and training written out against the limit."""

import pytest
import torch

from tests.problems import make
from torch_singlim import SAM, InjectNoise, SGDSettings, compare, limit_flow, nearest_point, simulate, singular_limit
from torch_singlim.theory import potential

RHO = 0.05


@pytest.mark.parametrize("name", ["scalar", "two_layers", "cross_entropy"])
def test_the_drift_is_down_the_gradient_of_the_largest_eigenvalue(name):
    """V = (rho^2/2) lambda_1 of the dense Hessian on Gamma, and -alpha P_T grad V by autograd of its eigenvalue."""
    dense, w = make(name)

    def V(v):
        return 0.5 * RHO**2 * torch.linalg.eigvalsh(torch.func.hessian(dense.L)(v))[-1]

    found = potential(SAM(RHO), dense.problem, w, num_draws=2)
    assert found.value.mean == pytest.approx(V(w).item(), rel=1e-6)
    limit = singular_limit(dense.problem, w, SAM(RHO), SGDSettings(lr=0.1))
    values, vectors = torch.linalg.eigh(dense.gauss_newton(w))
    Q = vectors[:, values > 1e-9 * values[-1]]
    gradient = torch.func.grad(V)(w)
    expected = -0.1 * (gradient - Q @ (Q.T @ gradient))
    torch.testing.assert_close(limit.drift, expected, rtol=0, atol=1e-5 * expected.norm().item())
    assert limit.time_scale == pytest.approx(1 / (0.1 * RHO**2))


def trained(dense, w, *, lr, steps, rho=RHO):
    """Steps of SAM, written out."""
    gradient = torch.func.grad(dense.L)
    for _ in range(steps):
        g = gradient(w)
        w = w - lr * gradient(w + rho * g / g.norm())
    return w


def test_simulated_runs_are_those_written_out():
    dense, w = make("two_layers")
    off = w + 0.01 * torch.linspace(-1, 1, len(w), dtype=w.dtype)
    runs = simulate(dense.problem, off, SAM(RHO), SGDSettings(lr=0.05), steps=20, replicas=2)
    expected = trained(dense, off, lr=0.05, steps=20)
    torch.testing.assert_close(runs.weights, expected.expand(2, -1), rtol=0, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["scalar", "rank_deficient"])
def test_training_follows_the_limit_at_its_distance(name):
    """Cosine 0.99, speed within 5 % at this step size, distance within 10 % of its law."""
    dense, w = make(name)
    rho = 0.01
    largest = torch.linalg.eigvalsh(dense.gauss_newton(w))[-1].item()
    sgd = SGDSettings(lr=0.1 / largest)
    limit = singular_limit(dense.problem, w, SAM(rho), sgd)
    steps = int(0.015 / limit.drift.norm().item())
    generator = torch.Generator().manual_seed(0)
    off = w + 1e-5 * torch.randn(len(w), generator=generator, dtype=w.dtype)
    end = trained(dense, off, lr=sgd.lr, steps=steps, rho=rho)
    nearest, other = (
        nearest_point(dense.problem, v, rtol=1e-6, max_steps=50)
        for v in (end, trained(dense, end, lr=sgd.lr, steps=1, rho=rho))
    )
    distance = ((nearest.distance**2 + other.distance**2) / 2) ** 0.5  # of both points between which it bounces
    flow = limit_flow(dense.problem, w, SAM(rho), sgd, steps=steps, finite_step=True)
    found = compare(nearest.point - w, flow.displacement)
    expected = singular_limit(dense.problem, nearest.point, SAM(rho), sgd).distance
    print(f"\n{name}: {steps} steps, {found}, distance {distance / expected:.3f} of its law")
    assert found.cosine >= 0.99
    assert found.speed == pytest.approx(1, abs=0.05)
    assert distance == pytest.approx(expected, rel=0.1)


def test_what_is_not_covered():
    dense, w = make("scalar")
    for sgd in (SGDSettings(lr=0.1, batch_size=1), SGDSettings(lr=0.1, momentum=0.9)):
        with pytest.raises(ValueError, match="full batches without momentum"):
            singular_limit(dense.problem, w, SAM(RHO), sgd)
    with pytest.raises(ValueError, match="positive"):
        SAM(0.0)
    with pytest.raises(ValueError, match="second gradient"):
        InjectNoise(SAM(RHO))
