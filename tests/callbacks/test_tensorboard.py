"""What the monitor writes for TensorBoard, read back from its event files."""

import functools
import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

from tests.zoo import Adam, Hyper, Manual, Net, fit, injected, monitor_of, seeded
from torch_singlim import AntiCorrelated, LabelFlips, Langevin
from torch_singlim.callbacks.board import layout, writers
from torch_singlim.measure import Code
from torch_singlim.measure.tags import TAGS, Group, Role

OPTIONS = {"every_n_steps": 5, "window": 5, "replicas": 2, "draws": 32}


def written(folder, *monitors, make=Net, callbacks=(), steps=20):
    """The events of a training under monitors."""
    board = TensorBoardLogger(folder, name="run")
    fit(seeded(make), *callbacks, *monitors, steps=steps, logger=board)
    events = EventAccumulator(board.log_dir, size_guidance={"tensors": 0, "images": 0, "scalars": 0})
    return events.Reload()


def without_figures(patch):
    """They take longest."""
    patch.setattr("torch_singlim.callbacks.tensorboard.figures", lambda *args: {})


KINDS = {
    "dropout": {},
    "hyperparameters": {"make": Hyper},
    "no replicas": {"replicas": 0},
    "weak momentum": {"make": lambda: Net(momentum=0.5)},
    "no noise": {"make": lambda: Net(dropout=0.0)},
    "transient": {"make": lambda: Net(dropout=0.0), "callbacks": injected(AntiCorrelated(0.01))},
    "diffusing": {"make": lambda: Net(dropout=0.0), "callbacks": injected(Langevin(0.01))},
    "flips": {"make": lambda: Net("hard", dropout=0.0), "callbacks": injected(LabelFlips(0.2))},
    "adam": {"make": Adam, "relaxed_after": 0.01},
    "manual": {"make": Manual, "loss": "mse", "every_n_steps": 4, "window": 4},
    "no problem": {"make": lambda: Net("half")},
}
# with figures
DRAWN = ["dropout", "hyperparameters"]


@pytest.fixture(scope="module")
def events(tmp_path_factory):
    """Of each kind of training, which is trained once."""

    @functools.cache
    def of(kind):
        options = dict(KINDS[kind])
        make, callbacks = options.pop("make", Net), options.pop("callbacks", tuple)
        folder, monitor = tmp_path_factory.mktemp("board"), monitor_of(**OPTIONS | options)
        with pytest.MonkeyPatch.context() as patch:
            if kind not in DRAWN:
                without_figures(patch)
            return written(folder, monitor, make=make, callbacks=callbacks())

    return of


def charts(events):
    """Category -> title -> tags or patterns, as TensorBoard reads it: the last layout that was written."""
    found = {}
    parsed = layout_pb2.Layout.FromString(events.Tensors("custom_scalars__config__")[-1].tensor_proto.string_val[0])
    for category in parsed.category:
        for chart in category.chart:
            series = [(s.value, s.lower, s.upper) for s in chart.margin.series]
            found.setdefault(category.title, {})[chart.title] = (list(chart.multiline.tag), series)
    return found


def of_roles(read):
    """Role -> what was written in its run."""
    found = {Role.MEASURED: read}
    for role in Role:
        folder = Path(read.path) / role.value
        if role.value and folder.exists():
            found[role] = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return found


def text_of(events, tag):
    return events.Tensors(f"{tag}/text_summary")[0].tensor_proto.string_val[0].decode()


@pytest.mark.parametrize("kind", KINDS)
def test_every_chart_of_the_layout_has_its_series_and_every_series_its_chart(kind, events):
    """A band has the steps of its series."""
    found, read = charts(events(kind)), events(kind)
    roles = of_roles(read)
    scalars = {tag: [event.step for event in read.Scalars(tag)] for tag in read.Tags()["scalars"]}
    everywhere = {tag for each in roles.values() for tag in each.Tags()["scalars"]}
    for category, titled in found.items():
        for title, (patterns, bands) in titled.items():
            assert not patterns or any(re.match(pattern, tag) for pattern in patterns for tag in everywhere), title
            assert all(pattern.startswith("^") for pattern in patterns)
            for series in bands:
                assert len({tuple(scalars[tag]) for tag in series}) == 1, (category, title)
    for tag in TAGS:
        if tag.chart and len(scalars.get(f"singlim/{tag.name}", ())) > 1:
            assert tag.chart in found[tag.group.value], tag.name
    assert list(found) == [group.value for group in Group if group.value in found]


@pytest.mark.parametrize(
    ("kind", "absent"),
    [
        ("dropout", set()),
        ("manual", {Group.THEORY}),
        ("no problem", {Group.SET}),
    ],
)
def test_there_are_no_charts_of_what_is_not_measured(kind, absent, events):
    found = charts(events(kind))
    assert {group.value for group in Group} - set(found) == {group.value for group in absent}
    titles = {title for titled in found.values() for title in titled}
    assert any("Noise-induced" in title for title in titles) == (kind in ("dropout", "no problem"))
    assert ("Relaxed modes [share]" in titles) == (kind != "no problem")


def test_curves_of_one_chart_are_runs_of_their_own(events):
    """With the values of the tags, which stay in the run itself: there every logger has them."""
    read = events("dropout")
    roles = of_roles(read)
    assert set(roles) == set(Role)
    for tag in TAGS:
        if tag.curve and f"singlim/{tag.name}" in read.Tags()["scalars"]:
            points = [(e.step, e.value) for e in roles[tag.role].Scalars(f"singlim/curves/{tag.curve}")]
            assert points == [(e.step, e.value) for e in read.Scalars(f"singlim/{tag.name}")]
    # no row of hyperparameters but that of the run
    for role, each in roles.items():
        assert ("_hparams_/experiment" in each.summary_metadata) == (role is Role.MEASURED)
        assert all(tag.startswith("singlim/curves/") for tag in each.Tags()["scalars"] if role is not Role.MEASURED)


def test_a_training_without_a_problem_has_its_motion_and_the_reason(events):
    read = events("no problem")
    assert {"singlim/drift/measured", "singlim/window/steps"} <= set(read.Tags()["scalars"])
    for tag in ("singlim/set-up", "singlim/verdict"):
        assert "Unsupported: the loss of training_step" in text_of(read, tag)


@pytest.mark.parametrize("kind", DRAWN)
def test_cards_figures_and_one_row_of_hyperparameters(kind, events):
    read = events(kind)
    card = text_of(read, "singlim/set-up")
    assert "| noise | Dropout() |" in card
    assert "| steps per unit of slow time | 20 |" in card
    assert "| 15-20 |" in text_of(read, "singlim/verdict")
    names = ("1_time_scales", "2_agreement", "3_speed", "4_spectrum", "5_layers")
    assert {f"singlim/figures/{name}" for name in names} == set(read.Tags()["images"])
    steps = [event.step for event in read.Images("singlim/figures/1_time_scales")]
    assert steps == sorted(set(steps))
    assert steps[-1] == 20
    assert len(steps) < 5
    experiment = read.summary_metadata["_hparams_/experiment"].plugin_data.content
    assert b"singlim/drift/cosine" in experiment
    assert (b"width" in experiment) == (kind == "hyperparameters")


def test_two_monitors_share_a_layout(tmp_path, monkeypatch):
    without_figures(monkeypatch)
    read = written(tmp_path, monitor_of(**OPTIONS), monitor_of(**OPTIONS, name="other"), steps=10)
    assert {"Is it at the set? (singlim)", "Is it at the set? (other)"} <= charts(read).keys()
    assert {"singlim/set-up/text_summary", "other/set-up/text_summary"} <= set(read.Tags()["tensors"])


def test_names_are_escaped():
    (pattern,) = layout({"my.net": {"excess_loss"}})[Group.SET.value]["Excess loss [loss]"][1]
    assert re.match(pattern, "my.net/excess_loss")
    assert not re.match(pattern, "my-net/excess_loss")
    assert not re.match(pattern, "my.net/excess_loss_2")


def test_a_figure_that_fails_ends_neither_training_nor_window(tmp_path, monkeypatch, caplog):
    def fail(*args):
        raise ArithmeticError("no ink")

    monkeypatch.setattr("torch_singlim.callbacks.tensorboard.figures", fail)
    monitor = monitor_of(**OPTIONS)
    with caplog.at_level("WARNING"):
        written(tmp_path, monitor)
    (reason,) = monitor.reasons
    assert reason.code is Code.FAILED
    assert "failed: ArithmeticError: no ink" in str(reason)
    assert caplog.text.count("no ink") == 1
    assert max(monitor.history) == 20
    assert "| 15-20 |" in monitor.verdict
    assert len([point for point in monitor.history.values() if "drift/cosine" in point]) == 20
    assert all(math.isfinite(v) for point in monitor.history.values() for v in point.values())


def test_no_process_but_the_first_writes():
    second = SimpleNamespace(is_global_zero=False, loggers=(TensorBoardLogger("nowhere"),))
    assert list(writers(second)) == []


def test_a_run_without_tensorboard_draws_nothing(tmp_path):
    _, trainer = fit(seeded(Net), monitor_of(**OPTIONS), steps=10, logger=CSVLogger(tmp_path))
    assert list(tmp_path.rglob("metrics.csv"))
    assert not list(tmp_path.rglob("events*"))
    assert trainer.global_step == 10
