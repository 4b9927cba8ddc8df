"""Processes that take part in the same measurements."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, distributed

__all__ = ["PeerFailed", "ProcessGroup"]


class PeerFailed(RuntimeError):
    """Another process has failed in the measurement that this process takes part in."""


@dataclass(frozen=True)
class ProcessGroup:
    """One of several processes that all hold the same weights and samples; each evaluates a part of the samples.

    Every process makes the same calls in the same order, and gets the same results. Each exchange of numbers begins
    with a flag from every process. A process that fails within `together` sends its flag instead of its numbers, and
    all processes leave the block with an exception, so that none waits for another.

    Args:
        rank: of this process.
        size: number of processes; 1: no communication.
        device: for the exchange of plain numbers.

    >>> ProcessGroup(rank=1, size=3).shard(10)
    slice(3, 6, None)
    """

    rank: int = 0
    size: int = 1
    device: str = "cpu"

    def shard(self, count: int) -> slice:
        """This process's part of `count` samples."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def _flag(self, failed: bool) -> bool:
        """Whether this process or another one has failed."""
        flag = torch.tensor(float(failed), device=self.device)
        distributed.all_reduce(flag)
        return flag.item() > 0

    def _check(self) -> None:
        if self._flag(False):
            raise PeerFailed("the measurement failed on another process")

    @contextmanager
    def together(self) -> Iterator[None]:
        """A block that fails on all processes if it fails on one of them.

        Raises:
            PeerFailed: another process has failed.
            Exception: that of this process.
        """
        try:
            yield
        except PeerFailed:
            raise
        except Exception:
            if self.size > 1:
                self._flag(True)
            raise
        if self.size > 1:
            self._check()

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.size == 1:
            return tensor
        self._check()
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

    def all_reduce_min(self, number: float) -> float:
        """The smallest number among all processes."""
        if self.size == 1:
            return number
        self._check()
        smallest = torch.tensor(number, dtype=torch.float64, device=self.device)
        distributed.all_reduce(smallest, distributed.ReduceOp.MIN)
        return smallest.item()

    def broadcast(self, number: float) -> float:
        """The first process's number: decisions that depend on a clock are made by that process for all."""
        own = number if self.rank == 0 else 0.0
        return self.all_reduce(torch.tensor(own, dtype=torch.float64, device=self.device)).item()
