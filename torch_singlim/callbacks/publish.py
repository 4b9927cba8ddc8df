"""Send results to other callbacks, the progress bar and the terminal."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import torch
from lightning.pytorch import Trainer

from torch_singlim.measure import Engine, Place, Reason, Scope
from torch_singlim.measure.tags import shown_in

__all__ = ["describe", "provide", "report_reasons", "say"]

_log = logging.getLogger(__name__)


def say(trainer: Trainer, level: int, message: str) -> None:
    """Log a message once, on the first process."""
    if trainer.is_global_zero:
        _log.log(level, "torch_singlim: %s", message)


def report_reasons(trainer: Trainer, reasons: Sequence[Reason]) -> None:
    """Log why something is not measured or not predicted, and what follows from it."""
    for reason in reasons:
        scope = reason.code.scope
        means = "" if scope in (Scope.PART, Scope.NOTHING) else f" ({scope.value})"
        level = logging.INFO if scope is Scope.NOTHING else logging.WARNING
        say(trainer, level, f"{reason.sentence.removesuffix('.')}{means}.")


def describe(trainer: Trainer, engine: Engine) -> None:
    """Log what was detected at the start."""
    p = engine.problem
    if p is not None:
        low = {str(q.dtype).removeprefix("torch.") for q in p.function.parameters() if q.dtype.itemsize < 4}
        weights = f"{p.num_weights} weights" + (f" in {', '.join(sorted(low))}" if low else "")
        say(
            trainer,
            logging.INFO,
            f"{weights}, {p.num_samples} samples, {p.num_residuals} residuals, {type(p.sample_loss).__name__}, noise "
            f"{engine.noise}, measured in {str(p.dtype).removeprefix('torch.')}",
        )
    report_reasons(trainer, engine.reasons)


def provide(trainer: Trainer, name: str, point: Mapping[str, float], *, prog_bar: bool) -> None:
    """Provide the same values to callbacks that monitor a metric, and to the progress bar."""
    named = {f"{name}/{tag}": value for tag, value in point.items()}
    trainer.callback_metrics.update({tag: torch.tensor(value) for tag, value in named.items()})
    if prog_bar:
        shown = (f"{name}/{tag.name}" for tag in shown_in(Place.PROGRESS))
        trainer.progress_bar_metrics.update({tag: named[tag] for tag in shown if tag in named})
