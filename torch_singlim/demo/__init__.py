"""A demonstration without any other file: an MLP with dropout on handwritten digits, trained under a monitor."""

from torch_singlim.demo.data import handwritten_digits
from torch_singlim.demo.digits import train

__all__ = ["handwritten_digits", "train"]
