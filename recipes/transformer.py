"""Drift of a transformer on handwritten digits: attention, layer normalisation and dropout, compared with theory.

An image of 8 x 8 pixels is 8 tokens, one for each of its rows. The drift is compared with paths beside the training,
which make steps on the same batches: the averaged path, descent on the effective loss, and the baseline, the same
descent with the noise switched off. They need gradients of a batch alone. The distance to the zero-loss set takes
derivatives of higher order, of torch's own attention, too, and is measured on a few samples.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import lightning as L
import torch
from data import digits
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from networks import Classifier, encoder
from shell import command, compared_window, require
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler

from torch_singlim import Model, SingularLimitMonitor, Window, drift_figure

TOKENS, PIXELS = 8, 8  # rows of an image, and pixels of a row
SMOOTHING = 0.1  # of the labels
MEASURED = 32  # samples on which the distance is measured


class Transformer(nn.Module):
    """Rows of pixels as tokens -> encoder layers -> mean over tokens -> 10 outputs.

    Args:
        width: of a token.
        heads: of each attention.
        layers: of the encoder, with layer normalisation first.
        dropout: rate, of attention weights and of the outputs of layers.
    """

    def __init__(self, width: int, heads: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Linear(PIXELS, width)
        self.position = nn.Parameter(0.02 * torch.randn(TOKENS, width))
        self.dropout = nn.Dropout(dropout)
        self.encoder = encoder(width, heads, layers, dropout)
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 10))

    def forward(self, x: Tensor) -> Tensor:
        """Images ``[n, 64]`` -> outputs ``[n, 10]``."""
        tokens = self.embedding(x.unflatten(-1, (TOKENS, PIXELS))) + self.position  # [n, tokens, width]
        return self.head(self.encoder(self.dropout(tokens)).mean(-2))


# last window, seed 0: cosine 0.957, noise ceiling 0.955; speed 1.01; baseline cosine 0.73; noise ratio 1.02. In smaller
# batches the paths fluctuate more
def promises(window: Window) -> dict[str, bool]:
    """What theory promises of a window."""
    assert window.drift is not None
    drift, baseline, noise = window.drift.agreement, window.comparisons[Model.BASELINE].agreement, window.noise
    return {
        "cosine >= 0.95 of the noise ceiling": drift.cosine >= 0.95 * window.ceiling,
        "speed within 0.93 to 1.07": 0.93 <= drift.speed <= 1.07,
        "baseline cosine at least 0.1 lower": baseline.cosine <= drift.cosine - 0.1,
        "noise-induced drift within 0.85 to 1.15 of the predicted": noise is not None
        and abs(noise.ratio.mean - 1) <= 0.15,
    }


def main(
    samples: int = 1_797,
    width: int = 64,
    heads: int = 4,
    layers: int = 2,
    dropout: float = 0.1,
    lr: float = 0.1,
    batch_size: int = 100,
    before: int = 500,
    steps: int = 1_000,
    window: int = 500,
    replicas: int = 1,
    seed: int = 0,
    out: Path = Path("runs/transformer"),
    check: bool = True,
) -> None:
    """Train a transformer on handwritten digits with dropout; compare its drift with the theory.

    Args:
        samples: training images.
        width: of a token.
        heads: of each attention.
        layers: blocks of attention and hidden units.
        dropout: rate, of attention weights and of the outputs of layers.
        lr: step size of SGD.
        batch_size: images per step.
        before: optimizer steps before the measurements, until the loss is small.
        steps: optimizer steps with measurements.
        window: steps over which drift is measured, one window after another.
        replicas: paths with independent noise, for the noise ceiling, the best cosine that a prediction can have.
        seed: of weights, batches and noise.
        out: folder for TensorBoard's event files and the figure.
        check: fail unless the last window agrees with the theory.
    """
    # settings
    warnings.filterwarnings("ignore", message=".*does not have many workers")  # the data are in memory
    L.seed_everything(seed)

    # data
    data = digits(samples, one_hot=False)

    def loader(steps: int) -> DataLoader:
        # shuffled passes over the data, one after another, as one long epoch: one progress bar for a whole phase
        return DataLoader(data, batch_size, sampler=RandomSampler(data, num_samples=steps * batch_size))

    # model
    model = Classifier(Transformer(width, heads, layers, dropout), lr, smoothing=SMOOTHING)

    # training; windows follow one another without a gap, whatever that costs
    monitor = SingularLimitMonitor(every_n_steps=window, window=window, replicas=replicas, num_samples=MEASURED)

    def fit(steps: int, logger: TensorBoardLogger | bool, *callbacks: L.Callback) -> None:
        trainer = L.Trainer(
            max_steps=steps,
            accelerator="cpu",
            logger=logger,
            callbacks=[*callbacks, TQDMProgressBar(refresh_rate=50)],
            enable_checkpointing=False,
            enable_model_summary=False,
            log_every_n_steps=50,
        )
        trainer.fit(model, loader(steps))

    board = TensorBoardLogger(out.parent, name=out.name, default_hp_metric=False)
    fit(before, False)
    fit(steps, board, monitor)

    # result
    figure = Path(board.log_dir) / "drift.png"
    title = f"{samples} digits, transformer, dropout {dropout:g}, SGD {lr:g}, batch {batch_size}"
    drift_figure(monitor.history, monitor.last_window, title=title).savefig(figure)
    seen = monitor.visibility
    assert seen is not None
    print(f"dropout {dropout:g}: {seen.words}\nfigure: {figure}\nlook:   tensorboard --logdir {out}")
    if check:
        require(promises(compared_window(monitor)))


if __name__ == "__main__":
    command(main)
