"""TensorBoard as people see it: every chart of the layout has its curves, in a real browser."""

import functools
from pathlib import Path

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from playwright.sync_api import sync_playwright
from torch.utils.tensorboard import SummaryWriter

from tests.report import browser
from tests.zoo import Hyper, Manual, Net, fit, monitor_of, seeded
from torch_singlim import SingularLimitMonitor, demo
from torch_singlim.measure.tags import Group
from torch_singlim.report import report

# screenshots are kept here, for people to look at
SHOTS = Path(__file__).parents[2] / "artefacts" / "tensorboard"

pytestmark = [
    pytest.mark.skipif(browser.chromium() is None, reason="no Chromium is installed (Debian: apt install chromium)"),
    # TensorBoard's server, and what the browser closes
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
]


def board(folder):
    return TensorBoardLogger(folder, name=None, version="run", default_hp_metric=False)


def test_every_chart_has_its_curves(tmp_path):
    for width in (24, 32):
        monitor = monitor_of(every_n_steps=15, window=15, replicas=2, draws=16)
        net = seeded(functools.partial(Hyper, width))
        fit(net, monitor, steps=60, logger=TensorBoardLogger(tmp_path, name=f"width {width}"))
    seen = browser.look(tmp_path, SHOTS)
    assert len(seen["layout"]) > 15
    assert list(dict.fromkeys(group for group, _ in seen["layout"])) == [group.value for group in Group]
    shown = sorted((chart["category"], chart["title"]) for chart in seen["charts"])
    assert shown == sorted(tuple(each) for each in seen["layout"])
    assert [fault for chart in seen["charts"] for fault in browser.faults(chart)] == []
    assert all(len(chart["series"]) >= 2 for chart in seen["charts"])  # of both runs
    assert seen["errors"] == []
    assert seen["cards"] == 4
    assert seen["images"] == 10  # five of each run
    assert len(seen["rows"]) == 2  # a row for each run, and no stray ones
    assert sorted(row["settings"]["width"] for row in seen["rows"]) == [24, 32]
    assert all(row["metrics"]["singlim/drift/cosine"] is not None for row in seen["rows"])


def look_at(state, tmp_path):
    """A run as TensorBoard shows it, without faults."""
    seen = browser.look(tmp_path, SHOTS / state)
    assert [fault for chart in seen["charts"] for fault in browser.faults(chart)] == []
    assert seen["errors"] == []
    return seen, {group for group, _ in seen["layout"]}


def test_a_drift_that_is_unsupported(tmp_path):
    fit(seeded(Manual), monitor_of(every_n_steps=15, window=15, loss="mse"), steps=60, logger=board(tmp_path))
    seen, groups = look_at("unsupported", tmp_path)
    assert Group.THEORY.value not in groups
    assert seen["images"] == 3  # the time scales, the spectrum, the layers
    assert "Displacement over a window [weight norm]" in {title for _, title in seen["layout"]}


def test_a_run_that_theory_does_not_describe(tmp_path):
    """Noise that is too strong for its step size; the site shows it beside the demonstration."""
    monitor = monitor_of(every_n_steps=100, window=100, replicas=6, draws=16)
    fit(seeded(lambda: Net(lr=0.5, dropout=0.4)), monitor, steps=400, logger=board(tmp_path))
    look_at("bad", tmp_path)
    last = monitor.history[400]
    assert last["drift/cosine"] < 0.95 * last["drift/ceiling"]
    assert last["excess_loss"] > 0.1 * monitor.history[0]["excess_loss"]


def test_nothing_but_the_excess_loss(tmp_path):
    fit(seeded(Net), SingularLimitMonitor(max_overhead=0), steps=60, logger=board(tmp_path))
    seen, groups = look_at("loss_alone", tmp_path)
    assert groups == {Group.SET.value, Group.DRIFT.value, Group.COST.value}
    assert seen["images"] == 0


@pytest.mark.slow
def test_screenshots_of_the_demonstration(tmp_path):
    """The site shows them."""
    demo.train(tmp_path / "demo")
    _, groups = look_at("demo", tmp_path)
    assert groups == {group.value for group in Group}


def test_a_report_asks_the_network_for_nothing(tmp_path):
    """And nothing on it is wider than the window."""
    monitor = monitor_of(every_n_steps=10, window=10)
    fit(seeded(Net), monitor, steps=20, logger=TensorBoardLogger(tmp_path / "runs", name="one"))
    page = report([tmp_path / "runs"], tmp_path / "report")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser.chromium(), args=browser.ARGUMENTS)
        window = chromium.new_page(viewport={"width": 1000, "height": 1400})
        asked: list[str] = []
        window.on("request", lambda request: asked.append(request.url))
        window.goto(page.as_uri())
        window.screenshot(path=str(SHOTS.parent / "report.png"), full_page=True)
        images = window.evaluate("() => [...document.images].map(i => i.complete && i.naturalWidth > 300)")
        width = window.evaluate("() => document.documentElement.scrollWidth")
        chromium.close()
    assert [url for url in asked if not url.startswith("data:")] == [page.as_uri()]
    assert images == [True] * 3  # two of the run, and its speeds
    assert width <= 1000


def test_what_is_missing_is_seen(tmp_path):
    """The test above can fail: a chart without data, a band whose steps differ."""
    writer = SummaryWriter(str(tmp_path / "run"))
    for step in range(3):
        writer.add_scalar("there", step, step)
        writer.add_scalar("lower", step, step)
        writer.add_scalar("upper", step, step + 1)
    writer.add_text("card", "words")
    writer.add_image("image", torch.zeros(3, 8, 8))
    writer.add_hparams({"a": 1}, {"there": 0.0}, run_name=".")
    writer.add_custom_scalars(
        {"Broken": {"absent": ["Multiline", ["^absent$"]], "band": ["Margin", ["there", "lower", "upper"]]}}
    )
    writer.close()
    seen = browser.look(tmp_path, tmp_path / "shots")
    found = {chart["title"]: browser.faults(chart) for chart in seen["charts"]}
    assert found["absent"] == ["Broken / absent: no data for ^absent$"]
    assert "do not match" in found["band"][0]
