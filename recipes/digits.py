"""Drift along the zero-loss set on real handwritten digits: an MLP, a noise, one callback.

Trains with dropout, or with any other noise of the paper (--noise), and measures distance and drift. The drift is
compared with paths beside the training, on the same batches: the averaged path, descent on the effective loss, and the
baseline, the same descent with the noise switched off. It is also compared with the singular limit. If the effect of a
noise is too weak to be visible, the output says so, with the number of steps that it would take.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import lightning as L
from data import digits
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from networks import Classifier, digits_mlp
from noises import Noise, choose
from shell import command, compared_window, require
from torch.utils.data import DataLoader, RandomSampler

from torch_singlim import InjectNoise, Model, SingularLimitMonitor, Window, drift_figure

# cross-entropy is steeper: at 0.5 the step is too large for the second-order theory (cosine 0.92 of the noise ceiling)
STEP_SIZE = {"label_flips": 0.1}


def promises(window: Window, noise: str) -> dict[str, bool]:
    """What theory promises of a window in which the noise is visible."""
    if window.diffuses:
        assert window.spread is not None
        ratio = window.spread.measured / window.spread.predicted
        return {"length of the motion along the zero-loss set within 5 %": abs(ratio - 1) <= 0.05}
    assert window.drift is not None
    drift, baseline = window.drift.agreement, window.comparisons[Model.BASELINE].agreement
    promised = {
        "cosine >= 0.97 of the noise ceiling": drift.cosine >= 0.97 * window.ceiling,
        "speed within 0.93 to 1.07": 0.93 <= drift.speed <= 1.07,
        "the baseline explains less": baseline.residual > drift.residual,
        "noise-induced drift within 0.75 to 1.25 of the predicted": window.noise is not None
        and abs(window.noise.ratio.mean - 1) <= 0.25,
    }
    if noise == "dropout":
        promised["cosine with the averaged path >= 0.95"] = drift.cosine >= 0.95
        promised["baseline cosine < 0.6"] = baseline.cosine < 0.6
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
        replicas: paths with independent noise, for the noise ceiling, the best cosine that a prediction can have.
        seed: of weights, batches and noise.
        out: folder for TensorBoard's event files and the figure.
        check: fail unless the last window agrees with the theory, where the effect of the noise is visible.
    """
    warnings.filterwarnings("ignore", message=".*does not have many workers")  # the data are in memory
    L.seed_everything(seed)
    lr = STEP_SIZE.get(noise, 0.5) if lr is None else lr

    # data: shuffled passes, one after another, as one long epoch: one progress bar for the whole run
    data = digits(samples, one_hot=noise != "label_flips")
    loader = DataLoader(data, batch_size=batch_size, sampler=RandomSampler(data, num_samples=steps * batch_size))

    # noise: a layer of the network, or injected
    chosen = choose(noise, level)
    injection = [] if chosen.injected is None else [InjectNoise(chosen.injected, seed=seed)]
    model = Classifier(digits_mlp(hidden, chosen.dropout), lr)

    # training; windows follow one another without a gap, whatever that costs
    monitor = SingularLimitMonitor(every_n_steps=window, window=window, replicas=replicas, num_draws=hidden)
    trainer = L.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=TensorBoardLogger(out.parent, name=out.name, default_hp_metric=False),
        callbacks=[*injection, monitor, TQDMProgressBar(refresh_rate=50)],
        enable_checkpointing=False,
        log_every_n_steps=50,
    )
    trainer.fit(model, loader)

    # result
    figure = Path(trainer.log_dir or out) / "drift.png"
    title = f"{samples} digits, 64-{hidden}-10 MLP, {chosen}, SGD {lr:g}, batch {batch_size}"
    drift_figure(monitor.history, monitor.last_window, title=title).savefig(figure)
    seen = monitor.visibility
    assert seen is not None
    print(f"{chosen}: {seen.words}\nfigure: {figure}\nlook:   tensorboard --logdir {out}")
    if check:
        last = compared_window(monitor)
        if seen.visible or last.diffuses or noise == "dropout":
            require(promises(last, noise))
        else:
            print("nothing to check against the theory")


if __name__ == "__main__":
    command(main)
