"""Reports of finished runs: what is in them, that they need no network, and what bad input gives."""

import csv
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

import torch_singlim
from tests.zoo import Manual, Net, fit, monitor_of, seeded
from torch_singlim import DropConnect, Estimate, InjectNoise
from torch_singlim.__main__ import main
from torch_singlim.measure import Code
from torch_singlim.report import Record, find_runs, read_run, report
from torch_singlim.report.page import _exponents, _rate

SWEEP = [(lr, std) for lr in (0.1, 0.2) for std in (0.1, 0.2, 0.3)]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """Six runs under DropConnect, with event files, which have no figures; of the first, CSV too."""
    root = tmp_path_factory.mktemp("sweep")
    histories = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch_singlim.callbacks.tensorboard.figures", lambda *args: {})  # they take longest
        for lr, std in SWEEP:
            monitor = monitor_of(every_n_steps=10, window=10, replicas=2)
            loggers = [TensorBoardLogger(root / "events", name=f"lr{lr}_std{std}", version="")]
            if not histories:
                loggers.append(CSVLogger(root / "csv", name="", version=""))
            net = seeded(lambda lr=lr: Net(dropout=0.0, lr=lr))
            fit(net, InjectNoise(DropConnect(std)), monitor, steps=20, logger=loggers)
            histories[f"lr{lr}_std{std}"] = monitor.history
    return root, histories


def test_what_was_logged_is_read_back(sweep):
    root, histories = sweep
    for name, history in histories.items():
        run = read_run(root / "events" / name)
        assert run.history == history
        assert run.finished
    assert read_run(root / "csv").history == histories["lr0.1_std0.1"]
    assert len(find_runs(root)) == 7


def test_one_page_without_network(sweep, tmp_path):
    root, histories = sweep
    page = report([root / "events"], tmp_path / "report")
    text = page.read_text()
    assert page.stat().st_size < 3e6
    assert not re.findall(r"(?:src|href)=\"(?!data:)", text)
    assert "http" not in re.sub(r"data:[^\"]*", "", text)
    assert "<script" not in text
    rows = list(csv.DictReader((tmp_path / "report" / "runs.csv").read_text().splitlines()))
    assert [row["run"] for row in rows] == sorted(histories)
    for row in rows:
        last = histories[row["run"]][20]
        assert float(row["cosine"]) == pytest.approx(last["drift/cosine"], rel=1e-3)
        assert float(row["step size α [step size]"]) == pytest.approx(float(row["run"][2:5]))
        assert float(row["noise level σ"]) == pytest.approx(float(row["run"][-3:]))
    names = {path.name for path in (tmp_path / "report").iterdir()}
    assert {"runs.png", "sweep.png", "sweep.pdf", "speed.pdf", "time_scales_5.png", "agreement_0.pdf"} <= names
    assert text.count("<img") == 3 + 2 * 6
    assert "Noise: order 1, " in text


def test_a_power_law_is_fitted(sweep):
    """To speeds that are one by construction."""
    root, _ = sweep
    rates = [_rate(read_run(folder).history) for folder in find_runs(root / "events")]
    assert all(rate is not None for rate in rates)
    lawful = [replace(r, measured=Estimate(3 * r.alpha * r.sigma**2, 1e-4 * r.alpha * r.sigma**2)) for r in rates]
    assert _exponents(lawful).startswith("speed ∝ α^a σ^b: a = 1.00 ± ")
    assert ", b = 2.00 ± " in _exponents(lawful)
    assert "at least four rates" in _exponents(lawful[:3])


def test_nothing_is_replaced_unless_asked(sweep, tmp_path, capsys):
    root, _ = sweep
    out = tmp_path / "report"
    command = ["report", str(root / "csv"), "--out", str(out)]
    main(command)
    before = (out / "report.html").read_bytes()
    (out / "report.html").write_text("mine")
    with pytest.raises(SystemExit) as ended:
        main(command)
    assert ended.value.code == 2
    assert (out / "report.html").read_text() == "mine"
    assert "report.html is there already: pass --overwrite" in capsys.readouterr().err
    main([*command, "--overwrite"])
    assert (out / "report.html").read_bytes() == before


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        main(["report", *map(str, arguments)])
    assert ended.value.code == 2
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    return printed


def test_bad_input_is_said_and_writes_nothing(sweep, tmp_path, capsys):
    root, _ = sweep
    out = tmp_path / "report"
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "no record of a SingularLimitMonitor" in refused(capsys, empty, "--out", out)
    assert "no folder" in refused(capsys, tmp_path / "absent", "--out", out)
    assert "no monitor named other in" in refused(capsys, root / "csv", "--name", "other", "--out", out)

    plain = tmp_path / "plain"
    fit(seeded(Net), steps=4, logger=TensorBoardLogger(plain, name="", version=""))
    assert "no record of a SingularLimitMonitor" in refused(capsys, plain, "--out", out)

    newer = tmp_path / "newer"
    newer.mkdir()
    (newer / "singlim.jsonl").write_text('{"torch_singlim": 99}\n')
    assert "a record of version 1 was expected" in refused(capsys, newer, "--out", out)
    assert not out.exists()


def test_a_run_that_was_killed_is_shown_up_to_there(sweep, tmp_path, capsys):
    root, histories = sweep
    whole = (root / "csv" / "singlim.jsonl").read_text()
    for end in (len(whole) // 2, whole.index("\n") + 1):
        cut = tmp_path / str(end)
        cut.mkdir()
        (cut / "singlim.jsonl").write_text(whole[:end])
        run = read_run(cut)
        assert not run.finished
        assert all(histories["lr0.1_std0.1"][step] == point for step, point in run.history.items())
    out = tmp_path / "out"
    main(["report", str(tmp_path / str(len(whole) // 2)), "--out", str(out)])
    assert "did not come to its end" in (out / "report.html").read_text()


def test_reasons_are_in_the_report(tmp_path):
    """Also of a run of which nothing else is known, which has no figure."""
    monitor = monitor_of(every_n_steps=10, window=10, loss="mse")
    fit(seeded(Manual), monitor, steps=20, logger=CSVLogger(tmp_path / "runs", name="manual"))
    page = report([tmp_path / "runs"], tmp_path / "report").read_text()
    assert "<li>Unsupported: manual optimization: " in page
    assert page.count("<img") == 1
    folder = tmp_path / "nothing"
    record = Record(folder, "singlim")
    record.finish([Code.NO_WEIGHTS()], None)
    page = report([folder], tmp_path / "of_nothing").read_text()
    assert "<li>Unsupported: the module has no trainable parameters.</li>" in page
    assert "<img" not in page


def test_runs_with_different_tags_are_shown_side_by_side(sweep, tmp_path):
    """A run whose drift is not predicted beside one whose is; what one has not stays empty."""
    root, _ = sweep
    part = monitor_of(every_n_steps=10, window=10, loss="mse")
    fit(seeded(Manual), part, steps=20, logger=TensorBoardLogger(tmp_path, name="manual", version=""))
    other = monitor_of(every_n_steps=10, window=10, name="other/one")
    fit(seeded(Net), other, steps=4, logger=TensorBoardLogger(tmp_path, name="other", version=""))
    page = report([tmp_path / "manual", tmp_path / "other", root / "csv"], tmp_path / "report")
    assert f"no monitor of this name logged there: {tmp_path / 'other'}." in page.read_text()
    with pytest.raises(ValueError, match="but other/one: pass its name"):
        read_run(tmp_path / "other")
    rows = {row["run"]: row for row in csv.DictReader((tmp_path / "report" / "runs.csv").read_text().splitlines())}
    assert len(rows) == 2
    (manual,) = [row for name, row in rows.items() if name.endswith("manual")]
    assert manual["cosine"] == ""
    assert float(manual["distance to half [weight norm]"]) > 0


def test_as_a_module():
    shown = subprocess.run(
        [sys.executable, "-m", "torch_singlim", "--help"], capture_output=True, text=True, check=True
    )
    assert "report" in shown.stdout
    assert "measure" in shown.stdout


def test_the_version_is_printed(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"torch_singlim {torch_singlim.__version__}\n"
    citation = Path(__file__).parents[2] / "CITATION.cff"
    assert f"version: {torch_singlim.__version__}\n" in citation.read_text(encoding="utf-8")
