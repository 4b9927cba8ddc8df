"""Windows made to order: what was measured against what was predicted."""

import math
from dataclasses import replace

import pytest
import torch

from tests.problems import make
from torch_singlim import Dropout, Langevin, Model, SGDSettings, Snapshot, measure_distance
from torch_singlim.measure import Code, Measurement, compare_window, scalars
from torch_singlim.measure.full_batch_window import unusable


def test_a_diffusing_noise_has_a_length_and_no_flow():
    """A window whose end is put where the limit says the ensemble is, on average: the two lengths are equal."""
    dense, w = make("two_layers")
    problem, noise, sgd = dense.problem, Langevin(0.01), SGDSettings(lr=0.05)
    start = measure_distance(problem, Snapshot(0, w, sgd=sgd), noise=noise, num_draws=1000)
    steps = 50
    tangential = start.tangent.project(torch.randn(len(w), generator=torch.Generator().manual_seed(0)).double())
    length = math.hypot(steps * start.limit.drift.norm().item(), start.limit.spread(steps))
    end = w + length * tangential / tangential.norm()
    window = compare_window(problem, w, end, start=0, stop=steps, noise=noise, sgd=sgd, forecast=start.forecast)
    assert window.comparisons.keys() == {Model.BASELINE, Model.LIMIT}
    assert window.drift is None
    assert window.diffuses
    assert window.spread.measured == pytest.approx(window.spread.predicted, rel=1e-6)
    logged = scalars(Measurement(steps, window=window))
    assert "drift/cosine" not in logged
    assert logged["limit/spread_measured"] == pytest.approx(length, rel=1e-6)


def test_long_steps_that_say_nothing_are_invalidated():
    dense, w = make("two_layers")
    window = compare_window(
        dense.problem,
        w,
        w + 0.01,
        start=0,
        stop=2000,
        noise=Dropout(),
        sgd=SGDSettings(lr=0.05),
        accurate=False,
        generator=torch.Generator().manual_seed(0),
    )
    prediction = window.comparisons[Model.FULL_BATCH].prediction
    assert window.reason == unusable(prediction, 0, 2000)
    size = torch.linalg.vector_norm(prediction.displacement).item()
    for off, invalidated in ((0.4 * size, False), (0.6 * size, True)):
        reason = unusable(replace(prediction, stderr=off, error=1e-3 * size), 0, 2000)
        assert (reason is not None) == invalidated
        assert reason is None or reason.code is Code.UNCERTAIN
        uncertain = replace(window, reason=reason)
        assert (uncertain.drift is None) == invalidated
        assert ("drift/cosine" in scalars(Measurement(2000, window=uncertain))) != invalidated
    followed = replace(prediction, stderr=size, error=0.0)
    assert unusable(followed, 0, 2000) is None
