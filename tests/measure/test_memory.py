"""What a measurement takes: at most 32 vectors of the weights' size and one chunk."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PEAKS = """
import gc, json, torch
from torch import nn
from torch_singlim import (
    Dropout, SGDSettings, Snapshot, ZeroLossProblem, level_distance, linearize, measure_distance, nearest_point,
)
from torch_singlim.measure import compare_window
from torch_singlim.measure.limit import against_limit
from torch_singlim.network import saved_bytes

def status(key):
    return int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1]) * 1024

torch.set_num_threads(1)
net = nn.Sequential(nn.Linear(50, 600), nn.Tanh(), nn.Dropout(0.1), nn.Linear(600, 600), nn.Tanh(), nn.Dropout(0.1),
                    nn.Linear(600, 4))
problem = ZeroLossProblem(net, "mse", torch.randn(4, 50), torch.randn(4, 4))
w, generator = problem.weights(), torch.Generator().manual_seed(0)
chunk = 4 * saved_bytes(lambda w: problem.function(w, problem.inputs), w, problem.inputs)
noise, sgd = Dropout(), SGDSettings(lr=0.01, batch_size=2)
end = w + 1e-3
found = {"P": w.nbytes, "chunk": chunk}
distance = None

def measure(max_dense):
    global distance
    distance = measure_distance(problem, Snapshot(100, w, sgd=sgd), noise=noise, num_draws=8, max_dense=max_dense,
                                generator=generator)

def window(steps):
    window = compare_window(problem, w, end, start=100, stop=100 + steps, noise=noise, sgd=sgd, generator=generator)
    against_limit(window, distance.forecast, end - w, steps)

calls = {
    "product": lambda: linearize(problem, w).operator.normal_product(w),
    "nearest point": lambda: nearest_point(problem, w, rtol=1e-2),
    "half of the loss": lambda: level_distance(problem, w, 0.5),
    "measurement": lambda: measure(4096),
    "measurement, by products": lambda: measure(0),
    "window, unit steps": lambda: window(8),
    "window, long steps": lambda: window(210),
}
for name, call in [*calls.items(), *calls.items()]:  # the first time libraries allocate for themselves
    gc.collect()
    open("/proc/self/clear_refs", "w").write("5")  # the high-water mark begins anew
    before = status("VmRSS")
    call()
    found[name] = status("VmHWM") - before
print(json.dumps(found))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux")
def test_peak_memory_of_a_measurement():
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
        assert peak <= 32 * vector + chunk, name
    assert found["product"] > vector  # the measurement sees what is taken
