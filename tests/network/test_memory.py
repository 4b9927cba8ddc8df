"""What is free, what a pass saves, and what a probe takes: at most 20 vectors of the weights' size and one chunk."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from torch_singlim import ZeroLossProblem, memory
from torch_singlim.geometry.gram import worth_factoring
from torch_singlim.network.memory import free_memory, saved_bytes

CPU = torch.device("cpu")
linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux")


@linux
def test_free_memory_heeds_the_control_group(tmp_path, monkeypatch):
    whole = free_memory(CPU)
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < whole <= total
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    (tmp_path / "memory.current").write_text("1000\n")
    (tmp_path / "memory.max").write_text("5000\n")
    assert free_memory(CPU) == 4000
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory(CPU) == pytest.approx(whole, rel=0.2)


def test_saved_activations_are_counted_once():
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    problem = ZeroLossProblem(net, "mse", torch.randn(3, 4), torch.randn(3, 2))
    # tanh and the second layer both need the activations, the first layer the inputs
    found = saved_bytes(lambda w: problem.function(w, problem.inputs), problem.weights(), problem.inputs)
    assert found == 3 * 8 * 8


def test_chunks_and_factors_follow_the_memory_that_is_free(monkeypatch):
    net = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 1))
    x, y = torch.randn(400, 20), torch.randn(400, 1)
    whole = ZeroLossProblem(net, "mse", x, y)
    assert whole.batch_size == whole.num_samples
    assert worth_factoring(whole)
    monkeypatch.setattr("torch_singlim.network.problem.free_memory", lambda device: 2**20)
    small = ZeroLossProblem(net, "mse", x, y)
    assert 1 < small.batch_size < small.num_samples
    assert not worth_factoring(small)
    w = whole.weights()
    torch.testing.assert_close(small.gradient(w), whole.gradient(w), rtol=1e-12, atol=1e-14)
    assert ZeroLossProblem(net, "mse", x, y, batch_size=3).batch_size == 3


PEAKS = """
import gc, json, torch
from torch import nn
from torch_singlim import Dropout, SGDSettings, ZeroLossProblem, nearest_point
from torch_singlim.network.memory import saved_bytes
from torch_singlim.measure.distance import observe, observe_window

def status(key):
    return int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1]) * 1024

torch.set_num_threads(1)
net = nn.Sequential(nn.Linear(50, 600), nn.Tanh(), nn.Dropout(0.1), nn.Linear(600, 600), nn.Tanh(), nn.Dropout(0.1),
                    nn.Linear(600, 4))
problem = ZeroLossProblem(net, "mse", torch.randn(4, 50), torch.randn(4, 4))
w, generator = problem.weights(), torch.Generator().manual_seed(0)
chunk = 4 * saved_bytes(lambda w: problem.function(w, problem.inputs), w, problem.inputs)
noise, sgd = Dropout(), SGDSettings(lr=0.01, batch_size=2)
end, between = w + 1e-3, {125: w + 2e-4, 150: w + 5e-4, 175: w + 7e-4}
found = {"P": w.nbytes, "chunk": chunk}
observation = None

def look(max_dense):
    global observation
    observation = observe(problem, w, step=100, noise=noise, sgd=sgd, num_draws=8, max_dense=max_dense,
                          generator=generator)

def window(steps):
    marks = {100 + round((step - 100) * steps / 100): v for step, v in between.items()}
    observe_window(problem, w, end, start=100, stop=100 + steps, noise=noise, sgd=sgd, forecast=observation.forecast,
                   between=marks, generator=generator)

calls = {
    "product": lambda: problem.linearize(w).operator.normal_product(w),
    "nearest point": lambda: nearest_point(problem, w, rtol=1e-2),
    "probe": lambda: look(4096),
    "probe, by products": lambda: look(0),
    "window, every step": lambda: window(8),
    "window, long steps": lambda: window(400),
}
for name, call in [*calls.items(), *calls.items()]:  # the first time libraries allocate for themselves
    gc.collect()
    open("/proc/self/clear_refs", "w").write("5")  # the high-water mark begins anew
    before = status("VmRSS")
    call()
    found[name] = status("VmHWM") - before
print(json.dumps(found))
"""


@linux
def test_peak_memory_of_a_probe():
    # the allocator gives large blocks back at once, so that resident memory is what is in use
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PEAKS], capture_output=True, text=True, env=environment, check=False
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    vector, chunk = found.pop("P"), found.pop("chunk")
    assert vector == pytest.approx(8 * 393_604)
    for name, peak in found.items():
        print(f"{name}: {peak / vector:.1f} P")
        assert peak <= 20 * vector + chunk, name
    assert found["product"] > vector  # the measurement sees what is taken
