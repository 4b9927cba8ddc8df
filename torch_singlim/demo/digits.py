"""The demonstration: one callback in the Trainer of a small network, trained as anyone would."""

from __future__ import annotations

import warnings
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from torch_singlim.callbacks import SingularLimitMonitor
from torch_singlim.demo.data import handwritten_digits
from torch_singlim.report import drift_figure

__all__ = ["train"]

_SAMPLES, _BATCH, _HIDDEN = 200, 25, 256


class _Classifier(L.LightningModule):
    """64 pixels -> 256 hidden units with dropout -> 10 outputs, mse on one-hot targets, SGD."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, _HIDDEN), nn.GELU(), nn.Dropout(0.1), nn.Linear(_HIDDEN, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return F.mse_loss(self(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.5)


def train(out: Path, *, steps: int = 4000) -> SingularLimitMonitor:
    """Train the network on 200 digits under a monitor; event files and a figure are written below a folder.

    Args:
        out: the folder.
        steps: of the optimizer; a window is a quarter of them.
    """
    L.seed_everything(0, verbose=False)
    pixels, labels = handwritten_digits(_SAMPLES)
    data = TensorDataset((pixels - pixels.mean()) / pixels.std(), F.one_hot(labels, 10).float())
    loader = DataLoader(data, _BATCH, sampler=RandomSampler(data, num_samples=steps * _BATCH))
    monitor = SingularLimitMonitor(window=steps // 4, every_n_steps=steps // 4, replicas=2, num_draws=_HIDDEN)
    trainer = L.Trainer(
        max_steps=steps,
        accelerator="cpu",
        callbacks=[monitor, TQDMProgressBar(refresh_rate=100)],
        logger=TensorBoardLogger(out, name=None, version="", default_hp_metric=False),
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers")  # the data are in memory
        trainer.fit(_Classifier(), loader)
    title = f"{_SAMPLES} digits, 64-{_HIDDEN}-10 MLP, dropout 0.1, SGD 0.5, batch {_BATCH}"
    drift_figure(monitor.history, monitor.last_window, title=title).savefig(out / "drift.png")
    return monitor
