"""The loss and its derivatives against dense brute force; refusals; no harm."""

import copy
import random

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.problems import DTYPE, NAMES, digits_net, displaced, make
from torch_singlim import (
    DropConnect,
    SGDSettings,
    ZeroLossProblem,
    gauss_newton,
    level_distance,
    linearize,
    nearest_point,
    singular_limit,
    tangent_space,
)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("on_gamma", [True, False])
@pytest.mark.parametrize("batch_size", [None, 3])
def test_derivatives_match_dense_ones(name, on_gamma, batch_size):
    dense, w = make(name)
    w = w if on_gamma else displaced(w)
    problem = ZeroLossProblem(dense.net, dense.loss, dense.inputs, dense.targets, batch_size=batch_size)
    torch.testing.assert_close(problem.loss(w), dense.L(w), atol=1e-15, rtol=1e-12)
    torch.testing.assert_close(problem.gradient(w), torch.func.grad(dense.L)(w), atol=1e-13, rtol=1e-10)
    v = torch.randn(w.shape, generator=torch.Generator().manual_seed(1), dtype=DTYPE)
    hessian = torch.autograd.functional.hessian(dense.L, w)
    torch.testing.assert_close(problem.hessian_product(w, v), hessian @ v, atol=1e-12, rtol=1e-9)
    assert not problem.hessian_product(w, torch.zeros_like(w)).any()


def test_custom_loss_equals_the_named_one():
    dense, w = make("two_layers")
    w = displaced(w)
    own = ZeroLossProblem(dense.net, lambda f, y: (f - y).square().mean(), dense.inputs, dense.targets)
    named = dense.problem
    torch.testing.assert_close(own.loss(w), named.loss(w))
    torch.testing.assert_close(own.residual(w).square().sum(), named.residual(w).square().sum())


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
    gauss_newton(problem, w).project_kernel(w)
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


class Several(nn.Linear):
    def forward(self, x):
        return super().forward(x), x


X, Y = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), torch.zeros(4, 2)
BAD = {
    "empty": (nn.Linear(3, 2), "mse", X[:0], Y[:0], "no samples"),
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
    "several outputs": (Several(3, 2), "mse", X, Y, "one tensor"),
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


@pytest.mark.parametrize("least", [0.0, 0.1, -0.1])
def test_the_infimum_of_a_function_must_be_zero(least):
    net, x, y = digits_net(), torch.randn(3, 64), torch.zeros(3, 10)

    def loss(f, y):
        return (f - y).square().mean() + least

    if not least:
        assert ZeroLossProblem(net, loss, x, y).loss(ZeroLossProblem(net, loss, x, y).weights()) > 0
        return
    with pytest.raises(ValueError, match="infimum"):
        ZeroLossProblem(net, loss, x, y)


UNATTAINED = {
    "hard labels": (nn.CrossEntropyLoss(), torch.tensor([0, 1, 0, 1])),
    "probabilities of 0 and 1": ("cross_entropy", torch.eye(2).repeat(2, 1)),
    "logistic": (lambda f, y: nn.functional.softplus(-f * (2 * y - 1)).mean(), torch.eye(2).repeat(2, 1)),
    "exponential": (lambda f, y: (-f * (2 * y - 1)).exp().mean(), torch.eye(2).repeat(2, 1)),
}
ATTAINED = {
    "quartic": (lambda f, y: (f - y).pow(4).mean(), Y),
    "log cosh": (lambda f, y: torch.log(torch.cosh(f - y)).mean(), Y),
    "squared hinge": (lambda f, y: nn.functional.relu(1 - f * (2 * y - 1)).square().mean(), torch.eye(2).repeat(2, 1)),
    "smoothed labels": (nn.CrossEntropyLoss(label_smoothing=0.1), torch.tensor([0, 1, 0, 1])),
}


@pytest.mark.parametrize("name", [*UNATTAINED, *ATTAINED])
def test_whether_the_loss_attains_its_infimum(name):
    loss, y = (UNATTAINED | ATTAINED)[name]
    assert ZeroLossProblem(nn.Linear(3, 2), loss, X, y).attained == (name in ATTAINED)


@pytest.mark.parametrize("name", UNATTAINED)
def test_only_what_needs_the_zero_loss_set_raises(name):
    loss, y = UNATTAINED[name]
    problem = ZeroLossProblem(nn.Linear(3, 2), loss, X, y)
    w = problem.weights()
    needs = {
        "residual": lambda: problem.residual(w),
        "nearest point": lambda: nearest_point(problem, w),
        "tangent space": lambda: tangent_space(problem, w),
        "limit": lambda: singular_limit(problem, w, DropConnect(0.1), SGDSettings(lr=0.1)),
    }
    for what in needs.values():
        with pytest.raises(ValueError, match="never reaches its infimum"):
            what()
    assert gauss_newton(problem, w).largest > 0
    assert problem.gradient(w).norm() > 0
    found = level_distance(problem, w, 0.1)
    assert found.certified
    assert problem.loss(found.point) <= 0.1 * problem.loss(w)


def test_hard_labels_against_torch():
    """Value, gradient and the gradient in the residual's coordinates."""
    torch.manual_seed(0)
    net, labels = nn.Linear(3, 4).double(), torch.tensor([0, 1, 3, 1])
    problem = ZeroLossProblem(net, nn.CrossEntropyLoss(), X, labels)
    w, at = problem.weights(), linearize(problem, problem.weights())
    expected = nn.functional.cross_entropy(net(X.double()), labels)
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(expected, list(net.parameters()))])
    assert problem.loss(w).item() == pytest.approx(expected.item(), rel=1e-12)
    assert problem.infimum() == 0
    torch.testing.assert_close(problem.gradient(w), gradient, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(at.operator.rmatvec(at.newton()), gradient, rtol=1e-10, atol=1e-12)
