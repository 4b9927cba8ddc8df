"""Digits from a configuration file, by LightningCLI: network, data, trainer and callbacks are arguments.

python recipes/cli.py fit --config recipes/configs/digits.yaml
"""

from __future__ import annotations

import warnings

import lightning as L
from data import digits
from lightning.pytorch.cli import LightningCLI
from networks import Classifier, digits_mlp
from torch.utils.data import DataLoader


class DigitsClassifier(Classifier):
    """An MLP with dropout on 64 pixels, mse on one-hot targets.

    Args:
        hidden: units of the hidden layer.
        dropout: rate.
        lr: step size of SGD.
    """

    def __init__(self, hidden: int = 256, dropout: float = 0.1, lr: float = 0.5) -> None:
        super().__init__(digits_mlp(hidden, dropout), lr)


class Digits(L.LightningDataModule):
    """The first of the 1,797 handwritten digits.

    Args:
        samples: how many.
        batch_size: per step.
    """

    def __init__(self, samples: int = 200, batch_size: int = 25) -> None:
        super().__init__()
        self.samples, self.batch_size = samples, batch_size

    def train_dataloader(self) -> DataLoader:
        """Shuffled."""
        return DataLoader(digits(self.samples, one_hot=True), batch_size=self.batch_size, shuffle=True)


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message=".*does not have many workers")  # the data are in memory
    LightningCLI(DigitsClassifier, Digits, seed_everything_default=0)
