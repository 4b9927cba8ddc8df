"""The linearised residual and the Gauss-Newton factor against dense brute force."""

import pytest
import torch

from tests.problems import DTYPE, NAMES, displaced, make
from torch_singlim import ZeroLossProblem, linearize
from torch_singlim.geometry import largest_curvature


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("on_gamma", [True, False])
@pytest.mark.parametrize("batch_size", [None, 3])
def test_products_match_dense_matrices(name, on_gamma, batch_size):
    dense, w = make(name)
    w = w if on_gamma else displaced(w)
    problem = ZeroLossProblem(dense.net, dense.loss, dense.inputs, dense.targets, batch_size=batch_size)
    v = torch.randn(w.shape, generator=torch.Generator().manual_seed(1), dtype=DTYPE)
    at = linearize(problem, w)
    B = at.operator.rows(w)
    torch.testing.assert_close(B.T @ B, dense.gauss_newton(w), atol=1e-12, rtol=1e-9)
    torch.testing.assert_close(at.operator.matvec(v), B @ v, atol=1e-12, rtol=1e-9)
    torch.testing.assert_close(at.gram(), B @ B.T, atol=1e-12, rtol=1e-9)
    if on_gamma:  # there H is the Hessian of L, and the residual vanishes
        hessian = torch.autograd.functional.hessian(dense.L, w)
        torch.testing.assert_close(B.T @ B, hessian, atol=1e-10, rtol=1e-8)
        assert torch.linalg.vector_norm(at.residual) < 1e-14
    assert not at.operator.rmatvec(torch.zeros(problem.num_residuals, dtype=DTYPE)).any()


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


def test_diverged_weights_are_refused():
    dense, w = make("scalar")
    with pytest.raises(ValueError, match="not finite"):
        linearize(dense.problem, w * float("nan"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", NAMES)
def test_the_largest_curvature_is_that_of_the_dense_matrix(name, dtype):
    dense, w = make(name)
    w = displaced(w, 0.1)
    problem = dense.problem if dtype == torch.float64 else dense.problem.fast()
    found = largest_curvature(problem, w, generator=torch.Generator().manual_seed(0))
    exact = torch.linalg.eigvalsh(dense.gauss_newton(w))[-1].item()
    assert found.item() == pytest.approx(exact, rel=0.01)
    assert found.item() <= exact * (1 + 1e-5)


def test_a_curvature_that_was_not_found_is_none():
    dense, w = make("two_layers")
    assert largest_curvature(dense.problem, w, rtol=1e-12, steps=1) is None
