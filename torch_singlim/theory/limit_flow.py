"""The drift of the singular limit, integrated along Gamma over K steps."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from torch_singlim.geometry import MAX_DENSE, gauss_newton, linearize
from torch_singlim.linalg import FactoredOperator, Result
from torch_singlim.network import ZeroLossProblem
from torch_singlim.noise import NoiseSystem
from torch_singlim.theory.effective import WindowPrediction, check_marks
from torch_singlim.theory.limit_drift import LimitDrift, limit_drift
from torch_singlim.theory.order import with_measured_order
from torch_singlim.theory.sgd import SGDSettings

__all__ = ["limit_flow"]

# the pair of order 3(2): nodes, weights of the last stage, which is the result, and of the error (P. Bogacki,
# L. Shampine, Appl. Math. Lett. 2, 1989)
_STAGES: tuple[tuple[float, ...], ...] = ((), (1 / 2,), (0.0, 3 / 4), (2 / 9, 1 / 3, 4 / 9))
_ERROR = (-5 / 72, 1 / 12, 1 / 9, -1 / 8)
# factors by which a sub-step may grow and shrink, and the safety factor
_GROWS, _SHRINKS, _SAFETY = 5.0, 0.2, 0.9
# the error estimate can be trusted while the drift changes by no more than this share of it within a sub-step
_CHANGE = 0.3
# steps back to Gamma, the factor by which the first two of them have to fall, and how close they lead, as a share of
# the tolerance
_RETRACTIONS, _CONTRACTION, _CLOSE = 12, 0.5, 0.1
# up to so many residuals decomposing K is faster than solves that are refined with products
_FEW = 500
# sub-steps below this share of the flow's length do not help
_SHORTEST = 1e-6


class _Base:
    """A point of Gamma at which a sub-step begins, and a map from weights nearby to Gamma along its normal space.

        v <- v - B^+ b(v)       with the B^+ of this point, as in the simplified Newton method

    Args:
        problem: loss and samples.
        point: ``[P]``.
        dense: decompose H, if it is small enough, for functions of it; else its factor is enough.
    """

    def __init__(self, problem: ZeroLossProblem, point: Tensor, *, dense: bool) -> None:
        self.problem, self.point, self.dense = problem, point, dense
        self.at = linearize(problem, point)
        self.hessian = self._hessian(point)

    def _hessian(self, v: Tensor) -> FactoredOperator:
        at = self.at if v is self.point else linearize(self.problem, v)
        return gauss_newton(self.problem, v, at=at, max_dense=MAX_DENSE if self.dense else _FEW)

    def hessian_at(self, v: Tensor) -> FactoredOperator:
        """H at this point, or at another one."""
        return self.hessian if v is self.point else self._hessian(v)

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
    device = "cpu" if generator is None else generator.device
    seeds = torch.Generator(device).manual_seed(0) if generator is None else generator

    def drift(base: _Base, v: Tensor, seed: int) -> LimitDrift:
        return limit_drift(
            problem,
            v,
            noise,
            sgd,
            base.hessian_at(v),
            num_draws=num_draws,
            finite_step=finite_step,
            generator=torch.Generator(device).manual_seed(seed),
        )

    k, h, at, base = 0.0, float(steps), point, _Base(problem, point, dense=dense)
    path: list[Tensor] = []
    squared, error, passes, substeps = 0.0, 0.0, 0, 0
    status, known, seed = Result.SUCCESSFUL, None, 0
    while len(path) < len(marks):
        if known is None:  # the first stage; the last one of the sub-step before, unless the drifts are sampled
            seed = int(torch.randint(2**31, (1,), generator=seeds, device=device).item())
            known = drift(base, at, seed)
            passes += known.passes
        if substeps == max_substeps or h < _SHORTEST * steps:
            status = Result.MAX_STEPS if substeps == max_substeps else Result.STALLED
            path += [at - point] * (len(marks) - len(path))
            break
        substeps += 1
        length = min(h, marks[len(path)] - k)
        slopes, stage, size = [known.drift.mean], at, torch.linalg.vector_norm(known.drift.mean).item()
        last, estimated = known, math.inf
        for weights in _STAGES[1:]:
            moved = at + length * sum((a * s for a, s in zip(weights, slopes, strict=True) if a), torch.zeros_like(at))
            landed = base.retract(moved, _CLOSE * rtol * length * size)
            if landed is None:
                break
            stage = landed
            last = drift(base, stage, seed)
            passes += last.passes
            slopes.append(last.drift.mean)
        else:
            off = sum((e * s for e, s in zip(_ERROR, slopes, strict=True)), torch.zeros_like(at))
            if torch.linalg.vector_norm(slopes[-1] - slopes[0]).item() <= _CHANGE * size:
                estimated = length * torch.linalg.vector_norm(off).item()
        allowed = rtol * length * size
        if estimated <= allowed or size == 0:
            k, error = k + length, error + (estimated if size else 0.0)
            squared += (length * known.drift.stderr) ** 2
            at, base = stage, _Base(problem, stage, dense=dense)
            known = last if last.drift.stderr == 0 else None
            while len(path) < len(marks) and k >= marks[len(path)] * (1 - 1e-12):
                path.append(at - point)
        share = allowed / estimated if estimated > 0 else math.inf
        h = length * min(_GROWS, max(_SHRINKS, _SAFETY * math.sqrt(share)))
    return WindowPrediction(torch.stack(path), math.sqrt(squared), error, passes, status)
