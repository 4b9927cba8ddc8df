"""H = B^T B through its Gram matrix, dense and Krylov, against dense linear algebra on H."""

import dataclasses
import math

import pytest
import torch

from torch_singlim.linalg import (
    CholeskyFactored,
    DenseFactored,
    KrylovFactored,
    LinearOperator,
    Result,
    cholesky,
    gram_cutoff,
    krylov_solve,
)

DTYPE = torch.float64


def matrix(kind: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    B = torch.randn(8, 20, generator=generator, dtype=DTYPE)
    if kind == "rank_deficient":
        B[7] = B[0] - 2 * B[1]
        B[6] = 0
    if kind == "zero":
        B = torch.zeros_like(B)
    return B


def factored(B: torch.Tensor, way: str):
    operator = LinearOperator.from_matrix(B)
    if way == "dense":
        return DenseFactored.from_gram(operator, B @ B.T)
    lanczos = (operator, B[0], 1e-12, 50, gram_cutoff(len(B), DTYPE))
    if way == "cholesky":
        return CholeskyFactored(*lanczos, factor=cholesky(B @ B.T))
    return KrylovFactored(*lanczos)


GRID = [(k, w) for k in ("full", "rank_deficient", "zero") for w in ("dense", "krylov")] + [("full", "cholesky")]


@pytest.mark.parametrize(("kind", "way"), GRID)
def test_projection_is_idempotent_symmetric_and_kills_the_rows(kind, way):
    B = matrix(kind)
    H = factored(B, way)
    P = torch.stack([H.project_kernel(e) for e in torch.eye(20, dtype=DTYPE)], 1)
    torch.testing.assert_close(P @ P, P, atol=1e-11, rtol=0)
    torch.testing.assert_close(P, P.T, atol=1e-11, rtol=0)
    torch.testing.assert_close(P @ B.T, torch.zeros(20, 8, dtype=DTYPE), atol=1e-10, rtol=0)
    assert H.rank == torch.linalg.matrix_rank(B)
    assert P.trace().item() == pytest.approx(20 - H.rank, abs=1e-9)
    assert not H.project_kernel(torch.zeros(20, dtype=DTYPE)).any()
    assert H.exact


@pytest.mark.parametrize(("kind", "way"), GRID)
def test_spectrum_and_functions(kind, way):
    B = matrix(kind)
    H = factored(B, way)
    values, vectors = torch.linalg.eigh(B.T @ B)
    kept = values > 1e-10
    torch.testing.assert_close(H.spectrum(), values[kept].flip(0), rtol=1e-9, atol=0)
    v = torch.randn(20, generator=torch.Generator().manual_seed(6), dtype=DTYPE)
    truth = vectors[:, kept] @ (values[kept].sqrt() * (vectors[:, kept].T @ v))
    torch.testing.assert_close(H.normal_function(torch.sqrt, v), truth, rtol=0, atol=1e-9)
    u = B @ v
    torch.testing.assert_close(H.pseudo_inverse(u), torch.linalg.pinv(B) @ u, rtol=0, atol=1e-9)
    if H.inverse is not None:
        torch.testing.assert_close(H.inverse(u), torch.linalg.inv(B @ B.T) @ u, rtol=0, atol=1e-9)
    assert (H.inverse is None) == (kind != "full" or way == "krylov")


def test_a_factor_in_single_precision_is_refined():
    generator = torch.Generator().manual_seed(4)
    Q = torch.linalg.qr(torch.randn(60, 60, generator=generator, dtype=DTYPE)).Q
    values = torch.logspace(0, -5, 60, dtype=DTYPE)
    B = torch.cat([Q * values.sqrt(), torch.zeros(60, 40, dtype=DTYPE)], 1)
    K, u, v = B @ B.T, torch.randn(60, generator=generator, dtype=DTYPE), torch.ones(100, dtype=DTYPE)
    factor = cholesky(K.float())
    H = CholeskyFactored(LinearOperator.from_matrix(B), v, 1e-3, 50, gram_cutoff(60, DTYPE), factor=factor)
    truth = torch.linalg.inv(K) @ u
    assert torch.linalg.vector_norm(factor.solve(u) - truth) > 1e-5 * torch.linalg.vector_norm(truth)
    torch.testing.assert_close(H.solve(u), truth, rtol=1e-6, atol=0)
    torch.testing.assert_close(H.pseudo_inverse(u), torch.linalg.pinv(B) @ u, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(H.project_kernel(v), v - torch.linalg.pinv(B) @ (B @ v), rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, DTYPE])
def test_no_factor_without_full_rank(dtype):
    """Pivots alone do not tell: where the leading block is ill-conditioned, the last one is large by rounding."""
    generator = torch.Generator().manual_seed(4)
    for trial in range(20):
        B = torch.randn(300, 299 if trial % 2 else 150, generator=generator, dtype=dtype)
        assert cholesky(B @ B.T) is None
    B = torch.randn(300, 600, generator=generator, dtype=dtype)
    assert cholesky(B @ B.T) is not None


@pytest.mark.parametrize(("kind", "way"), GRID)
def test_forms_are_those_of_the_vector(kind, way):
    B = matrix(kind)
    H = factored(B, way)
    u = torch.randn(8, generator=torch.Generator().manual_seed(8), dtype=DTYPE)
    values, vectors = torch.linalg.eigh(B @ B.T)
    kept = values > 1e-10
    truth = (values[kept].sqrt() * (vectors[:, kept].T @ u).square()).sum().item()
    assert H.gram_form(torch.sqrt, u) == pytest.approx(truth, rel=1e-8, abs=1e-12)


def test_counting_at_size():
    """A spectrum over six decades: the estimate against the count of every eigenvalue."""
    generator = torch.Generator().manual_seed(9)
    B = torch.randn(400, 500, generator=generator, dtype=DTYPE) * torch.logspace(0, -3, 400, dtype=DTYPE)[:, None]
    values = torch.linalg.eigvalsh(B @ B.T)
    dense = DenseFactored.from_gram(LinearOperator.from_matrix(B), B @ B.T)
    krylov = KrylovFactored(dense.operator, like=B[0], rtol=1e-3, max_steps=60, cutoff=gram_cutoff(400, DTYPE))
    for smallest in (10.0, 1.0, 0.3):
        true = int((values >= smallest).sum())
        assert dense.count(smallest) == true
        assert krylov.count(smallest) == pytest.approx(true, abs=0.1 * 400)
    assert dense.largest == pytest.approx(values[-1].item(), rel=1e-12)
    assert krylov.largest == pytest.approx(values[-1].item(), rel=1e-6)
    for phi in (torch.sqrt, lambda x: x / (x + 1.0)):
        truth, estimate = phi(values).sum().item(), krylov.trace(phi)
        assert dense.trace(phi).mean == pytest.approx(truth, rel=1e-9)
        assert abs(estimate.mean - truth) < 5 * estimate.stderr < 0.5 * truth
    assert math.isnan(krylov.count(1e-6))  # 60 products do not reach that far
    # the first 60 products resolve the few largest, the mass of small ones they do not
    sure = (values >= krylov.spectrum()[5]).double().mean().item()
    assert dense.unresolved == 0.0 < krylov.unresolved < 1 - sure + 0.05
    assert dataclasses.replace(krylov, max_steps=400).unresolved == 0


def by_products(B, u):
    """K^+ u by Lanczos, of K = B B^T."""
    product, cutoff = LinearOperator.from_matrix(B).gram_product, gram_cutoff(len(B), DTYPE)
    return krylov_solve(product, u, rtol=1e-9, max_steps=100, cutoff=cutoff)


@pytest.mark.parametrize("kind", ["full", "rank_deficient"])
@pytest.mark.parametrize("dense", [True, False])
def test_the_shortest_solution_is_that_of_the_pseudo_inverse(kind, dense):
    B = matrix(kind)
    u = B @ torch.randn(20, generator=torch.Generator().manual_seed(7), dtype=DTYPE)
    for rhs in (u, torch.zeros_like(u)):
        solution = by_products(B, rhs)
        assert solution.status is Result.SUCCESSFUL
        x = factored(B, "dense").pseudo_inverse(rhs) if dense else B.T @ solution.x
        torch.testing.assert_close(x, torch.linalg.pinv(B) @ rhs, rtol=0, atol=1e-8)
        assert x.any() == rhs.any()


def test_inconsistent_right_hand_side_is_reported():
    B, u = matrix("rank_deficient"), torch.ones(8, dtype=DTYPE)
    solution = by_products(B, u)
    assert solution.status is Result.INCONSISTENT
    for x in (B.T @ solution.x, factored(B, "dense").pseudo_inverse(u)):
        torch.testing.assert_close(x, torch.linalg.pinv(B) @ u, rtol=0, atol=1e-8)


def test_rows_of_an_operator_are_its_matrix():
    B = matrix("full")
    torch.testing.assert_close(LinearOperator.from_matrix(B).rows(B), B)
