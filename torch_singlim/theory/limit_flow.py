"""The drift of the singular limit, integrated along Gamma over K steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_singlim.geometry import MAX_DENSE, gauss_newton, linearize
from torch_singlim.linalg import Result
from torch_singlim.network import ZeroLossProblem
from torch_singlim.noise import NoiseSystem
from torch_singlim.theory.effective import WindowPrediction, check_marks
from torch_singlim.theory.limit_drift import LimitDrift, limit_drift
from torch_singlim.theory.order import with_measured_order
from torch_singlim.theory.second_moments import SecondMoments
from torch_singlim.theory.sgd import SGDSettings

__all__ = ["limit_flow"]

# the pair of order 3(2): nodes, weights of the last stage, which is the result, and of the error (P. Bogacki,
# L. Shampine, Appl. Math. Lett. 2, 1989)
_STAGES: tuple[tuple[float, ...], ...] = ((1 / 2,), (0.0, 3 / 4), (2 / 9, 1 / 3, 4 / 9))
_ERROR = (-5 / 72, 1 / 12, 1 / 9, -1 / 8)
# factors by which a sub-step may grow and shrink, and the safety factor
_GROWS, _SHRINKS, _SAFETY = 5.0, 0.2, 0.9
# the error estimate can be trusted while the drift changes by no more than this share of it within a sub-step
_CHANGE = 0.3
# and, with a large tolerance, by no more than this multiple of it
_COARSE = 10.0
# steps back to Gamma, the factor by which the first two of them have to fall, and how close they lead, as a share of
# the tolerance
_RETRACTIONS, _CONTRACTION, _CLOSE = 12, 0.5, 0.1
# up to so many residuals decomposing K is faster than solves that are refined with products
_FEW = 500
# sub-steps below this share of the flow's length do not help
_SHORTEST = 1e-6


class _Base:
    """A point of Gamma, H there, and a map from weights nearby to Gamma along its normal space.

        v <- v - B^+ b(v)       with the B^+ of this point, as in the simplified Newton method

    Args:
        problem: loss and samples.
        point: ``[P]``.
        dense: decompose H, if it is small enough, for functions of it; else its factor is enough.
    """

    def __init__(self, problem: ZeroLossProblem, point: Tensor, *, dense: bool) -> None:
        self.point, self.at = point, linearize(problem, point)
        self.hessian = gauss_newton(problem, point, at=self.at, max_dense=MAX_DENSE if dense else _FEW)

    def retract(self, v: Tensor, atol: float) -> Tensor | None:
        """The point of Gamma above v, up to a distance; None if v is too far away."""
        last = math.inf
        for _ in range(_RETRACTIONS):
            shift = self.hessian.pseudo_inverse(self.at.residual_at(v))
            size = torch.linalg.vector_norm(shift).item()
            if not size <= _CONTRACTION * last:
                return v if size <= atol else None
            v, last = v - shift, size
            if size <= atol:
                return v
        return None


@dataclass(frozen=True)
class _Substep:
    """The end of a sub-step, the drift there, its relative change, the error, and the passes.

    Change and error are infinite if a stage was too far away from Gamma.
    """

    end: _Base
    drift: LimitDrift
    change: float
    error: float
    passes: int


def _substep(
    base: _Base, first: LimitDrift, length: float, atol: float, drift: Callable[[Tensor], tuple[_Base, LimitDrift]]
) -> _Substep:
    """One sub-step of so many steps; `first` is the drift at its beginning, the stages are on Gamma up to `atol`."""
    slopes, last, end, passes = [first.drift.mean], first, base, 0
    for weights in _STAGES:
        moved = base.point.clone()
        for weight, slope in zip(weights, slopes, strict=True):
            moved.add_(slope, alpha=length * weight)
        landed = base.retract(moved, atol)
        if landed is None:
            return _Substep(end, last, math.inf, math.inf, passes)
        end, last = drift(landed)
        passes += last.passes
        slopes.append(last.drift.mean)
    off = torch.zeros_like(base.point)
    for weight, slope in zip(_ERROR, slopes, strict=True):
        off.add_(slope, alpha=length * weight)
    size = torch.linalg.vector_norm(slopes[0]).item()
    change = torch.linalg.vector_norm(slopes[-1] - slopes[0]).item() / size if size else 0.0
    return _Substep(end, last, change, torch.linalg.vector_norm(off).item(), passes)


def limit_flow(
    problem: ZeroLossProblem,
    point: Tensor,
    noise: NoiseSystem,
    sgd: SGDSettings,
    *,
    steps: int,
    marks: Sequence[int] = (),
    rtol: float = 1e-3,
    num_draws: int = 64,
    finite_step: bool = False,
    moments: SecondMoments | None = None,
    max_substeps: int = 1_000,
    generator: torch.Generator | None = None,
) -> WindowPrediction:
    """The singular limit's drift integrated along Gamma over K optimizer steps.

        dW/dk = drift(W),  W on Gamma           drift: that of `singular_limit`

    by a Runge-Kutta method of order 3 whose stages are mapped back to Gamma, with sub-steps that adapt to the error of
    the embedded method of order 2. Sampled traces take new directions in each sub-step, and the same ones in its
    stages. This flow is deterministic: if the limit also diffuses, it is the mean of the limit for short times only.

    Args:
        problem: loss and samples.
        point: weights on Gamma ``[P]``, see `nearest_point`.
        noise: the system.
        sgd: step size, momentum, batch size.
        steps: K.
        marks: steps at which the path is recorded, the last of them K; default: K alone.
        rtol: largest error of a sub-step, as a share of its length.
        num_draws: for each drift, see `singular_limit`.
        finite_step: the drift at this step size, see `singular_limit`.
        moments: of an adaptive optimizer, see `singular_limit`.
        max_substeps: maximum number of sub-steps, rejected ones included.
        generator: of random directions.

    Raises:
        ValueError: what `singular_limit` raises; marks that do not ascend to K.

    >>> from torch import nn
    >>> from torch_singlim.noise import Dropout
    >>> net = nn.Sequential(nn.Dropout(0.5), nn.Linear(2, 1, bias=False))
    >>> problem = ZeroLossProblem(net, "mse", torch.ones(1, 2), torch.ones(1, 1))
    >>> w, sgd = torch.tensor([0.75, 0.25]).double(), SGDSettings(lr=0.1)
    >>> flow = limit_flow(problem, w, Dropout(), sgd, steps=20)
    >>> flow.displacement  # towards the middle of the line w_1 + w_2 = 1
    tensor([-0.2454,  0.2454], dtype=torch.float64)
    """
    marks = check_marks(marks, steps)
    if point.shape != (problem.num_weights,):
        raise ValueError(f"expected {problem.num_weights} weights in one vector, got shape {tuple(point.shape)}")
    problem.check_attained()
    noise.check(problem)
    noise = with_measured_order(noise, problem, point, num_draws=num_draws, generator=generator)
    dense = finite_step or noise.order == 2  # these take functions of H
    device, change = "cpu" if generator is None else generator.device, max(_CHANGE, min(_COARSE * rtol, 0.5))
    seeds = torch.Generator(device).manual_seed(0) if generator is None else generator

    def drift(base: _Base, seed: int) -> LimitDrift:
        return limit_drift(
            problem,
            base.point,
            noise,
            sgd,
            base.hessian,
            num_draws=num_draws,
            finite_step=finite_step,
            moments=moments,
            generator=torch.Generator(device).manual_seed(seed),
        )

    def stage(v: Tensor, seed: int) -> tuple[_Base, LimitDrift]:
        at = _Base(problem, v, dense=dense)
        return at, drift(at, seed)

    k, h, base = 0.0, float(steps), _Base(problem, point, dense=dense)
    path: list[Tensor] = []
    squared, error, passes, tried, seed = 0.0, 0.0, 0, 0, 0
    status, first = Result.SUCCESSFUL, None
    while len(path) < len(marks):
        if first is None:  # else it is the last stage of the sub-step before
            seed = int(torch.randint(2**31, (1,), generator=seeds, device=device).item())
            first = drift(base, seed)
            passes += first.passes
        if tried == max_substeps or h < _SHORTEST * steps:
            status = Result.MAX_STEPS if tried == max_substeps else Result.STALLED
            path += [base.point - point] * (len(marks) - len(path))
            break
        tried += 1
        length = min(h, marks[len(path)] - k)
        allowed = rtol * length * torch.linalg.vector_norm(first.drift.mean).item()
        step = _substep(base, first, length, _CLOSE * allowed, lambda v, s=seed: stage(v, s))
        passes += step.passes
        if step.error <= allowed and step.change <= change:
            k, error, squared = k + length, error + step.error, squared + (length * first.drift.stderr) ** 2
            base = step.end
            first = step.drift if first.drift.stderr == 0 else None  # sampled drifts take new directions
            while len(path) < len(marks) and k >= marks[len(path)] * (1 - 1e-12):
                path.append(base.point - point)
        accurate = math.sqrt(allowed / step.error) if step.error > 0 else math.inf
        straight = change / step.change if step.change > 0 else math.inf
        h = length * min(_GROWS, max(_SHRINKS, _SAFETY * min(accurate, straight)))
    return WindowPrediction(torch.stack(path), math.sqrt(squared), error, passes, status)
