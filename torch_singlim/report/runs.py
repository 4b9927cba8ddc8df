"""Read back what finished runs have logged, from event files or CSV."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tensorboard.backend.event_processing.event_file_loader import EventFileLoader, RawEventFileLoader
from tensorboard.util import tensor_util

from torch_singlim.measure import History

__all__ = ["Run", "find_runs", "read_run"]

_EVENTS, _CSV = "events.out.tfevents.*", "metrics.csv"
# bytes of a record in addition to its content: the length, its checksum, the checksum of the content
_FRAME = 16


@dataclass(frozen=True)
class Run:
    """A finished run.

    Args:
        name: the part of the folder's path that distinguishes the run.
        path: the folder.
        history: what the monitor logged, step -> tag -> value; the tags are without the monitor's name.
        cut_off: an event file that is damaged or ends within a record, if there is one; it was read up to this point.
    """

    name: str
    path: Path
    history: History
    cut_off: Path | None = None


def find_runs(root: Path) -> list[Path]:
    """Folders that contain event files or a ``metrics.csv``: this one and all below it.

    Args:
        root: the folder.

    Raises:
        ValueError: there is no such folder, or there are no such files in it.
    """
    if not root.is_dir():
        raise ValueError(f"no folder {root}: pass the folder that a logger wrote to")
    found = {path.parent for pattern in (_EVENTS, _CSV) for path in root.rglob(pattern)}
    if not found:
        raise ValueError(f"no event files and no {_CSV} in {root}, or below: pass the folder that a logger wrote to")
    return sorted(found)


def _scalars(file: Path) -> Iterator[tuple[int, str, float]]:
    """Step, tag and value of each scalar in an event file."""
    for event in EventFileLoader(str(file)).Load():
        for value in event.summary.value:
            if value.HasField("simple_value"):
                yield event.step, value.tag, value.simple_value
            elif value.HasField("tensor") and value.metadata.plugin_data.plugin_name in ("", "scalars"):
                array = tensor_util.make_ndarray(value.tensor)
                if array.shape == () and array.dtype.kind == "f":
                    yield event.step, value.tag, float(array)


def _is_cut_off(file: Path) -> bool:
    """Whether the last record is incomplete."""
    whole = sum(len(record) + _FRAME for record in RawEventFileLoader(str(file)).Load())
    return whole != file.stat().st_size


def _rows(file: Path) -> Iterator[tuple[int, str, float]]:
    """Step, tag and value of each number in a CSV file of Lightning's logger."""
    with file.open(newline="") as opened:
        for row in csv.DictReader(opened):
            step = row.pop("step", None)
            for tag, text in row.items():
                if step and text and tag:
                    yield int(float(step)), tag, float(text)


def read_run(path: Path, *, name: str = "singlim", shown: str | None = None) -> Run:
    """What the monitor of this name logged in a run.

    Args:
        path: folder with event files or a ``metrics.csv``.
        name: the monitor's.
        shown: name of the run; default: that of the folder.

    Raises:
        ValueError: the monitor logged nothing there; the message lists some of the tags that were logged.
    """
    history: dict[int, dict[str, float]] = {}
    others: set[str] = set()
    events = sorted(path.glob(_EVENTS))
    points = (point for file in events for point in _scalars(file))
    if not events:
        points = _rows(path / _CSV)
    for step, tag, value in points:
        # a logger's prefix may precede the monitor's name
        head, found, rest = tag.partition(f"{name}/")
        if found and (not head or head.endswith("-")):
            if math.isfinite(value):
                history.setdefault(step, {})[rest] = value
        else:
            others.add(tag)
    cut_off = next((file for file in events if _is_cut_off(file)), None)
    if not history:
        few = ", ".join(sorted(others)[:5]) or "nothing"
        cut = f"; {cut_off.name} is cut off in the middle of a record" if cut_off else ""
        raise ValueError(
            f"no tag under {name}/ in {path}, only {few}{cut}: pass a run with a SingularLimitMonitor, or the "
            "monitor's name (--name)"
        )
    return Run(shown or path.name, path, dict(sorted(history.items())), cut_off)
