"""Drift along the zero-loss set on real handwritten digits: an MLP, a noise, one callback.

Trains with dropout (or any other noise of the paper: --noise) in Lightning, measures distance and drift, and holds the
drift against the theory: descent on the effective loss, the singular limit, and the null control. Prints the verdict,
says what is too weak to be seen, and where figure and TensorBoard are.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import lightning as L
import torch
from common import Classifier, Noise, as_dataset, command, conclude, set_up
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from torch_singlim import SingularLimitMonitor
from torch_singlim.measure.distance import WindowObservation
from torch_singlim.report import drift_figure

# cross-entropy is steeper: at 0.5 the step is too large for the second-order theory (cosine 0.92 of the ceiling)
STEP_SIZE = {"label_flips": 0.1}


def network(hidden: int, dropout: float) -> nn.Module:
    """64 pixels -> hidden units with dropout -> 10 outputs."""
    return nn.Sequential(nn.Linear(64, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, 10))


def digits(samples: int, *, one_hot: bool) -> TensorDataset:
    """The first digits of scikit-learn's set of 1,797, standardised over all pixels."""
    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels[:samples], dtype=torch.float32)
    return as_dataset(images, torch.tensor(labels[:samples]), one_hot=one_hot)


def bars(window: WindowObservation, noise: str) -> dict[str, bool]:
    """What theory promises of a window in which the noise is seen."""
    if window.spread is not None:
        ratio = window.spread.measured / window.spread.predicted
        return {"length of the motion along the zero-loss set within 5 %": abs(ratio - 1) <= 0.05}
    flow = window.reference  # followed step by step: the reference that theory is held to
    assert flow is not None
    promised = {
        "cosine >= 0.97 of the noise ceiling": flow.cosine >= 0.97 * window.ceiling,
        "speed ratio within 0.93 to 1.07": 0.93 <= flow.speed_ratio <= 1.07,
        "null explains less": window.null.residual_ratio > flow.residual_ratio,
        "pull within 0.75 to 1.25 of the predicted": window.pull is not None and abs(window.pull.mean - 1) <= 0.25,
    }
    if noise == "dropout":
        promised["cosine with the effective flow >= 0.95"] = flow.cosine >= 0.95
        promised["null cosine < 0.6"] = window.null.cosine < 0.6
    return promised


def main(
    noise: Noise = "dropout",
    level: float | None = None,
    samples: int = 200,
    hidden: int = 256,
    lr: float | None = None,
    batch_size: int = 25,
    steps: int = 7_500,
    window: int = 2_500,
    replicas: int = 2,
    seed: int = 0,
    out: Path = Path("runs/digits"),
    check: bool = True,
) -> None:
    """Train an over-parameterised MLP on handwritten digits under a noise; compare its drift with the theory.

    Args:
        noise: which one; dropout is a layer of the network, minibatch is none, the others are injected.
        level: rate of dropout or label flips, standard deviation of the others; default: one for each.
        samples: training images; the network must have more weights than 10 times this.
        hidden: hidden units; fewer than samples makes the zero-loss set singular.
        lr: step size of SGD; default: 0.5, with label flips 0.1.
        batch_size: images per step.
        steps: optimizer steps.
        window: steps over which drift is measured, one window after another.
        replicas: independent copies of each window for the noise ceiling.
        seed: of weights, batches and noise.
        out: folder for TensorBoard's event files and the figure.
        check: fail unless the last window agrees with the theory, where the noise is strong enough to be seen.
    """
    warnings.filterwarnings("ignore", message=".*does not have many workers")  # the data lies in memory
    L.seed_everything(seed)

    data = digits(samples, one_hot=noise != "label_flips")
    # shuffled passes over the data, one after another, as one long epoch: one progress bar for the whole run
    loader = DataLoader(data, batch_size=batch_size, sampler=RandomSampler(data, num_samples=steps * batch_size))
    rate, shown, callbacks = set_up(noise, level, seed)
    lr = STEP_SIZE.get(noise, 0.5) if lr is None else lr
    model = Classifier(network(hidden, rate), lr)
    monitor = SingularLimitMonitor(
        every_n_steps=window, window=window, replicas=replicas, reference=True, num_draws=hidden
    )
    trainer = L.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=TensorBoardLogger(out.parent, name=out.name, default_hp_metric=False),
        callbacks=[*callbacks, monitor, TQDMProgressBar(refresh_rate=50)],
        enable_checkpointing=False,
        log_every_n_steps=50,
    )
    trainer.fit(model, loader)

    figure = Path(trainer.log_dir or out) / "drift.png"
    figure.parent.mkdir(parents=True, exist_ok=True)
    title = f"{samples} digits, 64-{hidden}-10 MLP, {shown}, SGD {lr:g}, batch {batch_size}"
    drift_figure(monitor.history, monitor.last_window, title=title).savefig(figure)
    conclude(
        monitor,
        lambda last: bars(last, noise),
        shown=shown,
        figure=figure,
        logs=out,
        always=noise == "dropout",
        check=check,
    )


if __name__ == "__main__":
    command(main)
