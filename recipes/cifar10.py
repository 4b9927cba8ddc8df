"""Drift along the zero-loss set on CIFAR-10: a convolutional network or a ResNet, both with group normalisation.

Trains without noise, then with it, and holds the drift of the last window against the theory, beside the noise ceiling
and the null control. --quick runs a smaller experiment in minutes on two cores.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

from common import Loss, Noise, Plan, command, train_and_compare
from torch import nn
from torchvision.datasets import CIFAR10
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
_RESNET = Plan(clean=1_500, steps=900, window=600, batch_size=32, lr=0.05, num_draws=8, dtype="float32")
# samples and plan
FULL = {
    "cnn": (256, Plan(clean=3_000, steps=900, window=600, batch_size=32, lr=0.1)),
    "resnet": (256, _RESNET),
}
QUICK = {
    "cnn": (96, Plan(clean=1_500, steps=700, window=400, batch_size=16, lr=0.1, reference=False)),
    "resnet": (16, replace(_RESNET, clean=600, steps=300, window=200, batch_size=8, reference=False)),
}


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
    default, plan = (QUICK if quick else FULL)[network]
    samples = samples or default
    train_and_compare(
        CIFAR10,
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
