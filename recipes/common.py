"""What the recipes share: noises by name, a classifier, images in memory, two phases of training, a verdict."""

from __future__ import annotations

import math
import re
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from inspect import signature
from pathlib import Path
from typing import Literal

import lightning as L
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, RandomSampler, TensorDataset
from torchvision.datasets import CIFAR10, MNIST, ImageFolder, VisionDataset
from torchvision.transforms.functional import pil_to_tensor

from torch_singlim import (
    AntiCorrelated,
    DropConnect,
    InjectNoise,
    InputNoise,
    LabelFlips,
    LabelNoise,
    Langevin,
    SingularLimitMonitor,
)
from torch_singlim.measure.distance import WindowObservation
from torch_singlim.report import drift_figure
from torch_singlim.theory import NoiseSystem

Noise = Literal[
    "dropout",
    "drop_connect",
    "anti_correlated",
    "input_noise",
    "label_noise",
    "label_flips",
    "langevin",
    "minibatch",
]
Loss = Literal["mse", "cross_entropy"]
# what is injected, and its default level: a rate for dropout and flips, else a standard deviation
INJECTED: dict[str, tuple[Callable[[float], NoiseSystem], float]] = {
    "drop_connect": (DropConnect, 0.2),
    "anti_correlated": (AntiCorrelated, 0.02),
    "input_noise": (InputNoise, 0.3),
    "label_noise": (LabelNoise, 0.5),
    "label_flips": (LabelFlips, 0.2),
    "langevin": (Langevin, 0.002),
}
DROPOUT_RATE = 0.1
SMOOTHING = 0.1
VISIBLE = 0.25  # the noise is seen where its pull is known to a quarter of what is predicted
FLOW_ERROR = 0.02  # of the flow, relative: what minibatches alone add to the motion, see digits.py --noise minibatch


class Classifier(L.LightningModule):
    """A network with outputs ``[n, 10]``, plain SGD.

    Mean squared error on one-hot targets; on class labels cross-entropy, smoothed unless label flips do it.
    """

    def __init__(self, net: nn.Module, lr: float, smoothing: float = 0.0) -> None:
        super().__init__()
        self.net, self.lr, self.smoothing = net, lr, smoothing

    def forward(self, x: Tensor) -> Tensor:
        """Outputs ``[n, 10]`` for images ``[n, ...]``."""
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Mean loss of a batch."""
        x, y = batch
        f = self(x)
        loss = F.mse_loss(f, y) if y.is_floating_point() else F.cross_entropy(f, y, label_smoothing=self.smoothing)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain SGD."""
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def command(main: Callable[..., None]) -> None:
    """Run a recipe from the shell: an option for each argument of its main, with - or _; --quick is a flag."""
    parser = ArgumentParser(description=(main.__doc__ or "").splitlines()[0])
    parser.add_function_arguments(main, as_group=False, skip={"quick"})
    if "quick" in signature(main).parameters:
        parser.add_argument("--quick", action="store_true", help="a smaller experiment, minutes on two cores")
    options = [re.sub(r"^--[^=]+", lambda name: "--" + name[0][2:].replace("-", "_"), arg) for arg in sys.argv[1:]]
    main(**parser.instantiate_classes(parser.parse_args(options)))


def as_dataset(images: Tensor, labels: Tensor, *, one_hot: bool) -> TensorDataset:
    """Images, standardised over all pixels, with their labels or one-hot targets."""
    images = (images - images.mean()) / images.std()
    return TensorDataset(images, F.one_hot(labels, 10).float() if one_hot else labels)


def open_images(known: type[MNIST | CIFAR10], where: Path, *, download: bool) -> VisionDataset:
    """A training set that torchvision knows, in its format, or any folder that has one folder of images for each class.

    Args:
        known: torchvision's class.
        where: the folder; one that has other folders than the data set's own is taken as a folder of images.
        download: fetch it if it is not there.
    """
    own = "MNIST" if known is MNIST else CIFAR10.base_folder
    if any(path.is_dir() and path.name != own for path in where.glob("*")):
        try:
            return ImageFolder(str(where))
        except FileNotFoundError as error:
            raise SystemExit(f"no images in {where}, or in one of its folders: {error}") from error
    try:
        return known(str(where), train=True, download=download)
    except RuntimeError as error:
        raise SystemExit(
            f"no {known.__name__} in {where}: {error}; pass --download true, or --data-dir with a folder that holds "
            f"{own} or one folder of images for each class"
        ) from error


def first_images(dataset: VisionDataset, samples: int, *, where: Path) -> tuple[Tensor, Tensor]:
    """The first images of a data set ``[n, channels, height, width]`` and their labels ``[n]``, read into memory.

    Of a folder, which is sorted by class: the first in an order that is shuffled once and for all.

    Args:
        dataset: gives PIL images and labels.
        samples: how many.
        where: the folder, named in errors.
    """
    size = len(dataset)
    if size < samples:
        raise SystemExit(f"{where} has {size} images, {samples} were asked for: pass --samples {size} or fewer")
    order = torch.arange(size)
    if isinstance(dataset, ImageFolder):
        order = torch.randperm(size, generator=torch.Generator().manual_seed(0))
    images, labels = [], []
    for i in order[:samples].tolist():
        try:
            image, label = dataset[i]
        except OSError as error:
            name = getattr(dataset, "samples", {i: (f"image {i}",)})[i][0]
            raise SystemExit(f"{name} cannot be read as an image: {error}; remove it or replace it") from error
        images.append(pil_to_tensor(image).float())
        labels.append(label)
    shapes = {tuple(image.shape) for image in images}
    if len(shapes) > 1:
        raise SystemExit(f"the images in {where} have different shapes, {sorted(shapes)}: resize them to one")
    if max(labels) > 9:
        raise SystemExit(f"the networks here have 10 outputs, {where} has {max(labels) + 1} classes: use 10 folders")
    return torch.stack(images), torch.tensor(labels)


@dataclass(frozen=True)
class Plan:
    """How long to train, and what to watch.

    Args:
        clean: optimizer steps without noise, until the weights are near the zero-loss set.
        steps: optimizer steps with noise.
        window: steps over which drift is measured; the last window ends with the run.
        batch_size: images per step.
        lr: step size of SGD.
        replicas: independent copies of each window for the noise ceiling.
        num_draws: random directions for the singular limit.
        reference: follow the effective flow step by step, too.
        dtype: of the probe.
    """

    clean: int
    steps: int
    window: int
    batch_size: int
    lr: float
    replicas: int = 2
    num_draws: int = 16
    reference: bool = True
    dtype: Literal["float64", "float32"] = "float64"

    def adjusted(self, samples: int, epochs: int | None, lr: float | None) -> Plan:
        """The same with so many passes with noise over the samples, and another step size, where they are given."""
        batch_size = min(self.batch_size, samples)
        steps = self.steps if epochs is None else epochs * -(-samples // batch_size)
        window = min(self.window, steps)
        return replace(self, batch_size=batch_size, steps=steps, window=window, lr=self.lr if lr is None else lr)


def set_dropout(net: nn.Module, rate: float) -> None:
    """Give every dropout layer this rate."""
    for module in net.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = rate


def set_up(noise: Noise, level: float | None, seed: int) -> tuple[float, str, list[L.Callback]]:
    """Rate of the dropout layers, the noise in words, and the callbacks that inject what is no layer."""
    if noise in INJECTED:
        system, default = INJECTED[noise]
        injected = system(default if level is None else level)
        return 0.0, str(injected), [InjectNoise(injected, seed=seed)]
    rate = (DROPOUT_RATE if level is None else level) if noise == "dropout" else 0.0
    return rate, (f"dropout {rate:g}" if rate else "minibatches alone"), []


def what_was_seen(monitor: SingularLimitMonitor) -> tuple[bool, str]:
    """Whether the noise's own pull stood out in the last window, and that in words, with the slow clock."""
    window, observation = monitor.last_window, monitor.last_observation
    if window is None or observation is None:
        return False, "no window was completed"
    limit = observation.limit
    if not observation.moves:
        return False, "no motion along the zero-loss set on either clock, what moves is the approach"
    clock = "too large for the singular limit"
    if limit is not None:
        percent = 0.01 * (observation.weights.norm() / limit.drift.norm()).item()
        clock = f"order {limit.order}, the singular limit moves the weights by 1 % in {percent:.2g} steps"
    if window.spread is not None:
        return True, f"{clock}, but diffusion hides that: only the length of the motion can be predicted"
    pull, share, length = window.pull, window.pull_share, window.stop - window.start
    assert pull is not None  # every noise here has a flow, or diffuses
    error = math.hypot(pull.stderr, FLOW_ERROR / share)
    if error <= VISIBLE:
        return True, f"{clock}; its pull, {share:.0%} of the motion, is {pull.mean:.2f} +- {error:.2f} of the predicted"
    needed = length * max((pull.stderr / VISIBLE) ** 2, FLOW_ERROR / (share * VISIBLE))
    return False, (
        f"{clock}. Too weak to see in windows of {length} steps: its pull is {share:.2%} of the predicted motion; it "
        f"would take windows of about {needed:.2g} steps"
    )


def conclude(
    monitor: SingularLimitMonitor,
    bars: Callable[[WindowObservation], dict[str, bool]],
    *,
    shown: str,
    figure: Path,
    logs: Path,
    always: bool,
    check: bool,
) -> None:
    """Say what was seen and where to look; fail where theory and training part.

    Args:
        monitor: after training.
        bars: what theory promises of the last window, in words.
        shown: the noise, in words.
        figure: where it was written.
        logs: TensorBoard's folder.
        always: check even a noise whose pull does not stand out.
        check: whether to fail.
    """
    seen, words = what_was_seen(monitor)
    print(f"{shown}: {words}\nfigure: {figure}\nlook:   tensorboard --logdir {logs}")
    if not check:
        return
    last = monitor.last_window
    if last is None:
        raise SystemExit(
            f"no window of {monitor.window} steps was completed: make it shorter, or train longer; what else may have "
            f"been in the way: {'; '.join(monitor.not_covered) or 'nothing that was noticed'}"
        )
    if not seen and not always:
        print("nothing to check against the theory")
        return
    promised = bars(last)
    missed = [bar for bar, held in promised.items() if not held]
    if missed:
        raise SystemExit(f"the drift does not agree with the theory in the last window: {'; '.join(missed)} missed")
    print("agreement: " + ", ".join(promised))


def image_bars(window: WindowObservation) -> dict[str, bool]:
    """What the image recipes promise of a noise that is seen."""
    if window.spread is not None:
        ratio = window.spread.measured / window.spread.predicted
        return {"length of the motion along the zero-loss set within 15 %": abs(ratio - 1) <= 0.15}
    assert window.drift is not None
    return {
        "cosine >= 0.93 of the noise ceiling": window.drift.cosine >= 0.93 * window.ceiling,
        "speed ratio within 0.85 to 1.15": 0.85 <= window.drift.speed_ratio <= 1.15,
        "null cosine at least 0.3 lower": window.null.cosine <= window.drift.cosine - 0.3,
    }


def train_and_compare(
    known: type[MNIST | CIFAR10],
    network: Callable[[tuple[int, ...]], nn.Module],
    samples: int,
    plan: Plan,
    *,
    data_dir: Path,
    download: bool,
    loss: Loss,
    noise: Noise,
    level: float | None,
    accelerator: str,
    seed: int,
    out: Path,
    check: bool,
) -> None:
    """An image recipe: train on the first images without noise, then with it under the monitor; conclude.

    Args:
        known: torchvision's class of the data set.
        network: shape of an image -> the network, with a dropout layer where it has one.
        samples: training images.
        plan: how long to train.
        data_dir: and the others: see the recipes.
    """
    warnings.filterwarnings("ignore", message=".*does not have many workers")  # the data lies in memory
    if noise == "label_flips" and loss == "mse":
        raise SystemExit("label flips are for cross-entropy on class labels: pass --loss cross_entropy")
    L.seed_everything(seed)
    images, labels = first_images(open_images(known, data_dir, download=download), samples, where=data_dir)
    data = as_dataset(images, labels, one_hot=loss == "mse")
    net = network(tuple(images.shape[1:]))
    model = Classifier(net, plan.lr, smoothing=0.0 if noise == "label_flips" else SMOOTHING)

    def fit(steps: int, folder: str, callbacks: list[L.Callback]) -> L.Trainer:
        # shuffled passes over the data, one after another, as one long epoch: one progress bar for the whole phase
        sampler = RandomSampler(data, num_samples=steps * plan.batch_size)
        trainer = L.Trainer(
            max_steps=steps,
            accelerator=accelerator,
            devices=1,
            logger=TensorBoardLogger(out, name=folder, default_hp_metric=False),
            callbacks=[*callbacks, TQDMProgressBar(refresh_rate=50)],
            enable_checkpointing=False,
            enable_model_summary=False,
            log_every_n_steps=50,
        )
        trainer.fit(model, DataLoader(data, batch_size=plan.batch_size, sampler=sampler))
        return trainer

    set_dropout(net, 0.0)
    if plan.clean:
        fit(plan.clean, "clean", [])
    rate, shown, callbacks = set_up(noise, level, seed)
    set_dropout(net, rate)
    monitor = SingularLimitMonitor(
        max_overhead=None,  # the comparison is what the recipe is for
        num_samples=len(data),
        window=plan.window,  # the last one ends with the run
        replicas=plan.replicas,
        reference=plan.reference,
        num_draws=plan.num_draws,
        dtype=plan.dtype,
    )
    trainer = fit(plan.steps, "noisy", [*callbacks, monitor])
    figure = Path(trainer.log_dir or out) / "drift.png"
    figure.parent.mkdir(parents=True, exist_ok=True)
    title = f"{samples} {known.__name__} images, {network.__name__}, {loss}, SGD {plan.lr:g}, batch {plan.batch_size}"
    drift_figure(monitor.history, monitor.last_window, title=f"{title}, {shown}").savefig(figure)
    conclude(monitor, image_bars, shown=shown, figure=figure, logs=out, always=noise == "dropout", check=check)
