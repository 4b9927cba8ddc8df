"""Drift along the zero-loss set on CIFAR-10: a convolutional network or a ResNet, both with group normalisation.

Trains without noise, then with it, and holds the drift of the last window against the theory, beside the noise ceiling
and the null control. --quick runs a smaller experiment in minutes on two cores.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import lightning as L
import torch
from common import Loss, Noise, Plan, as_dataset, command, conclude, first_images, image_bars, image_folder, train
from torch import nn
from torchvision.datasets import CIFAR10, VisionDataset
from torchvision.models.resnet import BasicBlock, ResNet


def cnn(shape: tuple[int, ...]) -> nn.Module:
    """Three convolutions that halve the image, each with GroupNorm, dropout after the last two, and a linear layer."""

    def block(fan_in: int, fan_out: int) -> list[nn.Module]:
        return [nn.Conv2d(fan_in, fan_out, 3, stride=2, padding=1), nn.GroupNorm(4, fan_out), nn.GELU()]

    channels, height, width = shape
    return nn.Sequential(
        *block(channels, 16),
        *block(16, 32),
        nn.Dropout(),
        *block(32, 32),
        nn.Dropout(),
        nn.Flatten(),
        nn.Linear(32 * -(-height // 8) * -(-width // 8), 10),
    )


def resnet(shape: tuple[int, ...]) -> nn.Module:
    """torchvision's ResNet, a block in each of four stages, GroupNorm for BatchNorm, dropout before the last layer.

    The first convolution keeps the size of the image's small details: 3 x 3, as is usual at 32 x 32 pixels.
    """
    net = ResNet(
        BasicBlock,
        [1, 1, 1, 1],
        num_classes=10,
        zero_init_residual=True,
        norm_layer=lambda width: nn.GroupNorm(8, width),
    )
    net.conv1 = nn.Conv2d(shape[0], 64, 3, stride=2, padding=1, bias=False)
    net.fc = nn.Sequential(nn.Dropout(), nn.Linear(512, 10))  # type: ignore[assignment]  # ResNet types it Linear
    return net


NETWORKS = {"cnn": cnn, "resnet": resnet}
# float32: in float64 its gradients take three times as long, and few small eigenvalues are asked for
_RESNET = Plan(clean=1_500, steps=900, window=600, batch_size=32, lr=0.05, num_draws=8, dtype=torch.float32)
# samples and plan
FULL = {
    "cnn": (256, Plan(clean=3_000, steps=900, window=600, batch_size=32, lr=0.1)),
    "resnet": (256, _RESNET),
}
QUICK = {
    "cnn": (96, Plan(clean=1_500, steps=700, window=400, batch_size=16, lr=0.1, reference=False)),
    "resnet": (16, replace(_RESNET, clean=200, steps=300, window=200, batch_size=8, reference=False)),
}


def source(data_dir: Path, *, download: bool) -> VisionDataset:
    """CIFAR-10's training set in torchvision's format, or any folder that has one folder of images for each class."""
    if any(path.is_dir() and path.name != CIFAR10.base_folder for path in data_dir.glob("*")):
        return image_folder(data_dir)
    try:
        return CIFAR10(str(data_dir), train=True, download=download)
    except RuntimeError as error:
        raise SystemExit(
            f"no CIFAR-10 in {data_dir}: {error}; pass --download true, or --data-dir with a folder that holds "
            f"{CIFAR10.base_folder} or one folder of images for each class"
        ) from error


def main(
    data_dir: Path = Path("data"),
    download: bool = True,
    network: Literal["cnn", "resnet"] = "cnn",
    loss: Loss = "mse",
    noise: Noise = "dropout",
    level: float | None = None,
    samples: int | None = None,
    epochs: int | None = None,
    lr: float | None = None,
    quick: bool = False,
    accelerator: str = "auto",
    seed: int = 0,
    out: Path = Path("runs/cifar10"),
    check: bool = True,
) -> None:
    """Train on CIFAR-10 under a noise; compare the drift with the theory.

    Args:
        data_dir: where CIFAR-10 is or will be downloaded to, or a folder of folders of images.
        download: fetch CIFAR-10 if it is not there.
        network: a small convolutional network, or a ResNet.
        loss: mse on one-hot targets, or cross-entropy with label smoothing 0.1.
        noise: which one; dropout is a layer of the network, minibatch is none, the others are injected.
        level: rate of dropout or label flips, standard deviation of the others; default: one for each.
        samples: training images; default: 256; quick: 96, with the ResNet 16.
        epochs: passes over them with noise; default: 900 steps, quick: 700, with the ResNet 300.
        lr: step size of SGD; default: 0.1, with the ResNet 0.05.
        quick: a smaller experiment.
        accelerator: Lightning's: auto, cpu, gpu, ...
        seed: of weights, batches and noise.
        out: folder for TensorBoard's event files and the figure.
        check: fail unless the last window agrees with the theory, where the noise is strong enough to be seen.
    """
    L.seed_everything(seed)
    default, plan = (QUICK if quick else FULL)[network]
    samples = samples or default
    plan = plan.adjusted(samples, epochs, lr)
    images, labels = first_images(source(data_dir, download=download), samples, where=data_dir)
    data = as_dataset(images, labels, one_hot=loss == "mse")
    net = NETWORKS[network](tuple(images.shape[1:]))
    title = f"{samples} CIFAR-10 images, {network.upper()}, {loss}, SGD {plan.lr:g}, batch {plan.batch_size}"
    monitor, shown, figure = train(
        net, data, plan, noise=noise, level=level, seed=seed, out=out, accelerator=accelerator, title=title
    )
    conclude(monitor, image_bars, shown=shown, figure=figure, logs=out, always=noise == "dropout", check=check)


if __name__ == "__main__":
    command(main)
