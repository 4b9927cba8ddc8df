"""The networks of the recipes, and the LightningModule that trains them."""

from __future__ import annotations

from collections.abc import Callable

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock, ResNet


def digits_mlp(hidden: int, dropout: float, activation: Callable[[], nn.Module] = nn.GELU) -> nn.Module:
    """64 pixels -> hidden units with dropout -> 10 outputs."""
    return nn.Sequential(nn.Linear(64, hidden), activation(), nn.Dropout(dropout), nn.Linear(hidden, 10))


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


def cnn(shape: tuple[int, ...], *, groups: int = 0) -> nn.Module:
    """Three convolutions that halve the image, dropout after the last two, and a linear layer.

    Args:
        shape: of an image.
        groups: of the GroupNorm after each convolution; 0: no normalisation.
    """

    def block(fan_in: int, fan_out: int) -> list[nn.Module]:
        norm = [nn.GroupNorm(groups, fan_out)] if groups else []
        return [nn.Conv2d(fan_in, fan_out, 3, stride=2, padding=1), *norm, nn.GELU()]

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

    Its first convolution is 3 x 3, as is usual for 32 x 32 pixels.
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


def resnet18(shape: tuple[int, ...]) -> nn.Module:
    """torchvision's ResNet-18 with GroupNorm."""
    return ResNet(BasicBlock, [2, 2, 2, 2], num_classes=10, norm_layer=lambda width: nn.GroupNorm(8, width))


def set_dropout(net: nn.Module, rate: float) -> None:
    """Give every dropout layer this rate."""
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = rate


class Classifier(L.LightningModule):
    """A network with ten outputs, trained by plain SGD: mse on one-hot targets, cross-entropy on class labels.

    Args:
        net: maps images ``[n, ...]`` to outputs ``[n, 10]``.
        lr: step size.
        smoothing: of the labels under cross-entropy.
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
