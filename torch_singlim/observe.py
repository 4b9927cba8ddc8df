"""From weights at two probes to what was measured, what was predicted, and how well they agree."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from torch_singlim.geometry import FootPoint, TangentSpace, nearest_point, separation_level
from torch_singlim.linalg import Estimate, VectorEstimate
from torch_singlim.problem import ZeroLossProblem
from torch_singlim.theory import (
    EffectiveLoss,
    LimitPrediction,
    Minibatch,
    NoiseSystem,
    SGDSettings,
    WindowPrediction,
    averaged_gradient,
    effective_flow,
    expected_distance,
    finite_window,
    gradient_noise,
    has_effective_flow,
    potential,
    simulate,
    singular_limit,
)

__all__ = [
    "Agreement",
    "FiniteNoise",
    "History",
    "Observation",
    "Scatter",
    "Spread",
    "WindowObservation",
    "compare",
    "finite_noise",
    "jackknife",
    "noise_ceiling",
    "noise_pull",
    "observation_scalars",
    "observe",
    "observe_window",
    "verdict",
    "window_scalars",
]


@dataclass(frozen=True)
class Agreement:
    """How a predicted displacement q agrees with a measured one m; nan where one of them is zero.

    Args:
        cosine: <m, q> / (|m| |q|).
        speed_ratio: <m, q> / <q, q>; 1: as fast as predicted.
        residual_ratio: |m - q| / |m|, the share of the motion that is not explained.
        measured: |m|, in units of the weights' norm.
        predicted: |q|.
    """

    cosine: float
    speed_ratio: float
    residual_ratio: float
    measured: float
    predicted: float


def compare(measured: Tensor, predicted: Tensor) -> Agreement:
    """Cosine, speed ratio and unexplained share of two displacements ``[P]``.

    >>> compare(torch.tensor([2.0, 0.0]), torch.tensor([1.0, 0.0]))
    Agreement(cosine=1.0, speed_ratio=2.0, residual_ratio=0.5, measured=2.0, predicted=1.0)
    """
    if measured.shape != predicted.shape:
        raise ValueError(f"displacements of different weights: {tuple(measured.shape)} and {tuple(predicted.shape)}")
    m, q = torch.linalg.vector_norm(measured).item(), torch.linalg.vector_norm(predicted).item()
    inner = torch.dot(measured, predicted).item()
    gap = torch.linalg.vector_norm(measured - predicted).item()
    return Agreement(
        cosine=inner / (m * q) if m * q > 0 else math.nan,
        speed_ratio=inner / q**2 if q > 0 else math.nan,
        residual_ratio=gap / m if m > 0 else math.nan,
        measured=m,
        predicted=q,
    )


@dataclass(frozen=True)
class Scatter:
    """Standard errors of an agreement's cosine and speed ratio, from equal parts of the window."""

    cosine: float
    speed_ratio: float


def jackknife(measured: Tensor, predicted: Tensor) -> Scatter:
    """Standard errors from the displacements over n parts of a window ``[n, P]``, one part left out at a time.

        s^2 = (n-1)/n sum_j (a_j - mean a)^2,      a_j the agreement without part j        (Efron & Stein 1981)

    Parts are taken as independent; nan for fewer than two.

    >>> m = torch.tensor([[1.0, 0.1], [1.0, -0.1]])
    >>> jackknife(m, torch.tensor([[1.0, 0.0], [1.0, 0.0]])).speed_ratio
    0.0
    """
    n = len(measured)
    if n < 2:
        return Scatter(math.nan, math.nan)
    without = [compare(measured.sum(0) - m, predicted.sum(0) - q) for m, q in zip(measured, predicted, strict=True)]

    def error(values: list[float]) -> float:
        mean = sum(values) / n
        return math.sqrt((n - 1) / n * sum((value - mean) ** 2 for value in values))

    return Scatter(error([a.cosine for a in without]), error([a.speed_ratio for a in without]))


def noise_ceiling(runs: Sequence[Tensor]) -> float:
    """The best cosine that any deterministic prediction can have with one run: sqrt(mean cosine between runs).

    A run is mean + fluctuation; the mean itself has that cosine with it. Runs ``[P]`` are independent, from the same
    weights over the same window; nan for fewer than two.

    >>> noise_ceiling([torch.tensor([1.0, 1.0]), torch.tensor([1.0, -1.0])])
    0.0
    """
    cosines = [compare(a, b).cosine for a, b in itertools.combinations(runs, 2)]
    return math.sqrt(max(sum(cosines) / len(cosines), 0.0)) if cosines else math.nan


@dataclass(frozen=True)
class FiniteNoise:
    """The paper's second-order expansion of the noise against its average at finite size, at one weight vector.

    Args:
        cosine: between grad V and E_eta grad Lhat - grad L.
        norm_ratio: |grad V| over the other's norm; far from 1: the expansion does not hold at this noise.
        stderr: sampling error of the two, relative to their norms.
    """

    cosine: float
    norm_ratio: float
    stderr: float

    @property
    def fails(self) -> bool:
        """Whether the expansion clearly does not hold: cosine or norm off by more than 0.15 and the sampling error."""
        return abs(self.norm_ratio - 1) > 0.15 + self.stderr or self.cosine < 0.85 - self.stderr


def finite_noise(
    problem: ZeroLossProblem,
    w: Tensor,
    noise: NoiseSystem,
    averaged: VectorEstimate,
    *,
    num_draws: int,
    generator: torch.Generator | None = None,
) -> FiniteNoise:
    """Compare grad V at w ``[P]`` with the averaged gradient there, from other draws, sampling error taken out."""
    expanded = potential(noise, problem, w, num_draws=num_draws, generator=generator).gradient
    a, b = averaged.norm, expanded.norm
    if a * b == 0:
        return FiniteNoise(math.nan, math.nan, math.nan)
    cosine = torch.dot(averaged.mean, expanded.mean).item() / (a * b)
    return FiniteNoise(cosine, b / a, math.hypot(averaged.stderr / a, expanded.stderr / b))


@dataclass(frozen=True)
class Observation:
    """The weights at one probe, seen from Gamma.

    Args:
        step: optimizer steps so far.
        slow_time: sum of alpha^order sigma^2 over them.
        weights: ``[P]``.
        drifting: the weights without what a noise has them carry for a step (`AntiCorrelated`) ``[P]``: what drifts.
        loss_gap: L(w).
        foot: the nearest point of Gamma.
        tangent: the tangent space there.
        separated: distance along the separated modes at w: the part of B^+ b, the linearised displacement, along modes
            of H with alpha lambda step >= c (None without a covered step size).
        expected: the same by the theory, root mean square (None without a prediction).
        direction: cosine between that part and the mean offset which the theory expects (nan at order 2).
        num_separated: how many modes that is; where H is too large to be decomposed, an estimate, or nan.
        num_modes: how many modes there are; then the number of residuals, which bounds it.
        limit: the singular limit's prediction at the foot point (None where the theory does not cover the training, or
            its expansion of the noise does not hold).
        finite_noise: how far that expansion holds at these weights (order 1 alone).
        moves: whether the noise drives a motion along Gamma on one of the two clocks.
        subset: whether training uses more samples than were probed. The Gamma of some samples contains that of all:
            distances are then lower bounds.
    """

    step: int
    slow_time: float
    weights: Tensor = field(repr=False)
    drifting: Tensor = field(repr=False)
    loss_gap: float
    foot: FootPoint = field(repr=False)
    tangent: TangentSpace = field(repr=False)
    separated: float | None
    expected: float | None
    direction: float
    num_separated: float | None
    num_modes: int
    limit: LimitPrediction | None = field(repr=False)
    finite_noise: FiniteNoise | None
    moves: bool
    subset: bool

    @property
    def withdrawn(self) -> str | None:
        """Why the limit's prediction is not given, where the expansion that it rests on fails."""
        if self.finite_noise is None or not self.finite_noise.fails:
            return None
        return (
            f"the noise is too large for the second-order expansion that the singular limit rests on: at step "
            f"{self.step} its gradient has cosine {self.finite_noise.cosine:.2f} and "
            f"{self.finite_noise.norm_ratio:.2f} times the norm of the averaged one"
        )


def observe(
    problem: ZeroLossProblem,
    w: Tensor,
    *,
    step: int,
    slow_time: float = 0.0,
    noise: NoiseSystem | None = None,
    sgd: SGDSettings | None = None,
    carried: Tensor | None = None,
    num_draws: int = 32,
    separation: float = 3.0,
    rtol: float = 2e-2,
    max_steps: int = 12,
    max_dense: int = 4096,
    subset: bool = False,
    generator: torch.Generator | None = None,
) -> Observation:
    """Distance, tangent space and the limit's prediction at weights w ``[P]``.

    Args:
        problem: loss and probe set.
        w: weights.
        step: optimizer steps so far: what had the time to settle.
        slow_time: the clock, passed through.
        noise: the system; None where the theory does not cover the training (geometry only).
        sgd: the descent's settings; None likewise.
        carried: what the weights carry for this step on top of what drifts ``[P]``.
        num_draws: for the trace in V, see `singular_limit`.
        separation: a mode counts as separated at alpha lambda step >= this.
        rtol: of the nearest point; the distance, stationary there, is then right to about rtol^2.
        max_steps: most linearisations for the nearest point; early in training it is far and may not be found.
        max_dense: up to this many residuals the geometry is exact; above, the linearised distance and Lanczos.
        subset: whether training uses samples that the problem does not have; noted in the record.
        generator: of random directions.
    """
    exact = problem.num_residuals <= max_dense
    # the separated modes are those of H at w: there the loss and the noise pull against one another
    settled = TangentSpace(problem.gauss_newton(w, max_dense=max_dense, rtol=1e-3, max_steps=100))
    foot = nearest_point(
        problem,
        w,
        rtol=rtol,
        max_steps=max_steps if exact else 1,
        max_dense=max_dense,
        krylov_steps=100,
        hessian=settled.hessian,
    )
    tangent = TangentSpace(problem.gauss_newton(foot.point, max_dense=max_dense, rtol=1e-3, max_steps=100))
    drifting = w if carried is None else w - carried
    separated = expected = count = limit = expansion = None
    direction, pull = math.nan, VectorEstimate(torch.zeros_like(w)[None])
    if noise is not None and noise.order == 1:
        pull = averaged_gradient(noise, problem, drifting, num_draws=num_draws, generator=generator)
        expansion = finite_noise(problem, drifting, noise, pull, num_draws=num_draws, generator=generator)
    if noise is not None and sgd is not None and has_effective_flow(noise, problem):
        effective = EffectiveLoss(problem, noise, sgd, generator=generator)
        if effective.second:
            pull = pull + VectorEstimate(torch.stack([effective.pull_of_order_two(drifting) for _ in range(4)]))
    if sgd is not None:
        alpha = sgd.effective_lr
        level = separation_level(alpha, step, separation)
        part = settled.separated(foot.linearised, lr=alpha, steps=step, threshold=separation)
        separated = torch.linalg.vector_norm(part).item()
        count = settled.num_separated(lr=alpha, steps=step, threshold=separation)
        if noise is not None:
            if expansion is None or not expansion.fails:
                limit = singular_limit(
                    problem,
                    foot.point,
                    noise,
                    sgd,
                    num_draws=num_draws,
                    hessian=tangent.hessian,
                    generator=generator,
                )
            expectation = expected_distance(
                settled.hessian,
                pull,
                gradient_noise(
                    noise,
                    problem,
                    w,
                    batch_size=sgd.batch(problem.num_samples),
                    num_draws=num_draws,
                    generator=generator,
                ),
                sgd=sgd,
                smallest=level,
                num_draws=4,
                generator=generator,
            )
            expected = expectation.rms
            direction = compare(part, expectation.offset.mean).cosine
    return Observation(
        step=step,
        slow_time=slow_time,
        weights=w,
        drifting=drifting,
        loss_gap=problem.loss(w).item(),
        foot=foot,
        tangent=tangent,
        separated=separated,
        expected=expected,
        direction=direction,
        num_separated=count,
        num_modes=settled.num_modes,
        limit=limit,
        finite_noise=expansion,
        moves=noise is not None and noise.order is not None,
        subset=subset,
    )


# optimizer steps up to which following each of them costs less than long steps with their error estimate
_SHORT = 200


@dataclass(frozen=True)
class Spread:
    """Length of the motion along Gamma, measured and predicted, where the limit diffuses; in weight norm.

    predicted^2 = |K drift|^2 + K diffusion dim Gamma
    """

    measured: float
    predicted: float


@dataclass(frozen=True)
class WindowObservation:
    """The motion of the weights over one window, measured and predicted.

    Args:
        start: optimizer steps at its beginning.
        stop: at its end.
        displacement: measured, w(stop) - w(start) ``[P]``.
        prediction: descent on the effective loss by `finite_window` (None where the noise has none); followed step by
            step where the window is short or the long steps are not accurate.
        drift: measured against it.
        scatter: standard errors of that agreement, from parts of the window (nan without weights in between).
        flow: the same followed step by step, `effective_flow`, where it was asked for.
        reference: measured against that.
        null: measured against descent on L alone, the control that must be lower.
        pull: the noise's own part of the motion, measured over predicted (None without a prediction); see `noise_pull`.
        pull_share: how large that part is in it, |prediction - null| / |prediction| (nan without one).
        limit: the tangential part of the measured motion against the singular limit's (None where nothing moves).
        spread: how far along Gamma, where the limit diffuses (else None): no deterministic prediction has a direction.
        ceiling: the best cosine that any deterministic prediction can have (nan without replicas).
        products: gradients of the whole probe set that the predictions took.
    """

    start: int
    stop: int
    displacement: Tensor = field(repr=False)
    prediction: WindowPrediction | None = field(repr=False)
    drift: Agreement | None
    scatter: Scatter
    flow: WindowPrediction | None = field(repr=False)
    reference: Agreement | None
    null: Agreement
    pull: Estimate | None
    pull_share: float
    limit: Agreement | None
    spread: Spread | None
    ceiling: float
    products: int

    @property
    def withdrawn(self) -> str | None:
        """Why the prediction is not given, where it was tried in vain."""
        if self.prediction is None or self.prediction.status != "diverged":
            return None
        return (
            f"descent on the effective loss runs away in the window {self.start}-{self.stop}: training itself is "
            "probably unstable at this step size and noise"
        )


def observe_window(
    problem: ZeroLossProblem,
    start: Observation,
    w: Tensor,
    *,
    stop: int,
    noise: NoiseSystem,
    sgd: SGDSettings,
    replicas: int = 0,
    reference: bool = False,
    between: Mapping[int, Tensor] | None = None,
    velocity: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> WindowObservation:
    """Compare where the weights went from `start` with where the effective flow, L alone and the limit would go.

    Args:
        problem: loss and probe set, all the samples that training uses.
        start: the probe at the beginning of the window.
        w: what drifts, at its end ``[P]``: the weights without what they carry for a step.
        stop: optimizer steps there.
        noise: the system.
        sgd: settings over the window (lr: its mean, under a schedule).
        replicas: independent runs of the window for the ceiling; 0: none.
        reference: follow the effective flow step by step, too.
        between: what drifted at some steps in between, step -> ``[P]``, for standard errors.
        velocity: the optimizer's momentum at the start ``[P]``.
        generator: of noise and batches.
    """
    steps, origin = stop - start.step, start.drifting
    measured = w - origin
    seen = {**(between or {}), stop: w}
    marks = [step - start.step for step in seen]
    path = torch.stack([v - origin for v in seen.values()])

    def stepwise(system: NoiseSystem) -> WindowPrediction:
        return effective_flow(
            problem, origin, system, sgd, steps=steps, marks=marks, velocity=velocity, generator=generator
        )

    def predicted(system: NoiseSystem) -> WindowPrediction:
        if steps <= _SHORT:
            return stepwise(system)
        window = finite_window(
            problem, origin, system, sgd, steps=steps, marks=marks, velocity=velocity, generator=generator
        )
        return window if window.status == "ok" else stepwise(system)

    null = predicted(Minibatch())
    prediction = flow = None
    if has_effective_flow(noise, problem):
        prediction = predicted(noise)
        flow = stepwise(noise) if reference else None
    runs = [measured]
    if replicas:
        ensemble = simulate(
            problem, origin, noise, sgd, steps=steps, replicas=replicas, velocity=velocity, generator=generator
        )
        runs.extend(ensemble.displacements)
    limit = spread = None
    if start.limit is not None and start.limit.order is not None:
        tangential, drift = start.tangent.project(measured), steps * start.limit.drift
        limit = compare(tangential, drift)
        if start.limit.diffusion:
            spread = Spread(limit.measured, math.hypot(limit.predicted, start.limit.spread(steps)))
    return WindowObservation(
        start=start.step,
        stop=stop,
        displacement=measured,
        prediction=prediction,
        drift=None if prediction is None else compare(measured, prediction.displacement),
        scatter=jackknife(_parts(path), _parts(path if prediction is None else prediction.path)),
        flow=flow,
        reference=None if flow is None else compare(measured, flow.displacement),
        null=compare(measured, null.displacement),
        pull=None if prediction is None else noise_pull(runs, prediction.displacement, null.displacement),
        pull_share=math.nan
        if prediction is None
        else compare(prediction.displacement, null.displacement).residual_ratio,
        limit=limit,
        spread=spread,
        ceiling=noise_ceiling(runs),
        products=sum(each.products for each in (null, prediction, flow) if each is not None),
    )


def _parts(path: Tensor) -> Tensor:
    """Displacements between the points of a path that starts at 0  ``[n, P]``."""
    return path.diff(dim=0, prepend=torch.zeros_like(path[:1]))


def noise_pull(runs: Sequence[Tensor], flow: Tensor, null: Tensor) -> Estimate:
    """How much of the noise's predicted pull a run shows, beyond what the loss alone does: 1 as predicted, 0 none.

        <run - null, flow - null> / |flow - null|^2

    The first run ``[P]`` is the measured one; the standard error is the standard deviation of all of them, independent
    runs of the same window (nan for a single one). Well below 1: the pull stands out.
    """
    pull = flow - null
    size = pull.square().sum().item()
    if size == 0:
        return Estimate(math.nan, math.nan)
    shares = torch.stack([torch.dot(run - null, pull) / size for run in runs])
    return Estimate(shares[0].item(), shares.std().item() if len(runs) > 1 else math.nan)


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
    }
    if o.separated is not None and o.num_separated is not None:
        scalars["separation"] = o.num_separated / max(o.num_modes, 1)
        if o.num_separated:
            scalars["distance/separated"] = o.separated
            scalars["distance/predicted"] = math.nan if o.expected is None else o.expected
            scalars["distance/cosine"] = o.direction
    if o.expected is not None and o.moves:
        scalars["clock/slow_time"] = o.slow_time
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
            "clock/time_scale": o.limit.time_scale,
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


def verdict(history: History, *, not_covered: Sequence[str] = (), withdrawn: Sequence[str] = ()) -> str:
    """A short markdown table from what was logged: each probe's distance, each window's drift against theory.

    Below it, why the drift is not predicted, and which predictions were withdrawn.
    """

    def row(point: Mapping[str, float], tags: Sequence[str]) -> str:
        values = (point.get(f"singlim/{tag}") for tag in tags)
        return " | ".join("-" if v is None else f"{v:.3g}" for v in values)

    probes = {step: p for step, p in history.items() if "singlim/distance/measured" in p}
    windows = {step: p for step, p in history.items() if "singlim/drift/window" in p}
    lines = [
        "| step | loss gap | distance | settled part | expected | share of settled modes |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    for step, point in probes.items():
        star = "" if point["singlim/quality/converged"] else " *"
        distance = row(point, ["loss_gap", "distance/measured"])
        lines.append(
            f"| {step} | {distance}{star} | {row(point, ['distance/separated', 'distance/predicted', 'separation'])} |"
        )
    if not all(p["singlim/quality/converged"] for p in probes.values()):
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
    return "\n".join(lines)
