"""How distance and noise-induced drift are distributed over the layers of a network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from torch_singlim.measure.window import Model, Window

__all__ = ["drift_by_layer", "shares"]


def shares(vector: Tensor, sizes: Mapping[str, int]) -> dict[str, float]:
    """The share of |v|^2 that each parameter has.

    Args:
        vector: v, the parameters in their order  ``[P]``.
        sizes: number of weights of each parameter.

    >>> shares(torch.tensor([3.0, 4.0, 0.0]), {"weight": 2, "bias": 1})
    {'weight': 1.0, 'bias': 0.0}
    """
    squares = torch.stack([part.double().square().sum() for part in vector.split(list(sizes.values()))])
    total = squares.sum().clamp_min(torch.finfo(squares.dtype).tiny)
    return dict(zip(sizes, (squares / total).tolist(), strict=True))


def drift_by_layer(window: Window, sizes: Mapping[str, int]) -> Sequence[tuple[str, dict[str, float]]]:
    """(label, share of each parameter) of the noise-induced drift, measured and predicted, of a window at its end.

    The measured one contains the noise of the run, and the predicted one sampling errors. Empty: the drift of this
    window is not known, or was compared on other parameters than these.

    Args:
        window: the window.
        sizes: number of weights of each parameter.
    """
    models = (window.comparisons.get(Model.AVERAGED), window.comparisons.get(Model.BASELINE))
    averaged, baseline = (None if each is None or each.prediction is None else each.prediction for each in models)
    if window.displacement is None or averaged is None or baseline is None or window.noise is None:
        return ()
    if len(window.displacement) != sum(sizes.values()):
        return ()
    n = baseline.displacement
    return (
        ("noise-induced drift, measured", shares(window.displacement - n, sizes)),
        ("noise-induced drift, predicted", shares(averaged.displacement - n, sizes)),
    )
