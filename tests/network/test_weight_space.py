"""Steps of different sizes are one descent in the coordinates of their metric: against torch's own parameter groups."""

import copy

import pytest
import torch
from torch import nn

from torch_singlim import (
    DropConnect,
    Dropout,
    Minibatch,
    SGDSettings,
    ZeroLossProblem,
    effective_flow,
    gauss_newton,
    linearize,
    nearest_point,
)
from torch_singlim.network import FunctionalModule
from torch_singlim.theory import potential

RATIOS = {"0.weight": 4.0, "0.bias": 4.0, "3.weight": 0.25, "3.bias": 1.0}
LR = 0.02


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 2)).double()


def problem(net, ratios=RATIOS):
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(5, 3, generator=generator).double(), torch.randn(5, 2, generator=generator).double()
    return ZeroLossProblem(net, "mse", x, y, step_ratios=ratios)


def roots(net):
    """sqrt(r) of every weight ``[P]``."""
    return torch.cat([torch.full((p.numel(),), RATIOS[name]).sqrt() for name, p in net.named_parameters()]).double()


def flat(tensors):
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def test_gradients_of_torch_with_groups():
    """Full-batch SGD with momentum, one group a parameter, is the baseline flow of the problem, step for step."""
    net = network()
    studied = problem(net)
    before = flat(net.parameters())
    trained = copy.deepcopy(net).eval()
    groups = [{"params": [p], "lr": LR * RATIOS[name]} for name, p in trained.named_parameters()]
    optimizer = torch.optim.SGD(groups, lr=LR, momentum=0.8)
    for _ in range(30):
        optimizer.zero_grad()
        (0.5 * (trained(studied.inputs) - studied.targets).square().sum(1).mean()).backward()
        optimizer.step()
    sgd = SGDSettings(lr=LR, momentum=0.8)
    flow = effective_flow(studied, studied.weights(), Minibatch(), sgd, steps=30)
    moved = (flat(trained.parameters()) - before) / roots(net)
    torch.testing.assert_close(flow.displacement, moved, rtol=1e-9, atol=1e-12)
    # a run that goes on starts from the optimizer's buffers, which are gradients of the weights themselves
    velocity = studied.function.flatten(
        [optimizer.state[p]["momentum_buffer"] for p in trained.parameters()], gradients=True
    )
    later = problem(trained)
    start = later.weights()
    optimizer.zero_grad()
    (0.5 * (trained(studied.inputs) - studied.targets).square().sum(1).mean()).backward()
    optimizer.step()
    step = effective_flow(later, start, Minibatch(), sgd, steps=1, velocity=velocity)
    torch.testing.assert_close(step.displacement, later.weights() - start, rtol=1e-9, atol=1e-12)


def test_jacobian_and_its_gram_matrix_by_every_way():
    net = network()
    studied, plain = problem(net), problem(net, None)
    dense = linearize(plain, plain.weights()).operator.rows(plain.weights())
    scaled = dense * roots(net)
    at = linearize(studied, studied.weights())
    v = torch.randn(len(roots(net)), generator=torch.Generator().manual_seed(2)).double()
    torch.testing.assert_close(at.operator.matvec(v), scaled @ v)
    assert studied.linear_layers
    for way in ("layers", "columns", "rows"):
        torch.testing.assert_close(at.gram(way), scaled @ scaled.T, msg=way)


def test_the_nearest_point_is_nearest_in_the_metric():
    """There the displacement, in the metric, is normal: in the range of the scaled Jacobian's transpose."""
    net = network()
    studied = problem(net)
    start = nearest_point(studied, studied.weights(), max_steps=200).point
    w = start + 0.05 * torch.randn(start.shape, generator=torch.Generator().manual_seed(3)).double()
    nearest = nearest_point(studied, w, rtol=1e-8)
    assert nearest.converged
    hessian = gauss_newton(studied, nearest.point)
    off = w - nearest.point
    assert torch.linalg.vector_norm(hessian.project_kernel(off)) < 1e-6 * nearest.distance
    plain = problem(net, None)
    assert plain.loss(nearest.point * roots(net)) < 1e-15


@pytest.mark.parametrize("noise", [Dropout(), DropConnect(0.1)])
def test_potentials_do_not_change_and_gradients_scale(noise):
    net = network()
    studied, plain = problem(net), problem(net, None)
    V = potential(noise, studied, studied.weights(), num_draws=2000)
    reference = potential(noise, plain, plain.weights(), num_draws=2000)
    assert noise.scale_free
    assert V.value.mean == pytest.approx(
        reference.value.mean, abs=3 * (V.value.stderr + reference.value.stderr) + 1e-10
    )
    scaled = reference.gradient.mean * roots(net)
    error = torch.linalg.vector_norm(V.gradient.mean - scaled)
    assert error <= 3 * (V.gradient.stderr + reference.gradient.stderr * roots(net).max()) + 1e-10


def test_what_is_not_named_stays_where_it_is():
    net = network()
    function = FunctionalModule(net, dtype=torch.float64, step_ratios={"3.weight": 4.0})
    assert function.num_weights == 16
    torch.testing.assert_close(function.weights(), net[3].weight.detach().reshape(-1) / 2)
    x = torch.randn(4, 3).double()
    torch.testing.assert_close(function(function.weights(), x), net.eval()(x))
    with torch.no_grad():
        net[0].weight += 1
    function.refresh_constants()
    torch.testing.assert_close(function(function.weights(), x), net(x))


@pytest.mark.parametrize("ratios", [{"3.weights": 1.0}, {"3.weight": 0.0}])
def test_bad_ratios(ratios):
    with pytest.raises(ValueError, match=r"for names of trainable parameters, got .*3\.weight"):
        FunctionalModule(network(), dtype=torch.float64, step_ratios=ratios)
