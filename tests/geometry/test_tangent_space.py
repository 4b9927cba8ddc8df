"""Tangent space and spectrum against the eigenvectors of the dense Hessian."""

from dataclasses import replace

import pytest
import torch

from tests.problems import DTYPE, NAMES, make
from torch_singlim import TangentSpace, ZeroLossProblem, gauss_newton, linearize, tangent_space


def tangent(problem, w, way):
    """By eigenvectors, by a Cholesky factor where K has one (small problems do not ask for it), or by products alone."""
    if way == "cholesky":
        at = replace(linearize(problem, w), cheap_gram=True)
        return TangentSpace(gauss_newton(problem, w, at=at, max_dense=0, rtol=1e-12))
    return tangent_space(problem, w, max_dense=4096 if way == "eigenvectors" else 0, rtol=1e-12)


@pytest.mark.parametrize("way", ["eigenvectors", "cholesky", "products"])
@pytest.mark.parametrize("name", NAMES)
def test_tangent_space_is_the_kernel_of_H(name, way):
    dense, w = make(name)
    T = tangent(dense.problem, w, way)
    H = dense.gauss_newton(w)
    values, vectors = torch.linalg.eigh(H)
    kept = values > 1e-11 * values[-1]
    assert T.rank == int(kept.sum())
    assert (T.hessian.inverse is not None) == (way != "products" and name != "rank_deficient")
    torch.testing.assert_close(T.spectrum(), values[kept].flip(0), rtol=1e-6, atol=0)
    P = torch.stack([T.project(e) for e in torch.eye(len(w), dtype=DTYPE)], 1)
    kernel = vectors[:, ~kept]
    torch.testing.assert_close(P, kernel @ kernel.T, atol=1e-7, rtol=0)
    torch.testing.assert_close(P @ P, P, atol=1e-8, rtol=0)
    torch.testing.assert_close(P, P.T, atol=1e-8, rtol=0)
    B = linearize(dense.problem, w).operator.rows(w)
    assert torch.linalg.vector_norm(P @ B.T) < 1e-8
    assert T.exact
    if name == "rank_deficient":
        assert T.rank < dense.problem.num_residuals


@pytest.mark.parametrize("memory", [None, 0])
def test_a_factor_is_taken_where_it_is_cheap_and_fits_into_memory(memory):
    dense, w = make("many_outputs")
    count = len(dense.inputs)
    problem = ZeroLossProblem(dense.net, dense.loss, dense.inputs, dense.targets, batch_size=count, memory=memory)
    T = tangent_space(problem, w, max_dense=0, rtol=1e-12)
    assert linearize(problem, w).cheap_gram == (memory is None)
    assert (T.hessian.inverse is not None) == (memory is None)
    truth = tangent_space(problem, w)
    assert T.rank == truth.rank == problem.num_residuals
    v = torch.randn(w.shape, generator=torch.Generator().manual_seed(0), dtype=DTYPE)
    torch.testing.assert_close(T.project(v), truth.project(v), atol=1e-7, rtol=0)


def test_curvature_is_that_of_the_dense_hessian():
    dense, w = make("two_layers")
    T, v = tangent_space(dense.problem, w), torch.linspace(-1, 1, len(w), dtype=DTYPE)
    assert T.curvature(v) == pytest.approx((v @ dense.gauss_newton(w) @ v / v.square().sum()).item())
    assert T.curvature(T.project(v)) == pytest.approx(0, abs=1e-20)
