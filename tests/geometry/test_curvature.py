"""The linearised residual and the Gauss-Newton factor against dense brute force."""

import pytest
import torch
from torch import nn

from tests.problems import DTYPE, NAMES, displaced, make
from torch_singlim import ZeroLossProblem, gauss_newton, linearize
from torch_singlim.geometry import JacobianProducts, curvature, largest_curvature


def count_products(monkeypatch):
    """A list that grows with each product of a vector with the transposed Jacobian ."""
    calls, original = [], JacobianProducts.vjp

    def counted(self, u):
        calls.append(u)
        return original(self, u)

    monkeypatch.setattr(JacobianProducts, "vjp", counted)
    return calls


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("on_gamma", [True, False])
@pytest.mark.parametrize("way", ["formed", "cached", "chunks"])
def test_products_match_dense_matrices(name, on_gamma, way, monkeypatch):
    if way == "cached":
        monkeypatch.setattr(curvature, "_TINY", 0)
    batch_size = 3 if way == "chunks" else None
    dense, w = make(name)
    w = w if on_gamma else displaced(w)
    problem = ZeroLossProblem(dense.net, dense.loss, dense.inputs, dense.targets, batch_size=batch_size)
    v = torch.randn(w.shape, generator=torch.Generator().manual_seed(1), dtype=DTYPE)
    calls = count_products(monkeypatch)
    at = linearize(problem, w)
    B = at.operator.rows(w)
    assert len(calls) == 1 if way == "formed" else len(calls) >= len(B)  # all rows at once, or one by one
    torch.testing.assert_close(B.T @ B, dense.gauss_newton(w), atol=1e-12, rtol=1e-9)
    torch.testing.assert_close(at.operator.matvec(v), B @ v, atol=1e-12, rtol=1e-9)
    torch.testing.assert_close(at.gram(), B @ B.T, atol=1e-12, rtol=1e-9)
    if on_gamma:  # there H is the Hessian of L, and the residual vanishes
        hessian = torch.autograd.functional.hessian(dense.L, w)
        torch.testing.assert_close(B.T @ B, hessian, atol=1e-10, rtol=1e-8)
        assert torch.linalg.vector_norm(at.residual) < 1e-14
    assert not at.operator.rmatvec(torch.zeros(problem.num_residuals, dtype=DTYPE)).any()


@pytest.mark.parametrize("smallest", [1e-3, 1e-6, 1e-9, 0.0])
def test_the_factor_tells_a_small_eigenvalue_from_a_zero(smallest):
    """Inputs along one more direction, with this share of the others' variance; single precision cannot tell."""
    x = torch.eye(40, dtype=torch.float64)
    x[-1] = x[:-1].sum(0) / 6.3 + smallest**0.5 * x[-1]
    problem = ZeroLossProblem(nn.Linear(40, 1, bias=False), "mse", x, torch.zeros(40, 1), dtype=torch.float64)
    at = linearize(problem, problem.weights())
    K, factor = at.gram(), at.factor()
    torch.testing.assert_close(at.gram(dtype=torch.float32).double(), K, rtol=1e-6, atol=1e-7)
    assert torch.linalg.matrix_rank(K) == (39 if smallest == 0 else 40)
    assert (factor is None) == (smallest == 0)
    if factor is not None:
        assert factor.lower.dtype == torch.float32 or smallest < 1e-6
        found = gauss_newton(problem, problem.weights(), at=at, max_dense=0, factor=factor).solve(K[0])
        torch.testing.assert_close(found, torch.eye(40, dtype=torch.float64)[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["two_layers", "cross_entropy"])
def test_residual_is_linearised_by_B(name):
    dense, w = make(name)
    problem = dense.problem
    v = torch.randn(w.shape, generator=torch.Generator().manual_seed(2), dtype=DTYPE)
    slope = (problem.residual(w + 1e-6 * v) - problem.residual(w - 1e-6 * v)) / 2e-6
    torch.testing.assert_close(linearize(problem, w).operator.matvec(v), slope, atol=1e-8, rtol=1e-6)
    near = displaced(w, 1e-4)
    assert problem.residual(near).square().sum().item() == pytest.approx(2 * problem.loss(near).item(), rel=1e-2)


def test_custom_loss_has_the_curvature_of_the_named_one():
    dense, w = make("two_layers")
    w = displaced(w)
    own = ZeroLossProblem(dense.net, lambda f, y: (f - y).square().mean(), dense.inputs, dense.targets)
    torch.testing.assert_close(linearize(own, w).gram(), linearize(dense.problem, w).gram())


class Sine(torch.autograd.Function):
    """Without a rule for vmap."""

    @staticmethod
    def forward(x):
        return x.sin()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, g):
        return Cosine.apply(ctx.saved_tensors[0], g)


class Cosine(torch.autograd.Function):
    """g cos x, which is linear in g; also without a rule for vmap."""

    @staticmethod
    def forward(x, g):
        return g * x.cos()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, h):
        x, g = ctx.saved_tensors
        return -h * g * x.sin(), h * x.cos()


class Waves(torch.nn.Module):
    def forward(self, x):
        return Sine.apply(x)


def test_without_a_rule_for_vmap_the_matrix_is_not_formed():
    net = torch.nn.Sequential(torch.nn.Linear(2, 3), Waves(), torch.nn.Linear(3, 1))
    problem = ZeroLossProblem(net, "mse", torch.randn(4, 2), torch.randn(4, 1))
    w = problem.weights()
    B = linearize(problem, w).operator.rows(w)
    x, (first, _, second) = problem.inputs.float(), net

    def outputs(weight):
        return torch.nn.functional.linear((x @ weight.T + first.bias).sin(), second.weight, second.bias)[:, 0]

    slopes = torch.autograd.functional.jacobian(outputs, first.weight.detach()).reshape(4, -1)
    torch.testing.assert_close(B[:, : slopes.shape[1]].float(), slopes * (2 / 4) ** 0.5)


def test_diverged_weights_are_refused():
    dense, w = make("scalar")
    with pytest.raises(ValueError, match="not finite"):
        linearize(dense.problem, w * float("nan"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", NAMES)
def test_the_largest_curvature_is_that_of_the_dense_matrix(name, dtype):
    dense, w = make(name)
    w = displaced(w, 0.1)
    problem = dense.problem.at_precision(dtype)
    found = largest_curvature(problem, w, generator=torch.Generator().manual_seed(0))
    exact = torch.linalg.eigvalsh(dense.gauss_newton(w))[-1].item()
    assert found.item() == pytest.approx(exact, rel=0.01)
    assert found.item() <= exact * (1 + 1e-5)


def test_a_curvature_that_was_not_found_is_none():
    dense, w = make("two_layers")
    assert largest_curvature(dense.problem, w, rtol=1e-12, steps=1) is None
