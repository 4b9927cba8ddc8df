"""The registry of all series that are logged; scalars, bands, charts, tables and the docs page are derived from it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from torch_singlim.measure.measurement import Measurement
from torch_singlim.measure.tags.clock import (
    GRADIENTS,
    MOMENTS_COSINE,
    MOMENTS_RATIO,
    NEAREST_ERROR,
    NOISE_LEVEL,
    OVERHEAD,
    POTENTIAL,
    PREDICTION_ERROR,
    PREDICTION_STDERR,
    RESIDUAL,
    SLOW_TIME,
    STABILITY,
    STEP_SIZE,
    TANGENT_STEPS,
    TIME_SCALE,
    UNRESOLVED,
)
from torch_singlim.measure.tags.distance import (
    EXCESS_LOSS,
    GROWTH,
    HALF,
    HALF_LINEAR,
    HALF_WHOLE,
    HUNDREDTH,
    HUNDREDTH_LINEAR,
    HUNDREDTH_WHOLE,
    IN_METRIC,
    LINEARISED,
    NEAREST,
    OF_SAMPLES,
    RELAXED,
    RELAXED_COSINE,
    RELAXED_EXPECTED,
    RELAXED_SHARE,
    TENTH,
    TENTH_LINEAR,
    TENTH_WHOLE,
)
from torch_singlim.measure.tags.drift import (
    BASELINE_MOVED,
    DRIFT_BASELINE_COSINE,
    DRIFT_CEILING,
    DRIFT_COSINE,
    DRIFT_MEASURED,
    DRIFT_PREDICTED,
    DRIFT_RESIDUAL,
    DRIFT_SPEED,
    EXPANSION_COSINE,
    EXPANSION_RATIO,
    LIMIT_COSINE,
    LIMIT_FROZEN_COSINE,
    LIMIT_FROZEN_SPEED,
    LIMIT_SPEED,
    NOISE_CEILING,
    NOISE_COSINE,
    NOISE_MEASURED,
    NOISE_OF_REPLICAS,
    NOISE_PREDICTED,
    NOISE_RATIO,
    NOISE_SHARE,
    REPLAY_ERROR,
    SPREAD_MEASURED,
    SPREAD_PREDICTED,
    WINDOW_STATUS,
    WINDOW_STEPS,
)
from torch_singlim.measure.tags.tag import Group, Need, Place, Role, Tag

__all__ = [
    "TAGS",
    "Group",
    "History",
    "Need",
    "Place",
    "Role",
    "Tag",
    "bands",
    "curves",
    "last",
    "scalars",
    "series",
    "shown_in",
    "tags_page",
    "windows",
    "BASELINE_MOVED",
    "DRIFT_BASELINE_COSINE",
    "DRIFT_CEILING",
    "DRIFT_COSINE",
    "DRIFT_MEASURED",
    "DRIFT_PREDICTED",
    "DRIFT_RESIDUAL",
    "DRIFT_SPEED",
    "EXCESS_LOSS",
    "EXPANSION_COSINE",
    "EXPANSION_RATIO",
    "GRADIENTS",
    "GROWTH",
    "HALF",
    "HALF_LINEAR",
    "HALF_WHOLE",
    "HUNDREDTH",
    "HUNDREDTH_LINEAR",
    "HUNDREDTH_WHOLE",
    "IN_METRIC",
    "LIMIT_COSINE",
    "LIMIT_FROZEN_COSINE",
    "LIMIT_FROZEN_SPEED",
    "LIMIT_SPEED",
    "LINEARISED",
    "MOMENTS_COSINE",
    "MOMENTS_RATIO",
    "NEAREST",
    "NEAREST_ERROR",
    "NOISE_LEVEL",
    "NOISE_CEILING",
    "NOISE_COSINE",
    "NOISE_MEASURED",
    "NOISE_OF_REPLICAS",
    "NOISE_PREDICTED",
    "NOISE_RATIO",
    "NOISE_SHARE",
    "OF_SAMPLES",
    "OVERHEAD",
    "POTENTIAL",
    "PREDICTION_ERROR",
    "PREDICTION_STDERR",
    "RELAXED",
    "RELAXED_COSINE",
    "RELAXED_EXPECTED",
    "RELAXED_SHARE",
    "REPLAY_ERROR",
    "RESIDUAL",
    "SLOW_TIME",
    "SPREAD_MEASURED",
    "SPREAD_PREDICTED",
    "STABILITY",
    "STEP_SIZE",
    "TANGENT_STEPS",
    "TENTH",
    "TENTH_LINEAR",
    "TENTH_WHOLE",
    "TIME_SCALE",
    "UNRESOLVED",
    "WINDOW_STATUS",
    "WINDOW_STEPS",
]

# step -> tag -> value: all that was logged in a run, without the monitor's name
History = Mapping[int, Mapping[str, float]]

# in the order of the docs page
TAGS: tuple[Tag, ...] = (
    EXCESS_LOSS,
    HALF,
    TENTH,
    HUNDREDTH,
    HALF_LINEAR,
    TENTH_LINEAR,
    HUNDREDTH_LINEAR,
    HALF_WHOLE,
    TENTH_WHOLE,
    HUNDREDTH_WHOLE,
    NEAREST,
    IN_METRIC,
    OF_SAMPLES,
    GROWTH,
    LINEARISED,
    RELAXED,
    RELAXED_EXPECTED,
    RELAXED_COSINE,
    RELAXED_SHARE,
    WINDOW_STEPS,
    WINDOW_STATUS,
    DRIFT_MEASURED,
    DRIFT_PREDICTED,
    BASELINE_MOVED,
    DRIFT_COSINE,
    DRIFT_CEILING,
    DRIFT_SPEED,
    DRIFT_BASELINE_COSINE,
    DRIFT_RESIDUAL,
    NOISE_MEASURED,
    NOISE_PREDICTED,
    NOISE_COSINE,
    NOISE_CEILING,
    NOISE_RATIO,
    NOISE_OF_REPLICAS,
    NOISE_SHARE,
    EXPANSION_COSINE,
    EXPANSION_RATIO,
    LIMIT_COSINE,
    LIMIT_FROZEN_COSINE,
    LIMIT_SPEED,
    LIMIT_FROZEN_SPEED,
    SPREAD_MEASURED,
    SPREAD_PREDICTED,
    POTENTIAL,
    SLOW_TIME,
    TIME_SCALE,
    STEP_SIZE,
    NOISE_LEVEL,
    MOMENTS_RATIO,
    MOMENTS_COSINE,
    STABILITY,
    NEAREST_ERROR,
    RESIDUAL,
    UNRESOLVED,
    TANGENT_STEPS,
    REPLAY_ERROR,
    PREDICTION_STDERR,
    PREDICTION_ERROR,
    OVERHEAD,
    GRADIENTS,
)


def scalars(measurement: Measurement) -> dict[str, float]:
    """Tag -> value, for everything that was measured and is finite, including standard errors.

    >>> scalars(Measurement(3, excess_loss=0.5, overhead=0.1))
    {'excess_loss': 0.5, 'cost/overhead': 0.1}
    """
    found: dict[str, float] = {}
    for tag in TAGS:
        for name, read in ((tag.name, tag.value), (tag.stderr_name, tag.stderr)):
            value = None if read is None else read(measurement)
            if value is not None and math.isfinite(value):
                found[name] = value
        if tag.members is not None:
            found |= {f"{tag.name}/{key}": value for key, value in tag.members(measurement).items()}
    return found


def bands(point: Mapping[str, float]) -> dict[str, float]:
    """Values minus and plus their standard errors, for the charts that show these.

    >>> bands({"potential": 2.0, "potential_stderr": 0.5})
    {'potential_lower': 1.5, 'potential_upper': 2.5}
    """
    found = {}
    for tag in TAGS:
        if tag.band and tag.name in point and tag.stderr_name in point:
            value, error = point[tag.name], point[tag.stderr_name]
            found |= dict(zip(tag.band_names, (value - error, value + error), strict=True))
    return found


def curves(point: Mapping[str, float]) -> dict[Role, dict[str, float]]:
    """Role -> the tag of a chart with several roles -> value; standard errors are in the bands.

    >>> curves({"drift/measured": 2.0, "drift/predicted": 1.5, "excess_loss": 0.1})[Role.PREDICTED]
    {'curves/displacement': 1.5}
    """
    found: dict[Role, dict[str, float]] = {}
    for tag in TAGS:
        if tag.curve and tag.name in point:
            found.setdefault(tag.role, {})[f"curves/{tag.curve}"] = point[tag.name]
    return found


def shown_in(place: Place) -> tuple[Tag, ...]:
    """The tags that appear in a place, in the order of the registry."""
    return tuple(tag for tag in TAGS if place in tag.shown)


def series(history: History, tag: Tag) -> dict[int, float]:
    """Step -> value, for all steps at which the tag was logged.

    >>> series({0: {"excess_loss": 1.0}, 5: {}}, EXCESS_LOSS)
    {0: 1.0}
    """
    return {step: point[tag.name] for step, point in sorted(history.items()) if tag.name in point}


def windows(history: History) -> dict[int, list[int]]:
    """Beginning of each window -> the steps at which its values were logged.

    >>> windows({5: {"window/steps": 5.0}, 10: {"window/steps": 10.0}, 12: {"window/steps": 2.0}})
    {0: [5, 10], 10: [12]}
    """
    found: dict[int, list[int]] = {}
    for step, length in series(history, WINDOW_STEPS).items():
        found.setdefault(step - int(length), []).append(step)
    return found


def last(history: History, name: str) -> float | None:
    """The last value that was logged under a tag; None if there is none."""
    return next((point[name] for _, point in sorted(history.items(), reverse=True) if name in point), None)


def _row(tag: Tag) -> str:
    names = f"`{tag.name}{'' if tag.members is None else '/N'}`" + (
        f", `{tag.stderr_name}`" if tag.stderr is not None else ""
    )
    when = ", ".join(need.value for need in Need if need in tag.needs) or "–"
    return f"| {names} | {tag.unit} | {tag.meaning} | {tag.advice} | {when} |"


def tags_page() -> Iterator[str]:
    """Lines of the tables that explain every tag, one table for each group, as markdown."""
    for group in Group:
        head = "| tag | unit | meaning | how to act on it | only |"
        yield from ("", f"## {group.value}", "", head, "|---" * 5 + "|")
        yield from (_row(tag) for tag in TAGS if tag.group == group)
