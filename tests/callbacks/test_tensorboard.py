"""What the monitor writes for TensorBoard, read back from its event files."""

import math
import re

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

from tests.callbacks.test_monitor import Net, fit, seeded
from torch_singlim import AntiCorrelated, InjectNoise, LabelFlips, Langevin, SingularLimitMonitor
from torch_singlim.callbacks.tensorboard import Series, layout

OPTIONS = {"every_n_steps": 5, "window": 5, "replicas": 2}


class WithHyperparameters(Net):
    def __init__(self, width=32):
        super().__init__()
        self.save_hyperparameters()


def written(tmp_path, *monitors, make=Net, callbacks=(), steps=20, **logger):
    board = TensorBoardLogger(tmp_path, name="run", **logger)
    fit(seeded(make), *callbacks, *monitors, steps=steps, logger=board)
    events = EventAccumulator(board.log_dir, size_guidance={"tensors": 0, "images": 0, "scalars": 0})
    events.Reload()
    return events


def charts(events):
    """Category -> title -> tags or patterns, as TensorBoard reads it."""
    found = {}
    parsed = layout_pb2.Layout.FromString(events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    for category in parsed.category:
        for chart in category.chart:
            series = [(s.value, s.lower, s.upper) for s in chart.margin.series]
            found.setdefault(category.title, {})[chart.title] = (list(chart.multiline.tag), series)
    return found


CASES = {
    "dropout": (Net, [], OPTIONS),
    "no replicas": (Net, [], OPTIONS | {"replicas": 0}),
    "weak momentum": (lambda: Net(momentum=0.5), [], OPTIONS),
    "no noise": (lambda: Net(dropout=0.0), [], OPTIONS),
    "carried": (lambda: Net(dropout=0.0), [lambda: InjectNoise(AntiCorrelated(0.01))], OPTIONS),
    "diffusing": (lambda: Net(dropout=0.0), [lambda: InjectNoise(Langevin(0.01))], OPTIONS),
    "flips": (lambda: Net("hard", dropout=0.0), [lambda: InjectNoise(LabelFlips(0.2))], OPTIONS),
    "adam": (None, [], OPTIONS),
}


class Adam(Net):
    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore:torch_singlim. drift not predicted", "ignore:.*not over-parameterised")
def test_every_chart_of_the_layout_has_its_series(case, tmp_path):
    """Each tag is there with two points or more; a band has the steps of its series."""
    make, callbacks, options = CASES[case]
    events = written(
        tmp_path, SingularLimitMonitor(**options), make=make or Adam, callbacks=[each() for each in callbacks]
    )
    scalars = {tag: [event.step for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    found = charts(events)
    for category, titled in found.items():
        for title, (patterns, bands) in titled.items():
            for pattern in patterns:
                assert pattern.startswith("^")
                (tag,) = [tag for tag in scalars if re.match(pattern, tag)]
                assert len(scalars[tag]) > 1, (category, title, tag)
            for series in bands:
                assert len({tuple(scalars[tag]) for tag in series}) == 1, (category, title)
                assert len(scalars[series[0]]) > 1
    assert ("Drift" in found) == (case != "adam")
    assert next(iter(found)) == "Distance"


def test_cards_figures_and_one_row_of_hyperparameters(tmp_path):
    for make in (Net, WithHyperparameters):
        events = written(tmp_path, SingularLimitMonitor(**OPTIONS), make=make)
        tags = events.Tags()
        card = events.Tensors("singlim/set-up/text_summary")[0].tensor_proto.string_val[0].decode()
        assert "| noise | Dropout() |" in card
        assert "| steps per unit of slow time | 20 |" in card
        assert events.Tensors("singlim/verdict/text_summary")
        names = ("1_time_scales", "2_agreement", "3_speed", "4_plane", "5_spectrum")
        assert {f"singlim/figures/{name}" for name in names} <= set(tags["images"])
        steps = [event.step for event in events.Images("singlim/figures/1_time_scales")]
        assert steps == sorted(set(steps))
        assert steps[-1] == 20
        assert len(steps) < 5
        experiment = events.summary_metadata["_hparams_/experiment"].plugin_data.content
        assert b"singlim/drift/cosine" in experiment
        assert (b"width" in experiment) == (make is WithHyperparameters)


def test_two_monitors_share_a_layout(tmp_path):
    first = SingularLimitMonitor(**OPTIONS)
    second = SingularLimitMonitor(**OPTIONS, name="other")
    events = written(tmp_path, first, second, steps=10)
    assert len(events.Tensors("custom_scalars__config__")) == 1
    found = charts(events)
    assert {"Distance (singlim)", "Distance (other)"} <= found.keys()
    assert {"singlim/set-up/text_summary", "other/set-up/text_summary"} <= set(events.Tags()["tensors"])


def test_names_are_escaped():
    nothing = Series(covered=False, flow=False, moves=False, diffuses=False, replicas=False, bands=False)
    (charts,) = [layout({"my.net": nothing})["Distance"]]
    (pattern,) = charts["Loss gap [loss]"][1]
    assert re.match(pattern, "my.net/loss_gap")
    assert not re.match(pattern, "my-net/loss_gap")
    assert not re.match(pattern, "my.net/loss_gap_2")


def test_a_figure_that_fails_does_not_end_the_training(tmp_path, monkeypatch):
    def fail(*args):
        raise ArithmeticError("no ink")

    monkeypatch.setattr("torch_singlim.callbacks.monitor.figures", fail)
    monitor = SingularLimitMonitor(**OPTIONS)
    with pytest.warns(UserWarning, match="failed and was left out, training goes on: ArithmeticError: no ink"):
        written(tmp_path, monitor)
    assert max(monitor.history) == 20
    assert "| 15-20 |" in monitor.verdict
    assert len([point for point in monitor.history.values() if "singlim/drift/cosine" in point]) == 4
    assert all(math.isfinite(v) for point in monitor.history.values() for v in point.values())


def test_no_process_but_the_first_writes():
    class Second:
        is_global_zero = False
        loggers = (TensorBoardLogger("nowhere"),)

    from torch_singlim.callbacks.tensorboard import writers

    assert list(writers(Second())) == []


def test_a_run_without_tensorboard_draws_nothing(tmp_path):
    _, trainer = fit(
        seeded(Net), SingularLimitMonitor(**OPTIONS), steps=10, logger=L.pytorch.loggers.CSVLogger(tmp_path)
    )
    assert not list(tmp_path.rglob("events*"))
    assert trainer.global_step == 10
