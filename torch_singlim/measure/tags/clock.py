"""Series of the clock and the potential, and of quality and cost."""

from __future__ import annotations

from torch_singlim.measure.distance import DistanceMeasurement
from torch_singlim.measure.tags.tag import (
    Group,
    Need,
    Place,
    Reader,
    Tag,
    needs,
    of_clock,
    of_distance,
    of_limit,
    of_quality,
    of_window,
    shown,
)


def _potential(error: bool) -> Reader:
    def read(d: DistanceMeasurement) -> float | None:
        if d.limit is None or d.limit.order is None:
            return None
        return d.limit.potential.stderr if error else d.limit.potential.mean

    return of_limit(read)


POTENTIAL = Tag(
    name="potential",
    label="potential V",
    unit="loss",
    meaning="V at the nearest point",
    advice="Should decrease along Γ, since the noise-induced drift descends V",
    group=Group.DRIFT,
    chart="",
    value=_potential(error=False),
    stderr=_potential(error=True),
    band="Potential of the noise, standard error [loss]",
    needs=needs(Need.LIMIT, Need.MOVES),
)
SLOW_TIME = Tag(
    name="clock/slow_time",
    label="slow time",
    unit="slow time",
    meaning="Σ α^order σ² over the steps so far; the step sizes of an adaptive optimizer are interpolated between "
    "measurements",
    advice="The drift along Γ becomes visible when the slow time is of order 1",
    group=Group.DRIFT,
    chart="Slow time [sum of step size^order sigma^2]",
    value=of_clock(lambda c: c.slow_time),
    needs=needs(Need.LIMIT, Need.MOVES),
)
TIME_SCALE = Tag(
    name="clock/time_scale",
    label="steps per unit of slow time",
    unit="steps",
    meaning="optimizer steps per unit of slow time, 1/(α^order σ²)",
    advice="Much longer than the run: no drift will be visible",
    group=Group.DRIFT,
    chart="Optimizer steps per unit of slow time",
    value=of_clock(lambda c: c.time_scale),
    needs=needs(Need.LIMIT, Need.MOVES),
)
STEP_SIZE = Tag(
    name="clock/step_size",
    label="step size α",
    unit="step size",
    meaning="effective step size α at the present learning rate; of an adaptive optimizer, lr over the mean of √v + ε",
    advice="Follows the schedule",
    group=Group.DRIFT,
    chart="Step size",
    value=of_clock(lambda c: c.step_size),
    needs=needs(Need.LIMIT),
    shown=shown(Place.REPORT),
)
NOISE_LEVEL = Tag(
    name="clock/noise_level",
    label="noise level σ",
    unit="–",
    meaning="σ; the largest one of several noises of the lowest order",
    advice="–",
    group=Group.DRIFT,
    chart="",
    value=of_clock(lambda c: c.noise_level),
    needs=needs(Need.LIMIT, Need.MOVES),
    shown=shown(Place.REPORT),
)
MOMENTS_RATIO = Tag(
    name="moments/ratio",
    label="second moments over c diag H",
    unit="–",
    meaning="⟨v, c h⟩/\\|c h\\|² for the second moments v of an adaptive optimizer and h = diag H at w; c H is the "
    "covariance of the gradient under noise on the labels: near the zero-loss set v should be c h",
    advice="Far above 1: minibatches or a loss that is not yet small dominate the step sizes",
    group=Group.THEORY,
    chart="Second moments of the optimizer, measured / predicted",
    value=of_limit(lambda d: None if d.moments is None else d.moments.speed),
    needs=needs(Need.LIMIT, Need.MOMENTS),
)
MOMENTS_COSINE = Tag(
    name="moments/cosine",
    label="cosine of the second moments",
    unit="–",
    meaning="the cosine of v and h",
    advice="Near 1: each weight's step size is that of its curvature",
    group=Group.THEORY,
    chart="",
    value=of_limit(lambda d: None if d.moments is None else d.moments.cosine),
    needs=needs(Need.LIMIT, Need.MOMENTS),
)

STABILITY = Tag(
    name="stability",
    label="stability",
    unit="share",
    meaning="λ₁/λ*, with the largest eigenvalue λ₁ of the Gauss-Newton matrix H at w and the curvature λ* above which "
    "full-batch descent diverges: 2(1+μ)/(lr(1−d)), Nesterov 2(1+μ)/(lr(1+2μ)); parameter groups count with their own "
    "learning rates, and an adaptive optimizer is plain descent in its metric",
    advice="Near 1 training is at the edge of stability, where theory for small steps is inaccurate; above 1 for "
    "long: the loss should grow",
    group=Group.TRUST,
    chart="Largest eigenvalue over the largest stable one",
    value=lambda m: m.stability,
    needs=needs(Need.LIMIT),
    shown=shown(Place.REPORT, Place.FINAL),
)

_PREDICTION_ERROR = "Error of the prediction [weight norm]"

NEAREST_ERROR = Tag(
    name="quality/nearest_error",
    label="error of the nearest point",
    unit="weight norm",
    meaning="estimated error of `distance/nearest`, from how far the point still is from Γ and from being stationary "
    "on it: that of a local minimum, another part of Γ may be closer",
    advice="Above a tenth of the distance: rely on the distances to a level",
    group=Group.TRUST,
    chart="Estimated error of the nearest point [weight norm]",
    value=of_distance(lambda d: d.nearest.error),
)
RESIDUAL = Tag(
    name="quality/residual",
    label="residual at the nearest point",
    unit="√loss",
    meaning="norm of the residual at the nearest point",
    advice="Should be small compared with √(2 · excess loss)",
    group=Group.TRUST,
    chart="Residual at the nearest point [root of loss]",
    value=of_distance(lambda d: d.nearest.residual),
)
UNRESOLVED = Tag(
    name="quality/unresolved",
    label="unresolved modes",
    unit="share",
    meaning="share of the normal modes that the tangent projection does not resolve to a relative accuracy of 1/10; 0 "
    "if B Bᵀ is factored",
    advice="High: the values for the limit are inaccurate",
    group=Group.TRUST,
    chart="",
    value=of_distance(lambda d: d.tangent.unresolved),
)
TANGENT_STEPS = Tag(
    name="quality/tangent_steps",
    label="steps as tangent",
    unit="steps",
    meaning="over windows up to this length the limit's drift is practically tangent, even if normal modes are not "
    "resolved",
    advice="Shorter than the window: the values for the limit are inaccurate",
    group=Group.TRUST,
    chart="",
    value=of_limit(lambda d: d.tangent_steps),
    needs=needs(Need.LIMIT, Need.MOVES),
)
PREDICTION_STDERR = Tag(
    name="quality/stderr",
    label="sampling error of the prediction",
    unit="weight norm",
    meaning="sampling error of `drift/predicted` at the end of the window: half the difference of the two averaged "
    "paths. Cosine and speed are free of it, since they use products of the two",
    advice="Above `drift/predicted`: pass more `draws`",
    group=Group.TRUST,
    chart=_PREDICTION_ERROR,
    value=of_quality(lambda p: p.stderr),
    needs=needs(Need.PATHS),
)
PREDICTION_ERROR = Tag(
    name="quality/error",
    label="integration error of the prediction",
    unit="weight norm",
    meaning="estimated integration error of `drift/predicted`; 0 for paths, which make every step",
    advice="Between checkpoints: should be below a fifth of `drift/predicted`",
    group=Group.TRUST,
    chart=_PREDICTION_ERROR,
    value=of_quality(lambda p: p.error),
    needs=needs(Need.PATHS),
)
OVERHEAD = Tag(
    name="cost/overhead",
    label="overhead",
    unit="share",
    meaning="share of the wall time so far that was spent on measurements",
    advice="`max_overhead` limits it",
    group=Group.COST,
    chart="Share of the wall time spent on measurements",
    value=lambda m: m.overhead,
)
GRADIENTS = Tag(
    name="cost/gradients",
    label="gradients",
    unit="gradients",
    meaning="number of gradients for the predictions of the window so far: of training batches, or, between "
    "checkpoints, of all samples",
    advice="Fewer `draws` and `replicas` cost less",
    group=Group.COST,
    chart="Gradients spent on a window [number]",
    value=of_window(lambda w: float(w.gradients) if w.gradients else None),
    needs=needs(Need.PATHS),
)
