"""Drift along the zero-loss set on real handwritten digits: an MLP, a noise, one callback.

Trains with dropout (or any other noise of the paper: --noise) in Lightning, measures distance and drift, and holds the
drift against the theory: descent on the effective loss, the singular limit, and the null control. Prints the verdict,
says what is too weak to be seen, and where figure and TensorBoard are.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import lightning as L
import torch
from jsonargparse import auto_cli
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from torch_singlim import (
    AntiCorrelated,
    DropConnect,
    InjectNoise,
    InputNoise,
    LabelFlips,
    LabelNoise,
    Langevin,
    SingularLimitMonitor,
)
from torch_singlim.observe import WindowObservation
from torch_singlim.report import drift_figure
from torch_singlim.theory import NoiseSystem

Noise = Literal[
    "dropout",
    "drop_connect",
    "anti_correlated",
    "input_noise",
    "label_noise",
    "label_flips",
    "langevin",
    "minibatch",
]
# what is injected, and its default level: a rate for dropout and flips, else a standard deviation
INJECTED: dict[str, tuple[Callable[[float], NoiseSystem], float]] = {
    "drop_connect": (DropConnect, 0.2),
    "anti_correlated": (AntiCorrelated, 0.02),
    "input_noise": (InputNoise, 0.3),
    "label_noise": (LabelNoise, 0.5),
    "label_flips": (LabelFlips, 0.2),
    "langevin": (Langevin, 0.002),
}
DROPOUT_RATE = 0.1
# cross-entropy is steeper: at 0.5 the step is too large for the second-order theory (cosine 0.92 of the ceiling)
STEP_SIZE = {"label_flips": 0.1}
VISIBLE = 0.25  # the noise is seen where its pull is known to a quarter of what is predicted
FLOW_ERROR = 0.02  # of the flow, relative: what minibatches alone add to the motion, see --noise minibatch


class DigitsMLP(L.LightningModule):
    """64 pixels -> hidden units with dropout -> 10 outputs, plain SGD.

    Mean squared error on one-hot targets, cross-entropy on class labels.
    """

    def __init__(self, hidden: int, dropout: float, lr: float) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(64, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, 10))

    def forward(self, x: Tensor) -> Tensor:
        """Outputs ``[n, 10]`` for images ``[n, 64]``."""
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Mean loss of a batch."""
        x, y = batch
        loss = F.mse_loss(self(x), y) if y.is_floating_point() else F.cross_entropy(self(x), y)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain SGD."""
        return torch.optim.SGD(self.parameters(), lr=self.hparams["lr"])


def digits(samples: int, *, one_hot: bool) -> TensorDataset:
    """The first digits of scikit-learn's set of 1,797, standardised over all pixels."""
    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels[:samples], dtype=torch.float32)
    images = (images - images.mean()) / images.std()
    targets = torch.tensor(labels[:samples])
    return TensorDataset(images, F.one_hot(targets, 10).float() if one_hot else targets)


def what_was_seen(monitor: SingularLimitMonitor) -> tuple[bool, str]:
    """Whether the noise's own pull stood out in the last window, and that in words, with the slow clock."""
    window, observation = monitor.last_window, monitor.last_observation
    if window is None or observation is None or observation.limit is None:
        return False, "no window was completed"
    limit = observation.limit
    if limit.order is None:
        return False, "no motion along the zero-loss set on either clock, what moves is the approach"
    percent = 0.01 * (observation.weights.norm() / limit.drift.norm()).item()
    clock = f"order {limit.order}, the singular limit moves the weights by 1 % in {percent:.2g} steps"
    if window.spread is not None:
        return True, f"{clock}, but diffusion hides that: only the length of the motion can be predicted"
    pull, share, length = window.pull, window.pull_share, window.stop - window.start
    assert pull is not None  # every noise here has a flow, or diffuses
    error = math.hypot(pull.stderr, FLOW_ERROR / share)
    if error <= VISIBLE:
        return True, f"{clock}; its pull, {share:.0%} of the motion, is {pull.mean:.2f} +- {error:.2f} of the predicted"
    needed = length * max((pull.stderr / VISIBLE) ** 2, FLOW_ERROR / (share * VISIBLE))
    return False, (
        f"{clock}. Too weak to see in windows of {length} steps: its pull is {share:.2%} of the predicted motion; it "
        f"would take windows of about {needed:.2g} steps"
    )


def bars(window: WindowObservation, noise: str) -> dict[str, bool]:
    """What theory promises of a window in which the noise is seen."""
    if window.spread is not None:
        ratio = window.spread.measured / window.spread.predicted
        return {"length of the motion along the zero-loss set within 5 %": abs(ratio - 1) <= 0.05}
    assert window.drift is not None
    promised = {
        "cosine >= 0.97 of the noise ceiling": window.drift.cosine >= 0.97 * window.ceiling,
        "speed ratio within 0.93 to 1.07": 0.93 <= window.drift.speed_ratio <= 1.07,
        "null explains less": window.null.residual_ratio > window.drift.residual_ratio,
        "pull within 0.75 to 1.25 of the predicted": window.pull is not None and abs(window.pull.mean - 1) <= 0.25,
    }
    if noise == "dropout":
        promised["cosine with the effective flow >= 0.95"] = window.drift.cosine >= 0.95
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
    rate = (DROPOUT_RATE if level is None else level) if noise == "dropout" else 0.0
    lr = STEP_SIZE.get(noise, 0.5) if lr is None else lr
    model = DigitsMLP(hidden, rate, lr)
    shown, callbacks = (f"dropout {rate:g}" if rate else "minibatches alone"), []
    if noise in INJECTED:
        system, default = INJECTED[noise]
        injected = system(default if level is None else level)
        shown, callbacks = str(injected), [InjectNoise(injected, seed=seed)]
    monitor = SingularLimitMonitor(every_n_steps=window, window=window, replicas=replicas, num_draws=hidden)
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
    seen, words = what_was_seen(monitor)
    print(f"{shown}: {words}\nfigure: {figure}\nlook:   tensorboard --logdir {out}")

    last = monitor.last_window
    if not check:
        return
    if last is None:
        raise SystemExit(f"no window was completed in {steps} steps: choose --window {steps // 2} or shorter")
    if not seen and noise != "dropout":
        print("nothing to check against the theory")
        return
    promised = bars(last, noise)
    missed = [bar for bar, held in promised.items() if not held]
    if missed:
        raise SystemExit(f"the drift does not agree with the theory in the last window: {'; '.join(missed)} missed")
    print("agreement: " + ", ".join(promised))


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
