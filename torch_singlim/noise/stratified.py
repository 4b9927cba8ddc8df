"""Draws of a noise that are spread evenly over its distribution."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from torch_singlim.noise.base import NoiseSpace, NoiseSystem, parts

__all__ = ["stratified_noise"]


def _prime(least: int) -> int:
    """The smallest prime that is not less than `least`."""
    n = max(least, 2)
    while any(n % d == 0 for d in range(2, int(n**0.5) + 1)):
        n += 1
    return n


def stratified_noise(
    system: NoiseSystem, space: NoiseSpace, count: int, *, strata: int, generator: torch.Generator | None
) -> Iterator[tuple[Tensor, ...]]:
    """A block of draws like those of `draw_noise`, evenly spread over each component's distribution (Latin hypercube).

        u_j(i) = ((a_j i + s_j) mod n + U_ij) / n,      eta_j(i) = F_j^{-1}(u_j(i)),      i = 0..n-1

    Each draw on its own has the exact distribution, with independent components. Over the block, each component takes
    one value in each of its n strata, so that terms linear in eta nearly average out. n is the next prime, a_j is
    uniform on 1..n-1 and s_j on 0..n-1: any two draws are then distributed as under a random permutation (Owen 1992,
    Tang 1993).

    Args:
        system: the noise; its components must be independent, each with its own `quantile`.
        space: what can be perturbed.
        count: samples of a batch.
        strata: number of draws in the block, rounded up to a prime.
        generator: of the draws.
    """
    n = _prime(strata)
    device = "cpu" if generator is None else generator.device
    shapes = [
        (count, part.scale(space).numel()) if part.per_sample else (part.scale(space).numel(),)
        for part in parts(system)
    ]
    slopes = [torch.randint(1, n, shape, generator=generator, device=device, dtype=torch.int32) for shape in shapes]
    shifts = [torch.randint(0, n, shape, generator=generator, device=device, dtype=torch.int32) for shape in shapes]
    for i in range(n):
        etas = []
        for part, slope, shift in zip(parts(system), slopes, shifts, strict=True):
            jitter = torch.rand(slope.shape, generator=generator, device=device, dtype=space.dtype)
            u = ((slope * i + shift) % n + jitter) / n
            etas.append(part.quantile(space, u.clamp_min(torch.finfo(space.dtype).tiny).to(space.device)))
        yield tuple(etas)
