"""Drift along the zero-loss set on real handwritten digits: an MLP, dropout, one callback.

Trains with dropout in Lightning, measures distance and drift, and holds the drift against the theory: descent on the
effective loss, the singular limit, and the null control. Prints the verdict, and where figure and TensorBoard are.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import lightning as L
import torch
from jsonargparse import auto_cli
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from torch_singlim import SingularLimitMonitor
from torch_singlim.report import drift_figure


class DigitsMLP(L.LightningModule):
    """64 pixels -> hidden units with dropout -> 10 outputs, mean squared error on one-hot labels, plain SGD."""

    def __init__(self, hidden: int, dropout: float, lr: float) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(64, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, 10))

    def forward(self, x: Tensor) -> Tensor:
        """Outputs ``[n, 10]`` for images ``[n, 64]``."""
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Mean squared error of a batch."""
        x, y = batch
        loss = F.mse_loss(self(x), F.one_hot(y, 10).to(x.dtype))
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain SGD."""
        return torch.optim.SGD(self.parameters(), lr=self.hparams["lr"])


def digits(samples: int) -> TensorDataset:
    """The first digits of scikit-learn's set of 1,797, standardised over all pixels."""
    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels[:samples], dtype=torch.float32)
    images = (images - images.mean()) / images.std()
    return TensorDataset(images, torch.tensor(labels[:samples]))


def main(
    samples: int = 200,
    hidden: int = 256,
    dropout: float = 0.1,
    lr: float = 0.5,
    batch_size: int = 25,
    steps: int = 7_500,
    window: int = 2_500,
    replicas: int = 2,
    seed: int = 0,
    out: Path = Path("runs/digits"),
    check: bool = True,
) -> None:
    """Train an over-parameterised MLP on handwritten digits with dropout; compare its drift with the theory.

    Args:
        samples: training images; the network must have more weights than 10 times this.
        hidden: hidden units; fewer than samples makes the zero-loss set singular.
        dropout: dropout rate of the hidden layer.
        lr: step size of SGD.
        batch_size: images per step.
        steps: optimizer steps.
        window: steps over which drift is measured, one window after another.
        replicas: independent copies of each window for the noise ceiling.
        seed: of weights, batches and dropout.
        out: folder for TensorBoard's event files and the figure.
        check: fail unless the last window agrees with the theory.
    """
    warnings.filterwarnings("ignore", message=".*does not have many workers")  # the data lies in memory
    L.seed_everything(seed)

    data = digits(samples)
    # shuffled passes over the data, one after another, as one long epoch: one progress bar for the whole run
    loader = DataLoader(data, batch_size=batch_size, sampler=RandomSampler(data, num_samples=steps * batch_size))
    model = DigitsMLP(hidden, dropout, lr)
    monitor = SingularLimitMonitor(every_n_steps=window, window=window, replicas=replicas, num_draws=hidden)
    trainer = L.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=TensorBoardLogger(out.parent, name=out.name, default_hp_metric=False),
        callbacks=[monitor, TQDMProgressBar(refresh_rate=50)],
        enable_checkpointing=False,
        log_every_n_steps=50,
    )
    trainer.fit(model, loader)

    figure = Path(trainer.log_dir or out) / "drift.png"
    figure.parent.mkdir(parents=True, exist_ok=True)
    title = f"{samples} digits, 64-{hidden}-10 MLP, dropout {dropout:g}, SGD {lr:g}, batch {batch_size}"
    drift_figure(monitor.history, monitor.last_window, title=title).savefig(figure)
    print(f"figure: {figure}\nlook:   tensorboard --logdir {out}")

    if check:
        last = monitor.last_window
        if last is None:
            raise SystemExit(f"no window was completed in {steps} steps: choose --window {steps // 2} or shorter")
        bars = {
            "cosine with the effective flow >= 0.95": last.drift.cosine >= 0.95,
            "cosine >= 0.97 of the noise ceiling": last.drift.cosine >= 0.97 * last.ceiling,
            "speed ratio within 0.93 to 1.07": 0.93 <= last.drift.speed_ratio <= 1.07,
            "null cosine < 0.6": last.null.cosine < 0.6,
        }
        missed = [bar for bar, held in bars.items() if not held]
        if missed:
            raise SystemExit(f"the drift does not agree with the theory in the last window: {'; '.join(missed)} missed")
        print("agreement: " + ", ".join(bars))


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
