"""What each kind of logger gets, and the record beside it."""

import csv
from pathlib import Path

import pytest
import wandb
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.zoo import Net, fit, monitor_of, seeded
from torch_singlim.callbacks.logs import folder_of
from torch_singlim.measure import Code
from torch_singlim.report import find_runs, read_run, report

OPTIONS = {"every_n_steps": 5, "window": 5, "replicas": 2}


class Files(Logger):
    """A logger of one's own, which knows where it saves."""

    def __init__(self, folder):
        super().__init__()
        self.folder, self.metrics = folder, {}

    name, version = "mine", 3

    @property
    def save_dir(self):
        return str(self.folder)

    def log_metrics(self, metrics, step=None):
        self.metrics.setdefault(step, {}).update(metrics)

    def log_hyperparams(self, *args, **kwargs):
        pass


class Elsewhere(Files):
    """One whose files are not on this machine."""

    save_dir = "s3://bucket/runs"


@pytest.fixture
def offline(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    yield WandbLogger(save_dir=tmp_path, offline=True)
    wandb.finish()


@pytest.mark.filterwarnings("ignore")  # of wandb's own making
def test_every_logger_gets_the_same_tags_and_a_record(tmp_path, offline):
    loggers = [TensorBoardLogger(tmp_path / "board"), CSVLogger(tmp_path / "csv"), Files(tmp_path / "mine"), offline]
    monitor = monitor_of(**OPTIONS)
    fit(seeded(Net), monitor, steps=20, logger=loggers)
    logged = {f"singlim/{tag}" for point in monitor.history.values() for tag in point}

    events = EventAccumulator(loggers[0].log_dir, size_guidance={"scalars": 0}).Reload()
    derived = {tag for tag in events.Tags()["scalars"] if tag.startswith("singlim/curves/")}
    derived |= {tag for tag in events.Tags()["scalars"] if tag.endswith(("_lower", "_upper"))}
    assert {tag for tag in events.Tags()["scalars"] if tag.startswith("singlim/")} - derived == logged
    with Path(loggers[1].log_dir, "metrics.csv").open() as opened:
        assert {column for column in next(csv.reader(opened)) if column.startswith("singlim/")} == logged
    assert {tag for point in loggers[2].metrics.values() for tag in point if tag.startswith("singlim/")} == logged
    summary = offline.experiment.summary
    assert {tag for tag in summary.keys() if tag.startswith("singlim/")} == logged  # noqa: SIM118  # no mapping
    last = max(monitor.history)
    assert summary["singlim/drift/cosine"] == monitor.history[last]["drift/cosine"]

    folders = find_runs(tmp_path)
    assert folders == sorted(folder_of(logger) for logger in loggers)
    assert [read_run(folder).history for folder in folders] == [monitor.history] * 4
    assert folders[-1].is_relative_to(tmp_path / "wandb") or (tmp_path / "wandb") in folders[-1].parents
    # a run directory of any logger
    for i, folder in enumerate(folders):
        assert report([folder], tmp_path / f"report_{i}").exists()
    # all of them are one run
    assert (
        "<title>torch_singlim: lightning_logs/version_0</title>" in report([tmp_path], tmp_path / "report").read_text()
    )


def test_a_logger_without_a_folder_gets_the_values_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    logger = Elsewhere(tmp_path)
    monitor = monitor_of(**OPTIONS)
    fit(seeded(Net), monitor, steps=10, logger=logger)
    assert logger.metrics[10]["singlim/excess_loss"] == monitor.history[10]["excess_loss"]
    assert not [reason for reason in monitor.reasons if reason.code is Code.FAILED]
    assert not list(tmp_path.rglob("*.jsonl"))  # Lightning itself makes a folder of that name


def test_a_record_that_cannot_be_written_is_a_reason(tmp_path):
    (tmp_path / "mine" / "version_3").mkdir(parents=True)
    (tmp_path / "mine" / "version_3" / "singlim.jsonl").mkdir()
    monitor = monitor_of(**OPTIONS)
    fit(seeded(Net), monitor, steps=10, logger=Files(tmp_path))
    assert max(monitor.history) == 10
    assert "IsADirectoryError" in monitor.verdict
