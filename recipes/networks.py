"""The networks of the recipes, and the LightningModule that trains them."""

from __future__ import annotations

from collections.abc import Callable

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import VisionTransformer
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


def digits_cnn(dropout: float) -> nn.Module:
    """Three convolutions with batch normalisation, two of which halve the image, dropout, and a linear layer."""

    def block(fan_in: int, fan_out: int, stride: int) -> list[nn.Module]:
        convolution = nn.Conv2d(fan_in, fan_out, 3, stride=stride, padding=1, bias=False)
        return [convolution, nn.BatchNorm2d(fan_out), nn.GELU()]

    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        *block(1, 16, 1),
        *block(16, 32, 2),
        *block(32, 32, 2),
        nn.Flatten(),
        nn.Dropout(dropout),
        nn.Linear(128, 10),
    )


def digits_resnet18(dropout: float) -> nn.Module:
    """torchvision's ResNet-18 for 8 x 8 pixels: GroupNorm, a 3 x 3 stem, no pooling, dropout before the last layer."""
    net = resnet18((1, 8, 8))
    net.conv1, net.maxpool = nn.Conv2d(1, 64, 3, padding=1, bias=False), nn.Identity()
    net.fc = nn.Sequential(nn.Dropout(dropout), nn.Linear(512, 10))
    return nn.Sequential(nn.Unflatten(1, (1, 8, 8)), net)


def set_dropout(net: nn.Module, rate: float) -> None:
    """Give every dropout layer this rate, those within attention and between recurrent layers too."""
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = rate
        elif isinstance(module, nn.MultiheadAttention | nn.RNNBase):
            module.dropout = rate


class DigitsViT(nn.Module):
    """torchvision's vision transformer on the digits, in patches of 2 x 2 pixels.

    Args:
        width: of a token.
        heads: of each attention.
        layers: of the encoder.
        dropout: rate, of attention weights and of the outputs of layers.
    """

    def __init__(self, width: int, heads: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.net = VisionTransformer(
            image_size=8,
            patch_size=2,
            num_layers=layers,
            num_heads=heads,
            hidden_dim=width,
            mlp_dim=2 * width,
            dropout=dropout,
            attention_dropout=dropout,
            num_classes=10,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Images ``[n, 64]`` -> outputs ``[n, 10]``."""
        return self.net(x.view(-1, 1, 8, 8).expand(-1, 3, -1, -1))  # it takes three colours


class DigitsLSTM(nn.Module):
    """Rows of an image, one after another -> two layers of LSTM -> dropout -> 10 outputs.

    Args:
        width: of the states.
        dropout: rate, between the layers and before the outputs.
    """

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, width, num_layers=2, dropout=dropout, batch_first=True)
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(width, 10))

    def forward(self, x: Tensor) -> Tensor:
        """Images ``[n, 64]`` -> outputs ``[n, 10]``."""
        states, _ = self.lstm(x.view(-1, 8, 8))  # [n, rows, width]
        return self.head(states[:, -1])


def encoder(width: int, heads: int, layers: int, dropout: float) -> nn.TransformerEncoder:
    """torch's encoder, with layer normalisation first and two times as many hidden units as a token has."""
    layer = nn.TransformerEncoderLayer(
        width, heads, 2 * width, dropout, activation=F.gelu, batch_first=True, norm_first=True
    )
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)


class LanguageModel(nn.Module):
    """Characters -> encoder layers in which each one attends to those before it -> scores of the next character.

    Args:
        vocabulary: number of characters.
        context: number of characters that are read at once.
        width: of a token.
        heads: of each attention.
        layers: of the encoder, with layer normalisation first.
        dropout: rate, of attention weights and of the outputs of layers.
    """

    def __init__(self, vocabulary: int, context: int, width: int, heads: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(0.02 * torch.randn(context, width))
        self.dropout = nn.Dropout(dropout)
        self.encoder = encoder(width, heads, layers, dropout)
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, vocabulary))
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(context), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Characters ``[n, context]`` -> scores ``[n, context, vocabulary]``."""
        tokens = self.dropout(self.embedding(x) + self.position)
        return self.head(self.encoder(tokens, mask=self.mask, is_causal=True))


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
