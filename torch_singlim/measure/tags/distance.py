"""Series of the distance to the zero-loss set."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from torch_singlim.linalg import Estimate
from torch_singlim.measure.distance import DistanceMeasurement
from torch_singlim.measure.levels import Level
from torch_singlim.measure.samples import growth
from torch_singlim.measure.tags.tag import (
    Group,
    Need,
    Place,
    Role,
    Tag,
    needs,
    of_distance,
    of_level,
    of_limit,
    of_relaxed,
    shown,
)


def _relaxed_share(d: DistanceMeasurement) -> float | None:
    return None if d.relaxed is None else d.relaxed.count / max(d.relaxed.num_modes, 1)


def _certain(d: DistanceMeasurement) -> float | None:
    return d.nearest.distance if math.isfinite(d.nearest.error) else None


def _linearised(d: DistanceMeasurement) -> float | None:
    return None if d.tangent.unresolved else d.nearest.linearised_distance  # None after a warm start


def _growth(distances: Mapping[int, float], read: Callable[[Estimate], float]) -> float | None:
    p = growth(distances)
    return None if p is None else read(p)


def _level(level: Level, words: str, advice: str, *places: Place) -> tuple[Tag, Tag, Tag]:
    """The tags of a level: the distance that a point proves, the same in the linear model, the whole training set."""
    name = f"distance/{level.name.lower()}"
    return (
        Tag(
            name=name,
            label=f"distance to {words}",
            unit="weight norm",
            meaning=f"\\|v − w\\| for a point v that was found with L(v) ≤ {level.value:g} L(w), evaluated in float64: "
            "an upper bound for the distance to this level. The search is local: a nearer point may exist",
            advice=advice,
            group=Group.SET,
            chart=_TO_LEVELS,
            value=of_level(level, lambda p: p.distance),
            shown=shown(Place.DISTANCES, *places),
        ),
        Tag(
            name=f"{name}_linear",
            label=f"distance to {words}, linear model",
            unit="weight norm",
            meaning="the distance to the same level in the linear model at w: an estimate, not a bound",
            advice=f"Equal to `{name}`: the linear model holds that far",
            group=Group.SET,
            chart="",
            value=of_level(level, lambda p: p.linear),
        ),
        Tag(
            name=f"{name}_whole",
            label=f"whole training set, at the point for {words}",
            unit="share",
            meaning="excess loss of the whole training set at that point v, as a share of its excess loss at w, where "
            f"a part of the training set is measured: v proves that the whole is no farther than `{name}` from this "
            "level of its own loss",
            advice=f"Near {level.value:g}: the samples speak for the training set. Above 1: v says nothing about it",
            group=Group.TRUST,
            chart=_WHOLE,
            value=lambda m: m.whole.get(level),
            needs=needs(Need.PART),
        ),
    )


_TO_LEVELS = "Distance to lower levels of the loss [weight norm]"
_WHOLE = "Loss of the whole training set at points for a part of it [share]"
_TO_SET = "Distance to the zero-loss set [weight norm]"
_RELAXED = "Relaxed part of the distance [weight norm]"

EXCESS_LOSS = Tag(
    name="excess_loss",
    label="excess loss",
    unit="loss",
    meaning="L(w) of the samples without dropout: mean loss minus its infimum, zero exactly on Γ. Logged ten times per "
    "decade of steps",
    advice="Should fall by orders of magnitude. If it stays above a positive value, the noise is strong, or there are "
    "too few weights",
    group=Group.SET,
    chart="Excess loss [loss]",
    value=lambda m: m.excess_loss,
    shown=shown(Place.DISTANCES, Place.TERMINAL, Place.PROGRESS, Place.REPORT, Place.FINAL),
)
HALF, HALF_LINEAR, HALF_WHOLE = _level(
    Level.HALF,
    "half",
    "The distance to rely on, measured at every measurement. It falls as training proceeds, or settles where noise and "
    "descent are in balance",
    Place.TERMINAL,
    Place.PROGRESS,
    Place.REPORT,
    Place.FINAL,
)
TENTH, TENTH_LINEAR, TENTH_WHOLE = _level(
    Level.TENTH,
    "a tenth",
    "Measured as the budget allows; much larger than `distance/half` if small eigenvalues matter",
    Place.REPORT,
)
HUNDREDTH, HUNDREDTH_LINEAR, HUNDREDTH_WHOLE = _level(
    Level.HUNDREDTH,
    "a hundredth",
    "Measured as the budget allows; lower levels come closer to `distance/nearest`",
    Place.REPORT,
)
NEAREST = Tag(
    name="distance/nearest",
    label="nearest point",
    unit="weight norm",
    meaning="distance to the nearest point of Γ, if its error could be estimated, which is `quality/nearest_error`",
    advice="Falls fast at first, then changes slowly",
    group=Group.SET,
    chart=_TO_SET,
    value=of_distance(_certain),
    shown=shown(Place.DISTANCES, Place.TERMINAL, Place.PROGRESS, Place.REPORT, Place.FINAL),
)
OF_SAMPLES = Tag(
    name="distance/of_samples",
    label="nearest point, fewer samples",
    unit="weight norm",
    meaning="distance to the nearest point of the zero-loss set of the first N of the samples, which contains that of "
    "more samples: a lower bound for the distance of the training set, up to the error of the search. Measured where "
    "a part of the training set is, as the budget allows",
    advice="If it still grows with N, the distance of the training set is larger than `distance/nearest`; how much "
    "larger is not known",
    group=Group.TRUST,
    chart="Distance to the zero-loss set of the first N samples [weight norm]",
    value=lambda m: None,
    members=lambda m: {str(count): distance for count, distance in m.of_samples.items()},
    needs=needs(Need.PART),
)
GROWTH = Tag(
    name="distance/growth",
    label="growth with the number of samples",
    unit="–",
    meaning="p in distance ~ N^p, fitted to `distance/of_samples/N`; the standard error is that of the fit",
    advice="Near 0: more samples would hardly change the distance. The fit says nothing of sizes beyond",
    group=Group.TRUST,
    chart="",
    value=lambda m: _growth(m.of_samples, lambda p: p.mean),
    stderr=lambda m: _growth(m.of_samples, lambda p: p.stderr),
    needs=needs(Need.PART),
)
LINEARISED = Tag(
    name="distance/linearised",
    label="linearised",
    unit="weight norm",
    meaning="\\|B⁺b\\|, the distance to Γ in the linear model at w, if B Bᵀ is factored there. It is dominated by "
    "the smallest eigenvalues of H, for which the linear model holds next to Γ alone: a figure about this model, not "
    "about the network",
    advice="Equal to `distance/nearest` next to Γ only; do not read it as a distance elsewhere",
    group=Group.SET,
    chart="",
    value=of_distance(_linearised),
)
IN_METRIC = Tag(
    name="distance/in_metric",
    label="nearest point in the metric",
    unit="weight norm",
    meaning="distance to the nearest point of Γ in the metric of an adaptive optimizer: \\|v − w\\| with each weight "
    "divided by the root of its step size, relative to the harmonic mean of all. In it the training is plain descent",
    advice="The relaxed part and the limit are measured in this metric",
    group=Group.SET,
    chart=_TO_SET,
    value=lambda m: None if m.in_metric is None else _certain(m.in_metric),
    needs=needs(Need.LIMIT, Need.METRIC),
)
RELAXED = Tag(
    name="distance/relaxed",
    label="relaxed part",
    unit="weight norm",
    meaning="the part of the linearised distance at w along the relaxed modes, α λ · steps ≥ 3, by the filter "
    "1/(1 + (3/(α λ · steps))⁴)",
    advice="Compare with `distance/relaxed_expected`",
    group=Group.SET,
    chart=_RELAXED,
    curve="relaxed",
    value=of_relaxed(lambda r: r.measured),
    needs=needs(Need.LIMIT),
    shown=shown(Place.DISTANCES, Place.REPORT),
)
RELAXED_EXPECTED = Tag(
    name="distance/relaxed_expected",
    label="expected",
    unit="weight norm",
    meaning="root mean square of that part by theory: offset −H⁺g, where g is the noise's average gradient at w (α∇V "
    "at order 2), and normal fluctuation. There is no prediction for the rest of the distance",
    advice="Usually within 10 % of `distance/relaxed`; otherwise the steps are large (α λ near 2), or modes have only "
    "just relaxed",
    group=Group.SET,
    chart=_RELAXED,
    role=Role.PREDICTED,
    curve="relaxed",
    value=of_relaxed(lambda r: r.expected),
    needs=needs(Need.LIMIT),
    shown=shown(Place.DISTANCES, Place.REPORT),
)
RELAXED_COSINE = Tag(
    name="distance/relaxed_cosine",
    label="cosine with the expected offset",
    unit="–",
    meaning="cosine between that part and the predicted offset; low if the fluctuation dominates, as at order 2",
    advice="Near 1 at order 1: the offset has the predicted direction",
    group=Group.SET,
    chart="",
    value=of_relaxed(lambda r: r.cosine),
    needs=needs(Need.LIMIT),
)
RELAXED_SHARE = Tag(
    name="distance/relaxed_share",
    label="share of relaxed modes",
    unit="share",
    meaning="relaxed modes as a share of all normal modes; the theory's two time scales exist for relaxed modes only. "
    "Above 4,096 residuals an estimate, as a share of all residuals",
    advice="Low: the limit will not agree, but the averaged path may",
    group=Group.SET,
    chart="Relaxed modes [share]",
    value=of_limit(_relaxed_share),
    needs=needs(Need.LIMIT),
    shown=shown(Place.DISTANCES),
)
