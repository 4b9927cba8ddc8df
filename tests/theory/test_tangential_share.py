"""The share of the tangential motion: against the linear recursion itself, mode by mode, by unit steps."""

import pytest
import torch

from tests.problems import make
from torch_singlim import DropConnect, Dropout, LabelNoise, SGDSettings, WeightDecay, tangential_share


@pytest.mark.parametrize("name", ["scalar", "two_layers", "cross_entropy"])
def test_it_is_the_cosine_in_the_linear_recursion(name):
    dense, w = make(name)
    H, g = dense.gauss_newton(w), dense.dropout_potential_gradient(w)
    values, vectors = torch.linalg.eigh(H)
    kernel = vectors[:, values < 1e-10 * values[-1]]
    lr, marks, moved, expected = 0.002 / values[-1].item(), (1, 100, 3_000), torch.zeros_like(w), []
    for k in range(1, marks[-1] + 1):
        moved = moved - lr * (H @ moved + g)
        if k in marks:
            expected.append((torch.linalg.vector_norm(kernel.T @ moved) / torch.linalg.vector_norm(moved)).item())
    found = tangential_share(dense.problem, w, Dropout(), SGDSettings(lr=lr), steps=marks, num_draws=1000)
    assert found == pytest.approx(expected, rel=1e-3)
    assert found == sorted(found)


def test_momentum_moves_the_clock():
    dense, w = make("two_layers")
    (plain,) = tangential_share(dense.problem, w, DropConnect(0.1), SGDSettings(lr=0.1), steps=[50], num_draws=1000)
    heavy = SGDSettings(lr=0.01, momentum=0.9)
    assert tangential_share(dense.problem, w, DropConnect(0.1), heavy, steps=[50], num_draws=1000) == pytest.approx(
        [plain]
    )


def test_what_is_tangential_and_what_is_unknown():
    dense, w = make("scalar")
    with pytest.raises(ValueError, match="order 1, got order 2"):
        tangential_share(dense.problem, w, LabelNoise(0.1), SGDSettings(lr=0.1), steps=[1])
    late = tangential_share(dense.problem, w, WeightDecay(0.1), SGDSettings(lr=0.1), steps=[10**9])
    assert late == pytest.approx([1.0])
