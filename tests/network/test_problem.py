"""The loss, its derivatives and the Gauss-Newton factor against dense brute force; refusals; no harm."""

import copy
import math
import random

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.problems import DTYPE, NAMES, digits_net, make
from torch_singlim import ZeroLossProblem


def off_gamma(w, size=0.05, seed=0):
    return w + size * torch.randn(w.shape, generator=torch.Generator().manual_seed(seed), dtype=DTYPE)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("on_gamma", [True, False])
@pytest.mark.parametrize("batch_size", [None, 3])
def test_products_match_dense_matrices(name, on_gamma, batch_size):
    dense, w = make(name)
    w = w if on_gamma else off_gamma(w)
    problem = ZeroLossProblem(dense.net, dense.loss, dense.inputs, dense.targets, batch_size=batch_size)
    torch.testing.assert_close(problem.loss(w), dense.L(w), atol=1e-15, rtol=1e-12)
    torch.testing.assert_close(problem.gradient(w), torch.func.grad(dense.L)(w), atol=1e-13, rtol=1e-10)
    v = torch.randn(w.shape, generator=torch.Generator().manual_seed(1), dtype=DTYPE)
    hessian = torch.autograd.functional.hessian(dense.L, w)
    torch.testing.assert_close(problem.hessian_product(w, v), hessian @ v, atol=1e-12, rtol=1e-9)

    at = problem.linearize(w)
    B = at.operator.rows(w)
    torch.testing.assert_close(B.T @ B, dense.gauss_newton(w), atol=1e-12, rtol=1e-9)
    torch.testing.assert_close(at.operator.matvec(v), B @ v, atol=1e-12, rtol=1e-9)
    torch.testing.assert_close(at.gram(), B @ B.T, atol=1e-12, rtol=1e-9)
    if on_gamma:  # there H is the Hessian of L, and the residual vanishes
        torch.testing.assert_close(B.T @ B, hessian, atol=1e-10, rtol=1e-8)
        assert torch.linalg.vector_norm(at.residual) < 1e-14
    assert not problem.hessian_product(w, torch.zeros_like(w)).any()
    assert not at.operator.rmatvec(torch.zeros(problem.num_residuals, dtype=DTYPE)).any()


@pytest.mark.parametrize("name", ["two_layers", "cross_entropy"])
def test_residual_is_linearised_by_B(name):
    dense, w = make(name)
    problem = dense.problem
    v = torch.randn(w.shape, generator=torch.Generator().manual_seed(2), dtype=DTYPE)
    slope = (problem.residual(w + 1e-6 * v) - problem.residual(w - 1e-6 * v)) / 2e-6
    torch.testing.assert_close(problem.linearize(w).operator.matvec(v), slope, atol=1e-8, rtol=1e-6)
    near = off_gamma(w, 1e-4)
    assert problem.residual(near).square().sum().item() == pytest.approx(2 * problem.loss(near).item(), rel=1e-2)


@pytest.mark.parametrize("way", ["layers", "pushing", "rows", "rows in blocks"])
@pytest.mark.parametrize("name", ["two_layers", "cross_entropy"])
@pytest.mark.parametrize("batch_size", [None, 2])
def test_every_way_to_the_gram_matrix(name, way, batch_size, monkeypatch):
    dense, w = make(name)
    w = off_gamma(w)
    problem = ZeroLossProblem(dense.net, dense.loss, dense.inputs, dense.targets, batch_size=batch_size)
    if way == "rows in blocks":
        monkeypatch.setattr("torch_singlim.geometry.gram._ROW_BYTES", 1)
    monkeypatch.setattr("torch_singlim.geometry.gram._flops", lambda problem: {way.split()[0]: 1.0})
    monkeypatch.setattr("torch_singlim.geometry.gram._BLOCK", 4)
    K = problem.linearize(w).gram()
    H = dense.gauss_newton(w)
    values = torch.linalg.eigvalsh(K)[-3:]
    torch.testing.assert_close(values, torch.linalg.eigvalsh(H)[-3:], atol=1e-12, rtol=1e-9)
    B = problem.linearize(w).operator.rows(w)
    torch.testing.assert_close(K, B @ B.T, atol=1e-13, rtol=1e-9)


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
    at = problem.linearize(problem.weights())
    B = at.operator.rows(problem.weights())
    torch.testing.assert_close(at.gram(), B @ B.T, atol=1e-13, rtol=1e-9)


def test_custom_loss_equals_the_named_one():
    dense, w = make("two_layers")
    w = off_gamma(w)
    own = ZeroLossProblem(dense.net, lambda f, y: (f - y).square().mean(), dense.inputs, dense.targets)
    named = dense.problem
    torch.testing.assert_close(own.loss(w), named.loss(w))
    torch.testing.assert_close(own.residual(w).square().sum(), named.residual(w).square().sum())
    torch.testing.assert_close(own.linearize(w).gram(), named.linearize(w).gram())


def test_label_smoothing_subtracts_the_entropy():
    net, x, y = digits_net(), torch.randn(6, 64), torch.arange(6)
    problem = ZeroLossProblem(net, nn.CrossEntropyLoss(label_smoothing=0.2), x, y)
    net.eval()
    expected = F.cross_entropy(net(x), y, label_smoothing=0.2).item()
    assert problem.loss(problem.weights()).item() + problem.infimum() == pytest.approx(expected, rel=1e-5)
    assert problem.num_residuals == 6 * 9


def test_frozen_parameters_and_tied_weights():
    net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3), nn.Linear(3, 1))
    net[2].weight = net[0].weight
    net[3].requires_grad_(False)
    problem = ZeroLossProblem(net, "mse", torch.randn(2, 3), torch.randn(2, 1))
    assert problem.num_weights == 9 + 3 + 3
    torch.testing.assert_close(problem.outputs(problem.weights()), net.double()(problem.inputs))


def test_no_harm():
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 2)).train()
    net[3].eval()
    net(torch.randn(5, 4)).sum().backward()
    before = copy.deepcopy(net.state_dict())
    gradients = [p.grad.clone() for p in net.parameters()]
    modes = [m.training for m in net.modules()]
    torch.manual_seed(3)
    states = torch.get_rng_state(), random.getstate()
    problem = ZeroLossProblem(net, "mse", torch.randn(5, 4, generator=torch.Generator()), torch.zeros(5, 2))
    w = problem.weights()
    problem.hessian_product(w, problem.gradient(w))
    problem.gauss_newton(w).project_kernel(w)
    assert problem.function.is_random(problem.inputs[:2], training=True) is False
    w.zero_()
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), before.values(), strict=True))
    assert all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), gradients, strict=True))
    assert [m.training for m in net.modules()] == modes


def test_buffers_are_a_snapshot_until_refreshed():
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    problem = ZeroLossProblem(net, "mse", torch.randn(3, 2), torch.randn(3, 2))
    w = problem.weights()
    first = problem.loss(w)
    net.train()(torch.randn(10, 2))
    assert problem.loss(w) == first
    problem.function.refresh_constants()
    assert problem.loss(w) != first


class Random(nn.Linear):
    def forward(self, x):
        return super().forward(x) + torch.rand(1)


X, Y = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), torch.zeros(4, 2)
BAD = {
    "hard labels": (nn.Linear(3, 2), nn.CrossEntropyLoss(), X, torch.tensor([0, 1, 0, 1]), "label_smoothing"),
    "empty": (nn.Linear(3, 2), "mse", X[:0], Y[:0], "empty"),
    "counts differ": (nn.Linear(3, 2), "mse", X, Y[:3], "same number of samples"),
    "target shape": (nn.Linear(3, 2), "mse", X, torch.zeros(4, 5), "one value per output"),
    "labels for mse": (nn.Linear(3, 2), "mse", X, torch.tensor([0, 1, 0, 1]), "one_hot"),
    "label range": (
        nn.Linear(3, 2),
        nn.CrossEntropyLoss(label_smoothing=0.1),
        X,
        torch.tensor([0, 1, 2, 1]),
        r"0\.\.1",
    ),
    "not probabilities": (nn.Linear(3, 2), "cross_entropy", X, torch.full((4, 2), 0.7), "sum to 1"),
    "nan data": (nn.Linear(3, 2), "mse", X * float("nan"), Y, "inputs contain nan"),
    "random forward": (Random(3, 2), "mse", X, Y, "random in evaluation mode"),
    "no parameters": (nn.Flatten(), "mse", X, Y, "no trainable parameters"),
    "label indexing": (
        nn.Linear(3, 2),
        lambda f, y: (f - torch.eye(2)[y]).square().mean(),
        X,
        torch.tensor([0, 1, 0, 1]),
        r"torch\.func\.vmap",
    ),
    "negative loss": (nn.Linear(3, 2), lambda f, y: (f - y).square().mean() - 100, X, Y, "non-negative"),
    "unknown loss": (nn.Linear(3, 2), "hinge", X, Y, "unknown loss 'hinge'"),
    "sum reduction": (nn.Linear(3, 2), nn.MSELoss(reduction="sum"), X, Y, "reduction='mean'"),
    "class weights": (nn.Linear(3, 2), nn.CrossEntropyLoss(weight=torch.ones(2)), X, Y, "class weights"),
    "alpha dropout": (nn.Sequential(nn.Linear(3, 2), nn.AlphaDropout(0.1)), "mse", X, Y, "use nn.Dropout"),
    "tuple output": (nn.LSTM(3, 2), "mse", X, Y, "one tensor"),
    "batch size": (nn.Linear(3, 2), "mse", X, Y, "batch_size"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_with_advice(case):
    net, loss, x, y, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        ZeroLossProblem(net, loss, x, y, batch_size=0 if case == "batch size" else None)


def test_too_few_weights_warns():
    with pytest.warns(UserWarning, match="not over-parameterised"):
        ZeroLossProblem(nn.Linear(3, 2, bias=False), "mse", X, Y)


def test_diverged_weights_are_refused():
    dense, w = make("scalar")
    with pytest.raises(ValueError, match="not finite"):
        dense.problem.linearize(w * float("nan"))


def test_a_recorded_tangent_pass_gives_the_same_products(monkeypatch):
    monkeypatch.setattr("torch_singlim.geometry.jacobian._FEW", 2)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.GELU(), nn.Flatten(), nn.Linear(16, 3))
    problem = ZeroLossProblem(net, "mse", torch.randn(5, 1, 4, 4), torch.randn(5, 3))
    w = problem.weights()
    operator = problem.linearize(w).operator
    jacobian = math.sqrt(2 / 15) * torch.func.jacrev(lambda w: problem.function(w, problem.inputs).flatten())(w)
    for seed in range(4):
        v = torch.randn(w.shape, generator=torch.Generator().manual_seed(seed), dtype=w.dtype)
        torch.testing.assert_close(operator.matvec(v), jacobian @ v, atol=1e-13, rtol=1e-9)
        torch.testing.assert_close(operator.normal_product(v), jacobian.T @ (jacobian @ v), atol=1e-13, rtol=1e-9)
