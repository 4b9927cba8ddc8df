"""The descent settings against torch.optim.SGD."""

import pytest
import torch
from torch import nn

from tests.problems import DTYPE
from torch_singlim import SGDSettings


@pytest.mark.parametrize(
    "options",
    [
        {"lr": 0.1},
        {"lr": 0.1, "momentum": 0.9},
        {"lr": 0.1, "momentum": 0.8, "dampening": 0.3},
        {"lr": 0.1, "momentum": 0.9, "nesterov": True},
    ],
)
def test_steps_are_those_of_torch_sgd(options):
    w = nn.Parameter(torch.tensor([1.0, -2.0], dtype=DTYPE))
    scale = torch.tensor([1.0, 3.0], dtype=DTYPE)
    optimizer = torch.optim.SGD([w], **options)
    sgd, ours, velocity = SGDSettings(**options), w.detach().clone(), None
    for _ in range(20):
        optimizer.zero_grad()
        (0.5 * scale * w.square()).sum().backward()
        optimizer.step()
        ours, velocity = sgd.step(ours, velocity, scale * ours)
    torch.testing.assert_close(ours, w.detach(), rtol=1e-13, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.0}, "lr must be positive"),
        ({"lr": float("nan")}, "lr must be positive"),
        ({"lr": 0.1, "momentum": 1.0}, "momentum must be in"),
        ({"lr": 0.1, "dampening": -0.1}, "dampening must be in"),
        ({"lr": 0.1, "batch_size": 0}, "batch_size must be at least 1"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        SGDSettings(**options)
