"""Drift along the zero-loss set on MNIST: an MLP or a small convolutional network, trained without noise, then with it.

Holds the drift of the last window against the theory, beside the noise ceiling and the null control. --quick runs a
smaller experiment in minutes on two cores.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from common import Loss, Noise, Plan, command, train_and_compare
from torch import nn
from torchvision.datasets import MNIST


def mlp(shape: tuple[int, ...]) -> nn.Module:
    """Pixels -> 256 -> 256 -> 10, dropout after both activations."""
    pixels = shape[0] * shape[1] * shape[2]
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(pixels, 256),
        nn.GELU(),
        nn.Dropout(),
        nn.Linear(256, 256),
        nn.GELU(),
        nn.Dropout(),
        nn.Linear(256, 10),
    )


def cnn(shape: tuple[int, ...]) -> nn.Module:
    """Three convolutions that halve the image, dropout after two of them, and a linear layer."""
    channels, height, width = shape
    return nn.Sequential(
        nn.Conv2d(channels, 16, 3, stride=2, padding=1),
        nn.GELU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.GELU(),
        nn.Dropout(),
        nn.Conv2d(32, 32, 3, stride=2, padding=1),
        nn.GELU(),
        nn.Dropout(),
        nn.Flatten(),
        nn.Linear(32 * -(-height // 8) * -(-width // 8), 10),
    )


NETWORKS = {"mlp": mlp, "cnn": cnn}
# samples and plan
FULL = {
    "mlp": (1_000, Plan(clean=4_000, steps=1_500, window=1_000, batch_size=100, lr=0.2)),
    "cnn": (1_000, Plan(clean=4_000, steps=1_500, window=1_000, batch_size=100, lr=0.1)),
}
QUICK = {
    "mlp": (200, Plan(clean=2_000, steps=1_000, window=600, batch_size=20, lr=0.2, reference=False)),
    "cnn": (100, Plan(clean=2_000, steps=1_000, window=600, batch_size=20, lr=0.1, reference=False)),
}


def main(
    data_dir: Path = Path("data"),
    download: bool = True,
    network: Literal["mlp", "cnn"] = "mlp",
    loss: Loss = "mse",
    noise: Noise = "dropout",
    level: float | None = None,
    samples: int | None = None,
    epochs: int | None = None,
    lr: float | None = None,
    quick: bool = False,
    accelerator: str = "auto",
    seed: int = 0,
    out: Path = Path("runs/mnist"),
    check: bool = True,
) -> None:
    """Train on MNIST under a noise; compare the drift with the theory.

    Args:
        data_dir: where MNIST is or will be downloaded to, or a folder of folders of images.
        download: fetch MNIST if it is not there.
        network: an MLP, or a small convolutional network.
        loss: mse on one-hot targets, or cross-entropy with label smoothing 0.1.
        noise: which one; dropout is a layer of the network, minibatch is none, the others are injected.
        level: rate of dropout or label flips, standard deviation of the others; default: one for each.
        samples: training images; default: 1,000; quick: 200, with the convolutional network 100.
        epochs: passes over them with noise; default: 1,500 steps, quick: 1,000.
        lr: step size of SGD; default: 0.2 for the MLP, 0.1 for the convolutional network.
        quick: a smaller experiment.
        accelerator: Lightning's: auto, cpu, gpu, ...
        seed: of weights, batches and noise.
        out: folder for TensorBoard's event files and the figure.
        check: fail unless the last window agrees with the theory, where the noise is strong enough to be seen.
    """
    default, plan = (QUICK if quick else FULL)[network]
    samples = samples or default
    train_and_compare(
        MNIST,
        NETWORKS[network],
        samples,
        plan.adjusted(samples, epochs, lr),
        data_dir=data_dir,
        download=download,
        loss=loss,
        noise=noise,
        level=level,
        accelerator=accelerator,
        seed=seed,
        out=out,
        check=check,
    )


if __name__ == "__main__":
    command(main)
