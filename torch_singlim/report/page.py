"""A page, figures and a table from the records of one or several runs."""

from __future__ import annotations

import base64
import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure

from torch_singlim.linalg import Estimate
from torch_singlim.measure import History, Place, Rate, fit_exponents, sentences, tags, verdict
from torch_singlim.report.comparison import runs_figure
from torch_singlim.report.figures import agreement_figure, speed_figure, time_scales_figure
from torch_singlim.report.rates import sweep_figure
from torch_singlim.report.record import Run, distinct, find_runs, read_run

__all__ = ["report"]

_CAPTIONS = {
    "agreement": "Direction and speed. The averaged path should reach the noise ceiling, the best cosine that any "
    "deterministic prediction can have with one noisy run, and a speed of 1. The baseline, the same steps without "
    "noise, must be lower, otherwise the effect of the noise is not visible.",
    "runs": "All runs. At the end of each window: how well the averaged path agrees with the run; a bar is the noise "
    "ceiling, the best that is possible.",
    "speed": "A point for each window; bars are standard errors. Measured: the part of the motion along the "
    "prediction.",
    "sweep": "Displacement per step in the last window of each run, measured (solid) and predicted (dashed).",
}


def report(roots: Sequence[Path], out: Path, *, name: str = "singlim", overwrite: bool = False) -> Path:
    """Write ``report.html``, one file that needs no network, and next to it the figures (PNG, PDF) and ``runs.csv``.

    Args:
        roots: folders of runs, or folders that contain such folders.
        out: folder of the report.
        name: of the monitor.
        overwrite: replace an existing report.

    Raises:
        ValueError: a folder without runs, no run of this monitor.
        FileExistsError: a file would be replaced.
    """
    runs, skipped = _read(roots, name)
    common = _common(runs)
    own = [_own(run, f"_{i}" if len(runs) > 1 else "") for i, run in enumerate(runs)]
    figures = {name: figure for found in (common, *own) for name, (figure, _) in found.items()}
    targets = [out / "report.html", out / "runs.csv"]
    targets += [out / f"{each}.{kind}" for each in figures for kind in ("png", "pdf")]
    there = [path for path in targets if path.exists()]
    if there and not overwrite:
        raise FileExistsError(f"{there[0]} is there already: pass --overwrite, or another folder with --out")
    page = _page(runs, common, own, skipped)  # everything that can fail happens before anything is written
    table = _table(runs)
    out.mkdir(parents=True, exist_ok=True)
    for each, figure in figures.items():
        figure.savefig(out / f"{each}.png")
        figure.savefig(out / f"{each}.pdf")
    with (out / "runs.csv").open("w", newline="", encoding="utf-8") as opened:
        csv.writer(opened).writerows(table)
    (out / "report.html").write_text(page, encoding="utf-8")
    return out / "report.html"


def _read(roots: Sequence[Path], name: str) -> tuple[list[Run], list[Path]]:
    """Every run once, with a name that distinguishes it; and the folders that have no record of this monitor."""
    folders = distinct(dict.fromkeys(folder.resolve() for root in roots for folder in find_runs(root)), name)
    if len(folders) == 1:
        (folder,) = folders
        # Lightning's version_0 alone is not a useful name
        shown = "/".join(folder.parts[-2:]) if folder.name.startswith("version_") else folder.name
        return [read_run(folder, name=name, shown=shown)], []
    common = min((folder.parts for folder in folders), key=len)
    while not all(folder.parts[: len(common)] == common for folder in folders):
        common = common[:-1]
    # the last folder is omitted if it is the same for all, such as Lightning's version_0
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


# file name -> figure and caption
_Figures = dict[str, tuple[Figure, str]]


def _common(runs: Sequence[Run]) -> _Figures:
    """The figures of all runs together."""
    histories = {run.name: run.history for run in runs}
    rates = [rate for run in runs if (rate := _rate(run.history)) is not None]
    # of runs that differ in step size or noise level
    swept = len({(rate.alpha, rate.sigma) for rate in rates}) > 1
    drawn = {
        "runs": runs_figure(histories) if len(runs) > 1 else None,
        "sweep": sweep_figure(rates, title=_exponents(rates)) if swept else None,
        "speed": speed_figure(histories),
    }
    return {name: (figure, _CAPTIONS[name]) for name, figure in drawn.items() if figure is not None}


def _own(run: Run, end: str) -> _Figures:
    """The figures of one run."""
    drawn = {"time_scales": time_scales_figure(run.history), "agreement": agreement_figure(run.history)}
    captions = _CAPTIONS | {"time_scales": _fast_and_slow(run.history)}
    return {f"{name}{end}": (figure, captions[name]) for name, figure in drawn.items() if figure is not None}


def _fast_and_slow(history: History) -> str:
    """The caption of the time scales, for what was measured."""
    said = {
        tags.EXCESS_LOSS: "The excess loss falls fast at first.",
        tags.HALF: "The distances are to lower levels of the loss, and to the nearest point of the zero-loss set.",
        tags.RELAXED_EXPECTED: "The relaxed part has a value that theory expects.",
        tags.DRIFT_MEASURED: "Below: how far the weights moved since the beginning of each window.",
        tags.DRIFT_PREDICTED: "Beside it: what the averaged path predicts, and the motion without noise.",
    }
    return " ".join(words for tag, words in said.items() if tags.series(history, tag))


def _rate(history: History) -> Rate | None:
    """Speed of the drift in the last window that was compared with theory, with its step size and noise level."""
    needed = (tags.DRIFT_PREDICTED, tags.DRIFT_SPEED, tags.WINDOW_STEPS, tags.STEP_SIZE, tags.NOISE_LEVEL)
    for _, point in sorted(history.items(), reverse=True):
        if all(tag.name in point for tag in needed):
            predicted, ratio, window, alpha, sigma = (point[tag.name] for tag in needed)
            error = point.get(tags.DRIFT_SPEED.stderr_name, math.nan)
            if alpha > 0 and sigma > 0 and ratio > 0:
                speed = predicted / window
                return Rate(alpha, sigma, Estimate(ratio * speed, error * speed), speed)
    return None


def _exponents(rates: Sequence[Rate]) -> str:
    """The fitted power law, or why there is none."""
    try:
        fit = fit_exponents(rates)
    except ValueError as error:
        return f"No power law was fitted: {error}"
    a, b = fit.alpha, fit.sigma
    return f"speed ∝ α^a σ^b: a = {a.mean:.2f} ± {a.stderr:.2f}, b = {b.mean:.2f} ± {b.stderr:.2f}"


def _columns() -> list[tuple[str, str, str]]:
    """The quantities in the table: tag, heading and unit of each; standard errors follow their values."""
    columns = []
    for tag in tags.shown_in(Place.REPORT):
        columns.append((tag.name, tag.label, tag.unit.replace("–", "")))
        if tag.stderr is not None:
            columns.append((tag.stderr_name, f"± ({tag.label})", ""))
    return columns


def _table(runs: Sequence[Run]) -> list[list[str]]:
    """Headings, then a row for each run."""
    logged = [column for column in _columns() if any(tags.last(run.history, column[0]) is not None for run in runs)]
    heads = [f"{words} [{unit}]" if unit else words for _, words, unit in logged]
    rows = [["run", "steps", *heads]]
    for run in runs:
        values = (tags.last(run.history, name) for name, _, _ in logged)
        cells = ["" if value is None else f"{value:.4g}" for value in values]
        rows.append([run.name, str(max(run.history, default=0)), *cells])
    return rows


def _inline(figure: Figure, caption: str) -> dict[str, str]:
    """A figure in the form that the template needs."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    return {"caption": caption, "png": base64.b64encode(stream.getvalue()).decode()}


def _page(runs: Sequence[Run], common: _Figures, own: Sequence[_Figures], skipped: Sequence[Path]) -> str:
    """The page, rendered from its template."""
    shown = [
        {
            **vars(run),
            "figures": [_inline(*each) for each in figures.values()],
            "sentences": sentences(run.reasons),
            "tables": verdict(run.history),
        }
        for run, figures in zip(runs, own, strict=True)
    ]
    environment = Environment(
        loader=PackageLoader("torch_singlim", "report"), autoescape=True, undefined=StrictUndefined
    )
    return environment.get_template("report.html.jinja").render(
        title=f"torch_singlim: {runs[0].name}" if len(runs) == 1 else f"torch_singlim: {len(runs)} runs",
        table=list(zip(*_table(runs), strict=True)),
        skipped=skipped,
        common=[_inline(*each) for each in common.values()],
        runs=shown,
    )
