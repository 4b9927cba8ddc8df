"""Processes that share the samples of a measurement."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, distributed

__all__ = ["ProcessGroup"]


@dataclass(frozen=True)
class ProcessGroup:
    """One of several processes that all hold the same weights and samples; each evaluates a part of the samples.

    Every process makes the same calls in the same order, and gets the same results.

    Args:
        rank: of this process.
        size: number of processes; 1: no communication.

    >>> ProcessGroup(rank=1, size=3).shard(10)
    slice(3, 6, None)
    """

    rank: int = 0
    size: int = 1

    def shard(self, count: int) -> slice:
        """This process's part of `count` samples."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.size == 1:
            return tensor
        total = tensor.detach().clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total)
        return total

    def all_gather(self, part: Tensor, count: int) -> Tensor:
        """The rows of all processes, one shard after another  ``[count, ...]``."""
        if self.size == 1:
            return part
        rows = part.new_zeros(count, *part.shape[1:])
        rows[self.shard(count)] = part.detach()
        return self.all_reduce(rows)

    def all_reduce_min(self, number: float, device: torch.device) -> float:
        """The smallest number among all processes."""
        if self.size == 1:
            return number
        smallest = torch.tensor(number, dtype=torch.float64, device=device)
        distributed.all_reduce(smallest, distributed.ReduceOp.MIN)
        return smallest.item()

    def broadcast(self, number: float, device: torch.device) -> float:
        """The first process's number: decisions that depend on a clock are made by that process for all."""
        own = number if self.rank == 0 else 0.0
        return self.all_reduce(torch.tensor(own, dtype=torch.float64, device=device)).item()
