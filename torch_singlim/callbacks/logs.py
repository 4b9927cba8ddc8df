"""Where the results of a monitor go: the trainer's loggers, the charts of TensorBoard, a record beside each log."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger, WandbLogger

from torch_singlim.callbacks.board import Board
from torch_singlim.measure import Engine
from torch_singlim.report import Record

__all__ = ["Logs", "folder_of"]


def folder_of(logger: Logger) -> Path | None:
    """The local folder of the run that a logger logs; None: it has none."""
    if isinstance(logger, WandbLogger):
        return Path(logger.experiment.dir)
    folder = getattr(logger, "log_dir", None)
    if folder is None and logger.save_dir is not None:
        # as Lightning's ModelCheckpoint does
        version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
        folder = f"{logger.save_dir}/{logger.name}/{version}"
    return None if folder is None or "://" in str(folder) else Path(folder)


class Logs:
    """Writes the results of one monitor in one training; on the first process alone.

    Args:
        trainer: with its loggers.
        name: of the monitor.
        engine: whose results these are.
    """

    def __init__(self, trainer: Trainer, name: str, engine: Engine) -> None:
        self.board = Board(trainer, name, engine.history)
        """The charts."""
        self._name, self._engine = name, engine
        self._loggers = list(trainer.loggers) if trainer.is_global_zero else []
        self._records: list[Record] | None = None  # from the first value on, when loggers have made their folders

    def write(self, step: int, point: Mapping[str, float], beside: Sequence[Logs]) -> None:
        """Send the values of one step everywhere.

        Args:
            step: the optimizer's.
            point: tag -> value.
            beside: the logs of all monitors of the trainer, in their order.
        """
        for logger in self._loggers:
            logger.log_metrics({f"{self._name}/{tag}": value for tag, value in point.items()}, step=step)
        self.board.write(point, step, [each.board for each in beside])
        points = {step: point}
        if self._records is None:
            folders = dict.fromkeys(folder for each in self._loggers if (folder := folder_of(each)) is not None)
            self._records = [Record(folder, self._name) for folder in folders]
            # a run that is resumed has a history, which may have been logged elsewhere
            points = {**self._engine.history, **points}
        for record in self._records:
            record.write(points, self._engine.reasons)

    def finish(self) -> None:
        """Write what is known at the end only, and close the files."""
        for record in self._records or ():
            record.finish(self._engine.all_reasons, self._engine.noise_words)
        self.close()

    def close(self) -> None:
        """Close the files."""
        self.board.close()
