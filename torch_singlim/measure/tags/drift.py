"""Series of the motion over a window: the drift, its noise-induced part, the singular limit."""

from __future__ import annotations

import torch

from torch_singlim.measure.tags.tag import (
    Need,
    Place,
    Tag,
    needs,
    of_distance,
    of_drift,
    of_model,
    of_predicted_window,
    of_window,
    shown,
)
from torch_singlim.measure.window import Model

_COSINES = "Cosine with the measured motion: baseline, effective flow, noise ceiling"
_DISPLACEMENT = "Displacement over a window [weight norm]"

WINDOW_STEPS = Tag(
    name="window/steps",
    label="steps",
    unit="steps",
    meaning="length of the window that ends here; the values for this window are logged at the same step",
    advice="Weaker drifts are visible in longer windows",
    group="Drift",
    chart="",
    value=of_window(lambda w: float(w.steps)),
)
DRIFT_MEASURED = Tag(
    name="drift/measured",
    label="measured",
    unit="weight norm",
    meaning="displacement of the weights over the window, without transient perturbations",
    advice="Measured for every training, also if the drift is not predicted",
    group="Drift",
    chart=_DISPLACEMENT,
    value=of_window(lambda w: torch.linalg.vector_norm(w.displacement).item()),
)
DRIFT_PREDICTED = Tag(
    name="drift/predicted",
    label="predicted",
    unit="weight norm",
    meaning="displacement by full-batch descent on the effective loss E_η L(w, η), plus α V for noises of order 2 "
    "(`finite_window`: a few exponential steps; unit-step integration in windows up to 200 steps, and if the estimated "
    "error of the long steps is above a fifth). Not available for Langevin noise and custom noises of order 2",
    advice="Should be `drift/measured` times `drift/cosine`",
    group="Drift",
    chart=_DISPLACEMENT,
    value=of_drift(lambda c: c.agreement.predicted),
    needs=needs(Need.FLOW),
)
DRIFT_COSINE = Tag(
    name="drift/cosine",
    label="cosine",
    unit="–",
    meaning="cosine between those two displacements; compare it with `drift/ceiling` and `drift/baseline_cosine`",
    advice="At the noise ceiling: as good as it can be. Well below: look at `quality/stderr` and `quality/error`, then "
    "at the reasons in the verdict",
    group="Drift",
    chart=_COSINES,
    value=of_drift(lambda c: c.agreement.cosine),
    stderr=of_predicted_window(lambda w: w.scatter.cosine),
    band="Cosine with the effective flow, standard error",
    needs=needs(Need.FLOW),
    shown=shown(Place.WINDOWS, Place.TERMINAL, Place.REPORT, Place.FINAL),
)
DRIFT_CEILING = Tag(
    name="drift/ceiling",
    label="ceiling",
    unit="–",
    meaning="the noise ceiling: the best cosine that any deterministic prediction can have with one noisy run "
    "(with `replicas`)",
    advice="Low: use longer windows; more `replicas` make it more accurate",
    group="Drift",
    chart=_COSINES,
    value=of_window(lambda w: w.ceiling),
    needs=needs(Need.REPLICAS),
    shown=shown(Place.WINDOWS, Place.TERMINAL, Place.REPORT),
)
DRIFT_SPEED = Tag(
    name="drift/speed",
    label="speed",
    unit="–",
    meaning="⟨measured, predicted⟩/⟨predicted, predicted⟩; 1: as fast as predicted",
    advice="Usually 0.9 to 1.1; otherwise, with a good cosine, the step size is near the edge of stability",
    group="Drift",
    chart="",
    value=of_drift(lambda c: c.agreement.speed),
    stderr=of_predicted_window(lambda w: w.scatter.speed),
    band="Speed, measured / predicted, standard error",
    needs=needs(Need.FLOW),
    shown=shown(Place.WINDOWS, Place.TERMINAL, Place.REPORT, Place.FINAL),
)
DRIFT_BASELINE_COSINE = Tag(
    name="drift/baseline_cosine",
    label="baseline cosine",
    unit="–",
    meaning="the same cosine for the baseline, descent on L alone without noise. The effect of the noise is visible "
    "only if it is lower than `drift/cosine`",
    advice="As high as `drift/cosine`: the loss alone explains the motion; train longer first",
    group="Drift",
    chart=_COSINES,
    value=of_model(Model.BASELINE, lambda c: c.agreement.cosine),
    needs=needs(),
    shown=shown(Place.WINDOWS, Place.TERMINAL, Place.REPORT, Place.FINAL),
)
DRIFT_RESIDUAL = Tag(
    name="drift/residual",
    label="residual",
    unit="–",
    meaning="\\|measured − predicted\\|/\\|measured\\|, the share of the motion that is not explained",
    advice="Compare with its smallest possible value, √(1 − ceiling²)",
    group="Drift",
    chart="",
    value=of_drift(lambda c: c.agreement.residual),
    needs=needs(Need.FLOW),
)

NOISE_RATIO = Tag(
    name="noise/ratio",
    label="noise ratio",
    unit="–",
    meaning="the noise-induced drift, measured over predicted: ⟨measured − baseline, predicted − baseline⟩/"
    "\\|predicted − baseline\\|²; 1: as predicted. Standard error: scatter of independent runs (`replicas`)",
    advice="1 within its error: the noise has the predicted effect",
    group="Noise-induced drift",
    chart="",
    value=of_predicted_window(lambda w: w.noise_ratio.mean),
    stderr=of_predicted_window(lambda w: w.noise_ratio.stderr),
    band="Noise-induced drift, measured / predicted, standard error",
    needs=needs(Need.FLOW, Need.REPLICAS, Need.MOVES),
    shown=shown(Place.WINDOWS, Place.REPORT, Place.FINAL),
)
NOISE_SHARE = Tag(
    name="noise/share",
    label="noise share",
    unit="–",
    meaning="size of the noise-induced drift in the prediction, \\|predicted − baseline\\|/\\|predicted\\|; it can "
    "exceed 1. Below a few percent, other small effects hide the noise",
    advice="Below 0.05 do not interpret `noise/ratio`",
    group="Noise-induced drift",
    chart="",
    value=of_predicted_window(lambda w: w.noise_share),
    needs=needs(Need.FLOW),
)
EXPANSION_COSINE = Tag(
    name="expansion/cosine",
    label="cosine of the expansion",
    unit="–",
    meaning="cosine at w between ∇V, the second-order expansion of the noise, and the average over noise of finite "
    "size, E_η ∇L(w, η) − ∇L. If it is significantly below 0.85, the prediction of the limit, which rests on the "
    "expansion, is invalidated",
    advice="Near 1: the assumption of the limit holds",
    group="Noise-induced drift",
    chart="",
    value=of_distance(lambda d: None if d.expansion is None else d.expansion.cosine),
    stderr=of_distance(lambda d: None if d.expansion is None else d.expansion.stderr),
    needs=needs(Need.MOVES),
)
EXPANSION_RATIO = Tag(
    name="expansion/ratio",
    label="norm of the expansion",
    unit="–",
    meaning="\\|∇V\\| over the norm of that average; the prediction of the limit is invalidated if this differs "
    "significantly from 1 by more than 0.15",
    advice="Near 1: the assumption of the limit holds",
    group="Noise-induced drift",
    chart="",
    value=of_distance(lambda d: None if d.expansion is None else d.expansion.ratio),
    stderr=of_distance(lambda d: None if d.expansion is None else d.expansion.stderr),
    needs=needs(Need.MOVES),
)

_ALONG = "Motion along the zero-loss set, and its limit [weight norm]"

LIMIT_FROZEN_COSINE = Tag(
    name="limit/frozen_cosine",
    label="limit cosine",
    unit="–",
    meaning="cosine between the tangential part of the motion and the singular limit −α^order P_T ∇V, frozen at the "
    "start of the window",
    advice="Near 1 only where `distance/relaxed_share` is near 1",
    group="Singular limit",
    chart="",
    value=of_model(Model.LIMIT, lambda c: c.agreement.cosine),
    needs=needs(Need.MOVES),
    shown=shown(Place.WINDOWS, Place.REPORT),
)
LIMIT_FROZEN_SPEED = Tag(
    name="limit/frozen_speed",
    label="limit speed",
    unit="–",
    meaning="speed of the same motion relative to the limit, defined like `drift/speed`",
    advice="Near 1 only where `distance/relaxed_share` is near 1",
    group="Singular limit",
    chart="",
    value=of_model(Model.LIMIT, lambda c: c.agreement.speed),
    needs=needs(Need.MOVES),
    shown=shown(Place.WINDOWS, Place.REPORT),
)
SPREAD_MEASURED = Tag(
    name="limit/spread_measured",
    label="length along the zero-loss set",
    unit="weight norm",
    meaning="length of the tangential motion over the window",
    advice="Compare with `limit/spread_predicted`",
    group="Singular limit",
    chart=_ALONG,
    value=of_window(lambda w: None if w.spread is None else w.spread.measured),
    needs=needs(Need.MOVES),
    shown=shown(Place.LENGTHS),
)
SPREAD_PREDICTED = Tag(
    name="limit/spread_predicted",
    label="predicted length",
    unit="weight norm",
    meaning="the same length by the limit, from drift and diffusion: √(\\|K drift\\|² + K · diffusion · dim Γ)",
    advice="Equal within a few percent under Langevin noise, which diffuses; for other noises see `limit/frozen_speed`",
    group="Singular limit",
    chart=_ALONG,
    value=of_window(lambda w: None if w.spread is None else w.spread.predicted),
    needs=needs(Need.MOVES),
    shown=shown(Place.LENGTHS),
)
