"""The fake device is another device, with random states of its own; and its random state is isolated as the CPU's is."""

import random

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.device.fake_device import random_numbers_of_the_cpu
from tests.device.training import on_device
from tests.zoo import Net, Trace, assert_identical, fit, monitor_of, seeded
from torch_singlim.callbacks.isolation import isolated
from torch_singlim.measure import Budget
from torch_singlim.network import FunctionalModule, RandomState


def test_tensors_of_different_devices_are_refused(device):
    x, y = torch.ones(3, device=device), torch.ones(3)
    for mixed in (
        lambda: x + y,
        lambda: torch.cat([x, y]),
        lambda: x @ y,
        lambda: x + y.to("fake:1"),
        lambda: x.dot(y),
    ):
        with pytest.raises(RuntimeError, match="on the same device"):
            mixed()
    # as on CUDA: scalars and indices may be the CPU's
    assert (x + torch.tensor(1.0)).tolist() == [2, 2, 2]
    assert x[torch.tensor([0, 2])].device == device


DRAWS = {
    "normal": lambda device, **own: torch.randn(50, device=device, **own),
    "uniform": lambda device, **own: torch.rand(50, device=device, **own),
    "integers": lambda device, **own: torch.randint(9, (50,), device=device, **own),
    "an order": lambda device, **own: torch.randperm(50, device=device, **own),
    "exponential": lambda device, **own: torch.empty(50, device=device).exponential_(**own),
    "bernoulli": lambda device, **own: torch.empty(50, device=device).bernoulli_(0.3, **own),
    "bernoulli, a rate each": lambda device, **own: torch.full((50,), 0.3, device=device).bernoulli(**own),
    "samples": lambda device, **own: torch.multinomial(torch.ones(50, device=device), 9, **own),
    "dropout": lambda device: F.dropout(torch.ones(50, device=device), 0.3),
    "dropout of channels": lambda device: F.dropout2d(torch.ones(1, 50, 1, 1, device=device), 0.3),
}


@pytest.mark.parametrize("name", DRAWS)
def test_random_numbers_are_the_cpus_for_the_same_seed_from_another_state(name, device):
    draw = DRAWS[name]
    torch.manual_seed(3)
    states = torch.get_rng_state(), torch.fake.get_rng_state(device), torch.fake.get_rng_state("fake:1")
    there = draw(device)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert not torch.equal(torch.fake.get_rng_state(device), states[1])
    assert torch.equal(torch.fake.get_rng_state("fake:1"), states[2])

    moved = torch.fake.get_rng_state(device)
    here = draw("cpu")
    assert torch.equal(torch.fake.get_rng_state(device), moved)
    assert torch.equal(here, there.cpu())
    torch.fake.set_rng_state(states[1], device)
    assert torch.equal(draw(device), there)
    if "dropout" not in name:
        assert torch.equal(draw(device, generator=torch.Generator(device).manual_seed(3)), there)
        with pytest.raises(RuntimeError, match="generator of this device, got one of cpu"):
            draw(device, generator=torch.Generator())


def test_the_device_can_draw_from_the_cpus_state(device):
    torch.manual_seed(3)
    expected = torch.randn(2), torch.randn(2)
    torch.manual_seed(3)
    with random_numbers_of_the_cpu():
        assert torch.equal(torch.randn(2, device=device).cpu(), expected[0])
        assert torch.equal(torch.randn(2), expected[1])


# --- isolation -----------------------------------------------------------------------------------------------------


def states():
    return [torch.get_rng_state(), torch.fake.get_rng_state("fake:0"), torch.fake.get_rng_state("fake:1")]


def draw_on_all():
    for each in ("cpu", "fake:0", "fake:1"):
        torch.rand(2, device=each)


@pytest.mark.parametrize("block", [RandomState.isolated, lambda: isolated(Budget(None), "fake")])
def test_the_state_of_every_device_is_isolated_even_by_an_exception(block):
    torch.manual_seed(0)
    random.seed(0)
    before, python = states(), random.getstate()

    def fail():
        with block():
            draw_on_all()
            random.random()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert all(map(torch.equal, states(), before))
    assert random.getstate() == python


def test_a_device_that_is_not_in_use_is_not_asked(monkeypatch):
    """It would be initialised: that takes memory, and no process could be forked any more."""
    monkeypatch.setattr(torch.fake, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.fake, "get_rng_state", lambda device: pytest.fail("the device was initialised"))
    with RandomState.isolated():
        torch.rand(2)
    assert RandomState.now().devices == {}


class Drawing(nn.Module):
    """Random in evaluation mode."""

    def forward(self, x):
        return x + torch.rand_like(x)


def test_passes_that_look_for_randomness_leave_the_state(device):
    net = nn.Sequential(nn.Linear(2, 2), Drawing()).to(device)
    before = states()
    found = FunctionalModule(net, dtype=torch.float64)
    assert found.is_random(torch.ones(1, 2, device=device).double())
    assert all(map(torch.equal, states(), before))


class LabelsWithNoise(Net):
    """Draws on its device in every step, beside dropout."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        f = self(x)
        return F.mse_loss(f, F.one_hot(y, 3) + 0.1 * torch.randn_like(f))


@pytest.mark.filterwarnings("ignore::UserWarning")  # Lightning's own, about trainings this small
def test_a_monitor_changes_no_random_number_of_a_training_on_the_device():
    traces = [Trace(), Trace()]
    fit(seeded(LabelsWithNoise), monitor_of(loss="mse"), traces[0], **on_device({"max_steps": 12}))
    fit(seeded(LabelsWithNoise), traces[1], **on_device({"max_steps": 12}))
    assert_identical(*traces)
