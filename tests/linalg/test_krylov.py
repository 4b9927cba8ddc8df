"""Lanczos, solves and matrix functions against dense eigendecompositions."""

import pytest
import torch

from torch_singlim.linalg import Result, krylov_function, krylov_solve, lanczos

DTYPE = torch.float64


def spd(size: int, rank: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=DTYPE)).Q
    values = torch.cat([torch.logspace(-3, 1, rank, dtype=DTYPE), torch.zeros(size - rank, dtype=DTYPE)])
    return (Q * values) @ Q.T


def test_lanczos_relation_and_orthogonality():
    K = spd(30, 30)
    start = torch.randn(30, generator=torch.Generator().manual_seed(1), dtype=DTYPE)
    *_, space = lanczos(lambda v: K @ v, start, max_steps=12)
    Q, T = space.held.T, space.tridiagonal
    torch.testing.assert_close(Q.T @ Q, torch.eye(12, dtype=DTYPE), atol=1e-13, rtol=0)
    torch.testing.assert_close(Q.T @ K @ Q, T, atol=1e-12, rtol=0)
    remainder = K @ Q - Q @ T
    assert torch.linalg.vector_norm(remainder[:, :-1]) < 1e-12
    assert torch.linalg.vector_norm(remainder[:, -1]).item() == pytest.approx(space.beta, rel=1e-10)


@pytest.mark.parametrize("held", [2, 5, 40])
def test_vectors_that_are_not_held_are_made_again(held):
    """Same recurrence, same vectors: solves and functions as with all of them, where copies have come up, too."""
    K = spd(120, 120)
    v = torch.randn(120, generator=torch.Generator().manual_seed(4), dtype=DTYPE)
    products = 0

    def matvec(u):
        nonlocal products
        products += 1
        return K @ u

    *_, space = lanczos(matvec, v, max_steps=60, held=held)
    assert space.held.shape == (min(held, 60), 120)
    products = 0
    Q = torch.stack([space.combine(e) for e in torch.eye(60, dtype=DTYPE)], 1)
    assert products == 60 * (60 - held)
    torch.testing.assert_close(Q[:, :held].T, space.held, rtol=0, atol=0)
    # the recurrence holds column by column even where orthogonality is lost (Paige 1976)
    torch.testing.assert_close((K @ Q)[:, :-1], (Q @ space.tridiagonal)[:, :-1], rtol=0, atol=1e-12)

    values, vectors = torch.linalg.eigh(K)
    for function in (lambda x: torch.exp(-x), lambda x: 1 / (1 + (0.1 / x) ** 4)):
        truth = vectors @ (function(values) * (vectors.T @ v))
        found = krylov_function(matvec, function, v, rtol=1e-8, max_steps=600, held=held)
        assert found.status is Result.SUCCESSFUL
        torch.testing.assert_close(found.x, truth, rtol=0, atol=1e-6 * truth.norm().item())
    solved = krylov_solve(matvec, K @ v, rtol=1e-6, max_steps=600, cutoff=1e-14, held=held)
    assert solved.residual == pytest.approx(((K @ solved.x - K @ v).norm() / (K @ v).norm()).item(), rel=0.05, abs=1e-9)


def test_lanczos_stops_at_an_invariant_space():
    K = spd(20, 6)
    start = K @ torch.ones(20, dtype=DTYPE)
    *_, space = lanczos(lambda v: K @ v, start, max_steps=20)
    assert space.beta == 0.0
    assert space.steps == 6
    truth = torch.linalg.eigvalsh(K)[-6:]
    torch.testing.assert_close(space.ritz()[0], truth, rtol=1e-9, atol=0)


@pytest.mark.parametrize("rank", [25, 10])
def test_solve_finds_the_minimum_norm_solution(rank):
    K = spd(25, rank)
    b = K @ torch.randn(25, generator=torch.Generator().manual_seed(2), dtype=DTYPE)
    solution = krylov_solve(lambda v: K @ v, b, rtol=1e-10, max_steps=100, cutoff=1e-12)
    assert solution.status is Result.SUCCESSFUL
    torch.testing.assert_close(solution.x, torch.linalg.pinv(K, rtol=1e-10) @ b, rtol=1e-6, atol=1e-8)
    assert torch.linalg.vector_norm(K @ solution.x - b) <= 2e-10 * torch.linalg.vector_norm(b)


def test_solve_reports_what_it_could_not_do():
    K = spd(25, 25)
    b = torch.ones(25, dtype=DTYPE)
    short = krylov_solve(lambda v: K @ v, b, rtol=1e-12, max_steps=5, cutoff=1e-14)
    assert (short.status, short.steps) == (Result.MAX_STEPS, 5)
    true_residual = torch.linalg.vector_norm(K @ short.x - b) / torch.linalg.vector_norm(b)
    assert short.residual == pytest.approx(true_residual.item(), rel=1e-8)
    singular = spd(25, 10)
    outside = krylov_solve(lambda v: singular @ v, b, rtol=1e-10, max_steps=100, cutoff=1e-12)
    assert outside.status is Result.INCONSISTENT
    torch.testing.assert_close(outside.x, torch.linalg.pinv(singular, rtol=1e-10) @ b, rtol=1e-5, atol=1e-7)


def test_solve_stays_bounded_where_the_right_hand_side_is_far_outside():
    """A wide spectrum, a part outside the range, few products: the smallest residual in the Krylov space, densely."""
    K = spd(60, 30)
    b = torch.randn(60, generator=torch.Generator().manual_seed(5), dtype=DTYPE)
    found = krylov_solve(lambda v: K @ v, b, rtol=1e-8, max_steps=12, cutoff=1e-14)
    space = torch.stack([torch.linalg.matrix_power(K, k) @ b for k in range(12)], 1)
    Q = torch.linalg.qr(space).Q
    y = torch.linalg.lstsq(K @ Q, b[:, None]).solution[:, 0]
    best = torch.linalg.vector_norm(K @ Q @ y - b) / torch.linalg.vector_norm(b)
    assert found.status is Result.MAX_STEPS
    assert found.residual <= 1
    assert found.residual == pytest.approx(best.item(), rel=1e-4)
    assert found.residual == pytest.approx((torch.linalg.vector_norm(K @ found.x - b) / b.norm()).item(), rel=1e-6)


def test_zero_right_hand_side():
    K = spd(5, 5)
    for solution in (
        krylov_solve(lambda v: K @ v, torch.zeros(5, dtype=DTYPE), rtol=1e-8, max_steps=5, cutoff=1e-12),
        krylov_function(lambda v: K @ v, torch.exp, torch.zeros(5, dtype=DTYPE), rtol=1e-8, max_steps=5),
    ):
        assert (solution.status, solution.steps) == (Result.SUCCESSFUL, 0)
        assert not solution.x.any()


def test_matrix_function_matches_the_eigendecomposition():
    K = spd(30, 30)
    v = torch.randn(30, generator=torch.Generator().manual_seed(3), dtype=DTYPE)
    values, vectors = torch.linalg.eigh(K)
    truth = vectors @ (torch.exp(-values) * (vectors.T @ v))
    result = krylov_function(lambda u: K @ u, lambda x: torch.exp(-x), v, rtol=1e-10, max_steps=30)
    assert result.status is Result.SUCCESSFUL
    torch.testing.assert_close(result.x, truth, rtol=0, atol=1e-9)
