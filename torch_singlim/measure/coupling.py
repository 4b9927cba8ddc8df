"""Statistics of a run and its coupled paths: direction, speed, noise-induced drift, noise ceiling, by inner products.

All paths start at the same weights and use the same batches over the same steps. Their displacements are

    m  of the run,    n  of the baseline (noise off),    a_1, a_2  of two averaged paths (half of the draws each),
    r_1 ... r_R  of replicas (with independent noise)

Squares of the averaged displacement are products of a_1 and a_2, so that sampling errors do not bias them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from torch_singlim.linalg import Estimate
from torch_singlim.measure.agreement import Agreement

__all__ = ["CoupledWindow", "Projection", "noise_ceiling_of", "pooled"]

# the averaged paths are not resolved if 2 <y, d> exceeds this share of <y_1, y_2>
_UNRESOLVED = 1 / 3


@dataclass(frozen=True)
class Projection:
    """The projection of a displacement x of the run on that of the averaged paths, y = (y_1 + y_2)/2: x = Q y + rest.

        Q = <x, y> / D,      D = <y_1, y_2>,      cosine = <x, y> / (|x| sqrt(D))

    Args:
        product: <x, y>.
        square: D; its expectation is the squared length of the mean path, without the halves' sampling errors.
        cosine: nan if D is not positive.
        stderr: standard error of Q, from the replicas and from the difference of the halves; nan without replicas.
        resolved: whether the two halves agree well enough for the results to be meaningful.
        cosine_stderr: standard error of the cosine, likewise.
    """

    product: float
    square: float
    cosine: float
    stderr: float
    resolved: bool
    cosine_stderr: float = math.nan

    @property
    def ratio(self) -> Estimate:
        """Q with its standard error."""
        return Estimate(self.product / self.square if self.square else math.nan, self.stderr)


@dataclass(frozen=True)
class CoupledWindow:
    """A window of a run and the paths coupled to it, reduced to the inner products of their displacements.

    Args:
        gram: inner products of (m, n, a_1, a_2, r_1, ..., r_R) and of s, the expanded path, if there is one, float64;
            n = 0 without baseline.
        has_baseline: whether there is a baseline.
        has_expanded: whether there is an expanded path.

    >>> m, a = torch.tensor([2.0, 0.0]), torch.tensor([1.0, 0.0])
    >>> window = CoupledWindow.of(m, a, a, baseline=torch.tensor([0.5, 0.0]))
    >>> window.speed.ratio.mean, window.noise.ratio.mean
    (2.0, 3.0)
    """

    gram: Tensor = field(repr=False)
    has_baseline: bool
    has_expanded: bool = False

    @classmethod
    def of(
        cls,
        run: Tensor,
        averaged_1: Tensor,
        averaged_2: Tensor,
        *,
        baseline: Tensor | None = None,
        expanded: Tensor | None = None,
        replicas: Sequence[Tensor] = (),
    ) -> CoupledWindow:
        """From the displacements themselves  ``[P]``."""
        vectors = [run, torch.zeros_like(run) if baseline is None else baseline, averaged_1, averaged_2, *replicas]
        vectors += [] if expanded is None else [expanded]
        count = len(vectors)
        gram = torch.zeros(count, count, dtype=torch.float64)
        for i, j in itertools.combinations_with_replacement(range(count), 2):  # one by one, to save memory
            gram[i, j] = gram[j, i] = torch.dot(vectors[i].double(), vectors[j].double()).item()
        return cls(gram, baseline is not None, expanded is not None)

    def state_dict(self) -> dict[str, Any]:
        """A tensor and a plain value, for a checkpoint."""
        return {"gram": self.gram, "has_baseline": self.has_baseline, "has_expanded": self.has_expanded}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> CoupledWindow:
        """The window with this state."""
        return cls(state["gram"].cpu(), state["has_baseline"], state["has_expanded"])

    @property
    def num_replicas(self) -> int:
        """R."""
        return len(self.gram) - 4 - self.has_expanded

    def _inner(self, u: Tensor, v: Tensor) -> float:
        return (u @ self.gram @ v).item()

    def _combination(self, *weights: tuple[int, float]) -> Tensor:
        """Coefficients of a linear combination of the displacements."""
        c = self.gram.new_zeros(len(self.gram))
        for index, weight in weights:
            c[index] += weight
        return c

    def _halves(self, shift: float) -> tuple[Tensor, Tensor, float, bool]:
        """y = (y_1 + y_2)/2, d = (y_1 - y_2)/2, <y_1, y_2>, and whether the halves agree; y_i = a_i - shift n."""
        y1, y2 = (self._combination((i, 1.0), (1, -shift)) for i in (2, 3))
        y, d, square = (y1 + y2) / 2, (y1 - y2) / 2, self._inner(y1, y2)
        return y, d, square, square > 0 and abs(2 * self._inner(y, d)) <= _UNRESOLVED * square

    def _project(self, *, relative: bool) -> Projection:
        """The projection of the run on the averaged paths; `relative`: all displacements relative to the baseline."""
        shift = 1.0 if relative else 0.0
        x = self._combination((0, 1.0), (1, -shift))
        y, d, square, resolved = self._halves(shift)
        product = self._inner(x, y)
        size = self._inner(x, x)
        cosine = product / math.sqrt(size * square) if square > 0 and size > 0 else math.nan
        stderr = cosine_stderr = math.nan
        if self.num_replicas and square:
            # products and cosines of run and replicas with y: independent given the averaged paths
            runs = [x, *(self._combination((4 + r, 1.0), (1, -shift)) for r in range(self.num_replicas))]
            products = torch.tensor([self._inner(z, y) for z in runs], dtype=torch.float64)
            bias = self._inner(x - 2 * (product / square) * y, d)
            stderr = math.hypot(products.std().item(), bias) / abs(square)
            if size > 0 and square > 0:
                cosines = (
                    products / torch.tensor([self._inner(z, z) * square for z in runs], dtype=torch.float64).sqrt()
                )
                # an error d of y changes both <x, y> and D
                bias = self._inner(x, d) / math.sqrt(size * square) - cosine * self._inner(y, d) / square
                cosine_stderr = math.hypot(cosines.std().item(), bias)
        return Projection(product, square, cosine, stderr, resolved, cosine_stderr)

    @property
    def speed(self) -> Projection:
        """The whole motion: Q is the speed, its cosine the direction."""
        return self._project(relative=False)

    @property
    def noise(self) -> Projection | None:
        """The noise-induced part, x = m - n on y_i = a_i - n (None without a baseline)."""
        return self._project(relative=True) if self.has_baseline else None

    @property
    def noise_of_replicas(self) -> Projection | None:
        """The mean noise-induced part of the replicas, mean_r (r - n), on y_i = a_i - n (None without either).

        It contains what fluctuations feed back on the mean motion, which no deterministic path has, and nothing of what
        only the run does. The error counts run and replicas as equally distributed.
        """
        R = self.num_replicas
        if not (self.has_baseline and R):
            return None
        y, d, square, resolved = self._halves(1.0)
        runs = [self._combination((i, 1.0), (1, -1.0)) for i in (0, *range(4, 4 + R))]
        products = torch.tensor([self._inner(z, y) for z in runs], dtype=torch.float64)
        product, stderr = products[1:].mean().item(), math.nan
        if square:
            mean = torch.stack(runs[1:]).mean(0)
            bias = self._inner(mean - 2 * (product / square) * y, d)
            stderr = math.hypot(products.std().item() / math.sqrt(R), bias) / abs(square)
        return Projection(product, square, math.nan, stderr, resolved)

    @property
    def expansion(self) -> tuple[float, float] | None:
        """Cosine and ratio of norms of s - n with the averaged paths; None without an expanded path and a baseline."""
        if not (self.has_expanded and self.has_baseline):
            return None
        s, y1, y2 = (self._combination((i, 1.0), (1, -1.0)) for i in (len(self.gram) - 1, 2, 3))
        square, size = self._inner(y1, y2), self._inner(s, s)
        if square <= 0 or size <= 0:
            return None
        return self._inner(s, (y1 + y2) / 2) / math.sqrt(square * size), math.sqrt(size / square)

    def _cosines(self, shift: float) -> list[float]:
        """Cosines between the run and each replica."""
        x = self._combination((0, 1.0), (1, -shift))
        others = [self._combination((4 + r, 1.0), (1, -shift)) for r in range(self.num_replicas)]
        sizes = [math.sqrt(self._inner(z, z) * self._inner(x, x)) for z in others]
        return [self._inner(x, z) / size for z, size in zip(others, sizes, strict=True) if size > 0]

    def cosines(self, *, relative: bool) -> list[float]:
        """Cosines between the run and each replica; the root of their mean is the noise ceiling, `noise_ceiling_of`.

        Args:
            relative: the cosines are those of the noise-induced parts, r - n and m - n.
        """
        return self._cosines(1.0 if relative else 0.0)

    def norm(self, index: int) -> float:
        """Norm of a displacement, in the order of `gram`."""
        return math.sqrt(max(self.gram[index, index].item(), 0.0))

    @property
    def norm_of_noise(self) -> float:
        """|m - n|, norm of the measured noise-induced drift."""
        x = self._combination((0, 1.0), (1, -1.0))
        return math.sqrt(max(self._inner(x, x), 0.0))

    @property
    def sampling_error(self) -> float:
        """|a_1 - a_2| / 2, the standard error of the averaged displacement (a_1 + a_2)/2."""
        d = self._combination((2, 0.5), (3, -0.5))
        return math.sqrt(max(self._inner(d, d), 0.0))

    @property
    def baseline(self) -> Agreement:
        """The agreement of the run with the baseline."""
        m, n, inner = self.norm(0), self.norm(1), self.gram[0, 1].item()
        return Agreement(
            cosine=inner / (m * n) if m * n > 0 else math.nan,
            speed=inner / n**2 if n > 0 else math.nan,
            residual=self.norm_of_noise / m if m > 0 else math.nan,
            measured=m,
            predicted=n,
        )

    @property
    def residual(self) -> float:
        """|m - a| / |m|, where the two halves are used to remove the sampling error of a."""
        size, cross = self.gram[0, 0].item(), self.gram[2, 3].item()
        product = (self.gram[0, 2] + self.gram[0, 3]).item() / 2
        return math.sqrt(max(size - 2 * product + cross, 0.0) / size) if size > 0 else math.nan


def noise_ceiling_of(cosines: Sequence[float]) -> float:
    """The noise ceiling sqrt(mean cos(m, r)), the best cosine of a deterministic prediction, given the batches.

    The cosines are averaged over pairs of run and replica, and over windows, before the root is taken; nan if there are
    none. This is a bound for the mean cosine: that of a single run may be larger.

    >>> noise_ceiling_of([0.64, 0.64])
    0.8
    """
    return math.sqrt(max(sum(cosines) / len(cosines), 0.0)) if cosines else math.nan


def pooled(projections: Sequence[Projection]) -> Estimate:
    """Q over the W windows of a run: Q = sum N_w / sum D_w with N_w = <x, y>, D_w = <y_1, y_2>.

        SE^2 = (W / (W - 1)) sum_w (N_w - Q D_w)^2 / (sum_w D_w)^2          (ratio estimator; Cochran 1977, section 6.4)

    The standard error is nan for fewer than two windows.

    >>> pooled([Projection(1.0, 1.0, 1.0, 0.0, True), Projection(3.0, 3.0, 1.0, 0.0, True)])
    Estimate(mean=1.0, stderr=0.0)
    """
    total = sum(p.square for p in projections)
    if not total:
        return Estimate(math.nan, math.nan)
    Q, W = sum(p.product for p in projections) / total, len(projections)
    if W < 2:
        return Estimate(Q, math.nan)
    spread = sum((p.product - Q * p.square) ** 2 for p in projections)
    return Estimate(Q, math.sqrt(W / (W - 1) * spread) / abs(total))
