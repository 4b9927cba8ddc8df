"""Whether the noise of a training can be switched off, and what training mode adds besides: modules of every kind."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from torch_singlim.measure.noise_off import compare_noise_off
from torch_singlim.measure.paths import LossGradient, Path
from torch_singlim.measure.steps import Step


class Sampled(nn.Module):
    """Random also in evaluation mode, as a variational layer may be."""

    def forward(self, x):
        return x + 0.1 * torch.randn_like(x)


class Penalised(nn.Module):
    """Its loss has a penalty in training mode: 0.3 |w|^2."""

    def __init__(self, *layers):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), *layers, nn.Linear(8, 2))

    def forward(self, x):
        return self.body(x)

    def penalty(self):
        return 0.3 * sum(p.square().sum() for p in self.parameters()) if self.training else 0.0


def loss(module, batch):
    x, y = batch
    found = F.mse_loss(module(x), y)
    return found + module.penalty() if hasattr(module, "penalty") else found


def compared(net):
    torch.manual_seed(0)
    net = net.double()
    batch = torch.randn(6, 4).double(), torch.randn(6, 2).double()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    before, random = Path(net, optimizer), torch.get_rng_state()
    path = Path(net, optimizer)
    found = compare_noise_off(path, LossGradient(loss), Step.of(net, optimizer, [batch]))
    assert torch.equal(path.weights(), before.weights())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(part.training for part in path.module.modules())
    return found, net, batch


def layers(*middle):
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), *middle, nn.Linear(8, 2))


@pytest.mark.parametrize("middle", [(), (nn.Dropout(0.2),), (nn.BatchNorm1d(8),), (nn.BatchNorm1d(8), nn.Dropout(0.2))])
def test_layers_of_torch_can_be_switched_off_and_add_nothing(middle):
    found, *_ = compared(layers(*middle))
    assert (found.deterministic, found.added) == (True, 0.0)
    assert found.random == any(isinstance(part, nn.Dropout) for part in middle)


def test_a_module_that_is_random_in_evaluation_mode_cannot():
    for middle in ((Sampled(),), (Sampled(), nn.Dropout(0.2))):
        found, *_ = compared(layers(*middle))
        assert (found.deterministic, found.added) == (False, 0.0)


def test_a_penalty_in_training_mode_is_measured():
    """0.6 |w| over the gradient's norm."""
    found, net, batch = compared(Penalised())
    net.eval()
    gradient = torch.autograd.grad(loss(net, batch), list(net.parameters()))
    w, g = (torch.cat([t.reshape(-1) for t in tensors]) for tensors in (net.parameters(), gradient))
    assert found.deterministic
    assert found.added == pytest.approx((0.6 * w.norm() / g.norm()).item())


def test_a_penalty_beside_noise_cannot_be_told_from_it():
    found, *_ = compared(Penalised(nn.Dropout(0.2)))
    assert (found.deterministic, found.added) == (True, 0.0)
