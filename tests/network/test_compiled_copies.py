"""Copies of compiled modules run the code that was compiled for the original."""

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from torch_singlim.network import compile_likewise, no_compilation


class Network(nn.Module):
    """torch before 2.9 compiles no module of its own in place, such as nn.Sequential."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 2))

    def forward(self, x):
        return self.layers(x)


def network():
    torch.manual_seed(0)
    return Network()


def in_place(module):
    module.compile(backend="aot_eager")
    return module


WAYS = {"wrapped": lambda module: torch.compile(module, backend="aot_eager"), "in place": in_place}


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("way", WAYS)
def test_nothing_is_compiled_for_a_copy(way):
    module, x = WAYS[way](network()), torch.randn(3, 5)
    torch.manual_seed(1)
    expected = module(x)
    graphs = counters["stats"]["unique_graphs"]
    assert graphs == 1
    twin = copy.deepcopy(module)
    compile_likewise(twin, module)
    with no_compilation(twin):
        torch.manual_seed(1)
        assert torch.equal(twin(x), expected)
        twin(torch.randn(7, 5))  # of another size: would be compiled anew
        twin.eval()
        twin(x)
    with no_compilation(twin, eager=True):
        torch.testing.assert_close(twin(x), network().eval()(x))
    assert counters["stats"]["unique_graphs"] == graphs
    with torch.no_grad():  # its weights are its own
        for p in twin.parameters():
            p.zero_()
    torch.manual_seed(1)
    assert torch.equal(module(x), expected)


def test_modules_that_are_not_compiled_are_left_alone():
    module = network()
    twin = copy.deepcopy(module)
    compile_likewise(twin, module)
    with no_compilation(twin), no_compilation(twin, eager=True):
        assert torch.equal(twin.eval()(torch.ones(1, 5)), module.eval()(torch.ones(1, 5)))
    assert not counters["stats"]
