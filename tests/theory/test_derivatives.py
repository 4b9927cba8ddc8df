"""The guard: right derivatives pass, wrong ones are refused with the layer's name; both premises are broken on purpose."""

import pytest
import torch
from torch import nn

from tests.problems import Bend, Bent
from torch_singlim import (
    AntiCorrelated,
    DropConnect,
    Dropout,
    InputNoise,
    LabelNoise,
    Langevin,
    Minibatch,
    ZeroLossProblem,
)
from torch_singlim.theory import check_derivatives, potential
from torch_singlim.theory.derivatives import _central, _mismatch

DTYPE = torch.float64


def problem(*layers):
    return ZeroLossProblem(nn.Sequential(*layers), "mse", torch.randn(3, 6), torch.randn(3, 2))


def flat(layer):
    torch.manual_seed(0)
    return problem(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 8), layer, nn.Linear(8, 2))


RIGHT = [
    nn.GELU,
    nn.SiLU,
    nn.Tanh,
    nn.Softplus,
    nn.ReLU,
    lambda: nn.RMSNorm(8),
    lambda: nn.LayerNorm(8),
    lambda: nn.GroupNorm(2, 8),
]


@pytest.mark.parametrize("layer", RIGHT)
@pytest.mark.parametrize("noise", [Dropout(), DropConnect(0.1), LabelNoise(0.1)], ids=str)
def test_right_layers_pass(layer, noise):
    check_derivatives(flat(layer()), noise)


@pytest.mark.parametrize(
    "noise", [InputNoise(0.1), AntiCorrelated(0.1), Langevin(0.1), Minibatch(), Dropout() + LabelNoise(0.1)], ids=str
)
def test_right_noises_pass(noise):
    check_derivatives(flat(nn.GELU()), noise)


def test_cross_entropy_passes():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3))
    loss = nn.CrossEntropyLoss(label_smoothing=0.1)
    check_derivatives(ZeroLossProblem(net, loss, torch.randn(6, 6), torch.arange(6) % 3), Dropout())


def test_convolution_pooling_and_normalisation_pass():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Dropout2d(0.2),
        nn.Flatten(),
        nn.Linear(32, 2),
    ).eval()
    check_derivatives(ZeroLossProblem(net, "mse", torch.randn(3, 4, 4, 4), torch.randn(3, 2)), Dropout())


def test_a_kink_close_by_spoils_nothing():
    """|t - 3e-6| has slope -1 at zero; a deep network has such kinks everywhere."""
    difference = _central(lambda t: torch.tensor([abs(t - 3e-6)], dtype=torch.float64))
    assert _mismatch(torch.tensor([-1.0], dtype=torch.float64), difference, 1e-9) < 1e-6
    assert _mismatch(torch.tensor([-1.1], dtype=torch.float64), difference, 1e-9) > 0.05


def test_a_wrong_layer_among_in_place_ones_is_refused():
    torch.manual_seed(0)
    before = nn.Sequential(nn.Linear(6, 8), nn.SiLU(inplace=True), nn.Dropout(0.2), nn.Linear(8, 8))
    net = nn.Sequential(*before, Bent(), nn.ELU(inplace=True), nn.Linear(8, 2))
    with pytest.raises(ValueError, match="is Bent"):
        check_derivatives(ZeroLossProblem(net, "mse", torch.randn(3, 6), torch.randn(3, 2)), Dropout())


def test_a_wrong_layer_is_refused_by_name():
    with pytest.raises(ValueError, match=r"torch differentiates this network wrongly.*is Bent: replace it"):
        check_derivatives(flat(Bent()), Dropout())


def test_a_wrong_function_is_refused():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.2))
            self.last = nn.Linear(8, 2)

        def forward(self, x):
            return self.last(Bend.apply(self.net(x)))

    torch.manual_seed(0)
    with pytest.raises(ValueError, match=r"no layer by itself is responsible"):
        check_derivatives(ZeroLossProblem(Net(), "mse", torch.randn(3, 6), torch.randn(3, 2)), Dropout())


def test_a_wrong_backward_is_refused_by_name():
    class Square(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x):
            return x * x

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(inputs[0])
            ctx.save_for_forward(inputs[0])

        @staticmethod
        def backward(ctx, g):
            return 3 * ctx.saved_tensors[0] * g

        @staticmethod
        def jvp(ctx, t):
            return 3 * ctx.saved_tensors[0] * t

    class Wrong(nn.Module):
        def forward(self, x):
            return Square.apply(x)

    with pytest.raises(ValueError, match=r"is off by"):
        check_derivatives(flat(Wrong()), Minibatch())


def test_the_guard_leaves_everything_alone():
    p = flat(nn.LayerNorm(8))
    before, state = [q.clone() for q in p.function.module.parameters()], torch.get_rng_state()
    check_derivatives(p, Dropout())
    assert torch.equal(torch.get_rng_state(), state)
    for q, was in zip(p.function.module.parameters(), before, strict=True):
        assert q.dtype == torch.float32
        assert torch.equal(q, was)
        assert q.grad is None


def test_the_potential_through_a_layer_norm():
    """grad V with the layer taken apart, against differences of V from forward passes alone."""
    p = flat(nn.LayerNorm(8))
    w = p.weights()
    V = potential(Dropout(), p, w, num_draws=8)
    v = torch.linspace(-1, 1, len(w), dtype=DTYPE)

    def value(h, t=1e-3):
        """(1/2) sum_j sigma_j^2 d^2 L/d eta_j^2 by second differences, sample by sample through all at once."""
        total, (site,) = 0.0, p.sites
        for j in range(site.dimension):
            e = torch.zeros(3, site.dimension, dtype=DTYPE)
            e[:, j] = t * site.variance**0.5
            at = [p.batch_loss(w + h * v, p.inputs, p.targets, activations=k * e).item() for k in (-1, 0, 1)]
            total += 0.5 * (at[0] - 2 * at[1] + at[2]) / t**2
        return total

    assert V.value.mean == pytest.approx(value(0.0), rel=1e-4)
    assert torch.dot(V.gradient.mean, v).item() == pytest.approx((value(1e-3) - value(-1e-3)) / 2e-3, rel=1e-3)
