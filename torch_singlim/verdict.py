"""From records to what is logged, tag by tag, and from what was logged to a verdict in words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from torch_singlim.agreement import compare
from torch_singlim.observe import Observation, WindowObservation

__all__ = ["History", "observation_scalars", "verdict", "window_scalars"]

# step -> tag -> value: all that was logged in a run
History = Mapping[int, Mapping[str, float]]


def _finite(scalars: dict[str, float]) -> dict[str, float]:
    return {f"singlim/{tag}": value for tag, value in scalars.items() if math.isfinite(value)}


def observation_scalars(o: Observation) -> dict[str, float]:
    """What is logged of a probe: tag -> value; units in the README's table."""
    scalars = {
        "loss_gap": o.loss_gap,
        "distance/measured": o.foot.distance,
        "distance/linearised": o.foot.linearised_distance,
        "quality/residual": o.foot.residual,
        "quality/converged": float(o.foot.converged),
        "quality/unresolved": o.tangent.unresolved,
        "quality/tangent_steps": o.tangent_steps,
    }
    if o.separated is not None and o.num_separated is not None:
        scalars["separation"] = o.num_separated / max(o.num_modes, 1)
        if o.num_separated:
            scalars["distance/separated"] = o.separated
            scalars["distance/predicted"] = math.nan if o.expected is None else o.expected
            scalars["distance/cosine"] = o.direction
    if o.finite_noise is not None:
        scalars |= {
            "drift/finite_noise_cosine": o.finite_noise.cosine,
            "drift/finite_noise_ratio": o.finite_noise.norm_ratio,
            "drift/finite_noise_stderr": o.finite_noise.stderr,
        }
    if o.limit is not None and o.limit.order is not None:
        scalars |= {
            "potential": o.limit.potential.mean,
            "potential_stderr": o.limit.potential.stderr,
        }
    return _finite(scalars)


def window_scalars(window: WindowObservation) -> dict[str, float]:
    """What is logged of a window, at its end: tag -> value; units in the README's table."""
    scalars = {
        "drift/window": float(window.stop - window.start),
        "drift/measured": torch.linalg.vector_norm(window.displacement).item(),
        "drift/null_cosine": window.null.cosine,
        "drift/ceiling": window.ceiling,
        "cost/products": float(window.products),
    }
    if window.drift is not None and window.prediction is not None and window.withdrawn is None:
        scalars |= {
            "drift/cosine": window.drift.cosine,
            "drift/cosine_stderr": window.scatter.cosine,
            "drift/speed_ratio": window.drift.speed_ratio,
            "drift/speed_ratio_stderr": window.scatter.speed_ratio,
            "drift/residual_ratio": window.drift.residual_ratio,
            "drift/predicted": window.drift.predicted,
            "quality/stderr": window.prediction.stderr,
            "quality/error": window.prediction.error,
            "drift/pull_share": window.pull_share,
        }
        if window.pull is not None:
            scalars |= {"drift/pull": window.pull.mean, "drift/pull_stderr": window.pull.stderr}
    if window.reference is not None and window.flow is not None and window.flow.status == "ok":
        scalars |= {
            "reference/cosine": window.reference.cosine,
            "reference/speed_ratio": window.reference.speed_ratio,
            "reference/predicted": window.reference.predicted,
            "reference/stderr": window.flow.stderr,
        }
        if window.prediction is not None and window.withdrawn is None:
            agreement = compare(window.flow.displacement, window.prediction.displacement)
            scalars["reference/window_cosine"] = agreement.cosine
    if window.limit is not None:
        scalars |= {
            "limit/cosine": window.limit.cosine,
            "limit/speed_ratio": window.limit.speed_ratio,
            "limit/measured": window.limit.measured,
            "limit/predicted": window.limit.predicted,
        }
    if window.spread is not None:
        scalars |= {
            "limit/spread_measured": window.spread.measured,
            "limit/spread_predicted": window.spread.predicted,
        }
    return _finite(scalars)


def verdict(
    history: History,
    *,
    not_covered: Sequence[str] = (),
    withdrawn: Sequence[str] = (),
    left_out: str | None = None,
) -> str:
    """A short markdown table from what was logged: each probe's distance, each window's drift against theory.

    Below it, why the drift is not predicted, which predictions were withdrawn, and what was left out to save time.
    """

    def row(point: Mapping[str, float], tags: Sequence[str]) -> str:
        values = (point.get(f"singlim/{tag}") for tag in tags)
        return " | ".join("-" if v is None else f"{v:.3g}" for v in values)

    probes = {step: p for step, p in history.items() if "singlim/distance/linearised" in p}
    windows = {step: p for step, p in history.items() if "singlim/drift/window" in p}
    lines = ["The distance was not measured."]
    if probes:
        lines = [
            "| step | loss gap | distance | linearised | settled part | expected | share of settled modes |",
            "|---:|---:|---:|---:|---:|---:|---:|",
        ]
    for step, point in probes.items():
        star = "" if point.get("singlim/quality/converged", 1.0) else " *"
        distance = row(point, ["loss_gap", "distance/measured"])
        settled = ["distance/linearised", "distance/separated", "distance/predicted", "separation"]
        lines.append(f"| {step} | {distance}{star} | {row(point, settled)} |")
    if not all(p.get("singlim/quality/converged", 1.0) for p in probes.values()):
        lines.append("\n\\* the nearest point was not found to tolerance: an upper bound")
    if windows:
        lines += [
            "",
            "| window | cosine | ceiling | speed ratio | null cosine | pull | limit cosine | limit speed ratio |",
            "|---:|---:|---:|---:|---:|---:|---:|---:|",
        ]
    names = {step: f"{step - int(point['singlim/drift/window'])}-{step}" for step, point in windows.items()}
    drift = ["drift/cosine", "drift/ceiling", "drift/speed_ratio", "drift/null_cosine", "drift/pull"]
    for step, point in windows.items():
        lines.append(f"| {names[step]} | {row(point, [*drift, 'limit/cosine', 'limit/speed_ratio'])} |")
    diffusing = {step: p for step, p in windows.items() if "singlim/limit/spread_predicted" in p}
    if diffusing:
        lines += ["", "| window | length along the zero-loss set | predicted (diffusion) |", "|---:|---:|---:|"]
    for step, point in diffusing.items():
        lines.append(f"| {names[step]} | {row(point, ['limit/spread_measured', 'limit/spread_predicted'])} |")
    lines += [f"\nDrift not predicted: {reason}." for reason in not_covered]
    lines += [f"\nPrediction withdrawn: {reason}." for reason in withdrawn]
    if left_out is not None:
        lines.append(f"\nNot done: {left_out}.")
    return "\n".join(lines)
