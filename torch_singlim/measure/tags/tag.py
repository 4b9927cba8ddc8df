"""The declaration of a series: name, unit, meaning, where it is shown, how its value is read from a measurement."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum, auto

from torch_singlim.geometry import LevelPoint
from torch_singlim.measure.distance import DistanceMeasurement, RelaxedPart
from torch_singlim.measure.levels import Level
from torch_singlim.measure.measurement import Clock, Measurement
from torch_singlim.measure.window import Comparison, Model, NoiseInduced, Window
from torch_singlim.theory import WindowPrediction

__all__ = [
    "Group",
    "Need",
    "Place",
    "Reader",
    "Role",
    "Tag",
    "needs",
    "of_clock",
    "of_distance",
    "of_drift",
    "of_level",
    "of_limit",
    "of_model",
    "of_noise",
    "of_quality",
    "of_relaxed",
    "of_window",
    "shown",
]

Reader = Callable[[Measurement], float | None]


class Group(Enum):
    """A group of charts, and of tables on the docs page: a question."""

    SET = "Is it at the set?"
    DRIFT = "Is it drifting?"
    THEORY = "Is that the theory?"
    TRUST = "Can I trust it?"
    COST = "What does it cost?"


class Need(Enum):
    """A condition for a series to be logged; the value says it on the docs page."""

    PATHS = "with paths beside the training"
    BASELINE = "if the noise can be switched off"
    REPLICAS = "with replicas"
    PART = "if a part of the training set is measured"
    LIMIT = "if the singular limit covers the training"
    MOVES = "if the noise causes a drift of order 1 or 2"
    METRIC = "with an adaptive optimizer"
    MOMENTS = "with an adaptive optimizer, under noise on the labels"


class Role(Enum):
    """What a curve is, in a chart of several: TensorBoard has one colour for a run, so that each role is a run.

    The value is the last part of the run's name; what is measured belongs to the run itself.
    """

    MEASURED = ""
    PREDICTED = "predicted"
    BASELINE = "baseline"
    CEILING = "ceiling"
    LIMIT = "limit"


class Place(Enum):
    """Where a series is shown in addition to its chart."""

    DISTANCES = auto()  # the verdict's table of distances
    WINDOWS = auto()  # the verdict's table of windows
    LENGTHS = auto()  # the verdict's table of lengths, if the limit diffuses
    TERMINAL = auto()  # the line that is printed at a measurement
    PROGRESS = auto()  # the progress bar
    REPORT = auto()  # the report's table of last values
    FINAL = auto()  # the metrics of TensorBoard's HPARAMS


@dataclass(frozen=True)
class Tag:
    """One series.

    Args:
        name: the tag, without the monitor's name.
        label: in tables and figures.
        unit: of its values; a dash: none.
        meaning: one sentence or two, with the formula.
        advice: how to act on it.
        group: of charts, and of tables on the docs page.
        chart: title of the chart that shows it; several tags may share one. Empty: no chart.
        curve: if the tags of the chart differ in their role: the tag that they share there, ``curves/`` omitted.
        role: of the tag in that chart.
        value: reads the value from a measurement.
        stderr: reads its standard error, which is logged as the name with ``_stderr``; None: it has none.
        band: title of the chart that shows it with its standard error. Empty: no such chart.
        needs: conditions for it to be logged.
        shown: where else it appears.
        members: reads a family of series instead, last part of the name -> value.
    """

    name: str
    label: str
    unit: str
    meaning: str
    advice: str
    group: Group
    chart: str
    value: Reader
    curve: str = ""
    role: Role = Role.MEASURED
    stderr: Reader | None = None
    band: str = ""
    needs: frozenset[Need] = frozenset()
    shown: frozenset[Place] = frozenset()
    members: Callable[[Measurement], Mapping[str, float]] | None = None

    @property
    def stderr_name(self) -> str:
        """The tag of its standard error."""
        return f"{self.name}_stderr"

    @property
    def band_names(self) -> tuple[str, str]:
        """The tags of value minus and plus the standard error."""
        return f"{self.name}_lower", f"{self.name}_upper"


def of_distance(read: Callable[[DistanceMeasurement], float | None]) -> Reader:
    """Read from the distance measurement."""
    return lambda m: None if m.distance is None else read(m.distance)


def of_limit(read: Callable[[DistanceMeasurement], float | None]) -> Reader:
    """Read from the distance measurement in the optimizer's metric, of which the singular limit speaks."""
    return lambda m: None if m.of_limit is None else read(m.of_limit)


def of_level(level: Level, read: Callable[[LevelPoint], float | None]) -> Reader:
    """Read from the nearest point of a level."""
    return lambda m: read(m.levels[level]) if level in m.levels else None


def of_relaxed(read: Callable[[RelaxedPart], float | None]) -> Reader:
    """Read from the relaxed part, if at least one mode has relaxed."""
    return of_limit(lambda d: None if d.relaxed is None or not d.relaxed.count else read(d.relaxed))


def of_window(read: Callable[[Window], float | None]) -> Reader:
    """Read from the window."""
    return lambda m: None if m.window is None else read(m.window)


def of_model(model: Model, read: Callable[[Comparison], float | None]) -> Reader:
    """Read from the window's comparison with a model."""
    return of_window(lambda w: read(w.comparisons[model]) if model in w.comparisons else None)


def of_drift(read: Callable[[Comparison], float | None]) -> Reader:
    """Read from the window's comparison with the averaged path, or the effective flow, unless it is invalidated."""
    return of_window(lambda w: None if w.drift is None else read(w.drift))


def of_noise(read: Callable[[NoiseInduced], float | None]) -> Reader:
    """Read from the window's noise-induced drift, unless the comparison is invalidated."""
    return of_window(lambda w: None if w.noise is None or w.reason is not None else read(w.noise))


def of_quality(read: Callable[[WindowPrediction], float | None]) -> Reader:
    """Read from the prediction of a whole window, unless it is invalidated."""
    return of_drift(lambda c: None if c.prediction is None else read(c.prediction))


def of_clock(read: Callable[[Clock], float | None]) -> Reader:
    """Read from the clock."""
    return lambda m: None if m.clock is None else read(m.clock)


def needs(*conditions: Need) -> frozenset[Need]:
    """Conditions for a series to be logged."""
    return frozenset(conditions)


def shown(*places: Place) -> frozenset[Place]:
    """Where else a series appears."""
    return frozenset(places)
