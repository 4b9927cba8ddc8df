"""The record of a run: what a monitor measured, and the reasons for what it did not, in a file beside the logger's own.

A line is an object in JSON. The first one has the monitor's name; then come the values of a step, or a reason, as the
training goes on; the last one has what the verdict says of the noise. Where a training is killed, all lines but the
last one are whole.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from torch_singlim.measure import History, Reason

__all__ = ["Record", "Run", "distinct", "find_runs", "read_run", "record_file"]

_SUFFIX = ".jsonl"
_VERSION = 1
# with this every record begins
_MARK = '{"torch_singlim":'


class Record:
    """Writes the record of a run; an older one in the same folder is replaced.

    Args:
        folder: of the run; it is created.
        name: of the monitor.

    >>> from tempfile import mkdtemp
    >>> folder = Path(mkdtemp())
    >>> Record(folder, "singlim").write({5: {"excess_loss": 0.5}}, [])
    >>> read_run(folder).history
    {5: {'excess_loss': 0.5}}
    """

    def __init__(self, folder: Path, name: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = record_file(folder, name)
        """The file."""
        self._num_reasons = 0
        self._lines({"torch_singlim": _VERSION, "name": name}, mode="w")

    def write(self, points: History, reasons: Sequence[Reason]) -> None:
        """Append values, and the reasons that are new.

        Args:
            points: step -> tag -> value.
            reasons: all reasons so far.
        """
        new, self._num_reasons = reasons[self._num_reasons :], len(reasons)
        self._lines(
            *({"step": step, "values": dict(point)} for step, point in points.items()),
            *({"reason": reason.state_dict()} for reason in new),
        )

    def finish(self, reasons: Sequence[Reason], noise: str | None) -> None:
        """Write that the run has come to its end.

        Args:
            reasons: all of them.
            noise: whether its effect is visible, in words; None: nothing was compared with theory.
        """
        self.write({}, reasons)
        self._lines({"noise": noise})

    def _lines(self, *lines: Mapping[str, Any], mode: str = "a") -> None:
        with self.path.open(mode, encoding="utf-8") as opened:
            opened.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


@dataclass(frozen=True)
class Run:
    """A run, finished or not.

    Args:
        name: the part of the folder's path that distinguishes the run.
        path: the folder.
        history: what the monitor logged, step -> tag -> value; the tags are without the monitor's name.
        reasons: why something was not measured or predicted.
        noise: whether its effect is visible, in words; None: the run did not come to its end, or nothing was compared.
        finished: whether the run came to its end; otherwise it was killed, or still goes on.
    """

    name: str
    path: Path
    history: History
    reasons: tuple[Reason, ...] = field(repr=False, default=())
    noise: str | None = None
    finished: bool = True


def find_runs(root: Path) -> list[Path]:
    """Folders that contain the record of a monitor: this one and all below it.

    Args:
        root: the folder.

    Raises:
        ValueError: there is no such folder, or there is no record in it.
    """
    if not root.is_dir():
        raise ValueError(f"no folder {root}: pass the folder that a logger wrote to")
    found = {path.parent for path in root.rglob(f"*{_SUFFIX}") if _is_record(path)}
    if not found:
        raise ValueError(
            f"no record of a SingularLimitMonitor in {root}, or below: pass the folder of a run that one has measured"
        )
    return sorted(found)


def distinct(folders: Iterable[Path], name: str) -> list[Path]:
    """The folders without those whose record of this monitor is that of an earlier one: several loggers log one run."""
    found: dict[object, Path] = {}
    for folder in folders:
        file = record_file(folder, name)
        found.setdefault(file.read_bytes() if file.exists() else folder, folder)
    return list(found.values())


def record_file(folder: Path, name: str) -> Path:
    """The record of the monitor with this name in the folder of a run."""
    return folder / (quote(name, safe="") + _SUFFIX)


def _is_record(path: Path) -> bool:
    with path.open(encoding="utf-8", errors="replace") as opened:
        return opened.read(len(_MARK)) == _MARK


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a record; a last one that is incomplete is not read."""
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n"):
            yield json.loads(line)


def read_run(path: Path, *, name: str = "singlim", shown: str | None = None) -> Run:
    """What the monitor of this name measured in a run.

    Args:
        path: the folder of the run.
        name: the monitor's.
        shown: name of the run; default: that of the folder.

    Raises:
        ValueError: there is no record of this monitor; the message lists the others. Or it cannot be read.
    """
    file = record_file(path, name)
    if not file.exists():
        there = sorted(unquote(each.stem) for each in path.glob(f"*{_SUFFIX}") if _is_record(each))
        raise ValueError(f"no monitor named {name} in {path}, but {', '.join(there) or 'none'}: pass its name (--name)")
    history: dict[int, dict[str, float]] = {}
    reasons: list[Reason] = []
    noise, finished = None, False
    try:
        first, *lines = _lines(file)
        if first.get("torch_singlim") != _VERSION:
            raise ValueError(f"a record of version {_VERSION} was expected, got {first}")
        for line in lines:
            if "values" in line:
                history.setdefault(line["step"], {}).update(line["values"])
            elif "reason" in line:
                reasons.append(Reason.from_state(line["reason"]))
            else:
                noise, finished = line["noise"], True
    except (ValueError, KeyError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    return Run(shown or path.name, path, dict(sorted(history.items())), tuple(reasons), noise, finished)
