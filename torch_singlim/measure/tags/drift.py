"""Series of the motion over a window: the drift, its noise-induced part, the singular limit."""

from __future__ import annotations

from collections.abc import Callable

from torch_singlim.measure.distance import Expansion
from torch_singlim.measure.measurement import Measurement
from torch_singlim.measure.tags.tag import (
    Group,
    Need,
    Place,
    Reader,
    Role,
    Tag,
    needs,
    of_drift,
    of_limit,
    of_model,
    of_noise,
    of_window,
    shown,
)
from torch_singlim.measure.window import Model

_DISPLACEMENT = "Displacement over a window [weight norm]"
_INDUCED = "Noise-induced drift over a window [weight norm]"
_COSINES = "Cosine with the measured displacement"
_SPEEDS = "Speed, measured / predicted"
_INDUCED_COSINES = "Cosine of the noise-induced drift"


def _of_expansion(which: int, read: Callable[[Expansion], float]) -> Reader:
    """Read from the distance measurement, or from the window if there is an expanded path."""

    def value(m: Measurement) -> float | None:
        if m.of_limit is not None and m.of_limit.expansion is not None:
            return read(m.of_limit.expansion)
        return None if m.window is None or m.window.expansion is None else m.window.expansion[which]

    return value


WINDOW_STEPS = Tag(
    name="window/steps",
    label="steps",
    unit="steps",
    meaning="steps since the beginning of the window; all values for this window are logged at the same steps",
    advice="Weaker drifts are visible in longer windows",
    group=Group.DRIFT,
    chart="",
    value=of_window(lambda w: float(w.steps)),
)
WINDOW_STATUS = Tag(
    name="window/status",
    label="followed",
    unit="0 or 1",
    meaning="whether paths beside the training followed it up to this step of the window; 0: the motion alone was "
    "measured",
    advice="0: the verdict gives the reason",
    group=Group.TRUST,
    chart="",
    value=of_window(lambda w: float(w.coupled is not None or Model.FULL_BATCH in w.comparisons)),
)
REPLAY_ERROR = Tag(
    name="window/replay_error",
    label="replay error",
    unit="share",
    meaning="the step that ends here, repeated on a copy: \\|difference to what training did\\|/\\|step\\|. The "
    "values of a step are logged only if it is below 10⁻³",
    advice="About 10⁻⁶ in single precision, often 0",
    group=Group.TRUST,
    chart="Error of replays [share of a step]",
    value=of_window(lambda w: w.replay_error),
    needs=needs(Need.PATHS),
)
DRIFT_MEASURED = Tag(
    name="drift/measured",
    label="displacement",
    unit="weight norm",
    meaning="displacement of the weights over the window, without transient perturbations",
    advice="Measured for every training, also if the drift is not predicted",
    group=Group.DRIFT,
    chart=_DISPLACEMENT,
    curve="displacement",
    value=of_window(lambda w: w.measured),
    shown=shown(Place.REPORT),
)
DRIFT_PREDICTED = Tag(
    name="drift/predicted",
    label="predicted displacement",
    unit="weight norm",
    meaning="displacement of the averaged path: the same steps on the same batches, with the gradient averaged over "
    "new draws of the noise. Between checkpoints: full-batch descent on the effective loss E_η L(w, η)",
    advice="Should be `drift/measured` times `drift/cosine`",
    group=Group.DRIFT,
    chart=_DISPLACEMENT,
    role=Role.PREDICTED,
    curve="displacement",
    value=of_drift(lambda c: c.agreement.predicted),
    needs=needs(Need.PATHS),
)
BASELINE_MOVED = Tag(
    name="distance/baseline_moved",
    label="baseline's way",
    unit="weight norm",
    meaning="\\|n − w₀\\|, how far the path without noise has moved since the beginning of the window: the part of "
    "the distance to Γ that relaxes within so many steps once the noise stops",
    advice="Smaller than `drift/measured`: most of the motion is due to the noise",
    group=Group.DRIFT,
    chart=_DISPLACEMENT,
    role=Role.BASELINE,
    curve="displacement",
    value=of_window(lambda w: w.baseline_moved),
    needs=needs(Need.BASELINE),
)
DRIFT_COSINE = Tag(
    name="drift/cosine",
    label="cosine",
    unit="–",
    meaning="cosine between those two displacements; compare it with `drift/ceiling` and `drift/baseline_cosine`",
    advice="At the noise ceiling: as good as it can be. Well below: the weights fluctuate too much for any "
    "deterministic path, or they are far from the zero-loss set",
    group=Group.THEORY,
    chart=_COSINES,
    role=Role.PREDICTED,
    curve="cosine",
    value=of_drift(lambda c: c.agreement.cosine),
    stderr=of_drift(lambda c: c.agreement.cosine_stderr),
    band="Cosine with the averaged path, standard error",
    needs=needs(Need.PATHS),
    shown=shown(Place.WINDOWS, Place.TERMINAL, Place.REPORT, Place.FINAL),
)
DRIFT_CEILING = Tag(
    name="drift/ceiling",
    label="ceiling",
    unit="–",
    meaning="the noise ceiling: the best cosine that any deterministic prediction can have with one noisy run on these "
    "batches, from `replicas`. It bounds a mean: a single run may exceed it",
    advice="Low: use longer windows; more `replicas` make it more accurate",
    group=Group.THEORY,
    chart=_COSINES,
    role=Role.CEILING,
    curve="cosine",
    value=of_window(lambda w: w.ceiling),
    needs=needs(Need.REPLICAS),
    shown=shown(Place.WINDOWS, Place.TERMINAL, Place.REPORT),
)
DRIFT_SPEED = Tag(
    name="drift/speed",
    label="speed",
    unit="–",
    meaning="⟨measured, predicted⟩/⟨predicted, predicted⟩; 1: as fast as predicted",
    advice="Usually 0.95 to 1.05; otherwise the fluctuations themselves act on the drift",
    group=Group.THEORY,
    chart=_SPEEDS,
    role=Role.PREDICTED,
    curve="speed",
    value=of_drift(lambda c: c.agreement.speed),
    stderr=of_drift(lambda c: c.agreement.speed_stderr),
    band="Speed, measured / predicted, standard error",
    needs=needs(Need.PATHS),
    shown=shown(Place.WINDOWS, Place.TERMINAL, Place.REPORT, Place.FINAL),
)
DRIFT_BASELINE_COSINE = Tag(
    name="drift/baseline_cosine",
    label="baseline cosine",
    unit="–",
    meaning="the same cosine for the baseline, the same steps on the same batches without noise. The effect of the "
    "noise is visible only if it is lower than `drift/cosine`",
    advice="As high as `drift/cosine`: the loss alone explains the motion; train longer first",
    group=Group.THEORY,
    chart=_COSINES,
    role=Role.BASELINE,
    curve="cosine",
    value=of_model(Model.BASELINE, lambda c: c.agreement.cosine),
    needs=needs(Need.BASELINE),
    shown=shown(Place.WINDOWS, Place.TERMINAL, Place.REPORT, Place.FINAL),
)
DRIFT_RESIDUAL = Tag(
    name="drift/residual",
    label="residual",
    unit="–",
    meaning="\\|measured − predicted\\|/\\|measured\\|, the share of the motion that is not explained",
    advice="Compare with its smallest possible value, √(1 − ceiling²)",
    group=Group.THEORY,
    chart="",
    value=of_drift(lambda c: c.agreement.residual),
    needs=needs(Need.PATHS),
)

NOISE_MEASURED = Tag(
    name="noise/measured",
    label="noise-induced, measured",
    unit="weight norm",
    meaning="\\|measured − baseline\\|, displacement of the run relative to the baseline",
    advice="What the noise does, fluctuations included",
    group=Group.DRIFT,
    chart=_INDUCED,
    curve="noise_induced",
    value=of_noise(lambda n: n.measured),
    needs=needs(Need.BASELINE),
)
NOISE_PREDICTED = Tag(
    name="noise/predicted",
    label="noise-induced, predicted",
    unit="weight norm",
    meaning="\\|predicted − baseline\\|, displacement of the averaged path relative to the baseline",
    advice="Should be `noise/measured` times `noise/cosine`",
    group=Group.DRIFT,
    chart=_INDUCED,
    role=Role.PREDICTED,
    curve="noise_induced",
    value=of_noise(lambda n: n.predicted),
    needs=needs(Need.BASELINE),
)
NOISE_COSINE = Tag(
    name="noise/cosine",
    label="noise cosine",
    unit="–",
    meaning="cosine between those two displacements; compare it with `noise/ceiling`",
    advice="At the noise ceiling: as good as it can be",
    group=Group.THEORY,
    chart=_INDUCED_COSINES,
    role=Role.PREDICTED,
    curve="noise_cosine",
    value=of_noise(lambda n: n.cosine),
    needs=needs(Need.BASELINE),
)
NOISE_CEILING = Tag(
    name="noise/ceiling",
    label="noise ceiling of it",
    unit="–",
    meaning="the noise ceiling of that cosine: the best that any deterministic prediction of the noise-induced drift "
    "can have with one noisy run on these batches",
    advice="Low: use longer windows; more `replicas` make it more accurate",
    group=Group.THEORY,
    chart=_INDUCED_COSINES,
    role=Role.CEILING,
    curve="noise_cosine",
    value=of_noise(lambda n: n.ceiling),
    needs=needs(Need.BASELINE, Need.REPLICAS),
)
NOISE_RATIO = Tag(
    name="noise/ratio",
    label="noise ratio",
    unit="–",
    meaning="the noise-induced drift, measured over predicted: ⟨measured − baseline, predicted − baseline⟩/"
    "\\|predicted − baseline\\|²; 1: as predicted. Standard error: from `replicas` and the two averaged paths; the "
    "verdict pools the windows of a run",
    advice="1 within its error: the noise has the predicted effect",
    group=Group.THEORY,
    chart="",
    value=of_noise(lambda n: n.ratio.mean),
    stderr=of_noise(lambda n: n.ratio.stderr),
    band="Noise-induced drift, measured / predicted, standard error",
    needs=needs(Need.PATHS, Need.BASELINE),
    shown=shown(Place.WINDOWS, Place.REPORT, Place.FINAL),
)
NOISE_OF_REPLICAS = Tag(
    name="noise/ratio_of_replicas",
    label="noise ratio of the replicas",
    unit="–",
    meaning="the same ratio for the mean of the replicas, whose noise is independent of the run's. It contains what "
    "fluctuations feed back on the mean motion, which the averaged path does not have",
    advice="If `noise/ratio` is not 1: equal to it, the noise feeds back through its fluctuations; near 1, something "
    "else moves this run",
    group=Group.THEORY,
    chart="",
    value=of_noise(lambda n: n.replicas.mean),
    stderr=of_noise(lambda n: n.replicas.stderr),
    needs=needs(Need.PATHS, Need.BASELINE, Need.REPLICAS),
    shown=shown(Place.REPORT),
)
NOISE_SHARE = Tag(
    name="noise/share",
    label="noise share",
    unit="–",
    meaning="size of the noise-induced drift in the prediction, \\|predicted − baseline\\|/\\|predicted\\|; it can "
    "exceed 1. What training mode adds without being random, such as a penalty, is part of it",
    advice="Small: long windows are needed to see the effect of the noise",
    group=Group.DRIFT,
    chart="",
    value=of_noise(lambda n: n.share),
    needs=needs(Need.BASELINE),
)
EXPANSION_COSINE = Tag(
    name="expansion/cosine",
    label="cosine of the expansion",
    unit="–",
    meaning="cosine at w between ∇V, the second-order expansion of the noise, and the average over noise of finite "
    "size, E_η ∇L(w, η) − ∇L. If it is significantly below 0.85, the prediction of the limit, which rests on the "
    "expansion, is invalidated. In windows with `expanded=True`: between the noise-induced drift of the expanded and "
    "of the averaged path",
    advice="Near 1: the assumption of the limit holds",
    group=Group.TRUST,
    chart="",
    value=_of_expansion(0, lambda e: e.cosine),
    stderr=of_limit(lambda d: None if d.expansion is None else d.expansion.stderr),
    needs=needs(Need.LIMIT, Need.MOVES),
)
EXPANSION_RATIO = Tag(
    name="expansion/ratio",
    label="norm of the expansion",
    unit="–",
    meaning="\\|∇V\\| over the norm of that average; the prediction of the limit is invalidated if this differs "
    "significantly from 1 by more than 0.15. In windows with `expanded=True`: the same of the two paths",
    advice="Near 1: the assumption of the limit holds",
    group=Group.TRUST,
    chart="",
    value=_of_expansion(1, lambda e: e.ratio),
    stderr=of_limit(lambda d: None if d.expansion is None else d.expansion.stderr),
    needs=needs(Need.LIMIT, Need.MOVES),
)

_ALONG = "Length of the motion along the zero-loss set [weight norm]"

LIMIT_COSINE = Tag(
    name="limit/cosine",
    label="limit cosine",
    unit="–",
    meaning="cosine between the tangential part of the motion since the measurement at which the window was due and "
    "the singular limit dW/dk = −α^order P_T ∇V(W), integrated along the zero-loss set from the nearest point there; "
    "paths may be opened later, and cover the window's last part. Only where a mode had relaxed there",
    advice="Near 1 only where `distance/relaxed_share` is near 1",
    group=Group.THEORY,
    chart=_COSINES,
    role=Role.LIMIT,
    curve="cosine",
    value=of_model(Model.LIMIT, lambda c: c.agreement.cosine),
    needs=needs(Need.LIMIT, Need.MOVES),
    shown=shown(Place.WINDOWS, Place.REPORT),
)
LIMIT_FROZEN_COSINE = Tag(
    name="limit/frozen_cosine",
    label="frozen limit cosine",
    unit="–",
    meaning="the same cosine with the limit frozen at that point, −K α^order P_T ∇V",
    advice="Lower than `limit/cosine`: the drift turns within the window",
    group=Group.THEORY,
    chart="",
    value=of_model(Model.FROZEN_LIMIT, lambda c: c.agreement.cosine),
    needs=needs(Need.LIMIT, Need.MOVES),
)
LIMIT_SPEED = Tag(
    name="limit/speed",
    label="limit speed",
    unit="–",
    meaning="speed of the same motion relative to the integrated limit, defined like `drift/speed`",
    advice="Near 1 only where `distance/relaxed_share` is near 1",
    group=Group.THEORY,
    chart=_SPEEDS,
    role=Role.LIMIT,
    curve="speed",
    value=of_model(Model.LIMIT, lambda c: c.agreement.speed),
    needs=needs(Need.LIMIT, Need.MOVES),
    shown=shown(Place.WINDOWS, Place.REPORT),
)
LIMIT_FROZEN_SPEED = Tag(
    name="limit/frozen_speed",
    label="frozen limit speed",
    unit="–",
    meaning="the same speed relative to the frozen limit",
    advice="Lower than `limit/speed`: the drift slows down within the window",
    group=Group.THEORY,
    chart="",
    value=of_model(Model.FROZEN_LIMIT, lambda c: c.agreement.speed),
    needs=needs(Need.LIMIT, Need.MOVES),
)
SPREAD_MEASURED = Tag(
    name="limit/spread_measured",
    label="length along the zero-loss set",
    unit="weight norm",
    meaning="length of the tangential motion over the window",
    advice="Compare with `limit/spread_predicted`",
    group=Group.DRIFT,
    chart=_ALONG,
    curve="along",
    value=of_window(lambda w: None if w.spread is None else w.spread.measured),
    needs=needs(Need.LIMIT, Need.MOVES),
    shown=shown(Place.LENGTHS),
)
SPREAD_PREDICTED = Tag(
    name="limit/spread_predicted",
    label="predicted length",
    unit="weight norm",
    meaning="the same length by the limit, from drift and diffusion: √(\\|K drift\\|² + K · diffusion · dim Γ)",
    advice="Equal within a few percent under Langevin noise, which diffuses; for other noises see `limit/speed`",
    group=Group.DRIFT,
    chart=_ALONG,
    role=Role.LIMIT,
    curve="along",
    value=of_window(lambda w: None if w.spread is None else w.spread.predicted),
    needs=needs(Need.LIMIT, Need.MOVES),
    shown=shown(Place.LENGTHS),
)
