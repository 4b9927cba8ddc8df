"""A TensorBoard in headless Chromium: what its dashboards show, as data and as screenshots."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]
# of the dashboard: smoothing and the clipping of outliers hide data
CUSTOM = "custom_scalars&_smoothingWeight=0"
UNCLIPPED = "if (location.protocol === 'http:') localStorage.setItem('_ignoreYOutliers', 'false')"

# elements anywhere, shadow roots included
DEEP = r"""
const deep = (root, sel, out = []) => {
  for (const e of root.querySelectorAll('*')) {
    if (e.matches(sel)) out.push(e);
    if (e.shadowRoot) deep(e.shadowRoot, sel, out);
  }
  return out;
};
"""
# every chart of the custom scalars dashboard, from the properties of its elements and what is drawn of it
CHARTS = (
    "() => {"
    + DEEP
    + r"""
  const charts = [];
  for (const view of deep(document, 'tf-category-paginated-view')) {
    for (const card of deep(view, 'tf-custom-scalar-multi-line-chart-card, tf-custom-scalar-margin-chart-card')) {
      const line = deep(card.shadowRoot, 'vz-line-chart2')[0];
      const div = line && line.shadowRoot.querySelector('#chartdiv');
      // a path without a number draws nothing
      const drawn = (sel) => div ? [...div.querySelectorAll(sel)].filter(p => /[0-9]/.test(p.getAttribute('d') || '')).length : 0;
      const shown = (e) => {
        for (; e && e !== card; e = e.parentElement) if (e.style && e.style.display === 'none') return false;
        return true;
      };
      charts.push({
        category: view.category.name, title: card.title, opened: view.opened,
        band: card.localName.includes('margin'),
        wanted: card.marginChartSeries ? card.marginChartSeries.map(s => s.value) : card.tagRegexes,
        loaded: !!line && line.hasAttribute('data-loaded-once') && !line.hasAttribute('data-loading') && !!line._chart,
        height: div ? div.getBoundingClientRect().height : 0,
        series: (card._seriesNames || []).map(n => {
          const series = card._nameToDataSeries[n];
          return {tag: series.getTag(), run: series.getRun(),
                  points: series.getData().filter(p => Number.isFinite(p.scalar)).length};
        }),
        lines: drawn('.line-plot:not(.area-plot) path.line'), bands: drawn('.area-plot path.area'),
        errors: [...card.shadowRoot.querySelectorAll('.error-content')].filter(shown)
          .map(e => e.textContent.replace(/\s+/g, ' ').trim()),
      });
    }
  }
  return charts;
}"""
)
DRAWN = (
    "(count) => { const charts = (" + CHARTS + ")(); return charts.length >= count && charts.every(c => c.opened "
    "&& c.loaded && c.height > 50 && c.lines === c.series.filter(s => s.points).length); }"
)
# panes scroll inside the page: how high it would have to be
HEIGHT = (
    "() => {"
    + DEEP
    + r"""
  const panes = deep(document, '*').filter(e => e.scrollHeight > e.clientHeight + 1 && e.clientHeight > 100
    && ['auto', 'scroll'].includes(getComputedStyle(e).overflowY));
  return Math.ceil(Math.max(document.documentElement.scrollHeight,
    ...panes.map(e => e.getBoundingClientRect().top + e.scrollHeight)));
}"""
)
ROWS = (
    "() => {"
    + DEEP
    + r"""
  const table = deep(document, 'tf-hparams-table-view')[0];
  return table ? (table.sessionGroups || []).map(g => ({name: g.name, settings: g.hparams,
    metrics: Object.fromEntries((g.metricValues || []).map(m => [m.name.tag, m.value]))})) : [];
}"""
)
DRAWN_IMAGES = (
    "() => {" + DEEP + " const all = deep(document, 'img');"
    " return all.length && all.every(i => i.complete && i.naturalWidth); }"
)


def chromium() -> str | None:
    """Where a browser is installed."""
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def _get(address: str, path: str) -> dict:
    with urllib.request.urlopen(address + path, timeout=10) as answer:
        return json.loads(answer.read())


@contextlib.contextmanager
def tensorboard(logs: Path, *, timeout: float = 60):
    """Its address, once it serves what the event files hold: it answers before it has read them."""
    written = {}
    for folder in {path.parent for path in logs.rglob("events.out.tfevents.*")}:
        events = EventAccumulator(str(folder))
        events.Reload()
        written[folder.relative_to(logs).as_posix()] = set(events.Tags()["scalars"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logs), "--host", "127.0.0.1"]
    command += ["--port", str(port), "--load_fast=false", "--reload_interval=1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + timeout
    try:
        while True:
            with contextlib.suppress(OSError):
                served = _get(address, "/data/plugin/scalars/tags")
                if all(tags <= set(served.get(run, ())) for run, tags in written.items()):
                    break
            assert process.poll() is None, "TensorBoard ended"
            assert time.monotonic() < deadline, "TensorBoard does not serve all that was logged"
            time.sleep(0.1)
        yield address
    finally:
        process.terminate()
        process.wait(10)


def _screenshot(page, path: Path) -> None:
    page.set_viewport_size({"width": 1600, "height": 900})
    unchanged, last = 0, None
    while unchanged < 3:  # a larger window moves the panes: until its height stays
        height = max(900, min(8000, page.evaluate(HEIGHT)))
        unchanged, last = (unchanged + 1 if height == last else 0), height
        page.set_viewport_size({"width": 1600, "height": height})
        page.evaluate("() => new Promise(done => requestAnimationFrame(() => setTimeout(done, 60)))")
    page.screenshot(path=str(path))


def faults(chart: dict) -> list[str]:
    """Why a chart does not show all that it should."""
    found = list(chart["errors"])
    tags = [series["tag"] for series in chart["series"]]
    wanted = chart["wanted"]
    if chart["band"]:
        found += [f"no data for {each}" for each in wanted if each not in tags]
    elif not any(re.match(each, tag) for each in wanted for tag in tags):
        found.append(f"no data for {' or '.join(wanted)}")
    if chart["lines"] < len(tags) or (chart["band"] and chart["bands"] < len(tags)):
        found.append(f"{len(tags)} series, {chart['lines']} lines and {chart['bands']} bands drawn")
    found += [f"a single point of {series['tag']}" for series in chart["series"] if series["points"] < 2]
    return [f"{chart['category']} / {chart['title']}: {each}" for each in found]


def look(logs: Path, shots: Path) -> dict:
    """Charts, cards, images and rows that TensorBoard shows of a folder; screenshots of its tabs."""
    from playwright.sync_api import TimeoutError as Late
    from playwright.sync_api import sync_playwright

    shots.mkdir(parents=True, exist_ok=True)
    with tensorboard(logs) as address, sync_playwright() as playwright:
        layout = _get(address, "/data/plugin/custom_scalars/layout")
        titles = [(each["title"], chart["title"]) for each in layout["category"] for chart in each["chart"]]
        browser = playwright.chromium.launch(executable_path=chromium(), args=ARGUMENTS)
        page = browser.new_page(viewport={"width": 1600, "height": 900})
        page.set_default_timeout(30_000)
        page.add_init_script(UNCLIPPED)
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))

        def tab(fragment: str, ready: str) -> None:
            page.goto("about:blank")  # a new fragment alone loads nothing
            page.goto(f"{address}/#{fragment}")
            page.locator(ready).first.wait_for(state="visible")

        tab(CUSTOM, "tf-category-paginated-view button.heading")
        with contextlib.suppress(Late):  # what is missing is found below
            page.wait_for_function(DRAWN, arg=len(titles))
        charts = page.evaluate(CHARTS)
        _screenshot(page, shots / "custom_scalars.png")
        groups = page.locator("tf-category-paginated-view")
        for i in range(groups.count()):  # a part of the page for each group of charts
            groups.nth(i).screenshot(path=str(shots / f"group_{i + 1}.png"))
        tab("text", "tf-text-loader")
        cards = page.locator("tf-text-loader").count()
        _screenshot(page, shots / "text.png")
        images = 0
        if any(_get(address, "/data/plugin/images/tags").values()):
            tab("images", "tf-image-loader img")
            page.wait_for_function(DRAWN_IMAGES)
            images = page.locator("tf-image-loader img").count()
            _screenshot(page, shots / "images.png")
        tab("hparams", "tf-hparams-table-view")
        with contextlib.suppress(Late):
            page.wait_for_function(f"() => ({ROWS})().length > 0")
        rows = page.evaluate(ROWS)
        _screenshot(page, shots / "hparams.png")
        browser.close()
    return {"layout": titles, "charts": charts, "cards": cards, "images": images, "rows": rows, "errors": errors}
