"""Handwritten digits that come with the package."""

from __future__ import annotations

from importlib.resources import files

import numpy as np
import torch
from torch import Tensor

__all__ = ["handwritten_digits"]


def handwritten_digits(samples: int = 1797) -> tuple[Tensor, Tensor]:
    """The first of 1,797 handwritten digits: pixels, 0 to 16, as float32 ``[n, 64]``, and labels ``[n]``.

    Source: E. Alpaydin and C. Kaynak, *Optical Recognition of Handwritten Digits*, UCI Machine Learning Repository,
    1998, test set; CC BY 4.0.

    Args:
        samples: how many.

    Raises:
        ValueError: fewer than 1, or more than there are.

    >>> pixels, labels = handwritten_digits(3)
    >>> pixels.shape, labels.tolist()
    (torch.Size([3, 64]), [0, 1, 2])
    """
    with files("torch_singlim.demo").joinpath("digits.npz").open("rb") as opened, np.load(opened) as found:
        pixels, labels = found["pixels"], found["labels"]
    if not 1 <= samples <= len(labels):
        raise ValueError(f"samples must be 1 to {len(labels)}, got {samples}")
    return torch.tensor(pixels[:samples], dtype=torch.float32), torch.tensor(labels[:samples], dtype=torch.int64)
