"""The monitor in real trainers: what it logs, what it finds, what it survives, and that it changes nothing."""

import logging
import math
import re
import warnings
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import DataLoader

from tests.problems import Bent
from tests.zoo import (
    LayerNormed,
    Net,
    Normed,
    Recorder,
    Recurrent,
    Trace,
    Validated,
    assert_identical,
    data,
    fit,
    monitor_of,
    reasons_of,
    scheduled,
    seeded,
    tags_of,
    with_optimizer,
)
from torch_singlim import SingularLimitMonitor, WeightDecay
from torch_singlim.callbacks.detect import read_samples
from torch_singlim.callbacks.optimizer import step_batch_size
from torch_singlim.measure import Code, tags
from torch_singlim.measure.distance import Expansion, measure_distance
from torch_singlim.network import out_of_memory

# --- what it logs --------------------------------------------------------------------------------------------------

EVERYTHING = {
    *(f"distance/{level}{model}" for level in ("half", "tenth", "hundredth") for model in ("", "_linear")),
    *("excess_loss", "distance/nearest", "distance/linearised", "distance/relaxed", "distance/relaxed_expected"),
    *("distance/relaxed_cosine", "distance/relaxed_share", "distance/baseline_moved", "potential", "potential_stderr"),
    *("window/steps", "window/status", "window/replay_error"),
    *("drift/measured", "drift/predicted", "drift/cosine", "drift/cosine_stderr", "drift/ceiling"),
    *("drift/speed", "drift/speed_stderr", "drift/baseline_cosine", "drift/residual"),
    *("noise/measured", "noise/predicted", "noise/cosine", "noise/ceiling"),
    *("noise/ratio", "noise/ratio_stderr", "noise/share", "noise/ratio_of_replicas", "noise/ratio_of_replicas_stderr"),
    *("expansion/cosine", "expansion/cosine_stderr", "expansion/ratio", "expansion/ratio_stderr"),
    *("limit/cosine", "limit/speed"),
    *("limit/frozen_cosine", "limit/frozen_speed", "limit/spread_measured", "limit/spread_predicted"),
    *("stability", "clock/step_size", "clock/noise_level", "clock/slow_time", "clock/time_scale"),
    *("quality/residual", "quality/nearest_error", "quality/unresolved", "quality/stderr", "quality/error"),
    *("cost/overhead", "cost/gradients"),
}


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """A training under a monitor that takes its time."""
    recorder, board, trace = Recorder(), TensorBoardLogger(tmp_path_factory.mktemp("board")), Trace()
    monitor = monitor_of(window=10, draws=32, replicas=2, num_draws=8, prog_bar=True)
    _, trainer = fit(seeded(Net), monitor, trace, steps=40, logger=[recorder, board])
    return SimpleNamespace(monitor=monitor, trainer=trainer, recorder=recorder, trace=trace, folder=board.log_dir)


def test_every_tag_and_a_verdict(logged):
    monitor, points = logged.monitor, logged.recorder.of_monitor()
    assert {tag for _, point in points for tag in point} == EVERYTHING
    assert monitor.history == dict(points)
    assert all(math.isfinite(value) for _, point in points for value in point.values())
    # one point for each step
    assert len(points) == len(monitor.history)
    assert [step for step, point in points if "distance/nearest" in point] == [0, 10, 20, 30, 40]
    assert tags.windows(monitor.history) == {k: list(range(k + 1, k + 11)) for k in (0, 10, 20, 30)}
    assert all(p["window/status"] == 1 and p["window/replay_error"] < 1e-5 for _, p in points if "drift/cosine" in p)
    assert monitor.history[40]["clock/slow_time"] == pytest.approx(40 * 0.2 * 0.25)
    assert monitor.history[40]["clock/time_scale"] == pytest.approx(1 / (0.2 * 0.25))
    assert "| 30-40 |" in monitor.verdict
    assert reasons_of(monitor) == []
    assert monitor.visibility.words in monitor.verdict


def test_what_others_see(logged):
    last = {f"singlim/{tag}": value for tag, value in logged.monitor.history[40].items()}
    seen = {tag: float(value) for tag, value in logged.trainer.callback_metrics.items() if tag in last}
    assert seen == pytest.approx(last, rel=1e-6)
    assert {"singlim/excess_loss", "singlim/distance/nearest"} <= logged.trainer.progress_bar_metrics.keys()
    events = EventAccumulator(logged.folder).Reload()
    assert "singlim/drift/cosine" in events.Tags()["scalars"]
    assert "singlim/verdict/text_summary" in events.Tags()["tensors"]


def test_the_measured_drift_is_the_change_of_the_weights(logged):
    before, after = (logged.trace.states[step - 1]["weights"].double() for step in (30, 40))
    torch.testing.assert_close(logged.monitor.last_window.displacement, after - before, rtol=0, atol=0)


def test_a_run_without_noise_is_predicted_to_rounding():
    """Given its batches, momentum and decay included; there is no baseline then."""
    monitor = SingularLimitMonitor(window=10, every_n_steps=10)
    fit(seeded(lambda: Net(dropout=0.0, momentum=0.9, weight_decay=0.01)), monitor, steps=30)
    assert monitor.engine.noise == WeightDecay(0.01)
    residuals = [point["drift/residual"] for point in monitor.history.values() if "drift/residual" in point]
    assert len(residuals) == 30
    assert max(residuals) < 1e-6
    assert [reason.code for reason in monitor.reasons] == [Code.NO_NOISE]
    assert "drift/baseline_cosine" not in tags_of(monitor)


def test_accumulation_and_schedule_enter_the_clock():
    def halved(optimizer):
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)

    make = with_optimizer(lambda module: scheduled(torch.optim.SGD(module.parameters(), lr=0.2), halved))
    monitor = monitor_of(window=4, every_n_steps=4)
    _, trainer = fit(seeded(make), monitor, steps=4, batch_size=5, accumulate_grad_batches=2)
    assert step_batch_size(trainer) == 10
    expected = 0.25 * sum(0.2 * 0.5**k for k in range(4))
    assert monitor.history[4]["clock/slow_time"] == pytest.approx(expected)


def test_what_was_measured_stays_when_the_trainer_goes_on_to_validate():
    monitor = monitor_of(max_overhead=0)
    model, trainer = fit(seeded(Validated), monitor, steps=5)
    history, verdict = dict(monitor.history), monitor.verdict
    trainer.validate(model, verbose=False)
    assert monitor.history == history != {}
    assert monitor.verdict == verdict != ""


# --- what it finds -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "found"), [("smoothed", "SoftCrossEntropy(label_smoothing=0.13)"), ("mse", "MeanSquaredError()")]
)
def test_the_loss_is_recognised(kind, found):
    monitor = monitor_of(max_overhead=0)
    fit(seeded(lambda: Net(kind)), monitor, steps=1)
    assert str(monitor.engine.problem.sample_loss) == found


def test_passing_the_loss():
    monitor = monitor_of(max_overhead=0, loss=lambda f, y: 0.5 * (f - 1.0 * (torch.arange(3) == y)).square().mean())
    fit(seeded(lambda: Net("half")), monitor, steps=1)
    assert monitor.history[0]["excess_loss"] > 0
    named = monitor_of(max_overhead=0, loss=nn.MSELoss())
    fit(seeded(lambda: Net("trainer")), named, steps=1)  # its step cannot be checked, so what is passed is taken
    assert named.history[0]["excess_loss"] > 0


def test_fewer_weights_than_residuals_is_only_a_warning(caplog):
    monitor = monitor_of()
    with caplog.at_level("WARNING"):
        fit(seeded(lambda: Net(hidden=4)), monitor, steps=5)
    assert caplog.text.count("43 weights for 60 residuals") == 1
    assert "not over-parameterised" in caplog.text
    assert {reason.code for reason in reasons_of(monitor)} <= {Code.NEAREST}
    assert {0, 5} <= set(monitor.history)


def test_empty_dataset():
    trainer = SimpleNamespace(train_dataloader=DataLoader(data(0), batch_size=2))  # Lightning itself skips such a fit
    with pytest.raises(ValueError, match="training dataset is empty"):
        read_samples(trainer, 5)


def test_a_layer_that_torch_differentiates_wrongly_is_named():
    recorder, monitor = Recorder(), monitor_of()
    fit(seeded(lambda: LayerNormed(Bent)), monitor, steps=5, logger=recorder)
    (reason,) = reasons_of(monitor)
    assert reason.code is Code.DERIVATIVES
    assert "the layer responsible is Bent" in str(reason)
    logged = {tag for _, point in recorder.of_monitor() for tag in point}
    assert {"excess_loss", "drift/measured", "drift/cosine"} <= logged
    assert not {tag for tag in logged if tag.startswith(("distance/nearest", "limit/", "clock/"))}


def test_recurrent_layers_are_measured():
    """Not on every device: torch's fused cells are missing on some."""
    monitor = monitor_of(window=5)
    fit(seeded(Recurrent), monitor, steps=5)
    assert {"distance/nearest", "drift/cosine", "clock/time_scale"} <= tags_of(monitor)
    assert {reason.code for reason in reasons_of(monitor)} <= {Code.UNRESOLVED, Code.EXPANSION_FAILS}


def test_a_failing_expansion_is_invalidated_with_its_reason(monkeypatch):
    found = Expansion(cosine=0.98, ratio=1.3, stderr=0.02)
    monkeypatch.setattr("torch_singlim.measure.distance.compare_expansion", lambda *args: found)
    monitor = monitor_of(window=10)
    fit(seeded(Net), monitor, steps=20)
    assert "Invalidated: the noise is too large for the second-order expansion" in monitor.verdict
    assert "cosine 0.98 and 1.30 times the norm" in monitor.verdict
    assert {reason.code for reason in reasons_of(monitor)} == {Code.EXPANSION_FAILS}
    logged = tags_of(monitor)
    assert not {tag for tag in logged if tag.startswith("limit/") or tag == "potential"}
    assert {"drift/cosine", "distance/relaxed_expected", "expansion/ratio"} <= logged


# --- what it survives, and that it changes nothing -----------------------------------------------------------------


@pytest.mark.parametrize("make", [Net, Normed, lambda: Net("smoothed", momentum=0.9, nesterov=True)])
def test_no_harm(make):
    """Neither before a measurement nor after it, as other callbacks see it."""
    traces = []
    for monitors in ([], [SingularLimitMonitor(window=5, every_n_steps=5, replicas=1, num_draws=4)]):
        early, late = Trace(), Trace()
        fit(seeded(make), early, *monitors, late, steps=13)
        traces.append((early, late))
    for plain, watched in zip(*traces, strict=True):
        assert_identical(plain, watched)


def test_no_harm_where_warnings_are_errors():
    """Nor is any warning shown that the training alone does not give."""
    model, plain = seeded(Net), Trace()
    with warnings.catch_warnings(record=True) as own:
        warnings.simplefilter("always")
        fit(model, plain, steps=12)
    watched, monitor = Trace(), monitor_of()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for each in own:
            warnings.filterwarnings("ignore", re.escape(str(each.message)), each.category)
        fit(model, monitor, watched, steps=12)
    assert_identical(plain, watched)
    assert reasons_of(monitor) == []
    assert "drift/cosine" in monitor.history[12]


def test_a_fast_dev_run_is_left_alone():
    model, plain, watched, monitor = seeded(Net), Trace(), Trace(), monitor_of()
    fit(model, plain, fast_dev_run=3)
    fit(model, monitor, watched, fast_dev_run=3)
    assert_identical(plain, watched)
    assert len(plain.states) == 4
    assert (monitor.history, list(monitor.reasons), monitor.verdict) == ({}, [], "")


def harmless(monitor, *, steps=15, logger=False):
    """A training under the monitor, which changes nothing."""
    model, plain, watched = seeded(Net), Trace(), Trace()
    fit(model, plain, steps=steps)
    fit(model, monitor, watched, steps=steps, logger=logger)
    assert_identical(plain, watched)


def test_a_failing_measurement_does_not_end_the_run(monkeypatch, caplog):
    def fails(*args, **kwargs):
        torch.rand(10)  # and leaves the random state disturbed
        raise RuntimeError("out of luck")

    monkeypatch.setattr("torch_singlim.measure.geometry.measure_distance", fails)
    monitor = monitor_of()
    with caplog.at_level("DEBUG", logger="torch_singlim"):
        harmless(monitor)
    assert reasons_of(monitor) == [Code.FAILED(step=0, error="RuntimeError: out of luck")]
    shown = [
        record for record in caplog.records if record.levelno >= logging.WARNING and "out of luck" in record.message
    ]
    assert len(shown) == 1
    assert "Skipped: the measurement at step 0 failed: RuntimeError: out of luck" in shown[0].message
    assert "Skipped: the measurement at step 0 failed" in monitor.verdict
    # the traceback, for those who look for it
    assert any(record.exc_info for record in caplog.records if record.levelno == logging.DEBUG)


class Refusing(Recorder):
    """A logger that cannot be reached."""

    def log_metrics(self, metrics, step=None):
        if any(tag.startswith("singlim/") for tag in metrics):
            raise ConnectionError("no route")


def test_a_failing_logger_does_not_end_the_run(caplog):
    monitor = monitor_of()
    with caplog.at_level("WARNING"):
        harmless(monitor, logger=Refusing())
    assert [str(reason) for reason in reasons_of(monitor)] == [
        "the measurement at step 0 failed: ConnectionError: no route"
    ]
    assert caplog.text.count("no route") == 1
    assert "drift/cosine" in monitor.history[15]


def test_out_of_memory_takes_fewer_samples_at_once(monkeypatch):
    sizes = []

    def hungry(problem, snapshot, **options):
        sizes.append(problem.batch_size)
        if problem.batch_size > 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return measure_distance(problem, snapshot, **options)

    monkeypatch.setattr("torch_singlim.measure.geometry.measure_distance", hungry)
    monitor = monitor_of()
    harmless(monitor, steps=5)
    assert sizes[:3] == [20, 10, 5]
    assert set(sizes[2:]) == {5}
    assert monitor.last_window.comparisons
    assert reasons_of(monitor) == []


def test_memory_that_never_suffices_is_a_reason(monkeypatch, caplog):
    def hungry(problem, snapshot, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("torch_singlim.measure.geometry.measure_distance", hungry)
    with caplog.at_level("WARNING"):
        harmless(monitor_of(), steps=10)
    assert caplog.text.count("the measurement at step 0 failed: OutOfMemoryError") == 1


def test_what_counts_as_out_of_memory():
    assert out_of_memory(MemoryError())
    assert out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"))
    assert not out_of_memory(RuntimeError("out of luck"))


def test_diverging_training_is_survived():
    plain, watched = Trace(), Trace()
    monitor = monitor_of(every_n_steps=5)
    fit(seeded(lambda: Net(lr=1e6)), plain, steps=20)
    fit(seeded(lambda: Net(lr=1e6)), monitor, watched, steps=20)
    assert_identical(plain, watched)
    assert monitor.history
    assert monitor.verdict
