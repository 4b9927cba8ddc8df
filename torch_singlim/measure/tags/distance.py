"""Series of the distance to the zero-loss set."""

from __future__ import annotations

import torch

from torch_singlim.measure.distance import DistanceMeasurement
from torch_singlim.measure.measurement import Measurement
from torch_singlim.measure.tags.tag import Need, Place, Tag, needs, of_distance, of_relaxed, of_window, shown


def _relaxed_share(d: DistanceMeasurement) -> float | None:
    return None if d.relaxed is None else d.relaxed.count / max(d.relaxed.num_modes, 1)


def _linearised(m: Measurement) -> float | None:
    if m.distance is not None:
        return m.distance.nearest.linearised_distance
    return None if m.linearised is None else torch.linalg.vector_norm(m.linearised.x).item()


_TO_SET = "Distance to the zero-loss set [weight norm]"
_RELAXED = "Relaxed part of the distance, measured and expected [weight norm]"

EXCESS_LOSS = Tag(
    name="excess_loss",
    label="excess loss",
    unit="loss",
    meaning="L(w) of the samples without dropout: mean loss minus its infimum, zero exactly on Γ. Logged ten times per "
    "decade of steps",
    advice="Should fall by orders of magnitude. If it stays above a positive value, the noise is strong, or there are "
    "too few weights",
    group="Distance",
    chart="Excess loss [loss]",
    value=lambda m: m.excess_loss,
    shown=shown(Place.DISTANCES, Place.TERMINAL, Place.PROGRESS, Place.REPORT, Place.FINAL),
)
NEAREST = Tag(
    name="distance/nearest",
    label="distance",
    unit="weight norm",
    meaning="distance to the nearest point of Γ; an upper bound if `quality/converged` is 0",
    advice="Falls fast at first, then changes slowly; a star in the verdict marks upper bounds",
    group="Distance",
    chart=_TO_SET,
    value=of_distance(lambda d: d.nearest.distance),
    shown=shown(Place.DISTANCES, Place.TERMINAL, Place.PROGRESS, Place.REPORT, Place.FINAL),
)
LINEARISED = Tag(
    name="distance/linearised",
    label="linearised",
    unit="weight norm",
    meaning="\\|B⁺b\\|, the distance in the linear model at w, dominated by the smallest eigenvalues of H. Correct to "
    "first order near Γ",
    advice="Equal to `distance/nearest` near Γ; if they differ much, the linear model is not valid at this distance",
    group="Distance",
    chart=_TO_SET,
    value=_linearised,
    shown=shown(Place.DISTANCES, Place.PROGRESS),
)
RELAXED = Tag(
    name="distance/relaxed",
    label="relaxed part",
    unit="weight norm",
    meaning="the part of the linearised distance at w along the relaxed modes, α λ · steps ≥ 3, by the filter "
    "1/(1 + (3/(α λ · steps))⁴)",
    advice="Compare with `distance/relaxed_expected`",
    group="Distance",
    chart=_RELAXED,
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
    group="Distance",
    chart=_RELAXED,
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
    group="Distance",
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
    group="Distance",
    chart="Relaxed modes [share]",
    value=of_distance(_relaxed_share),
    needs=needs(Need.LIMIT),
    shown=shown(Place.DISTANCES),
)
BASELINE_MOVED = Tag(
    name="distance/baseline_moved",
    label="baseline's way",
    unit="weight norm",
    meaning="\\|n − w₀\\|, how far the path without noise has moved since the beginning of the window: the part of "
    "the distance to Γ that relaxes within so many steps once the noise stops",
    advice="Smaller than `drift/measured`: most of the motion is due to the noise",
    group="Distance",
    chart="Way of the path without noise [weight norm]",
    value=of_window(lambda w: w.baseline_moved),
    needs=needs(Need.BASELINE),
)
