"""Seven networks, two optimizers: the drift of each training beside theory, in one table.

Each network is trained without dropout first, until its loss is small: it is then near its zero-loss set. Dropout is
switched on, and the drift is compared with paths beside the training, which make steps on the same batches: the
averaged path, descent on the effective loss, and the baseline, the same descent with the noise switched off. Nothing
but the training itself tells the monitor what is trained. --quick: two small networks, about three minutes on one core.
"""

from __future__ import annotations

import json
import logging
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from data import digits
from networks import DigitsLSTM, DigitsViT, LanguageModel, digits_cnn, digits_mlp, digits_resnet18, set_dropout
from shell import command, require
from text import CHARACTERS, next_characters
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, RandomSampler, TensorDataset
from transformer import Transformer

from torch_singlim import Model, SingularLimitMonitor

Network = Literal["mlp", "cnn", "resnet18", "vit", "lstm", "transformer", "language"]
Optimizer = Literal["sgd", "adamw"]
DROPOUT = 0.1  # of every dropout layer, after a phase without it
SMOOTHING = 0.1  # of the labels, under cross-entropy
RATE, DECAY = 5e-4, 1e-2  # of AdamW: step size and weight decay
NEAR, ASKED = 0.01, 50  # the phase without dropout ends at this share of the first loss, asked every so many steps
MEASURED = 32  # samples on which the distance to the zero-loss set is measured
OVERHEAD = 16.0  # time for measurements, as a share of that of training: half of it lasts for the paths of a window
CONTEXT = 32  # characters that the language model reads at once


# --- networks ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """One network, its data, and how it is trained.

    Args:
        make: the network.
        data: its training set.
        lr: step size of SGD.
        batch_size: samples per step.
        window: steps over which drift is measured.
    """

    make: Callable[[], nn.Module]
    data: Callable[[], TensorDataset]
    lr: float
    batch_size: int = 50
    window: int = 200


# mse on one-hot targets, cross-entropy on class labels; a ResNet-18 learns fewer images by heart in the time
labelled, few = partial(digits, 500, one_hot=False), partial(digits, 64, one_hot=False)
NETWORKS: dict[Network, Entry] = {
    "mlp": Entry(lambda: digits_mlp(256, DROPOUT), partial(digits, 500, one_hot=True), 0.2, window=300),
    "cnn": Entry(lambda: digits_cnn(DROPOUT), labelled, 0.1, window=300),
    "resnet18": Entry(lambda: digits_resnet18(DROPOUT), few, 0.05, batch_size=16, window=60),
    "vit": Entry(lambda: DigitsViT(32, 4, 2, DROPOUT), labelled, 0.1),
    "lstm": Entry(lambda: DigitsLSTM(64, DROPOUT), labelled, 0.5, window=300),
    "transformer": Entry(lambda: Transformer(32, 4, 2, DROPOUT), labelled, 0.1),
    "language": Entry(
        lambda: LanguageModel(len(CHARACTERS), CONTEXT, 64, 4, 2, DROPOUT),
        partial(next_characters, CONTEXT),
        0.3,
        batch_size=16,
    ),
}
QUICK: tuple[Network, ...] = ("mlp", "transformer")  # --quick: these, and windows of half the length
MOST = 5_000  # steps without dropout


# --- training ------------------------------------------------------------------------------------------------------


class Learner(L.LightningModule):
    """A network that is trained on one-hot targets (mse), class labels or next characters (cross-entropy).

    Args:
        net: maps inputs ``[n, ...]`` to outputs ``[n, classes]`` or ``[n, context, classes]``.
        optimizer: which one.
        lr: its step size.
    """

    def __init__(self, net: nn.Module, optimizer: Optimizer, lr: float) -> None:
        super().__init__()
        self.net, self.optimizer, self.lr = net, optimizer, lr

    def forward(self, x: Tensor) -> Tensor:
        """Outputs for inputs."""
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Mean loss of a batch."""
        x, y = batch
        f = self(x)
        if y.is_floating_point():
            return F.mse_loss(f, y)
        return F.cross_entropy(f.flatten(0, -2), y.flatten(), ignore_index=-100, label_smoothing=SMOOTHING)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD or AdamW."""
        if self.optimizer == "sgd":
            return torch.optim.SGD(self.parameters(), lr=self.lr)
        return torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=DECAY)


def excess_loss(module: Learner, data: TensorDataset) -> float:
    """Loss of all samples without dropout, minus its infimum."""
    x, y = data.tensors
    module.eval()
    with torch.no_grad():
        loss, classes = module.training_step((x, y), 0).item(), module(x[:1]).shape[-1]
    module.train()
    if y.is_floating_point():
        return loss
    smoothed = torch.full((classes,), SMOOTHING / classes)
    smoothed[0] += 1 - SMOOTHING
    return loss + torch.xlogy(smoothed, smoothed).sum().item()


class StopNear(L.Callback):
    """Ends a training near the zero-loss set: at a share of its first excess loss.

    Args:
        data: the training set.
    """

    def __init__(self, data: TensorDataset) -> None:
        self.data, self.first = data, math.nan

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, Learner)
        self.first = excess_loss(pl_module, self.data)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, Learner)
        if trainer.global_step % ASKED == 0:
            trainer.should_stop = excess_loss(pl_module, self.data) <= NEAR * self.first


class Clock(L.Callback):
    """The time at the end of each step, after what other callbacks do there."""

    def __init__(self) -> None:
        self.times: dict[int, float] = {}

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.times[trainer.global_step] = time.perf_counter()

    def per_step(self, start: int, stop: int) -> float:
        """Mean time of a step, without what happens at the first and at the last of them."""
        return (self.times[stop - 1] - self.times[start + 1]) / max(stop - start - 2, 1)


# --- result --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """The last window of one training, read from the monitor; nan: not measured.

    Args:
        network: its name.
        optimizer: its name.
        weights: their number.
        excess: loss at the end, as a share of that at the start of training.
        half: distance to half of the excess loss, on a few samples.
        cosine: of the motion with the averaged path.
        ceiling: the noise ceiling.
        speed: of the motion, relative to the averaged path.
        speed_error: its standard error.
        baseline: cosine of the motion with the baseline.
        noise: the noise-induced drift, measured over predicted.
        noise_error: its standard error.
        replay: error of a step of the training that is repeated on a copy; nan: the window was not followed.
        cost: time of a measured step over that of a plain one.
        steps: without dropout, and in a window.
        seconds: of the whole row.
        reasons: all that the monitor says.
        tags: all that it has measured at the end.
    """

    network: Network
    optimizer: Optimizer
    weights: int
    excess: float
    half: float
    cosine: float
    ceiling: float
    speed: float
    speed_error: float
    baseline: float
    noise: float
    noise_error: float
    replay: float
    cost: float
    steps: tuple[int, int]
    seconds: float = math.nan
    reasons: tuple[str, ...] = ()
    tags: Mapping[str, float] = field(default_factory=dict)

    @property
    def misses(self) -> list[str]:
        """What does not agree with theory, as sentences; none: all does."""
        if math.isnan(self.cosine):
            return ["the drift was not predicted", *self.reasons]
        missed = []
        if not self.cosine >= 0.93 * self.ceiling:
            missed.append(f"the cosine is {self.cosine / self.ceiling:.2f} of the noise ceiling")
        if not abs(self.speed - 1) <= 0.15:
            missed.append(f"the speed is {self.speed:.2f} +- {self.speed_error:.2f}")
        return missed

    @property
    def agrees(self) -> bool:
        """Whether direction and speed are those of the averaged path."""
        return not self.misses


HEAD = (
    "network", "optimizer", "weights", "steps", "excess loss", "half", "cosine", "ceiling", "speed", "baseline",
    "noise ratio", "replay error", "cost", "agrees",
)  # fmt: skip


def cells(row: Row) -> list[str]:
    """The row as it is printed."""

    def number(value: float, form: str = ".3f") -> str:
        return "-" if math.isnan(value) else f"{value:{form}}"

    return [
        row.network,
        row.optimizer,
        f"{row.weights:,}",
        f"{row.steps[0]:,} + {row.steps[1]}",
        f"{row.excess:.1e}",
        number(row.half, ".2g"),
        number(row.cosine),
        number(row.ceiling),
        number(row.speed, ".2f"),
        number(row.baseline),
        f"{number(row.noise, '.2f')} ± {number(row.noise_error, '.2f')}",
        number(row.replay, ".0e"),
        number(row.cost, ".1f"),
        "yes" if row.agrees else "; ".join(row.misses),
    ]


def aligned(values: Sequence[str]) -> str:
    """Cells in columns as wide as their heads, and the widest values."""
    widths = [11, 9, 10, 11, 11, 6, 6, 7, 5, 8, 11, 12, 4, 0]
    return "  ".join(value.ljust(width) for value, width in zip(values, widths, strict=True)).rstrip()


def notes(rows: Sequence[Row]) -> list[str]:
    """Where no distance was measured, with what the monitor says."""
    return [
        f"{row.network}, {row.optimizer}: no distance to half of the excess loss. {' '.join(row.reasons)}"
        for row in rows
        if math.isnan(row.half)
    ]


def markdown(rows: Sequence[Row]) -> str:
    """The rows as a table, and the notes below it."""
    lines = [HEAD, ["---"] * len(HEAD), *map(cells, rows)]
    return "\n".join([*(f"| {' | '.join(line)} |" for line in lines), *(f"\n{note}" for note in notes(rows))]) + "\n"


def promises(rows: Sequence[Row]) -> dict[str, bool]:
    """What is required of the whole table."""
    agree = sum(row.agrees for row in rows)
    return {f"at least 10 of {len(rows)} trainings agree ({agree} do)": agree >= 10}


def train(network: Network, optimizer: Optimizer, window: int, seed: int) -> Row:
    """Train one network near its zero-loss set, then with dropout, and compare a window that ends with the run.

    The steps with dropout before the window, one fewer than it has, give the time of a plain step.

    Args:
        network: its name.
        optimizer: its name.
        window: steps of the window.
        seed: of weights, batches and noise.
    """
    began, entry = time.perf_counter(), NETWORKS[network]
    L.seed_everything(seed, verbose=False)
    data = entry.data()
    module = Learner(entry.make(), optimizer, entry.lr if optimizer == "sgd" else RATE)

    def fit(steps: int, *callbacks: L.Callback) -> int:
        trainer = L.Trainer(
            max_steps=steps,
            accelerator="cpu",
            logger=False,
            callbacks=list(callbacks),
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
        )
        # shuffled passes over the data, one after another, as one long epoch
        sampler = RandomSampler(data, num_samples=steps * entry.batch_size)
        trainer.fit(module, DataLoader(data, entry.batch_size, sampler=sampler))
        return trainer.global_step

    # onto the zero-loss set
    near = StopNear(data)
    set_dropout(module, 0.0)
    clean = fit(MOST, near)
    # along it
    set_dropout(module, DROPOUT)
    monitor, clock = SingularLimitMonitor(window=window, num_samples=MEASURED, max_overhead=OVERHEAD), Clock()
    stop = fit(2 * window - 1, monitor, clock)

    # result
    last, point = monitor.last_window, monitor.history[stop]
    start = stop - window if last is None else last.start
    drift = last.drift.agreement if last is not None and last.drift is not None else None
    baseline = None if last is None or drift is None else last.comparisons.get(Model.BASELINE)
    noise = None if last is None or drift is None else last.noise
    return Row(
        network,
        optimizer,
        weights=sum(p.numel() for p in module.parameters()),
        excess=excess_loss(module, data) / near.first,
        half=point.get("distance/half", math.nan),
        cosine=math.nan if drift is None else drift.cosine,
        ceiling=math.nan if last is None else last.ceiling,
        speed=math.nan if drift is None else drift.speed,
        speed_error=math.nan if drift is None else drift.speed_stderr,
        baseline=math.nan if baseline is None else baseline.agreement.cosine,
        noise=math.nan if noise is None else noise.ratio.mean,
        noise_error=math.nan if noise is None else noise.ratio.stderr,
        replay=math.nan if last is None or last.replay_error is None else last.replay_error,
        cost=clock.per_step(start, stop) / clock.per_step(0, stop - window),
        steps=(clean, stop - start),
        seconds=time.perf_counter() - began,
        reasons=tuple(reason.sentence for reason in monitor.reasons),
        tags=point,
    )


def write(rows: Sequence[Row], out: Path) -> None:
    """The rows as JSON and as a Markdown table."""
    out.mkdir(parents=True, exist_ok=True)
    values = [
        {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in asdict(row).items()}
        | {"agrees": row.agrees, "misses": row.misses}
        for row in rows
    ]
    (out / "zoo.json").write_text(json.dumps(values, indent=1))
    (out / "zoo.md").write_text(markdown(rows))


def main(
    networks: list[Network] | None = None,
    optimizers: tuple[Optimizer, ...] = ("sgd", "adamw"),
    seed: int = 0,
    quick: bool = False,
    out: Path = Path("runs/zoo"),
    check: bool = True,
) -> None:
    """Train seven networks by two optimizers with dropout; compare the drift of each with theory, in one table.

    Args:
        networks: which ones; default: all, quick: an MLP and a transformer.
        optimizers: which ones.
        seed: of weights, batches and noise.
        quick: fewer networks, shorter windows.
        out: folder for the table, as zoo.json and zoo.md.
        check: fail unless at least 10 of all 14 trainings agree with theory.
    """
    # settings
    warnings.filterwarnings("ignore", message=".*does not have many workers")  # the data are in memory
    for name in ("torch_singlim", "lightning.pytorch"):  # the table says it
        logging.getLogger(name).setLevel(logging.ERROR)
    chosen: list[Network] = networks or list(QUICK if quick else NETWORKS)

    # training
    rows: list[Row] = []
    print(aligned(HEAD))
    for network in chosen:
        for optimizer in optimizers:
            rows.append(train(network, optimizer, NETWORKS[network].window // (2 if quick else 1), seed))
            print(aligned(cells(rows[-1])), flush=True)
            write(rows, out)

    # result
    print(*notes(rows), f"{sum(row.seconds for row in rows) / 60:.1f} minutes", f"table: {out / 'zoo.md'}", sep="\n")
    if check and len(rows) == 2 * len(NETWORKS):
        require(promises(rows))


if __name__ == "__main__":
    command(main)
