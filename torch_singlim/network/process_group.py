"""Processes that take part in the same measurements."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, distributed

__all__ = ["PeerFailed", "ProcessGroup"]


# number of blocks in which this process is at present, one within the other
_depth = 0
# blocks are never nested as deeply as this
_DEEPEST = 100.0


class PeerFailed(RuntimeError):
    """Another process has failed in the measurement that this process takes part in.

    Args:
        depth: of the outermost block that another process has left.
    """

    def __init__(self, depth: int) -> None:
        super().__init__("the measurement failed on another process")
        self.depth = depth

    @property
    def left_further(self) -> bool:
        """Whether the other process has left the block in which this one is at present, too."""
        return self.depth <= _depth


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

    def _flag(self, depth: int | None) -> int | None:
        """Depth of the outermost block that a process is leaving; None: none is. `depth`: that of this process."""
        flag = torch.tensor(0.0 if depth is None else _DEEPEST - depth, device=self.device)
        distributed.all_reduce(flag, distributed.ReduceOp.MAX)
        return None if flag.item() == 0 else round(_DEEPEST - flag.item())

    def _check(self) -> None:
        depth = self._flag(None)
        if depth is not None:
            raise PeerFailed(depth)

    @contextmanager
    def together(self) -> Iterator[None]:
        """A block that fails on all processes if it fails on one of them.

        Raises:
            PeerFailed: another process has failed.
            Exception: that of this process.
        """
        global _depth  # as many as there are processes, which are not threads
        _depth += 1
        try:
            yield
            if self.size > 1:
                self._check()
        except PeerFailed:
            raise
        except Exception as error:
            outermost = self._flag(_depth) if self.size > 1 else None
            if outermost is not None and outermost < _depth:
                raise PeerFailed(outermost) from error
            raise
        finally:
            _depth -= 1

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
