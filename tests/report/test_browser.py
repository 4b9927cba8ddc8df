"""TensorBoard as people see it: every chart of the layout has its curves, in a real browser."""

import functools
from pathlib import Path

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from playwright.sync_api import sync_playwright
from torch.utils.tensorboard import SummaryWriter

from tests.report import browser
from tests.zoo import Hyper, Net, fit, monitor_of, seeded
from torch_singlim.report import report

# screenshots are kept here, for people to look at
SHOTS = Path(__file__).parents[2] / "artefacts" / "tensorboard"

pytestmark = [
    pytest.mark.skipif(browser.chromium() is None, reason="no Chromium is installed (Debian: apt install chromium)"),
    # TensorBoard's server, and what the browser closes
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
]


def test_every_chart_has_its_curves(tmp_path):
    for width in (24, 32):
        monitor = monitor_of(every_n_steps=15, window=15, replicas=2, draws=16)
        net = seeded(functools.partial(Hyper, width))
        fit(net, monitor, steps=60, logger=TensorBoardLogger(tmp_path, name=f"width {width}"))
    seen = browser.look(tmp_path, SHOTS)
    assert len(seen["layout"]) > 15
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
    assert images == [True] * 3
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
        {"Broken": {"absent": ["Multiline", ["^there$", "^absent$"]], "band": ["Margin", ["there", "lower", "upper"]]}}
    )
    writer.close()
    seen = browser.look(tmp_path, tmp_path / "shots")
    found = {chart["title"]: browser.faults(chart) for chart in seen["charts"]}
    assert found["absent"] == ["Broken / absent: no data for ^absent$"]
    assert "do not match" in found["band"][0]
