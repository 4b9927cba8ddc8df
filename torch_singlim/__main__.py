"""The command line: ``torch_singlim digits``, ``report`` and ``measure``."""

from __future__ import annotations

import argparse
import csv
import pkgutil
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

__all__ = ["main"]


def _named(reference: str) -> Any:
    """The object with the name ``package.module:name``; modules are also searched for in the current folder."""
    if ":" not in reference:
        raise ValueError(f"expected package.module:name, got {reference!r}")
    sys.path.insert(0, str(Path.cwd()))
    try:
        return pkgutil.resolve_name(reference)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{reference} was not found: {error}") from error
    finally:
        sys.path.pop(0)


def _digits(options: argparse.Namespace) -> None:
    from torch_singlim.demo import train
    from torch_singlim.report import record_file

    if record_file(options.out, "singlim").exists() and not options.overwrite:
        raise FileExistsError(f"{options.out} has a run already: pass --overwrite, or another folder with --out")
    train(options.out)
    print(f"figure: {options.out / 'drift.png'}")
    print(f"look:   tensorboard --logdir {options.out}")
    print(f"report: torch_singlim report {options.out}")


def _report(options: argparse.Namespace) -> None:
    from torch_singlim.report import report

    page = report(options.runs, options.out, name=options.name, overwrite=options.overwrite)
    print(f"report: {page}")


def _measure(options: argparse.Namespace) -> None:
    from torch_singlim.callbacks import measure_checkpoints
    from torch_singlim.report import Record

    table = options.out / "metrics.csv"
    if table.exists() and not options.overwrite:
        raise FileExistsError(f"{table} is there already: pass --overwrite, or another folder with --out")
    found = measure_checkpoints(
        _named(options.module)(),
        _named(options.data)(),
        options.checkpoints,
        batch_size=options.batch_size,
        noise=None if options.noise is None else _named(options.noise),
        replicas=options.replicas,
        dtype=options.dtype,
    )
    tags = sorted({tag for point in found.history.values() for tag in point})
    options.out.mkdir(parents=True, exist_ok=True)
    with table.open("w", newline="", encoding="utf-8") as opened:
        writer = csv.writer(opened)
        writer.writerow(["step", *(f"singlim/{tag}" for tag in tags)])
        writer.writerows([step, *(point.get(tag, "") for tag in tags)] for step, point in found.history.items())
    record = Record(options.out, "singlim")
    record.write(found.history, found.reasons)
    record.finish(found.reasons, found.noise)
    print(found.verdict)
    print(f"\ntable: {table}\nlook:  torch_singlim report {options.out}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="torch_singlim", description="A demonstration, reports on runs, measurements on the checkpoints of a run."
    )
    parser.add_argument("--version", action="version", version=f"torch_singlim {version('torch_singlim')}")
    commands = parser.add_subparsers(required=True, metavar="command")

    digits = commands.add_parser("digits", help="a demonstration on handwritten digits, about two minutes")
    digits.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder to write to (default: runs/demo)")
    digits.add_argument("--overwrite", action="store_true", help="write to a folder that has a run already")
    digits.set_defaults(run=_digits)

    report = commands.add_parser("report", help="a page, figures and a table of one or several runs")
    report.add_argument("runs", nargs="+", type=Path, help="folders of runs, or folders that contain such")
    report.add_argument("--out", type=Path, default=Path("report"), help="folder to write to (default: report)")
    report.add_argument("--name", default="singlim", help="the monitor's name (default: singlim)")
    report.add_argument("--overwrite", action="store_true", help="replace an existing report")
    report.set_defaults(run=_report)

    measure = commands.add_parser("measure", help="the monitor's measurements on checkpoints of a finished run")
    measure.add_argument("checkpoints", nargs="+", type=Path, help="files that Lightning's ModelCheckpoint wrote")
    measure.add_argument(
        "--module",
        required=True,
        help="package.module:name, a class or a function without arguments: the LightningModule",
    )
    measure.add_argument(
        "--data", required=True, help="package.module:name, a function: all training samples, (inputs, targets)"
    )
    measure.add_argument("--noise", help="package.module:name of a noise system that was injected")
    measure.add_argument("--batch-size", type=int, help="samples of one optimizer step (default: all)")
    measure.add_argument("--replicas", type=int, default=0, help="independent runs for the noise ceiling (default: 0)")
    measure.add_argument("--dtype", choices=("float64", "float32"), default="float64", help="of the measurements")
    measure.add_argument("--out", type=Path, default=Path("measured"), help="folder to write to (default: measured)")
    measure.add_argument("--overwrite", action="store_true", help="replace an existing table")
    measure.set_defaults(run=_measure)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; an error is reported in one line, with exit status 2."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except (ValueError, FileExistsError) as error:
        print(f"torch_singlim: {error}", file=sys.stderr)
        raise SystemExit(2) from error


if __name__ == "__main__":
    main()
