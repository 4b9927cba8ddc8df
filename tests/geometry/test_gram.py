"""K = B B^T by every way to it, against the dense B."""

import pytest
import torch
from torch import nn

from tests.problems import DTYPE, displaced, make
from torch_singlim import ZeroLossProblem, linearize


@pytest.mark.parametrize("way", ["layers", "columns", "rows", "rows in blocks"])
@pytest.mark.parametrize("name", ["two_layers", "cross_entropy"])
@pytest.mark.parametrize("batch_size", [None, 2])
def test_every_way_to_the_gram_matrix(name, way, batch_size):
    dense, w = make(name)
    w = displaced(w)
    batch_size = batch_size or len(dense.inputs)
    memory = 0 if way == "rows in blocks" else None  # the rows of one sample at a time
    problem = ZeroLossProblem(dense.net, dense.loss, dense.inputs, dense.targets, batch_size=batch_size, memory=memory)
    at = linearize(problem, w)
    K = at.gram(way.split()[0])
    H = dense.gauss_newton(w)
    values = torch.linalg.eigvalsh(K)[-3:]
    torch.testing.assert_close(values, torch.linalg.eigvalsh(H)[-3:], atol=1e-12, rtol=1e-9)
    B = at.operator.rows(w)
    torch.testing.assert_close(K, B @ B.T, atol=1e-13, rtol=1e-9)


@pytest.mark.parametrize("name", ["two_layers", "cross_entropy"])
@pytest.mark.parametrize("batch_size", [None, 200])
def test_more_residuals_than_one_block_of_the_layers(name, batch_size):
    dense, w = make(name)
    x = torch.randn(600, dense.inputs.shape[1], generator=torch.Generator().manual_seed(0), dtype=DTYPE)
    y = dense.targets[:1].expand(600, -1)
    with pytest.warns(UserWarning, match="not over-parameterised"):
        problem = ZeroLossProblem(dense.net, dense.loss, x, y, batch_size=batch_size)
    f, J = problem.outputs(w), torch.func.jacfwd(lambda v: problem.function(v, x))(w)
    B = torch.stack([problem.whiten(f, column) for column in J.unbind(2)], 1)
    assert len(B) == 1200
    torch.testing.assert_close(linearize(problem, w).gram("layers"), B @ B.T, atol=1e-13, rtol=1e-9)


class Tied(nn.Module):
    """Its one weight is used twice, once without its layer."""

    def __init__(self):
        super().__init__()
        self.encode = nn.Linear(3, 3)

    def forward(self, x):
        return nn.functional.linear(self.encode(x).tanh(), self.encode.weight.T)


class Sequences(nn.Sequential):
    def forward(self, x):
        return super().forward(x[:, None]).flatten(1)


@pytest.mark.parametrize(
    ("net", "layers"),
    [
        (nn.Linear(3, 3), [(3, 3)]),
        (nn.Sequential(nn.Linear(3, 4, bias=False), nn.ReLU(inplace=True), nn.Linear(4, 3)), [(3, 4), (4, 3)]),
        (nn.Sequential(nn.Linear(3, 4).requires_grad_(False), nn.Tanh(), nn.Linear(4, 3)), [(4, 3)]),
        (nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 3)), []),
        (Tied(), []),
        (nn.Sequential(*[nn.Linear(3, 3)] * 2), []),
        (Sequences(nn.Linear(3, 3)), []),
    ],
)
def test_which_networks_consist_of_linear_layers(net, layers):
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randn(4, 3, generator=generator), torch.randn(4, 3, generator=generator)
    problem = ZeroLossProblem(net, "mse", x, y)
    assert problem.linear_layers == layers
    at = linearize(problem, problem.weights())
    B = at.operator.rows(problem.weights())
    torch.testing.assert_close(at.gram(), B @ B.T, atol=1e-13, rtol=1e-9)
    if not layers:
        with pytest.raises(ValueError, match="not consist of linear layers"):
            at.gram("layers")
