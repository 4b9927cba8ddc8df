"""Cross-entropy at many positions of a sample: language models, and labels of every pixel."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from torch_singlim.network.loss import SoftCrossEntropy

__all__ = ["SequenceCrossEntropy"]


@dataclass(frozen=True)
class SequenceCrossEntropy:
    """l = (1/m) sum_t KL(q_t || softmax f_t) over the m positions of a sample that are to be predicted.

    This is the mean over the positions of a batch, as torch.nn.CrossEntropyLoss takes it, if there are equally many in
    each sample; otherwise that is no mean over samples. The prepared targets ``[n, m, V + 1]`` are the probabilities of
    the V classes and, last, the position. Outputs are f ``[n, T V]``, with the classes last or first.

    Args:
        classes: V.
        positions: m.
        label_smoothing: as in torch.nn.CrossEntropyLoss.
        classes_first: whether outputs are ``[n, V, T]``, as torch.nn.CrossEntropyLoss takes them, or ``[n, T, V]``.
        ignored: label of positions that are not to be predicted.
    """

    classes: int
    positions: int
    label_smoothing: float = 0.0
    classes_first: bool = False
    ignored: int = field(default=-100, kw_only=True)

    @classmethod
    def of(
        cls, targets: Tensor, classes: int, label_smoothing: float = 0.0, *, classes_first: bool = False
    ) -> SequenceCrossEntropy:
        """The loss for class labels ``[n, ...]``.

        Args:
            targets: the labels; -100 where nothing is to be predicted.
            classes: V.
            label_smoothing: see above.
            classes_first: see above.

        Raises:
            ValueError: samples with different numbers of positions to be predicted, or without any.

        >>> SequenceCrossEntropy.of(torch.tensor([[-100, 1, 2], [0, -100, 2]]), 3)
        SequenceCrossEntropy(classes=3, positions=2, label_smoothing=0.0, classes_first=False, ignored=-100)
        """
        counts = (targets.flatten(1) != cls.ignored).sum(1)
        low, high = int(counts.min()), int(counts.max())
        if low != high or not low:
            raise ValueError(
                f"the positions to be predicted are {low} to {high} in a sample: the mean over the positions of a "
                "batch is a mean over samples, with a zero-loss set, if there are equally many in each; cut the "
                "samples to the same length, or average each sample first and pass that loss"
            )
        return cls(classes, low, label_smoothing, classes_first)

    @property
    def _each(self) -> SoftCrossEntropy:
        return SoftCrossEntropy(self.label_smoothing)

    def _at(self, f: Tensor, y: Tensor) -> Tensor:
        """Outputs, or directions in them, at the positions that are to be predicted  ``[n m, V]``."""
        n, V = len(f), self.classes
        whole = f.reshape(n, V, -1).transpose(1, 2) if self.classes_first else f.reshape(n, -1, V)
        where = y[..., -1:].long().expand(-1, -1, V)
        return whole.gather(1, where).reshape(-1, V)

    def _into(self, v: Tensor, y: Tensor, f: Tensor) -> Tensor:
        """The transpose: 0 at all other positions  ``[n, T V]``."""
        n, V = len(y), self.classes
        where = y[..., -1:].long().expand(-1, -1, V)
        whole = torch.zeros(n, f.shape[1] // V, V, dtype=v.dtype, device=v.device)
        whole = whole.scatter(1, where, v.reshape(n, -1, V))
        return (whole.transpose(1, 2) if self.classes_first else whole).reshape(n, -1)

    def _targets(self, y: Tensor) -> Tensor:
        return y[..., :-1].reshape(-1, self.classes)

    def _mean(self, each: Tensor, y: Tensor) -> Tensor:
        return each.reshape(len(y), -1).mean(1)

    def prepare(self, targets: Tensor, outputs: Tensor) -> Tensor:
        flat = targets.flatten(1)
        if targets.is_floating_point() or targets.ndim < 2 or flat.shape[1] * self.classes != outputs.shape[1]:
            raise ValueError(
                f"targets must be class labels [n, ...] at every position, got {targets.dtype} of shape "
                f"{tuple(targets.shape)} for {outputs.shape[1]} outputs and {self.classes} classes"
            )
        valid = flat != self.ignored
        if bool((valid.sum(1) != self.positions).any()):
            raise ValueError(f"each sample must have {self.positions} positions to be predicted, as the loss says")
        labels = flat[valid]
        if not (int(labels.min()) >= 0 and int(labels.max()) < self.classes):
            raise ValueError(
                f"class labels must lie in 0..{self.classes - 1}, got {int(labels.min())}..{int(labels.max())}"
            )
        q = self._each.prepare(labels, outputs.new_empty(len(labels), self.classes))
        where = valid.nonzero()[:, 1].to(outputs)
        return torch.cat([q, where[:, None]], 1).view(len(targets), self.positions, -1)

    def num_rows(self, num_outputs: int) -> int:
        return self.positions * (self.classes - 1)

    def value(self, f: Tensor, y: Tensor) -> Tensor:
        return self._mean(self._each.value(self._at(f, y), self._targets(y)), y)

    def shifted(self, f: Tensor, y: Tensor, shift: Tensor) -> Tensor:
        return self._mean(self._each.shifted(self._at(f, y), self._targets(y), self._at(shift, y)), y)

    def infimum(self, y: Tensor) -> Tensor:
        return self._mean(self._each.infimum(self._targets(y)), y)

    def attained(self, f: Tensor, y: Tensor) -> bool:
        return self._each.attained(f, self._targets(y))

    def optimum(self, y: Tensor) -> Tensor:
        raise ValueError(
            "noise on labels at many positions is not covered: use LabelNoise with mse, or LabelFlips with one label "
            "for each sample"
        )

    def curvature(self, f: Tensor, y: Tensor, v: Tensor) -> Tensor:
        return self._mean(self._each.curvature(self._at(f, y), self._targets(y), self._at(v, y)), y)

    def whiten(self, f: Tensor, y: Tensor, v: Tensor) -> Tensor:
        rows = self._each.whiten(self._at(f, y), self._targets(y), self._at(v, y))
        return rows.reshape(len(y), -1) / math.sqrt(self.positions)

    def unwhiten(self, f: Tensor, y: Tensor, u: Tensor) -> Tensor:
        each = u.reshape(-1, self.classes - 1)
        back = self._each.unwhiten(self._at(f, y), self._targets(y), each)
        return self._into(back, y, f) / math.sqrt(self.positions)

    def deviation(self, f: Tensor, y: Tensor) -> Tensor:
        return self._into(self._each.deviation(self._at(f, y), self._targets(y)), y, f)

    def residual(self, f: Tensor, y: Tensor) -> Tensor:
        return self.whiten(f, y, self.deviation(f, y))

    def newton(self, f: Tensor, y: Tensor) -> Tensor:
        rows = self._each.newton(self._at(f, y), self._targets(y))
        return rows.reshape(len(y), -1) / math.sqrt(self.positions)
