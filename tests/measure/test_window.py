"""Windows made to order: what was measured against what was predicted."""

import math
from dataclasses import replace

import pytest
import torch

from tests.problems import make
from torch_singlim import Dropout, Langevin, Model, SGDSettings, Snapshot, measure_distance
from torch_singlim.measure import Code, Measurement, Window, compare, compare_window, noise_ratio, scalars
from torch_singlim.measure.coupling import CoupledWindow
from torch_singlim.measure.followed import unresolved
from torch_singlim.measure.full_batch_window import unusable
from torch_singlim.measure.limit import against_limit


def of_paths(*vectors, baseline=True, replicas=()):
    """A window from displacements of run, baseline and both averaged paths, and their inner products."""
    m, n, a1, a2 = vectors
    coupled = CoupledWindow.of(m, a1, a2, baseline=n if baseline else None, replicas=list(replicas))
    return Window.of_coupled(coupled, 10, 30, replay_error=1e-7, gradients=120)


def draw(seed=0, count=6):
    """Displacements with a common part."""
    generator = torch.Generator().manual_seed(seed)
    common, own = torch.randn(50, generator=generator), 0.3 * torch.randn(count, 50, generator=generator)
    return tuple((common + own).double())


# --- with paths beside the training --------------------------------------------------------------------------------


def test_a_followed_window_against_the_formulas_written_out():
    m, n, a1, a2, r1, r2 = draw()
    n = n / 2
    window = of_paths(m, n, a1, a2, replicas=(r1, r2))
    assert (window.start, window.stop, window.steps, window.gradients) == (10, 30, 20, 120)
    assert window.measured == pytest.approx(m.norm().item())
    assert window.displacement is None  # only at its end
    assert window.replay_error == 1e-7
    assert window.baseline_moved == pytest.approx(n.norm().item())
    assert window.comparisons.keys() == {Model.AVERAGED, Model.BASELINE}
    drift, D = window.drift.agreement, a1 @ a2
    y = (a1 + a2) / 2
    assert drift.predicted == pytest.approx(D.sqrt().item())
    assert drift.measured == window.measured
    assert drift.speed == pytest.approx((m @ y / D).item())
    assert drift.cosine == pytest.approx((m @ y / (m.norm() * D.sqrt())).item())
    assert drift.residual == pytest.approx(((m @ m - 2 * m @ y + D) / (m @ m)).sqrt().item())
    assert (drift.speed_stderr, drift.cosine_stderr) == (
        window.coupled.speed.stderr,
        window.coupled.speed.cosine_stderr,
    )
    assert window.comparisons[Model.BASELINE].agreement.cosine == pytest.approx(compare(m, n).cosine)
    cosines = [compare(m, r).cosine for r in (r1, r2)]
    assert window.ceiling == pytest.approx(math.sqrt(sum(cosines) / 2))

    x, z, square = m - n, y - n, (a1 - n) @ (a2 - n)
    assert window.noise.measured == pytest.approx(x.norm().item())
    assert window.noise.predicted == pytest.approx(square.sqrt().item())
    assert window.noise.ratio.mean == pytest.approx((x @ z / square).item())
    assert window.noise.ratio.stderr == window.coupled.noise.stderr
    assert window.noise.cosine == pytest.approx((x @ z / (x.norm() * square.sqrt())).item())
    assert window.noise.share == pytest.approx((square / D).sqrt().item())
    cosines = [compare(x, r - n).cosine for r in (r1, r2)]
    assert window.noise.ceiling == pytest.approx(math.sqrt(sum(cosines) / 2))


def test_what_is_logged_of_a_followed_window():
    whole = scalars(Measurement(30, window=of_paths(*draw()[:4], replicas=draw()[4:])))
    every = {f"drift/{name}" for name in ("measured", "predicted", "cosine", "speed", "residual")}
    every |= {f"noise/{name}" for name in ("measured", "predicted", "cosine", "ratio", "share")}
    every |= {"drift/baseline_cosine", "window/replay_error", "distance/baseline_moved", "cost/gradients"}
    every |= {"window/steps", "window/status"}
    ceilings = {"drift/ceiling", "noise/ceiling", *(f"{tag}_stderr" for tag in ("drift/cosine", "drift/speed"))}
    ceilings |= {"noise/ratio_stderr", "noise/ratio_of_replicas", "noise/ratio_of_replicas_stderr"}
    assert whole.keys() == every | ceilings
    assert whole["window/status"] == 1
    assert scalars(Measurement(30, window=of_paths(*draw()[:4]))).keys() == every  # without replicas
    alone = scalars(Measurement(30, window=of_paths(*draw()[:4], baseline=False)))
    assert not any(tag.startswith("noise/") or "baseline" in tag for tag in alone)
    assert {"drift/cosine", "window/replay_error"} <= alone.keys()
    moved = scalars(Measurement(30, window=Window(10, 30, 2.0)))
    assert moved == {"window/steps": 20, "window/status": 0, "drift/measured": 2}


def test_halves_that_disagree_predict_nothing():
    """The two averaged paths have less in common than they differ, in the whole motion or in its noise-induced part."""
    m, n, a1, a2 = draw()[:4]
    apart = torch.linspace(-3, 3, 50, dtype=torch.float64)
    nothing = of_paths(m, n, a1 + apart, -a2)
    assert nothing.comparisons.keys() == {Model.BASELINE}
    assert nothing.drift is None
    assert nothing.noise is None
    reason = unresolved(nothing)
    assert reason.code is Code.UNRESOLVED
    assert "the noise-induced drift in the window 10-30 is smaller than the sampling error" in str(reason)
    # the drift is resolved, its noise-induced part is not
    part = of_paths(m, (a1 + a2) / 2, a1, a2)
    assert part.drift is not None
    assert part.noise is None
    expected = 0.5 * (a1 - a2).norm().item() / m.norm().item()
    assert unresolved(part) == Code.UNRESOLVED(start=10, stop=30, share=pytest.approx(expected))
    # the noise is there, or there is no baseline to tell
    assert unresolved(of_paths(m, n / 2, a1, a2)) is None
    assert unresolved(of_paths(m, n, a1, a2, baseline=False)) is None
    still = torch.zeros(50, dtype=torch.float64)
    assert unresolved(of_paths(*4 * (still,))).values["share"] == 0.0


def test_a_baseline_that_stands_has_no_cosine():
    m, _, a1, a2 = draw()[:4]
    window = of_paths(m, torch.zeros_like(m), a1, a2)
    assert window.comparisons.keys() == {Model.AVERAGED}
    assert window.baseline_moved == 0.0
    assert window.noise.share == pytest.approx(1.0)


# --- between checkpoints, and the limit ----------------------------------------------------------------------------


def test_full_batches_with_replicas():
    """The noise-induced drift between checkpoints: against the displacements that the window holds."""
    dense, w = make("two_layers")
    end = w - 0.01 * torch.linspace(-1, 1, len(w), dtype=w.dtype)
    options = {"start": 0, "stop": 20, "noise": Dropout(), "sgd": SGDSettings(lr=0.05)}
    window = compare_window(dense.problem, w, end, **options, replicas=2, generator=torch.Generator().manual_seed(0))
    assert window.comparisons.keys() == {Model.BASELINE, Model.FULL_BATCH}
    assert window.measured == pytest.approx((end - w).norm().item())
    assert (window.coupled, window.baseline_moved, window.replay_error) == (None, None, None)
    assert window.ceiling >= 0
    flow, baseline = (window.comparisons[m].prediction.displacement for m in (Model.FULL_BATCH, Model.BASELINE))
    assert window.drift.agreement == compare(window.displacement, flow)
    found, measured = window.noise, compare(end - w - baseline, flow - baseline)
    assert (found.measured, found.predicted, found.cosine) == (measured.measured, measured.predicted, measured.cosine)
    assert found.ratio.mean == pytest.approx(noise_ratio([end - w], flow, baseline).mean)
    assert found.ratio.stderr > 0
    assert found.share == pytest.approx(((flow - baseline).norm() / flow.norm()).item())
    alone = compare_window(dense.problem, w, end, **options)
    assert math.isnan(alone.ceiling)
    assert math.isnan(alone.noise.ratio.stderr)
    assert scalars(Measurement(20, window=alone))["window/status"] == 1


def test_a_diffusing_noise_has_a_length_and_no_flow():
    """A window whose end is put where the limit says the ensemble is, on average: the two lengths are equal."""
    dense, w = make("two_layers")
    problem, noise, sgd = dense.problem, Langevin(0.01), SGDSettings(lr=0.05)
    start = measure_distance(problem, Snapshot(0, w, sgd=sgd), noise=noise, num_draws=1000)
    steps = 50
    tangential = start.tangent.project(torch.randn(len(w), generator=torch.Generator().manual_seed(0)).double())
    length = math.hypot(steps * start.limit.drift.norm().item(), start.limit.spread(steps))
    end = w + length * tangential / tangential.norm()
    window = compare_window(problem, w, end, start=0, stop=steps, noise=noise, sgd=sgd)
    assert window.comparisons.keys() == {Model.BASELINE}
    assert window.drift is None
    window = against_limit(window, start.forecast, end - w, steps)
    assert window.comparisons.keys() == {Model.BASELINE, Model.FROZEN_LIMIT}
    assert window.diffuses
    assert window.spread.measured == pytest.approx(window.spread.predicted, rel=1e-6)
    logged = scalars(Measurement(steps, window=window))
    assert "drift/cosine" not in logged
    assert logged["limit/spread_measured"] == pytest.approx(length, rel=1e-6)


def test_long_steps_that_say_nothing_are_invalidated():
    dense, w = make("two_layers")
    options = {"start": 0, "stop": 2000, "noise": Dropout(), "sgd": SGDSettings(lr=0.05)}
    window = compare_window(dense.problem, w, w + 0.01, **options, generator=torch.Generator().manual_seed(0))
    prediction = window.comparisons[Model.FULL_BATCH].prediction
    assert window.reason == unusable(prediction, 0, 2000)
    size = torch.linalg.vector_norm(prediction.displacement).item()
    for off, invalidated in ((0.4 * size, False), (0.6 * size, True)):
        reason = unusable(replace(prediction, stderr=off, error=1e-3 * size), 0, 2000)
        assert (reason is not None) == invalidated
        assert reason is None or reason.code is Code.UNCERTAIN
        uncertain = replace(window, reason=reason)
        assert (uncertain.drift is None) == invalidated
        logged = scalars(Measurement(2000, window=uncertain))
        assert ("drift/cosine" in logged) != invalidated
        assert ("noise/ratio" in logged) != invalidated
    followed = replace(prediction, stderr=size, error=0.0)
    assert unusable(followed, 0, 2000) is None
