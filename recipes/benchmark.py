"""What the pieces cost, in units of one gradient, beside other ways to the same products.

Prints one table for each problem and writes JSON. The unit is the gradient of the loss over all samples by plain
autograd, in the same run on the same machine; times are medians. curvlinops is compared where it is installed (the
extra "bench"). Peak memory is what the driver, or Linux, counts.
"""

from __future__ import annotations

import ctypes
import gc
import json
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from data import first_images, open_images
from networks import Classifier, cnn, mlp, resnet18, set_dropout
from shell import command
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vjp
from torch.nn import functional as F
from torch.utils.data import DataLoader, RandomSampler, TensorDataset
from torchvision.datasets import MNIST

from torch_singlim import (
    Dropout,
    SGDSettings,
    SingularLimitMonitor,
    Snapshot,
    ZeroLossProblem,
    effective_flow,
    finite_window,
    level_distance,
    linearize,
    measure_distance,
    nearest_point,
    tangent_space,
)

# name, call, whether it takes so long that once is enough
Row = tuple[str, Callable[[], object], bool]
# network, shape of a sample, samples
PROBLEMS: dict[str, tuple[Callable[[tuple[int, ...]], nn.Module], tuple[int, ...], int]] = {
    "mlp": (mlp, (1, 28, 28), 1_000),
    "cnn": (cnn, (1, 28, 28), 1_000),
    "resnet18": (resnet18, (3, 32, 32), 64),
}
SGD = SGDSettings(lr=0.2, batch_size=100)
DROPOUT = 0.1
_CLEAN_STEPS = 2_000  # of training before the projections: their difficulty depends on the spectrum
_WARM_UP = 35
_REPEATS = 15
_CLEAR = Path("/proc/self/clear_refs")
_WINDOW = 80  # steps that are timed in a training; a quarter of them is replayed, which the median leaves out
_PATIENCE = 20.0  # another library's solve is given up after so many times ours


# --- how time and memory are measured ---------------------------------------------------------------------------------


def seconds(call: Callable[[], object], *, once: bool, device: torch.device) -> float:
    """Median time of a call, after a warm-up that is long enough for what is recorded in the course of it."""

    def timed() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    if once:
        return timed()
    for _ in range(_WARM_UP):
        timed()
    return statistics.median(timed() for _ in range(_REPEATS))


def memory(call: Callable[[], object], device: torch.device) -> float:
    """Memory that one call needs at most beyond what is there, in MiB; nan where that is not counted."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    if not _CLEAR.exists():
        call()
        return math.nan
    gc.collect()
    with suppress(OSError, AttributeError):  # memory that the C library keeps would count for the next call
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    _CLEAR.write_text("5")  # the high-water mark begins anew
    before = _status("VmRSS")
    call()
    return _status("VmHWM") - before


def _status(key: str) -> float:
    """A figure of the process from Linux, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 2**10


# --- what is measured -------------------------------------------------------------------------------------------------


def images(shape: tuple[int, ...], count: int, data_dir: Path | None) -> tuple[Tensor, Tensor]:
    """Images ``[n, *shape]`` and one-hot targets: MNIST from a folder, or random ones."""
    x, labels = torch.randn(count, *shape), torch.randint(10, (count,))
    if data_dir is not None and shape[0] == 1:
        x, labels = first_images(open_images(MNIST, data_dir, download=True), count, where=data_dir)
        x = (x - x.mean()) / x.std()
    return x, F.one_hot(labels, 10).float()


def train(net: nn.Module, x: Tensor, y: Tensor) -> None:
    """Bring the weights near the zero-loss set, where measurements are made."""
    optimizer = torch.optim.SGD(net.parameters(), lr=SGD.lr)
    generator = torch.Generator().manual_seed(0)
    for _ in range(_CLEAN_STEPS):
        index = torch.randint(len(x), (100,), generator=generator).to(x.device)
        optimizer.zero_grad()
        F.mse_loss(net(x[index]), y[index]).backward()
        optimizer.step()


def naive_product(net: nn.Module, x: Tensor, y: Tensor, v: dict[str, Tensor]) -> dict[str, Tensor]:
    """The Gauss-Newton product as one would write it: a tangent pass, the loss's curvature, a backward pass."""
    parameters = {name: p.detach() for name, p in net.named_parameters()}

    def outputs(p: dict[str, Tensor]) -> Tensor:
        return functional_call(net, p, (x,))

    f, Jv = jvp(outputs, (parameters,), (v,))  # type: ignore[misc]  # typed for auxiliary outputs, too
    AJv = jvp(grad(lambda f: (f - y).square().mean()), (f,), (Jv,))[1]
    return vjp(outputs, parameters)[1](AJv)[0]


def products(net: nn.Module, problem: ZeroLossProblem, x: Tensor, y: Tensor) -> Iterator[Row]:
    """Products with the Gauss-Newton matrix and the Hessian."""
    w = problem.weights()
    v = torch.randn(w.shape, generator=torch.Generator().manual_seed(0)).to(w)
    operator = linearize(problem, w).operator
    named = problem.function.unflatten(v)
    yield "Gauss-Newton product, cached linearisation", lambda: operator.normal_product(v), False
    yield "Gauss-Newton product, new linearisation", lambda: linearize(problem, w).operator.normal_product(v), False
    yield "Gauss-Newton product, jvp + vjp", lambda: naive_product(net, x, y, named), False
    yield "Hessian product", lambda: problem.hessian_product(w, v), False
    if find_spec("curvlinops") is None:
        return
    curvlinops, parameters = import_module("curvlinops"), list(net.parameters())
    for name, kind in (
        ("Gauss-Newton", curvlinops.GGNLinearOperator),
        ("Hessian", curvlinops.HessianLinearOperator),
    ):
        other = kind(net, nn.MSELoss(), parameters, [(x, y)], check_deterministic=False)
        yield f"{name} product, curvlinops", lambda other=other: other @ v, False
    # curvlinops evaluates the module itself, which may be compiled
    compiled = torch.compile(net)
    other = curvlinops.GGNLinearOperator(compiled, nn.MSELoss(), parameters, [(x, y)], check_deterministic=False)
    yield "Gauss-Newton product, curvlinops, compiled", lambda: other @ v, False


def geometry(problem: ZeroLossProblem) -> Iterator[Row]:
    """The parts of a measurement, and all of it."""
    w = problem.weights()
    snapshot, generator = Snapshot(1_000, w, sgd=SGD), torch.Generator().manual_seed(0)
    yield "tangent projection", lambda: tangent_space(problem, w).project(torch.ones_like(w)), True
    yield "distance of half the loss", lambda: level_distance(problem, w, 0.5), True
    yield "distance of a tenth of the loss", lambda: level_distance(problem, w, 0.1), True
    yield "distance of the zero-loss set", lambda: nearest_point(problem, w, rtol=2e-2, max_steps=12), True
    yield "finite_window, 1,000 steps", lambda: finite_window(problem, w, Dropout(), SGD, steps=1_000), True
    yield "measurement", lambda: measure_distance(problem, snapshot, noise=Dropout(), generator=generator), True


def other_projection(net: nn.Module, x: Tensor, y: Tensor, v: Tensor, exact: Tensor, limit: float) -> dict[str, Any]:
    """P_T v = v - z by conjugate gradients on H z = H v with curvlinops' H, stopped by the true error."""
    operator = import_module("curvlinops").GGNLinearOperator
    H = operator(net, nn.MSELoss(), list(net.parameters()), [(x, y)], check_deterministic=False)
    z, r = torch.zeros_like(v), H @ v
    direction, square, start, steps = r, torch.dot(r, r), time.perf_counter(), 0

    def error() -> float:
        return (torch.linalg.vector_norm(v - z - exact) / torch.linalg.vector_norm(exact)).item()

    while error() > 1e-3 and time.perf_counter() - start < limit:
        Hd = H @ direction
        length = square / torch.dot(direction, Hd)
        z, r = z + length * direction, r - length * Hd
        square, before = torch.dot(r, r), square
        direction = r + (square / before) * direction
        steps += 1
    return {"seconds": time.perf_counter() - start, "error": error(), "products": steps}


# --- the experiments --------------------------------------------------------------------------------------------------


def pieces(
    name: str, dtype: torch.dtype, device: torch.device, samples: int | None, data_dir: Path | None, *, deep: bool
) -> dict[str, Any]:
    """Seconds and memory of the products of one problem; deep: on trained weights, and of the geometry, too."""
    build, shape, default = PROBLEMS[name]
    torch.manual_seed(0)
    count = samples or default
    x, y = (each.to(device, dtype) for each in images(shape, count, data_dir))
    net = build(shape).to(device, dtype)
    set_dropout(net, DROPOUT)
    net.eval()
    if deep:
        train(net, x, y)
    problem = ZeroLossProblem(net, "mse", x, y, dtype=dtype)
    parameters = list(net.parameters())

    def gradient() -> object:
        return torch.autograd.grad(F.mse_loss(net(x), y), parameters)

    unit = seconds(gradient, once=False, device=device)
    rows: list[dict[str, Any]] = [{"name": "gradient", "seconds": unit, "MiB": memory(gradient, device)}]
    for row, call, once in (*products(net, problem, x, y), *(geometry(problem) if deep else [])):
        try:
            peak, duration = memory(call, device), seconds(call, once=once, device=device)
        except NotImplementedError as error:
            print(f"{name}: {row}: not possible, {error}", flush=True)
            continue
        rows.append({"name": row, "seconds": duration, "MiB": peak})
        print(f"{name}: {row}: {duration:.3g} s", flush=True)
    found: dict[str, Any] = {"N": count, "P": problem.num_weights, "rows": rows}
    if deep and dtype == torch.float64 and find_spec("curvlinops") is not None:
        w = problem.weights()
        v = torch.ones_like(w)
        ours = next(row["seconds"] for row in rows if row["name"] == "tangent projection")
        exact = tangent_space(problem, w).project(v)
        other = other_projection(net, x, y, v, exact, _PATIENCE * ours)
        found["projection"] = {"ours": ours, "curvlinops": other}
        print(f"projection: ours {ours:.3g} s, curvlinops and conjugate gradients {other}")
    print(f"\n{name}: N = {count}, P = {problem.num_weights}, {dtype}\n\n{table(rows, unit)}\n")
    return found


def table(rows: list[dict[str, Any]], unit: float) -> str:
    """A markdown table."""
    lines = ["| | seconds | gradients | MiB |", "|---|---:|---:|---:|"]
    for row in rows:
        peak = "-" if math.isnan(row["MiB"]) else f"{row['MiB']:.0f}"
        lines.append(f"| {row['name']} | {row['seconds']:.3g} | {row['seconds'] / unit:.3g} | {peak} |")
    return "\n".join(lines)


def growth(data_dir: Path | None) -> dict[str, Any]:
    """Seconds of a measurement against samples and against weights, in float64, and the exponents fitted to them."""

    def measured(samples: int, hidden: int) -> dict[str, float]:
        x, y = images((1, 28, 28), samples, data_dir)
        torch.manual_seed(0)
        layers = [nn.Linear(784, hidden), nn.GELU(), nn.Dropout(DROPOUT), nn.Linear(hidden, hidden), nn.GELU()]
        net = nn.Sequential(nn.Flatten(), *layers, nn.Dropout(DROPOUT), nn.Linear(hidden, 10))
        train(net, x, y)
        net.eval()
        problem = ZeroLossProblem(net, "mse", x, y)
        snapshot = Snapshot(1_000, problem.weights(), sgd=SGD)

        def timed(call: Callable[..., object]) -> float:
            generator = torch.Generator().manual_seed(0)
            return seconds(partial(call, generator=generator), once=True, device=torch.device("cpu"))

        measurement = partial(measure_distance, problem, snapshot, noise=Dropout())
        found = {"samples": float(samples), "weights": float(problem.num_weights), "measurement": timed(measurement)}
        problem.memory = 0  # no room for B B^T: products alone
        found["measurement, by products"] = timed(partial(measurement, max_dense=0))
        found["drift, 50 steps"] = timed(partial(effective_flow, problem, snapshot.weights, Dropout(), SGD, steps=50))
        print({name: round(value, 3) for name, value in found.items()}, flush=True)
        return found

    measured(100, 64)  # what is done once in a process
    rows = {
        "samples": [measured(samples, 256) for samples in (250, 500, 1_000, 2_000)],
        "weights": [measured(250, hidden) for hidden in (128, 256, 512, 1_024)],
    }
    exponents = {}
    for size, found in rows.items():
        for row in ("measurement", "measurement, by products", "drift, 50 steps"):
            t = torch.tensor([[each[size], each[row]] for each in found]).log()
            exponents[f"{row}, in {size}"] = (torch.cov(t.T)[0, 1] / t[:, 0].var()).item()
            print(f"{row}: seconds ~ {size}^{exponents[f'{row}, in {size}']:.2f}")
    return {"rows": rows, "exponents": exponents}


class StepTimes(L.Callback):
    """The times at which steps begin."""

    def __init__(self) -> None:
        self.began: list[float] = []

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.began.append(time.perf_counter())

    @property
    def median(self) -> float:
        """Seconds from one step to the next."""
        return statistics.median(b - a for a, b in pairwise(self.began))


def fit(problem: str, data: TensorDataset, steps: int, *callbacks: L.Callback, lr: float, batch_size: int) -> float:
    """Seconds of a training of one problem's network on data with dropout."""
    build, shape, _ = PROBLEMS[problem]
    L.seed_everything(0, verbose=False)
    net = build(shape)
    set_dropout(net, DROPOUT)
    trainer = L.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        callbacks=list(callbacks),
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    loader = DataLoader(data, batch_size, sampler=RandomSampler(data, num_samples=steps * batch_size))
    start = time.perf_counter()
    trainer.fit(Classifier(net, lr), loader)
    return time.perf_counter() - start


def window(problem: str, samples: int | None, data_dir: Path | None) -> dict[str, float]:
    """Seconds of a training step, in Lightning, without and with paths beside it: four draws, one replica.

    The ratio is what a step of all paths costs, in training steps, including the records that it needs.
    """
    _, shape, default = PROBLEMS[problem]
    batch_size = min(100, (samples or default) // 4)
    data = TensorDataset(*images(shape, batch_size, data_dir))
    train = partial(fit, problem, data, _WINDOW, lr=1e-3, batch_size=batch_size)
    without, beside = StepTimes(), StepTimes()
    train(without)
    train(beside, SingularLimitMonitor(window=_WINDOW, max_overhead=None, num_samples=1, num_draws=2))
    found = {"without": without.median, "with": beside.median}
    found["ratio"] = beside.median / without.median - 1
    print(f"{problem}, batch {batch_size}: a training step {without.median:.3g} s, with paths {beside.median:.3g} s")
    print(f"a step of all paths: {found['ratio']:.2f} training steps\n", flush=True)
    return found


def training(target: float, data_dir: Path | None) -> dict[str, float]:
    """Seconds of the same training, about `target` long, without and with a monitor of default settings."""
    data = TensorDataset(*images((1, 28, 28), 1_000, data_dir))
    train = partial(fit, "mlp", data, lr=SGD.lr, batch_size=100)
    steps = round(target * 1_000 / train(1_000))
    found = {"steps": float(steps), "without": train(steps)}
    found["with"] = train(steps, SingularLimitMonitor())
    found["ratio"] = found["with"] / found["without"]
    print(f"{steps} steps: {found['without']:.1f} s without the monitor, {found['with']:.1f} s with it")
    print(f"a step: {found['without'] / steps:.3g} s, {found['with'] / steps:.3g} s; ratio {found['ratio']:.3f}")
    return found


def main(
    problems: str = "mlp,cnn,resnet18",
    dtype: Literal["float32", "float64"] = "float32",
    data_dir: Path | None = None,
    samples: int | None = None,
    deep: bool = False,
    scaling: bool = False,
    paths: bool = False,
    overhead: float | None = None,
    device: str = "cpu",
    threads: int | None = None,
    out: Path = Path("runs/benchmark.json"),
) -> None:
    """Measure what products, projections and measurements cost.

    Args:
        problems: which, with commas in between: mlp, cnn, resnet18; empty: none.
        dtype: of weights and data.
        data_dir: folder with MNIST, for the MLP and the convolutional network; default: random images, which leave
            the products' times as they are and make the projections easier.
        samples: default: 1,000; ResNet-18: 64.
        deep: also projection, distance, a window and a whole measurement of the MLP, on trained weights.
        scaling: also whole measurements for growing samples and weights, and the exponents.
        paths: also a step of all paths beside a training: baseline, averaged paths, one replica.
        overhead: also a training of so many seconds without and with the monitor.
        device: cpu, cuda, ...
        threads: of torch.
        out: JSON file.
    """
    chosen = [name for name in problems.split(",") if name]
    if deep and "mlp" not in chosen:
        raise ValueError(f"--deep true measures the MLP: add mlp to --problems, got {problems!r}")
    warnings.filterwarnings("ignore")  # other libraries warn about torch itself
    if threads is not None:
        torch.set_num_threads(threads)
    where, kind = torch.device(device), getattr(torch, dtype)
    name = torch.cuda.get_device_name(where) if where.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, {dtype}\n")
    results: dict[str, Any] = {"device": name, "torch": torch.__version__, "dtype": dtype}
    for problem in chosen:
        results[problem] = pieces(problem, kind, where, samples, data_dir, deep=deep and problem == "mlp")
    if scaling:
        results["scaling"] = growth(data_dir)
    if paths:
        results["paths"] = {name: window(name, samples, data_dir) for name in chosen}
    if overhead is not None:
        results["overhead"] = training(overhead, data_dir)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=1))
    print(f"written: {out}")


if __name__ == "__main__":
    command(main)
