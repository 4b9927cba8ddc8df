"""A verdict in words, from what was logged and the reasons for what was not."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch_singlim.linalg import Estimate
from torch_singlim.measure import tags
from torch_singlim.measure.distance import DistanceMeasurement
from torch_singlim.measure.reasons import Reason
from torch_singlim.measure.tags import History, Place, Tag
from torch_singlim.measure.window import Window

__all__ = ["Visibility", "sentences", "terminal_line", "verdict", "visibility"]

# the effect of the noise is visible if the error of the noise ratio is at most this
_VISIBLE = 0.25


def _cell(point: Mapping[str, float], tag: Tag) -> str:
    """A value; the nearest point's with its error."""
    if tag.name not in point:
        return "-"
    error = point.get(tags.NEAREST_ERROR.name) if tag is tags.NEAREST else None
    return f"{point[tag.name]:.3g}" + (f" ± {error:.1g}" if error is not None else "")


def _table(head: str, rows: Mapping[str, Mapping[str, float]], shown: Sequence[Tag]) -> list[str]:
    """A markdown table with a row for each point."""
    lines = [f"| {' | '.join([head, *(tag.label for tag in shown)])} |", "|---:" * (len(shown) + 1) + "|"]
    return lines + [f"| {' | '.join([name, *(_cell(point, tag) for tag in shown)])} |" for name, point in rows.items()]


def verdict(history: History, *, reasons: Sequence[Reason] = (), noise: str | None = None) -> str:
    """Short markdown tables of what was logged: the distance at each step, the drift in each window against theory.

    After the tables: whether the effect of the noise is visible, and the reasons for what is not measured or predicted.

    Args:
        history: what was logged, step -> tag -> value.
        reasons: for what was not measured or predicted.
        noise: whether its effect is visible, in words.

    >>> print(verdict({0: {"excess_loss": 0.5, "distance/half": 2.0}}).splitlines()[2])
    | 0 | 0.5 | 2 | - | - | - | - | - | - |
    """
    distances = {tag.name for tag in tags.shown_in(Place.DISTANCES)} - {tags.EXCESS_LOSS.name}
    measured = {str(step): p for step, p in history.items() if distances & p.keys()}
    ends = {f"{start}-{steps[-1]}": steps[-1] for start, steps in tags.windows(history).items()}
    lines = ["The distance was not measured."]
    if measured:
        lines = _table("step", measured, tags.shown_in(Place.DISTANCES))
    shown = {tag.name for tag in tags.shown_in(Place.WINDOWS)}
    compared = {name: history[end] for name, end in ends.items() if shown & history[end].keys()}
    if compared:
        lines += ["", *_table("window", compared, tags.shown_in(Place.WINDOWS))]
    diffusing = {name: p for name, p in compared.items() if _diffuses(p)}
    if diffusing:
        lines += ["", *_table("window", diffusing, tags.shown_in(Place.LENGTHS))]
    if noise:
        lines.append(f"\nNoise: {noise}.")
    return "\n".join([*lines, *(f"\n{sentence}" for sentence in sentences(reasons))])


def sentences(reasons: Sequence[Reason]) -> list[str]:
    """One sentence for each reason; of those that came up in several windows, the first one and how many there are."""
    found: dict[object, list[Reason]] = {}
    for reason in reasons:
        found.setdefault(reason.code if "start" in reason.values else reason, []).append(reason)
    lines = []
    for first, *others in found.values():
        further = f" The same in {len(others)} further window{'s' * (len(others) > 1)}." if others else ""
        lines.append(f"{first.sentence}{further}")
    return lines


def _diffuses(point: Mapping[str, float]) -> bool:
    """Whether the limit predicts a length and there is no effective flow, as under Langevin noise."""
    return tags.SPREAD_PREDICTED.name in point and tags.DRIFT_COSINE.name not in point


def terminal_line(point: Mapping[str, float]) -> str:
    """What was measured at one step, in one line.

    >>> terminal_line({"excess_loss": 0.5, "drift/cosine": 0.98, "window/steps": 500.0})
    'excess loss 0.5, cosine 0.98 over 500 steps'
    """
    found = [f"{tag.label} {point[tag.name]:.3g}" for tag in tags.shown_in(Place.TERMINAL) if tag.name in point]
    steps = point.get(tags.WINDOW_STEPS.name)
    return ", ".join(found) + (f" over {steps:.0f} steps" if steps else "")


def _feedback(ratio: Estimate, replicas: Estimate | None) -> str:
    """Where the noise ratio is clearly not 1: whether the replicas have it, too, so that fluctuations explain it."""
    if replicas is None or not math.isfinite(replicas.stderr) or abs(ratio.mean - 1) <= 2 * ratio.stderr:
        return ""
    theirs = f"that of the replicas is {replicas.mean:.3f} +- {replicas.stderr:.1g} times"
    if abs(replicas.mean - ratio.mean) <= 2 * math.hypot(ratio.stderr, replicas.stderr):
        return f"; {theirs}, too: fluctuations feed back on the mean motion, which no averaged path has"
    return f"; {theirs}: not the noise that was found, but something else makes the difference in this run"


@dataclass(frozen=True)
class Visibility:
    """Whether the effect of the noise is visible in a window.

    Args:
        visible: whether it is.
        words: how large it is, or how many steps it would take.
    """

    visible: bool
    words: str


def visibility(
    window: Window | None,
    distance: DistanceMeasurement | None,
    ratio: Estimate | None = None,
    replicas: Estimate | None = None,
) -> Visibility:
    """Whether the noise-induced drift is visible, and on which clock the noise moves the weights.

    Args:
        window: the last window.
        distance: the last measurement of the distance, with the limit's prediction.
        ratio: the noise ratio of all windows together; it counts if its error is smaller than that of the last window.
        replicas: the same of the replicas.

    >>> visibility(None, None)
    Visibility(visible=False, words='no window was compared with theory')
    """
    if window is None or not window.comparisons:
        return Visibility(False, "no window was compared with theory")
    limit = None if distance is None else distance.limit
    clock = "the limit was not predicted"
    if limit is not None and distance is not None and limit.order is not None:
        percent = 0.01 * distance.weight_norm / limit.drift.norm().item()
        clock = f"order {limit.order}, the singular limit moves the weights by 1 % in {percent:.2g} steps"
    elif limit is not None:
        clock = "no motion along the zero-loss set at order 1 or 2, by the singular limit"
    elif distance is not None and distance.reason is not None:
        clock = "too large for the singular limit"
    if window.diffuses:
        words = "but diffusion hides that: only the length of the motion can be predicted"
        return Visibility(True, f"{clock}, {words}")
    noise, steps, over = window.noise, window.steps, ""
    if window.drift is None or noise is None:
        return Visibility(False, f"{clock}; the noise-induced drift was not resolved")
    # early windows may be less certain than the last one
    if ratio is not None and (ratio.stderr < noise.ratio.stderr or not math.isfinite(noise.ratio.stderr)):
        over = " over all windows"
    else:
        ratio, replicas = noise.ratio, noise.replicas
    if not math.isfinite(ratio.stderr):
        return Visibility(False, f"{clock}; without replicas the error of the noise-induced drift is unknown")
    if ratio.stderr <= _VISIBLE:
        return Visibility(
            True,
            f"{clock}; the noise-induced drift{over} is {ratio.mean:.3f} +- {ratio.stderr:.1g} times the predicted "
            f"one, whose norm is {noise.share:.0%} of that of the predicted motion{_feedback(ratio, replicas)}",
        )
    needed = steps * (ratio.stderr / _VISIBLE) ** 2
    return Visibility(
        False,
        f"{clock}; not visible in windows of {steps} steps: the norm of the noise-induced drift is {noise.share:.2%} "
        f"of that of the predicted motion; it would take windows of about {needed:.2g} steps",
    )
