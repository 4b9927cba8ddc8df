"""What is free, and what a pass saves; chunks and factors that fit."""

import os
from pathlib import Path

import pytest
import torch
from torch import nn

from torch_singlim import ZeroLossProblem
from torch_singlim.geometry import worth_factoring
from torch_singlim.network import free_memory, saved_bytes

CPU = torch.device("cpu")


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="free memory is read from Linux")
def test_free_memory_heeds_the_control_group(tmp_path):
    whole = free_memory(CPU)
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < whole <= total
    (tmp_path / "memory.current").write_text("1000\n")
    (tmp_path / "memory.max").write_text("5000\n")
    assert free_memory(CPU, control_group=tmp_path) == 4000
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory(CPU, control_group=tmp_path) == pytest.approx(whole, rel=0.2)


def test_saved_activations_are_counted_once():
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    problem = ZeroLossProblem(net, "mse", torch.randn(3, 4), torch.randn(3, 2))
    # tanh and the second layer both need the activations, the first layer the inputs
    found = saved_bytes(lambda w: problem.function(w, problem.inputs), problem.weights(), problem.inputs)
    assert found == 3 * 8 * 8


def test_chunks_and_factors_follow_the_memory():
    net = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 1))
    x, y = torch.randn(400, 20), torch.randn(400, 1)
    whole = ZeroLossProblem(net, "mse", x, y)
    assert whole.batch_size == whole.num_samples
    assert worth_factoring(whole)
    small = ZeroLossProblem(net, "mse", x, y, memory=2**19)
    assert 1 < small.batch_size < small.num_samples
    assert not worth_factoring(small)
    w = whole.weights()
    torch.testing.assert_close(small.gradient(w), whole.gradient(w), rtol=1e-12, atol=1e-14)
    assert ZeroLossProblem(net, "mse", x, y, batch_size=3).batch_size == 3
