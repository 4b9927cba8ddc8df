"""The limit over a window, integrated and frozen: against descent in tiny steps; its budget; finite step sizes."""

import math

import pytest
import torch

from tests.measure.test_engine import Run
from tests.problems import make
from tests.theory.test_limit_flow import descend
from torch_singlim import (
    AntiCorrelated,
    Dropout,
    LabelFlips,
    LabelNoise,
    Langevin,
    SGDSettings,
    Snapshot,
    WeightDecay,
    compare,
    measure_distance,
)
from torch_singlim.measure import Budget, Code, Measurement, Model, Options
from torch_singlim.measure.limit import against_limit, integrated
from torch_singlim.measure.tags import scalars
from torch_singlim.measure.window import Window
from torch_singlim.theory import has_finite_step


def test_a_motion_along_gamma_is_that_of_the_integrated_limit():
    """Weight decay from Gamma in tiny projected steps: the tangential part of this motion, with both limits."""
    dense, w = make("scalar")
    noise, sgd, steps = WeightDecay(0.2), SGDSettings(lr=0.1), 10
    moved = descend(dense, w, lambda v: 0.1 * 0.2 * v, steps, 200)
    start = measure_distance(dense.problem, Snapshot(0, w, sgd=sgd), noise=noise)
    flow = integrated(dense.problem, start.forecast, noise, sgd, steps=steps, num_draws=8, generator=None)
    assert compare(moved, flow.displacement).residual < 0.01
    window = Window(0, steps, moved.norm().item(), moved)
    window = against_limit(window, start.forecast, moved, steps, flow=flow)
    logged = scalars(Measurement(steps, window=window))
    tangential = start.tangent.project(moved)
    frozen = steps * start.limit.drift
    assert logged["limit/cosine"] == pytest.approx(compare(tangential, flow.displacement).cosine)
    assert logged["limit/frozen_cosine"] == pytest.approx(compare(tangential, frozen).cosine)
    assert abs(logged["limit/speed"] - 1) < 0.1 * abs(logged["limit/frozen_speed"] - 1)


# a mode has relaxed soon
EARLY = Options(num_draws=4, replicas=1, draws=16, relaxed_after=0.1)


def test_the_engine_logs_both_at_the_end_of_a_window():
    run = Run()
    engine = run.follow(run.engine(options=EARLY))
    point = engine.history[16]
    assert "limit/frozen_cosine" in engine.history[8]
    assert "limit/cosine" not in engine.history[8]  # nothing had relaxed at its beginning
    assert {"limit/cosine", "limit/speed", "limit/frozen_cosine", "limit/frozen_speed"} <= point.keys()
    assert Model.LIMIT in engine.windows.last.comparisons
    assert "limit cosine" in engine.verdict()


def test_where_there_is_no_time_the_frozen_limit_is_left():
    run = Run()
    engine = run.engine(budget=Budget(1e6), options=EARLY)
    engine.budget.expect({"flow": math.inf})
    engine.budget._known["flow"] = math.inf
    run.follow(engine)
    point = engine.history[16]
    assert "limit/frozen_cosine" in point
    assert "limit/cosine" not in point
    assert engine.budget.skipped["flow"] > 0
    assert "the limit integrated over the window" in str(engine.budget.reason)


def test_a_flow_that_does_not_arrive_is_a_reason(monkeypatch):
    monkeypatch.setattr("torch_singlim.measure.limit._SUBSTEPS", 0)
    run = Run()
    engine = run.follow(run.engine(options=EARLY))
    assert "limit/cosine" not in engine.history[16]
    assert "limit/frozen_cosine" in engine.history[16]
    assert any(reason.code is Code.LIMIT_STOPPED for reason in engine.reasons)


@pytest.mark.parametrize(
    ("noise", "options", "known"),
    [
        (LabelNoise(0.1), {}, True),
        (LabelNoise(0.1), {"momentum": 0.9, "nesterov": True}, True),
        (LabelNoise(0.1), {"batch_size": 2}, True),
        (LabelNoise(0.1), {"batch_size": 2, "momentum": 0.9}, False),
        (AntiCorrelated(0.1), {}, True),
        (AntiCorrelated(0.1), {"batch_size": 2}, False),
        (LabelFlips(0.2), {}, True),
        (Dropout(), {}, True),
        (Dropout(), {"batch_size": 2}, True),
        (Dropout(), {"batch_size": 2, "momentum": 0.9}, False),
        (Dropout() + LabelNoise(0.1), {}, True),
        (Dropout() + Langevin(0.1), {}, False),
        (Langevin(0.1), {}, False),
    ],
    ids=str,
)
def test_what_is_known_at_finite_step_size(noise, options, known):
    dense, w = make("cross_entropy" if isinstance(noise, LabelFlips) else "two_layers")
    sgd = SGDSettings(lr=0.02, **options)
    assert has_finite_step(noise, dense.problem, sgd) is known
    if not isinstance(noise, LabelFlips):
        found = measure_distance(dense.problem, Snapshot(5, w, sgd=sgd), noise=noise)
        assert found.limit.finite_step is known
        assert found.forecast.finite_step is known


def test_an_unstable_step_has_the_limit_of_small_ones():
    dense, w = make("two_layers")
    largest = torch.linalg.eigvalsh(dense.gauss_newton(w))[-1].item()
    for options in ({}, {"batch_size": 1}):
        sgd = SGDSettings(lr=2.1 / largest, **options)
        found = measure_distance(dense.problem, Snapshot(5, w, sgd=sgd), noise=LabelNoise(0.1))
        assert not found.limit.finite_step
        assert torch.isfinite(found.limit.drift).all()
