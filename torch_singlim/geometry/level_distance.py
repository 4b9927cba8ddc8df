"""The distance to a lower level of the loss, with a point on that level that proves it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from torch_singlim.geometry.curvature import linearize
from torch_singlim.linalg import QuasiNewton, tikhonov
from torch_singlim.network.problem import ZeroLossProblem

__all__ = ["LevelPoint", "level_distance"]

# costs in gradients of all samples: the loss; a linearisation; a product with B^T B; one with B or its transpose
_LOSS, _LINEARISATION, _PRODUCT, _HALF_PRODUCT = 0.35, 1.0, 1.2, 0.6
# the Krylov space at w is large enough if the last products have changed the length of the step by less than this, and
# if the residual of its linear system is below this share
_KRYLOV_CHANGE, _KRYLOV_ERROR = 0.02, 0.3
# eigenpairs of B^T B at w, and pairs of the last steps, in the quasi-Newton matrix. Without eigenpairs the level 0.5
# takes a quarter more gradients, and some searches for 0.1 fail; 20 pairs instead of 10 save nothing on ten states of a
# run
_EIGENPAIRS, _PAIRS = 8, 10
# eigenvalues below this share of the largest are ignored
_NEGLIGIBLE = 1e-6
# the search aims at this share of the level, and with one mu at no less than this share of the loss
_AIM, _REDUCTION = 0.98, 0.3
# the loss of a point is close to the level from this share of it on
_CLOSE = 0.93
# mu is changed when the gradient of L + mu |u|^2 / 2 is this share of mu |u|, or if the loss has fallen by less than
# the last share in so many steps; the search may end at the second share of mu |u|
_LOOSE, _STATIONARY, _PATIENCE, _SLOW = 1.0, 0.3, 10, 0.1
# the level counts as out of reach if so many gradients have lowered the loss by less than this share: searches for 0.01
# that meet it lower the loss by a fifth or more
_ROUND, _HOPELESS = 200, 0.1
# bounds for the slope of log L in log mu, and for a change of mu
_FLATTEST, _STEEPEST, _LARGEST = 0.4, 1.5, 5.0
# Armijo's constant, the shares by which a step is shortened, and the shortest one
_ARMIJO, _HALF, _FIFTH, _SHORTEST = 1e-4, 0.5, 0.2, 1e-3
# at the end, the point is moved towards w by this share of the way at most, by so many bisections
_SHORTENED, _BISECTIONS = 0.9, 5
# the search in single precision meets the level with a margin for rounding errors; where these are larger, as for small
# losses, the point is moved away from w by these factors until it meets the level in double precision
_MARGIN, _STRETCHED = 1e-4, (1.0, 1.003, 1.01, 1.03, 1.1)


@dataclass(frozen=True)
class LevelPoint:
    """A point v with the excess loss L(v) <= eps L(w): a proof that this level is no farther from w than |v - w|.

    Args:
        point: v  ``[P]``.
        distance: |v - w|, in units of the weights' norm.
        level: eps.
        loss: L(v), evaluated in float64.
        linear: the distance of the same level in the linear model at w; an estimate, not a bound.
        gradients: the cost of the search, in gradients of all samples.
        certified: whether L(v) <= eps L(w); if not, the search ended before it met the level, and nothing is proved.
    """

    point: Tensor = field(repr=False)
    distance: float
    level: float
    loss: float
    linear: float
    gradients: float
    certified: bool


class _Search:
    """Looks for a short displacement u with L(w + u) <= allowed: the minimiser of L(w + u) + mu |u|^2 / 2 for some mu.

    Args:
        problem: loss and samples.
        w: weights  ``[P]``.
        total: L(w).
        allowed: the loss to be met.
        max_gradients: the search ends when it has cost as much.
    """

    def __init__(self, problem: ZeroLossProblem, w: Tensor, total: float, allowed: float, max_gradients: float) -> None:
        self.problem, self.w, self.total, self.allowed = problem, w, total, allowed
        self.max_gradients, self.spent, self.linear = max_gradients, 0.0, math.nan
        self.length, self.best = math.inf, torch.zeros_like(w)  # the shortest displacement that meets the level
        self.lowest, self.deepest = math.inf, torch.zeros_like(w)  # the lowest loss, and the displacement
        self.mu, self.slope = math.nan, 1.0
        self.known: tuple[float, float] | None = None  # mu and L when mu was changed last
        self.memory = QuasiNewton(w[:0], w[None][:0], pairs=_PAIRS)

    def _keep(self, u: Tensor, loss: float) -> None:
        """Keep the displacement if it is the shortest that meets the level, or has the lowest loss."""
        length = torch.linalg.vector_norm(u).item()
        if loss <= self.allowed and length < self.length:
            self.length, self.best = length, u
        if loss < self.lowest:
            self.lowest, self.deepest = loss, u

    def loss(self, u: Tensor) -> float:
        """L(w + u)."""
        self.spent += _LOSS
        loss = self.problem.loss(self.w + u).item()
        self._keep(u, loss)
        return loss

    def loss_and_gradient(self, u: Tensor) -> tuple[float, Tensor]:
        """L(w + u) and its gradient  ``[P]``."""
        self.spent += 1
        loss, gradient = self.problem.loss_and_gradient(self.w + u)
        self._keep(u, loss.item())
        return loss.item(), gradient

    def first(self) -> tuple[Tensor, float]:
        """The shortest displacement with the wanted value of the linear model at w, and the loss there.

        The model is L + (|c + B u|^2 - |c|^2) / 2, where B^T c is the gradient.
        """
        at = linearize(self.problem, self.w)
        self.spent += _LINEARISATION
        c = at.newton()
        offset = torch.dot(c, c).item() / 2 - self.total

        def residual(value: float) -> float:
            return math.sqrt(2 * max(value + offset, 1e-3 * value))

        before, found, mu = 0.0, None, math.inf
        steps = max(int(self.max_gradients / 2 / _PRODUCT), 5)
        for found in tikhonov(at.operator.gram_product, c, max_steps=steps, held=at.operator.held):
            mu = found.regularisation(residual(self.allowed))
            length = found.length(mu)
            if abs(length - before) <= _KRYLOV_CHANGE * length and found.error(mu) <= _KRYLOV_ERROR:
                break
            before = length
        if found is None:  # w is a stationary point
            return torch.zeros_like(self.w), self.total
        self.linear = found.length(mu)
        self.mu = found.regularisation(residual(max(_AIM * self.allowed, _REDUCTION * self.total)))
        u = -at.operator.rmatvec(found.dual(self.mu))
        values, vectors = found.leading(_EIGENPAIRS)
        kept = values > _NEGLIGIBLE * values.max() if len(values) else values > 0
        values, vectors = values[kept], vectors[kept]
        V = self.w.new_empty(len(values), len(self.w))
        for i, (value, vector) in enumerate(zip(values, vectors, strict=True)):
            V[i] = at.operator.rmatvec(vector) / value.sqrt()
        self.memory = QuasiNewton(values, V, pairs=_PAIRS)
        self.spent += found.space.steps * _PRODUCT + (1 + len(values)) * _HALF_PRODUCT
        loss = self.loss(u)
        return (u, loss) if loss <= self.total else (torch.zeros_like(u), self.total)

    def improve(self, d: Tensor, loss: float, gradient: Tensor) -> tuple[Tensor, float, Tensor]:
        """A quasi-Newton step for L + mu |u|^2 / 2 from u = d, and loss and gradient of L before and after it."""
        mu = self.mu
        g = gradient + mu * d
        step = self.memory.direction(g, mu)
        slope, share = torch.dot(g, step).item(), 1.0
        if not slope < 0:
            self.memory.clear()
            step = self.memory.direction(g, mu)
            slope = torch.dot(g, step).item()
        before = loss + mu / 2 * torch.dot(d, d).item()
        while True:
            u = d + share * step
            new, new_gradient = self.loss_and_gradient(u)
            if new + mu / 2 * torch.dot(u, u).item() <= before + _ARMIJO * share * slope:
                self.memory.add(u - d, new_gradient - gradient)
                return u, new, new_gradient
            if share < _SHORTEST or self.spent >= self.max_gradients:
                self.memory.clear()
                return d, loss, gradient
            share *= _HALF if share > _FIFTH else _FIFTH

    def adapt(self, loss: float) -> None:
        """Change mu towards the level, by the slope of log L between the last two values of log mu."""
        if self.known is not None and self.known[0] != self.mu:
            slope = math.log(loss / self.known[1]) / math.log(self.mu / self.known[0])
            self.slope = min(max(slope, _FLATTEST), _STEEPEST)
        self.known = self.mu, loss
        target = max(_AIM * self.allowed, _REDUCTION * loss)
        self.mu *= min(max((target / loss) ** (1 / self.slope), 1 / _LARGEST), _LARGEST)

    def run(self, d: Tensor, rtol: float, *, given: bool) -> None:
        """Improve a displacement until that costs too much, or no longer shortens it.

        Args:
            d: the displacement.
            rtol: see `level_distance`.
            given: whether it is not that of the linear model. Then mu is the one for which it is closest to stationary,
                -grad L(w + d) = mu d.
        """
        loss, gradient = self.loss_and_gradient(d)
        if given:
            square = torch.dot(d, d).item()
            mu = -torch.dot(gradient, d).item() / square
            self.mu = mu if mu > 0 else 2 * loss / square
        length, steps, mark = math.inf, 0, loss  # when mu was changed, or patience ended, last
        round_ends, lowest = self.spent + _ROUND, self.lowest
        while self.spent < self.max_gradients and loss > 0:
            d, loss, gradient = self.improve(d, loss, gradient)
            steps += 1
            size = torch.linalg.vector_norm(gradient + self.mu * d).item()
            tangential = size / (self.mu * torch.linalg.vector_norm(d).item() + 1e-300)
            close = _CLOSE * self.allowed <= loss <= self.allowed
            if close and tangential <= _STATIONARY and self.length > (1 - rtol) * length:
                break
            if self.spent > round_ends and self.length == math.inf:
                if self.lowest > (1 - _HOPELESS) * lowest:
                    break
                round_ends, lowest = self.spent + _ROUND, self.lowest
            slow = steps >= _PATIENCE and loss > self.allowed and loss > (1 - _SLOW) * mark
            if tangential <= _LOOSE or loss < _CLOSE * self.allowed or slow:
                length = self.length
                self.adapt(loss)
                steps, mark = 0, loss
            elif steps >= _PATIENCE:
                steps, mark = 0, loss
        if self.length < math.inf:
            self._shorten()

    def _shorten(self) -> None:
        """Shorten the best displacement as long as it meets the level."""
        whole, low, high = self.best, _SHORTENED, 1.0
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            low, high = (low, middle) if self.loss(middle * whole) <= self.allowed else (middle, high)


def level_distance(
    problem: ZeroLossProblem,
    w: Tensor,
    level: float = 0.1,
    *,
    start: Tensor | None = None,
    rtol: float = 0.02,
    max_gradients: float = 500.0,
) -> LevelPoint:
    """An upper bound for the distance to the level eps of the loss, with the point that proves it.

        d_eps(w) = min |v - w|  subject to  L(v) <= eps L(w)

    The search begins at the solution of the linear model at w, or at a given point if that is better. The points on the
    way minimise L(v) + mu |v - w|^2 / 2, by quasi-Newton steps; mu is adapted until the level is met. As eps goes to 0,
    the distance tends to that of the zero-loss set. The search is local: another point of the level may be closer.

    Args:
        problem: loss and samples.
        w: weights  ``[P]``.
        level: eps, between 0 and 1.
        start: a point close to the level, such as the last one  ``[P]``; saves some of the cost.
        rtol: the search ends when a new mu has shortened the distance by less than this, relative to it.
        max_gradients: the search ends when it has cost about as many gradients of all samples.

    Raises:
        ValueError: a level that is not between 0 and 1; weights or outputs that are not finite.

    >>> from torch import nn
    >>> problem = ZeroLossProblem(nn.Linear(2, 1, bias=False), "mse", torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0]]))
    >>> found = level_distance(problem, torch.tensor([1.0, 5.0], dtype=torch.float64), 0.25)
    >>> found.certified, round(found.distance, 2)  # the residual is halved: 2 -> 1
    (True, 1.0)
    """
    if not 0 < level < 1:
        raise ValueError(f"the level is a share of the present excess loss, between 0 and 1, got {level}")
    if not torch.isfinite(w).all():
        raise ValueError("the weights contain nan or infinity: training has probably diverged")
    total = problem.loss(w).item()
    if total == 0:
        return LevelPoint(w, 0.0, level, 0.0, 0.0, _LOSS, certified=True)
    # the certificate is evaluated in float64; the search need not be
    fast = problem.at_precision(torch.float32)
    allowed = (1 - _MARGIN) * level * total
    search = _Search(fast, w.to(fast.dtype), total, allowed, max_gradients)
    (d, loss), known = search.first(), None
    if start is not None:
        known = start.to(fast.dtype) - search.w
        value = search.loss(known)
        if known.any() and (value < loss if loss > allowed else search.best is known):
            d = known
    if math.isfinite(search.mu) or d is known:
        search.run(d, rtol, given=d is known)
    u = (search.best if search.length < math.inf else search.deepest).to(w.dtype)
    exact = problem.at_precision(torch.float64)
    total = exact.loss(w.to(exact.dtype)).item()
    v, value = w + u, math.nan
    for stretched in _STRETCHED:  # where single precision met the level and double precision does not
        v = w + stretched * u
        value = exact.loss(v.to(exact.dtype)).item()
        search.spent += 2 * _LOSS
        if value <= level * total or search.length == math.inf:
            break
    length = torch.linalg.vector_norm(v - w).item()
    return LevelPoint(v, length, level, value, search.linear, search.spent, certified=value <= level * total)
