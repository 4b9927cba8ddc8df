"""Products with the Jacobian, also after so many that their pass is recorded, against the dense one."""

import math

import pytest
import torch
from torch import nn

from torch_singlim import ZeroLossProblem, linearize
from torch_singlim.geometry import JacobianProducts, curvature

MANY = 34  # the pass is recorded before


def test_a_recorded_tangent_pass_gives_the_same_products(monkeypatch):
    monkeypatch.setattr(curvature, "_TINY", 0)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.GELU(), nn.Flatten(), nn.Linear(16, 3))
    problem = ZeroLossProblem(net, "mse", torch.randn(5, 1, 4, 4), torch.randn(5, 3))
    w = problem.weights()
    operator = linearize(problem, w).operator
    jacobian = math.sqrt(2 / 15) * torch.func.jacrev(lambda w: problem.function(w, problem.inputs).flatten())(w)
    for seed in range(MANY):
        v = torch.randn(w.shape, generator=torch.Generator().manual_seed(seed), dtype=w.dtype)
        torch.testing.assert_close(operator.matvec(v), jacobian @ v, atol=1e-13, rtol=1e-9)
        torch.testing.assert_close(operator.normal_product(v), jacobian.T @ (jacobian @ v), atol=1e-13, rtol=1e-9)


@pytest.mark.parametrize("tangent", [True, False])
def test_after_many_products_the_function_is_not_called_any_more(tangent):
    calls = 0

    def function(w):
        nonlocal calls
        calls += 1
        return w.sin() * w.flip(0)

    w = torch.linspace(-1, 1, 5, dtype=torch.float64)
    J = JacobianProducts(function, w, tangent=tangent)
    jacobian = torch.func.jacrev(function)(w)
    for _ in range(MANY):
        torch.testing.assert_close(J.jvp(w), jacobian @ w)
        torch.testing.assert_close(J.vjp(w), jacobian.T @ w)
    before = calls
    J.jvp(w), J.vjp(w)
    assert calls == before
