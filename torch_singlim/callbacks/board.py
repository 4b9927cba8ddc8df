"""The charts of a monitor in TensorBoard: curves of several roles, bands of standard errors, the layout."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import custom_scalars

from torch_singlim.measure.tags import TAGS, Group, History, Role, Tag, bands, curves

__all__ = ["Board", "has_board", "layout", "writers"]

Chart = list[str | list[str]]
Layout = dict[str, dict[str, Chart]]


def writers(trainer: Trainer) -> Iterator[SummaryWriter]:
    """The trainer's TensorBoard writers; none on processes other than the first."""
    for logger in trainer.loggers if trainer.is_global_zero else ():
        if isinstance(logger, TensorBoardLogger):
            yield logger.experiment


def has_board(trainer: Trainer) -> bool:
    """Whether the trainer logs to TensorBoard; the same on all processes."""
    return any(isinstance(logger, TensorBoardLogger) for logger in trainer.loggers)


def layout(monitors: Mapping[str, Collection[str]]) -> Layout:
    """The charts of all monitors: group -> title with unit -> type of chart and tags.

    A chart is there as soon as one of its series has two points. It always names all of them: TensorBoard merges the
    layouts of several runs, and shows charts twice that differ.

    Args:
        monitors: name of each -> the tags that have two points or more.

    >>> layout({"singlim": ["excess_loss"]})
    {'Is it at the set?': {'Excess loss [loss]': ['Multiline', ['^singlim/excess_loss$']]}}
    """
    charts: Layout = {}
    for name, there in monitors.items():
        of = f" ({name})" if len(monitors) > 1 else ""
        for group in Group:
            found = _charts(name, [tag for tag in TAGS if tag.group == group], there)
            if found:
                charts[f"{group.value}{of}"] = found
    return charts


def _charts(name: str, tags: Sequence[Tag], there: Collection[str]) -> dict[str, Chart]:
    """The charts of one group that have something to show."""
    charts: dict[str, Chart] = {}
    for title in dict.fromkeys(tag.chart for tag in tags if tag.chart):
        shown = [tag for tag in tags if tag.chart == title]
        if any(_is_there(tag, there) for tag in shown):
            charts[title] = ["Multiline", list(dict.fromkeys(_pattern(name, tag) for tag in shown))]
    for tag in tags:
        if tag.band and tag.stderr_name in there:
            charts[tag.band] = ["Margin", [f"{name}/{each}" for each in (tag.name, *tag.band_names)]]
    return charts


def _is_there(tag: Tag, there: Collection[str]) -> bool:
    if tag.members is None:
        return tag.name in there
    return any(each.startswith(f"{tag.name}/") for each in there)


def _pattern(name: str, tag: Tag) -> str:
    """Of the series of a tag in its chart, of all runs and their roles."""
    if tag.curve:
        return f"^{re.escape(f'{name}/curves/{tag.curve}')}$"
    return f"^{re.escape(f'{name}/{tag.name}')}{'' if tag.members is None else '/.*'}$"


class Board:
    """What a monitor writes for TensorBoard beside its tags.

    Args:
        trainer: with its loggers.
        name: of the monitor.
        history: of a run that is resumed.
    """

    def __init__(self, trainer: Trainer, name: str, history: History) -> None:
        self.name = name
        self.shown: set[str] = set()
        """The tags that have two points or more."""
        self._logged: set[str] = set()
        for point in history.values():
            self._count(point)
        self._runs = list(writers(trainer))
        self._of_roles: dict[tuple[int, Role], SummaryWriter] = {}
        self._drawn: set[str] = set()  # the tags of the last layout

    def write(self, point: Mapping[str, float], step: int, beside: Sequence[Board]) -> None:
        """Write curves and bands, and the layout of all charts if it has changed.

        Args:
            point: tag -> value, which were logged.
            step: at which they were.
            beside: the boards of all monitors of the trainer, in their order.
        """
        self._count(point)
        for i, run in enumerate(self._runs):
            for tag, value in bands(point).items():
                run.add_scalar(f"{self.name}/{tag}", value, step)
            for role, values in curves(point).items():
                for tag, value in values.items():
                    self._writer(i, role).add_scalar(f"{self.name}/{tag}", value, step)
        if self._runs and self.shown != self._drawn:
            charts = layout({each.name: each.shown for each in beside})
            for run in self._runs:  # TensorBoard reads the last one of a run
                run._get_file_writer().add_summary(custom_scalars(charts), step)
            self._drawn = set(self.shown)

    def _count(self, point: Mapping[str, float]) -> None:
        self.shown |= self._logged & point.keys()
        self._logged |= point.keys()

    def _writer(self, i: int, role: Role) -> SummaryWriter:
        """Of a role in a run: a run of its own within its folder, since TensorBoard has one colour for each."""
        if role is Role.MEASURED:
            return self._runs[i]
        if (i, role) not in self._of_roles:
            self._of_roles[i, role] = SummaryWriter(f"{self._runs[i].get_logdir()}/{role.value}")
        return self._of_roles[i, role]

    def close(self) -> None:
        """Close the files of the roles; the run's own belongs to its logger."""
        for writer in self._of_roles.values():
            writer.close()
        self._of_roles.clear()
