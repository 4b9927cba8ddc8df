"""Quasi-Newton directions against the dense BFGS formula, and on a quadratic."""

import torch

from torch_singlim.linalg import QuasiNewton


def dense_bfgs(values, vectors, pairs, mu):
    """H by the update (1 - rho s y^T) H (1 - rho y s^T) + rho s s^T, all matrices formed (Nocedal & Wright, 7.16)."""
    n = vectors.shape[1]
    eye = torch.eye(n, dtype=torch.float64)
    outside = eye - vectors.T @ vectors
    gamma = 1 / (mu + values.min())
    if pairs:
        s, y = (outside @ each for each in pairs[-1])
        gamma = min((s @ (y + mu * s)) / (y + mu * s).square().sum(), 1 / mu)
    H = vectors.T @ torch.diag(1 / (values + mu)) @ vectors + gamma * outside
    for s, y in pairs:
        y = y + mu * s
        rho = 1 / (s @ y)
        H = (eye - rho * torch.outer(s, y)) @ H @ (eye - rho * torch.outer(y, s)) + rho * torch.outer(s, s)
    return H


def case(seed=0, n=9, k=2, count=6):
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(n, n, generator=generator, dtype=torch.float64)
    hessian = A @ A.T / n + 0.1 * torch.eye(n, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(hessian)
    steps = torch.randn(count, n, generator=generator, dtype=torch.float64)
    return hessian, values[-k:], vectors[:, -k:].T, [(s, hessian @ s + 0.05 * s * s.norm()) for s in steps]


def test_the_direction_is_that_of_the_dense_formula_for_every_mu_and_after_old_pairs_were_dropped():
    _, values, vectors, pairs = case()
    memory = QuasiNewton(values, vectors, pairs=4)
    g = torch.arange(9, dtype=torch.float64) - 3
    for count in range(len(pairs) + 1):
        for mu in (0.01, 1.0, 30.0):
            expected = -dense_bfgs(values, vectors, pairs[max(count - 4, 0) : count], mu) @ g
            torch.testing.assert_close(memory.direction(g, mu), expected, rtol=1e-9, atol=1e-10)
        if count < len(pairs):
            memory.add(*pairs[count])
    memory.clear()
    torch.testing.assert_close(memory.direction(g, 1.0), -dense_bfgs(values, vectors, [], 1.0) @ g)


def test_a_pair_of_negative_curvature_is_left_out_until_the_penalty_makes_it_positive():
    _, values, vectors, pairs = case()
    memory, g = QuasiNewton(values, vectors, pairs=4), torch.ones(9, dtype=torch.float64)
    s = pairs[0][0]
    memory.add(s, -0.5 * s)
    torch.testing.assert_close(memory.direction(g, 0.1), -dense_bfgs(values, vectors, [], 0.1) @ g)
    torch.testing.assert_close(memory.direction(g, 2.0), -dense_bfgs(values, vectors, [(s, -0.5 * s)], 2.0) @ g)


def test_on_a_quadratic_it_converges_faster_than_without_eigenpairs():
    _, _, vectors, _ = case(n=40, k=40)
    spectrum = torch.cat([torch.linspace(0.1, 1, 34), torch.linspace(20, 100, 6)]).double()
    hessian = vectors.T @ torch.diag(spectrum) @ vectors
    values, vectors = spectrum[-6:], vectors[-6:]

    def left(memory):
        u = torch.ones(40, dtype=torch.float64)
        for _ in range(12):
            g = hessian @ u + 0.01 * u
            step = memory.direction(g, 0.01)
            t = -(g @ step) / (step @ (hessian @ step + 0.01 * step))
            memory.add(t * step, hessian @ (t * step))
            u = u + t * step
        return (hessian @ u + 0.01 * u).norm().item()

    plain = left(QuasiNewton(values[:0], vectors[:0], pairs=5))
    assert left(QuasiNewton(values, vectors, pairs=5)) < 0.2 * plain
