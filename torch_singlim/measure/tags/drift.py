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
    meaning="length of the window that ends here; what is logged with it belongs to that window",
    advice="Longer windows show weaker drifts",
    group="Drift",
    chart="",
    value=of_window(lambda w: float(w.steps)),
)
DRIFT_MEASURED = Tag(
    name="drift/measured",
    label="measured",
    unit="weight norm",
    meaning="displacement of the weights over the window, without transient perturbations",
    advice="Measured for every training, whatever can be predicted of it",
    group="Drift",
    chart=_DISPLACEMENT,
    value=of_window(lambda w: torch.linalg.vector_norm(w.displacement).item()),
)
DRIFT_PREDICTED = Tag(
    name="drift/predicted",
    label="predicted",
    unit="weight norm",
    meaning="displacement by descent on the effective loss E_η L(w, η), full batch, with α V added for noises of "
    "order 2 (`finite_window`: a few exponential steps; unit-step integration in windows up to 200 steps, and where "
    "the estimated error of the long steps is above a fifth). Langevin and custom noises of order 2 have none",
    advice="As large as measured, times the cosine",
    group="Drift",
    chart=_DISPLACEMENT,
    value=of_drift(lambda c: c.agreement.predicted),
    needs=needs(Need.FLOW),
)
DRIFT_COSINE = Tag(
    name="drift/cosine",
    label="cosine",
    unit="–",
    meaning="between those two displacements; to be read against `drift/ceiling` and `drift/baseline_cosine`",
    advice="At the ceiling: as good as it can be. Well below: look at `quality/stderr` and `quality/error`, then at "
    "what is unsupported",
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
    advice="Low: longer windows; more `replicas` make it more precise",
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
    advice="0.9 to 1.1 is usual; off with a good cosine: step size near the edge of stability",
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
    meaning="the same cosine for the baseline: descent on L alone, the noise switched off. It must be lower for the "
    "noise to be seen",
    advice="As high as the cosine: the loss alone explains the motion; train longer first",
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
    meaning="\\|measured − predicted\\|/\\|measured\\|: the share that is not explained",
    advice="Compare with √(1 − ceiling²), its floor",
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
    advice="1 within its error: the noise does what theory says",
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
    meaning="how large the noise-induced drift is in the prediction: \\|predicted − baseline\\|/\\|predicted\\|. "
    "Below a few percent other small effects hide it",
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
    meaning="between ∇V, the second-order expansion of the noise, and its average at finite size, "
    "E_η ∇L(w, η) − ∇L, at w. Clearly off by more than 0.15, the limit's prediction, which rests on the expansion, is "
    "invalidated",
    advice="Near 1: the limit's premise holds",
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
    meaning="\\|∇V\\| over the norm of that average",
    advice="Near 1: the limit's premise holds",
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
    meaning="between the tangential part of the motion and the singular limit −α^order P_T ∇V, frozen at the window's "
    "start",
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
    meaning="the same motion over the limit's, as `drift/speed`",
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
    meaning="the same by the limit, drift and diffusion: √(\\|K drift\\|² + K · diffusion · dim Γ)",
    advice="Equal within a few percent under Langevin noise, which diffuses; else see `limit/frozen_speed`",
    group="Singular limit",
    chart=_ALONG,
    value=of_window(lambda w: None if w.spread is None else w.spread.predicted),
    needs=needs(Need.MOVES),
    shown=shown(Place.LENGTHS),
)
