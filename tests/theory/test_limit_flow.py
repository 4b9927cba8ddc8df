"""The integrated limit: against projected descent in tiny steps, closed forms, its own error estimate."""

import math
import sys

import pytest
import torch

from tests.problems import make
from torch_singlim import (
    AntiCorrelated,
    Dropout,
    LabelNoise,
    Langevin,
    Minibatch,
    Result,
    SGDSettings,
    WeightDecay,
    ZeroLossProblem,
    compare,
    limit_flow,
)
from torch_singlim.theory import potential


def onto(dense, v):
    for _ in range(8):
        J = dense.jacobian(v).reshape(-1, len(v))
        v = v - torch.linalg.pinv(J) @ (dense.outputs(v) - dense.targets).reshape(-1)
    return v


def descend(dense, w, gradient, steps, split):
    """Projected descent of a potential in many small steps, with dense pseudo-inverses."""
    at = w
    for _ in range(split):
        J, g = dense.jacobian(at).reshape(-1, len(w)), gradient(at)
        at = onto(dense, at - steps / split * (g - torch.linalg.pinv(J) @ (J @ g)))
    return at - w


def test_weight_decay_is_descent_along_gamma():
    dense, w = make("scalar")
    sgd, noise, steps = SGDSettings(lr=0.1), WeightDecay(0.2), 40
    # Richardson's extrapolation of a method of order 1
    coarse, fine = (descend(dense, w, lambda v: 0.1 * 0.2 * v, steps, n) for n in (200, 400))
    truth = 2 * fine - coarse
    errors = []
    for rtol in (1e-1, 1e-3, 1e-5):
        flow = limit_flow(dense.problem, w, noise, sgd, steps=steps, rtol=rtol)
        errors.append((torch.linalg.vector_norm(flow.displacement - truth) / truth.norm()).item())
        assert (flow.stderr, flow.status) == (0.0, Result.SUCCESSFUL)
        assert errors[-1] < max(rtol, 1e-4)
        assert dense.L(w + flow.displacement).item() < (0.1 * rtol * truth.norm().item()) ** 2 * 10
        assert errors[-1] < 3 * flow.error / truth.norm() + 1e-5
    assert errors[-1] < errors[0] / 10


def test_dropout_is_descent_of_its_potential():
    dense, w = make("two_layers")
    sgd, steps = SGDSettings(lr=0.05), 60

    def gradient(v):
        return 0.05 * potential(Dropout(), dense.problem, v, num_draws=1000).gradient.mean

    coarse, fine = (descend(dense, w, gradient, steps, n) for n in (60, 120))
    flow = limit_flow(dense.problem, w, Dropout(), sgd, steps=steps, rtol=1e-3)
    assert compare(2 * fine - coarse, flow.displacement).residual < 1e-3


def hyperbola():
    """f = w_1 w_2, target 1: D = w_1^2 - w_2^2 obeys dD/dt = -4 D under anti-correlated noise."""
    net = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False))
    one = torch.ones(1, 1)
    return ZeroLossProblem(net, "mse", one, one), torch.tensor([2.0, 0.5]).double()


def squares(w):
    return (w[..., 0].square() - w[..., 1].square()).tolist()


@pytest.mark.parametrize("noise", [AntiCorrelated(0.1), LabelNoise(0.1)], ids=str)
def test_a_solution_in_closed_form_at_marks(noise):
    problem, w = hyperbola()
    sgd, order = SGDSettings(lr=0.05), noise.order
    scale = 1 / (0.05**order * 0.01)
    marks = [round(t * scale) for t in (0.1, 0.25, 0.6)]
    flow = limit_flow(problem, w, noise, sgd, steps=marks[-1], marks=marks, rtol=1e-4)
    assert flow.path.shape == (3, 2)
    for k, D in zip(marks, squares(w + flow.path), strict=True):
        assert pytest.approx(D, rel=1e-3) == 3.75 * math.exp(-4 * k / scale)
    exact = limit_flow(problem, w, noise, sgd, steps=marks[-1], rtol=1e-6)
    for rtol in (1e-2, 1e-3, 1e-4):
        flow = limit_flow(problem, w, noise, sgd, steps=marks[-1], rtol=rtol)
        # the estimate is that of the method of order 2, while the result is that of order 3
        assert torch.linalg.vector_norm(flow.displacement - exact.displacement).item() <= 1.5 * flow.error
        assert flow.gradients < exact.gradients


def test_finite_steps_are_those_of_the_potential():
    """V_alpha = -(c/(2 alpha)) log(1 - alpha H/2) on the hyperbola, H = 2 (w_1^2 + w_2^2): a scalar equation."""
    problem, w = hyperbola()
    alpha, noise, steps = 0.1, LabelNoise(0.1), 4_000
    flow = limit_flow(problem, w, noise, SGDSettings(lr=alpha), steps=steps, rtol=1e-4, finite_step=True)
    D, c = 3.75, 2 * 0.1**2
    for _ in range(20 * steps):  # dD/dk = -alpha^2 c D / (1 - alpha H/2), H = 2 sqrt(D^2 + 4)
        D -= alpha**2 * c * 2 * D / (1 - alpha * math.sqrt(D**2 + 4)) / 20
    assert squares(w + flow.displacement) == pytest.approx(D, rel=2e-3)


def test_sampled_drifts_have_an_error_that_covers():
    dense, w = make("many_outputs")
    sgd, noise = SGDSettings(lr=0.05), Dropout()
    steps = 20  # on longer ways, descent forgets a part of its errors
    exact = limit_flow(dense.problem, w, noise, sgd, steps=steps).displacement
    generator = torch.Generator().manual_seed(0)
    flows = [limit_flow(dense.problem, w, noise, sgd, num_draws=2, steps=steps, generator=generator) for _ in range(40)]
    spread = sum((f.displacement - exact).square().sum().item() for f in flows) / 40
    stated = sum(f.stderr**2 for f in flows) / 40
    assert stated / spread == pytest.approx(1, abs=0.5)
    assert flows[0].status is Result.SUCCESSFUL


def test_many_residuals_take_no_decomposition(monkeypatch):
    dense, w = make("many_outputs")
    sgd = SGDSettings(lr=0.05)
    exact = limit_flow(dense.problem, w, Dropout(), sgd, steps=200)
    monkeypatch.setattr(sys.modules[limit_flow.__module__], "_FEW", 0)
    factored = limit_flow(dense.problem, w, Dropout(), sgd, steps=200)
    torch.testing.assert_close(factored.displacement, exact.displacement, rtol=1e-6, atol=1e-8)


def test_no_motion_and_what_is_refused():
    dense, w = make("scalar")
    sgd = SGDSettings(lr=0.1)
    still = limit_flow(dense.problem, w, Minibatch(), sgd, steps=100)
    assert still.displacement.norm() == 0
    assert still.status is Result.SUCCESSFUL
    with pytest.raises(ValueError, match="marks must ascend"):
        limit_flow(dense.problem, w, Dropout(), sgd, steps=0)
    with pytest.raises(ValueError, match="weights in one vector"):
        limit_flow(dense.problem, w[1:], Dropout(), sgd, steps=1)
    with pytest.raises(ValueError, match="finite step size"):
        limit_flow(dense.problem, w, Langevin(0.1), sgd, steps=1, finite_step=True)


def test_too_few_substeps_are_a_status():
    problem, w = hyperbola()
    flow = limit_flow(problem, w, Langevin(0.1), SGDSettings(lr=0.1), steps=10**6, max_substeps=3, rtol=1e-4)
    assert flow.status is Result.MAX_STEPS
    assert torch.isfinite(flow.displacement).all()
