"""Drift along the zero-loss set on MNIST or CIFAR-10: a network trained without noise, then with it.

Trains onto the zero-loss set first. Then the noise is switched on, and the drift is compared with paths beside the
training, on the same batches: the averaged path, descent on the effective loss, and the baseline, the same descent with
the noise switched off. --quick runs a smaller experiment in minutes on two cores.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import lightning as L
from data import as_dataset, first_images, open_images
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from networks import Classifier, cnn, mlp, resnet, set_dropout
from noises import Noise, choose
from shell import command, compared_window, require
from torch import nn
from torch.utils.data import DataLoader, RandomSampler
from torchvision.datasets import CIFAR10, MNIST

from torch_singlim import InjectNoise, Model, SingularLimitMonitor, Window, drift_figure

Network = Literal["mlp", "cnn", "resnet"]
SMOOTHING = 0.1  # of the labels, under cross-entropy
REPLICAS = 2  # paths with independent noise, for the noise ceiling


@dataclass(frozen=True)
class Experiment:
    """One network on one data set: how long it is trained, and how it is measured.

    Args:
        samples: training images.
        clean: optimizer steps without noise, until the weights are near the zero-loss set.
        steps: optimizer steps with noise.
        window: steps over which drift is measured; the last window ends with the run.
        batch_size: images per step.
        lr: step size of SGD.
        num_draws: random directions for the singular limit.
        dtype: of the measurement.
    """

    samples: int
    clean: int
    steps: int
    window: int
    batch_size: int
    lr: float
    num_draws: int = 16
    dtype: Literal["float64", "float32"] = "float64"


DATA_SETS: dict[str, type[MNIST | CIFAR10]] = {"mnist": MNIST, "cifar10": CIFAR10}
# shape of an image -> network; the first of each data set is its default
NETWORKS: dict[str, dict[Network, Callable[[tuple[int, ...]], nn.Module]]] = {
    "mnist": {"mlp": mlp, "cnn": cnn},
    "cifar10": {"cnn": partial(cnn, groups=4), "resnet": resnet},
}
FULL = {
    ("mnist", "mlp"): Experiment(1_000, clean=4_000, steps=1_500, window=1_000, batch_size=100, lr=0.2),
    ("mnist", "cnn"): Experiment(1_000, clean=4_000, steps=1_500, window=1_000, batch_size=100, lr=0.1),
    ("cifar10", "cnn"): Experiment(256, clean=3_000, steps=900, window=600, batch_size=32, lr=0.1),
    # float32: in float64 its gradients take three times as long, and few small eigenvalues are asked for
    ("cifar10", "resnet"): Experiment(
        256, clean=1_500, steps=900, window=600, batch_size=32, lr=0.05, num_draws=8, dtype="float32"
    ),
}
QUICK = {
    ("mnist", "mlp"): Experiment(200, clean=2_000, steps=1_000, window=600, batch_size=20, lr=0.2),
    ("mnist", "cnn"): Experiment(100, clean=2_000, steps=1_000, window=600, batch_size=20, lr=0.1),
    ("cifar10", "cnn"): Experiment(96, clean=1_500, steps=700, window=400, batch_size=16, lr=0.1),
    ("cifar10", "resnet"): Experiment(
        16, clean=600, steps=300, window=200, batch_size=8, lr=0.05, num_draws=8, dtype="float32"
    ),
}


def promises(window: Window) -> dict[str, bool]:
    """What theory promises of a window in which the noise is visible."""
    if window.diffuses:
        assert window.spread is not None
        ratio = window.spread.measured / window.spread.predicted
        return {"length of the motion along the zero-loss set within 15 %": abs(ratio - 1) <= 0.15}
    assert window.drift is not None
    drift, baseline = window.drift.agreement, window.comparisons[Model.BASELINE].agreement
    return {
        "cosine >= 0.93 of the noise ceiling": drift.cosine >= 0.93 * window.ceiling,
        "speed within 0.85 to 1.15": 0.85 <= drift.speed <= 1.15,
        "baseline cosine at least 0.3 lower": baseline.cosine <= drift.cosine - 0.3,
    }


def main(
    dataset: Literal["mnist", "cifar10"] = "mnist",
    data_dir: Path = Path("data"),
    download: bool = True,
    network: Network | None = None,
    loss: Literal["mse", "cross_entropy"] = "mse",
    noise: Noise = "dropout",
    level: float | None = None,
    samples: int | None = None,
    epochs: int | None = None,
    lr: float | None = None,
    quick: bool = False,
    accelerator: str = "auto",
    seed: int = 0,
    out: Path | None = None,
    check: bool = True,
) -> None:
    """Train on images without noise, then under a noise; compare the drift with the theory.

    Args:
        dataset: which images.
        data_dir: where the data set is or will be downloaded to, or a folder with a folder of images for each class.
        download: fetch the data set if it is not there.
        network: MNIST: mlp (default) or cnn; CIFAR-10: cnn (default) or resnet, both with group normalisation.
        loss: mse on one-hot targets, or cross-entropy with label smoothing 0.1.
        noise: which one; dropout is a layer of the network, minibatch is none, the others are injected.
        level: rate of dropout or label flips, standard deviation of the others; default: one for each.
        samples: training images; default: 1,000 of MNIST, 256 of CIFAR-10; quick: 16 to 200.
        epochs: passes over them with noise; default: 1,500 steps on MNIST, 900 on CIFAR-10; quick: 300 to 1,000.
        lr: step size of SGD; default: 0.2 for the MLP, 0.1 for the CNNs, 0.05 for the ResNet.
        quick: a smaller experiment.
        accelerator: Lightning's: auto, cpu, gpu, ...
        seed: of weights, batches and noise.
        out: folder for TensorBoard's event files and the figure; default: runs/ and the data set's name.
        check: fail unless the last window agrees with the theory, where the effect of the noise is visible.
    """
    # settings
    warnings.filterwarnings("ignore", message=".*does not have many workers")  # the data are in memory
    networks = NETWORKS[dataset]
    network = network or next(iter(networks))
    if network not in networks:
        raise SystemExit(f"the networks for {dataset} are {' and '.join(networks)}, got --network {network}")
    if noise == "label_flips" and loss == "mse":
        raise SystemExit("label flips are for cross-entropy on class labels: pass --loss cross_entropy")
    plan = (QUICK if quick else FULL)[dataset, network]
    samples, lr = samples or plan.samples, plan.lr if lr is None else lr
    batch_size = min(plan.batch_size, samples)
    steps = plan.steps if epochs is None else epochs * -(-samples // batch_size)
    out = out or Path("runs") / dataset
    L.seed_everything(seed)

    # data
    source = open_images(DATA_SETS[dataset], data_dir, download=download)
    images, labels = first_images(source, samples, where=data_dir)
    data = as_dataset(images, labels, one_hot=loss == "mse")

    def loader(steps: int) -> DataLoader:
        # shuffled passes over the data, one after another, as one long epoch: one progress bar for a whole phase
        return DataLoader(data, batch_size, sampler=RandomSampler(data, num_samples=steps * batch_size))

    # network and noise; label flips are a smoothing themselves
    net = networks[network](tuple(images.shape[1:]))
    model = Classifier(net, lr, smoothing=0.0 if noise == "label_flips" else SMOOTHING)
    chosen = choose(noise, level)
    injection = [] if chosen.injected is None else [InjectNoise(chosen.injected, seed=seed)]
    monitor = SingularLimitMonitor(
        max_overhead=None,  # the comparison is what the recipe is for
        num_samples=samples,
        window=min(plan.window, steps),  # the last one ends with the run
        replicas=REPLICAS,
        num_draws=plan.num_draws,
        dtype=plan.dtype,
    )

    def trainer(phase: str, steps: int, *callbacks: L.Callback) -> L.Trainer:
        return L.Trainer(
            max_steps=steps,
            accelerator=accelerator,
            devices=1,
            logger=TensorBoardLogger(out, name=phase, default_hp_metric=False),
            callbacks=[*callbacks, TQDMProgressBar(refresh_rate=50)],
            enable_checkpointing=False,
            enable_model_summary=False,
            log_every_n_steps=50,
        )

    # onto the zero-loss set
    set_dropout(net, 0.0)
    trainer("clean", plan.clean).fit(model, loader(plan.clean))
    # along it
    set_dropout(net, chosen.dropout)
    noisy = trainer("noisy", steps, *injection, monitor)
    noisy.fit(model, loader(steps))

    # result
    figure = Path(noisy.log_dir or out) / "drift.png"
    name = DATA_SETS[dataset].__name__
    title = f"{samples} {name} images, {network}, {loss}, SGD {lr:g}, batch {batch_size}, {chosen}"
    drift_figure(monitor.history, monitor.last_window, title=title).savefig(figure)
    seen = monitor.visibility
    assert seen is not None
    print(f"{chosen}: {seen.words}\nfigure: {figure}\nlook:   tensorboard --logdir {out}")
    if check:
        last = compared_window(monitor)
        if seen.visible or last.diffuses or noise == "dropout":
            require(promises(last))
        else:
            print("nothing to check against the theory")


if __name__ == "__main__":
    command(main)
