"""The relaxed part against the spectral filter on dense matrices."""

import torch

from tests.problems import DTYPE, make
from torch_singlim import gauss_newton
from torch_singlim.geometry import num_modes, relaxation_level, relaxed_part
from torch_singlim.linalg import KrylovFactored, LinearOperator


def test_relaxed_part_is_the_spectral_filter():
    dense, w = make("two_layers")
    H, b = gauss_newton(dense.problem, w), dense.problem.residual(w)
    v = H.pseudo_inverse(b)
    values, vectors = torch.linalg.eigh(dense.gauss_newton(w))
    level = relaxation_level(0.1, 300, 2.0)
    assert level == 2.0 / (0.1 * 300)
    share = torch.where(values > 1e-11 * values[-1], 1 / (1 + (level / values) ** 4), 0)
    part = relaxed_part(H, b, level)
    torch.testing.assert_close(part, vectors @ (share * (vectors.T @ v)), atol=1e-9, rtol=0)
    assert H.count(level) == (values >= level).sum()
    assert not relaxed_part(H, b, relaxation_level(0.1, 0, 2.0)).any()


def test_the_filter_is_within_reach_of_lanczos():
    values = torch.logspace(0, -6, 1500, dtype=DTYPE)
    B = torch.diag(values.sqrt())
    H = KrylovFactored(LinearOperator.from_matrix(B), like=values, rtol=1e-4, max_steps=100, cutoff=1e-12)
    v = torch.randn(1500, dtype=DTYPE, generator=torch.Generator().manual_seed(0))
    level = 1e-2
    part = relaxed_part(H, values.sqrt() * v, relaxation_level(1.0, 3 / level, 3.0))
    torch.testing.assert_close(part, v / (1 + (level / values) ** 4), atol=0.01, rtol=0)


def test_number_of_modes():
    dense, w = make("rank_deficient")
    assert num_modes(gauss_newton(dense.problem, w)) == torch.linalg.matrix_rank(dense.gauss_newton(w))
    assert num_modes(gauss_newton(dense.problem, w, max_dense=0)) == dense.problem.num_residuals
