"""Processes that share the samples of a probe between them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, distributed

__all__ = ["Team"]


@dataclass(frozen=True)
class Team:
    """One of several processes that hold the same weights and samples, and evaluate a part of the samples each.

    Every process makes the same calls in the same order, and gets the same results.

    Args:
        rank: of this process.
        size: of the team; 1: alone.

    >>> Team(rank=1, size=3).own(10)
    slice(3, 6, None)
    """

    rank: int = 0
    size: int = 1

    def own(self, count: int) -> slice:
        """This process's part of so many samples."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of everybody's."""
        if self.size == 1:
            return tensor
        total = tensor.detach().clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total)
        return total

    def whole(self, part: Tensor, count: int) -> Tensor:
        """Everybody's rows, one after another  ``[count, ...]``, from each its own."""
        if self.size == 1:
            return part
        rows = part.new_zeros(count, *part.shape[1:])
        rows[self.own(count)] = part.detach()
        return self.sum(rows)

    def least(self, number: float, device: torch.device) -> float:
        """The smallest of everybody's numbers."""
        if self.size == 1:
            return number
        smallest = torch.tensor(number, dtype=torch.float64, device=device)
        distributed.all_reduce(smallest, distributed.ReduceOp.MIN)
        return smallest.item()

    def of_first(self, number: float, device: torch.device) -> float:
        """The first process's number: what clocks decide, one decides for all."""
        return self.sum(torch.tensor(number if self.rank == 0 else 0.0, dtype=torch.float64, device=device)).item()
