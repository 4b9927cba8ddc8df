"""A page, figures and a table from the logs of one or several runs."""

from __future__ import annotations

import base64
import csv
import html
import io
import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from torch_singlim.linalg import Estimate
from torch_singlim.report.figures import agreement_figure, speed_figure, sweep_figure, time_scales_figure
from torch_singlim.report.runs import Run, find_runs, read_run
from torch_singlim.scaling import Rate, fit_exponents
from torch_singlim.verdict import History, verdict

__all__ = ["report"]

# a run's last value of each, in the table: tag, heading, unit
_COLUMNS = (
    ("loss_gap", "loss gap", "loss"),
    ("distance/measured", "distance", "norm"),
    ("distance/separated", "settled part", "norm"),
    ("distance/predicted", "expected", "norm"),
    ("drift/cosine", "cosine", ""),
    ("drift/cosine_stderr", "± (cosine)", ""),
    ("drift/ceiling", "ceiling", ""),
    ("drift/null_cosine", "null", ""),
    ("drift/speed_ratio", "speed ratio", ""),
    ("drift/speed_ratio_stderr", "± (speed)", ""),
    ("drift/pull", "pull", ""),
    ("limit/cosine", "limit cosine", ""),
    ("limit/speed_ratio", "limit speed ratio", ""),
    ("clock/step_size", "step size α", ""),
    ("clock/noise_level", "noise level σ", ""),
)

_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 68rem; margin: 2rem auto;
       padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid #ddd; }
table { border-collapse: collapse; font-size: 13px; display: block; overflow-x: auto; }
th, td { padding: .2rem .6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #eee; }
th:first-child, td:first-child { text-align: left; }
.row { display: flex; flex-wrap: wrap; gap: 2rem; align-items: start; }
figure { margin: 1rem 0; max-width: 30rem; flex: 1 1 22rem; } img { width: 100%; height: auto; }
figcaption, .note { color: #555; font-size: 13px; }
pre { font-size: 12px; background: #f7f7f7; padding: .8rem; overflow-x: auto; }
"""

_CAPTIONS = {
    "time_scales": "Above: the fast fall; the settled part of the distance beside what the theory expects of it. "
    "Below: the slow drift, window by window, beside descent on the effective loss.",
    "agreement": "Direction and speed. The effective flow should reach the noise ceiling and a speed ratio of 1; the "
    "null control, descent on the loss alone, must lie below it for the noise to be seen.",
    "speed": "A point for each window; bars are standard errors. Measured is the motion along the prediction.",
    "sweep": "Displacement per step in the last window of each run, measured (solid) and by the effective flow "
    "(dashed).",
}


def report(
    roots: Sequence[Path],
    out: Path,
    *,
    name: str = "singlim",
    overwrite: bool = False,
    partial: bool = False,
) -> Path:
    """Write ``report.html``, one file that needs no network, with its figures (PNG, PDF) and ``runs.csv`` beside it.

    Args:
        roots: folders with event files or ``metrics.csv``, or above such folders.
        out: folder of the report.
        name: of the monitor.
        overwrite: replace a report that is there already.
        partial: read event files that are cut off up to there.

    Raises:
        ValueError: a folder without runs, a run without the monitor's tags, a file that is cut off.
        FileExistsError: a file would be replaced.
    """
    runs, left_out = _read(roots, name)
    cut = [run.cut_off for run in runs if run.cut_off is not None]
    if cut and not partial:
        raise ValueError(
            f"{cut[0]} is cut off in the middle of a record: the run was killed, or still writes; pass --partial to "
            "report what comes before"
        )
    figures = _figures(runs)
    targets = [out / "report.html", out / "runs.csv"]
    targets += [out / f"{each}.{kind}" for each in figures for kind in ("png", "pdf")]
    there = [path for path in targets if path.exists()]
    if there and not overwrite:
        raise FileExistsError(f"{there[0]} is there already: pass --overwrite, or another folder with --out")
    page = _page(runs, figures, left_out)  # all that can fail comes before anything is written
    table = _table(runs)
    out.mkdir(parents=True, exist_ok=True)
    for each, (figure, _) in figures.items():
        figure.savefig(out / f"{each}.png")
        figure.savefig(out / f"{each}.pdf")
    with (out / "runs.csv").open("w", newline="", encoding="utf-8") as opened:
        csv.writer(opened).writerows(table)
    (out / "report.html").write_text(page, encoding="utf-8")
    return out / "report.html"


def _read(roots: Sequence[Path], name: str) -> tuple[list[Run], list[Path]]:
    """Every run once, named by what tells it from the others; and the folders in which the monitor logged nothing."""
    folders = list(dict.fromkeys(folder.resolve() for root in roots for folder in find_runs(root)))
    if len(folders) == 1:
        (folder,) = folders
        # Lightning's version_0 says little by itself
        shown = "/".join(folder.parts[-2:]) if folder.name.startswith("version_") else folder.name
        return [read_run(folder, name=name, shown=shown)], []
    common = min((folder.parts for folder in folders), key=len)
    while not all(folder.parts[: len(common)] == common for folder in folders):
        common = common[:-1]
    # a logger's version_0, if all end in it
    same = len({folder.name for folder in folders}) == 1 and all(len(f.parts) > len(common) + 1 for f in folders)
    tail = 1 if same else 0
    runs, problems = [], []
    for folder in folders:
        try:
            parts = folder.parts[len(common) : len(folder.parts) - tail]
            runs.append(read_run(folder, name=name, shown="/".join(parts) or folder.name))
        except ValueError as error:
            problems.append((folder, error))
    if not runs:
        raise problems[0][1]
    return runs, [folder for folder, _ in problems]


def _figures(runs: Sequence[Run]) -> dict[str, tuple[Figure, str]]:
    """File name -> figure and caption."""
    figures: dict[str, tuple[Figure, str]] = {}
    rates = [rate for run in runs if (rate := _rate(run.history)) is not None]
    if len(rates) > 1:
        figures["sweep"] = (sweep_figure(rates, title=_exponents(rates)), _CAPTIONS["sweep"])
    figures["speed"] = (speed_figure({run.name: run.history for run in runs}), _CAPTIONS["speed"])
    for i, run in enumerate(runs):
        end = f"_{i}" if len(runs) > 1 else ""
        figures[f"time_scales{end}"] = (time_scales_figure(run.history), _CAPTIONS["time_scales"])
        figures[f"agreement{end}"] = (agreement_figure(run.history), _CAPTIONS["agreement"])
    return figures


def _rate(history: History) -> Rate | None:
    """Speed of the drift in the last window that was held against the theory, with its step size and noise level."""
    needed = ("drift/predicted", "drift/speed_ratio", "drift/window", "clock/step_size", "clock/noise_level")
    for _, point in sorted(history.items(), reverse=True):
        if all(f"singlim/{tag}" in point for tag in needed):
            predicted, ratio, window, alpha, sigma = (point[f"singlim/{tag}"] for tag in needed)
            error = point.get("singlim/drift/speed_ratio_stderr", math.nan)
            if alpha > 0 and sigma > 0 and ratio > 0:
                speed = predicted / window
                return Rate(alpha, sigma, Estimate(ratio * speed, error * speed), speed)
    return None


def _exponents(rates: Sequence[Rate]) -> str:
    """The power law in words."""
    try:
        fit = fit_exponents(rates)
    except ValueError as error:
        return f"No power law was fitted: {error}"
    a, b = fit.alpha, fit.sigma
    return f"speed ∝ α^a σ^b: a = {a.mean:.2f} ± {a.stderr:.2f}, b = {b.mean:.2f} ± {b.stderr:.2f}"


def _last(history: History, tag: str) -> float | None:
    """The last value that was logged."""
    for _, point in sorted(history.items(), reverse=True):
        if f"singlim/{tag}" in point:
            return point[f"singlim/{tag}"]
    return None


def _table(runs: Sequence[Run]) -> list[list[str]]:
    """Headings, then a row for each run."""
    logged = [column for column in _COLUMNS if any(_last(run.history, column[0]) is not None for run in runs)]
    heads = [f"{words} [{unit}]" if unit else words for _, words, unit in logged]
    rows = [["run", "steps", *heads]]
    for run in runs:
        values = (_last(run.history, tag) for tag, _, _ in logged)
        cells = ["" if value is None else f"{value:.4g}" for value in values]
        rows.append([run.name, str(max(run.history)), *cells])
    return rows


def _html_table(rows: Sequence[Sequence[str]]) -> str:
    """A column for each run, which is easier to read than a long row."""
    head, *body = zip(*rows, strict=True)
    lines = [f"<tr>{''.join(f'<th>{html.escape(cell)}</th>' for cell in head)}</tr>"]
    lines += [f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in body]
    return f"<table>{''.join(lines)}</table>"


def _inline(figure: Figure, caption: str) -> str:
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    data = base64.b64encode(stream.getvalue()).decode()
    return (
        f'<figure><img alt="{html.escape(caption)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )


def _row(figures: Sequence[tuple[Figure, str]]) -> str:
    return f"<div class=row>{''.join(_inline(*each) for each in figures)}</div>"


def _page(runs: Sequence[Run], figures: dict[str, tuple[Figure, str]], left_out: Sequence[Path]) -> str:
    title = f"torch_singlim: {runs[0].name}" if len(runs) == 1 else f"torch_singlim: {len(runs)} runs"
    parts = [f"<h1>{html.escape(title)}</h1>", "<p>Last values of each run.</p>", _html_table(_table(runs))]
    if left_out:
        words = f"Left out, no monitor logged there: {', '.join(map(str, left_out))}."
        parts.append(f"<p class=note>{html.escape(words)}</p>")
    parts.append(_row([figures[each] for each in ("sweep", "speed") if each in figures]))
    for i, run in enumerate(runs):
        end = f"_{i}" if len(runs) > 1 else ""
        parts.append(f"<h2>{html.escape(run.name)}</h2><p class=note>{html.escape(str(run.path))}</p>")
        if run.cut_off is not None:
            parts.append(f"<p class=note>{html.escape(run.cut_off.name)} is cut off: what comes before is shown.</p>")
        parts.append(_row([figures[f"{each}{end}"] for each in ("time_scales", "agreement")]))
        parts.append(f"<details><summary>all probes</summary><pre>{html.escape(verdict(run.history))}</pre></details>")
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style>\n'
        + "\n".join(parts)
        + "\n</html>\n"
    )
