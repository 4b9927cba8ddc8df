"""The YAML example as a user runs it; its printed configuration is one that gives the same again."""

import contextlib
import os
import runpy
import sys
from pathlib import Path

import lightning as L
import pytest

from torch_singlim import SingularLimitMonitor

ROOT = Path(__file__).parents[2]


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys):
    """Runs the script as at a shell, in a folder of its own; returns what it prints."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["cli.py", "fit", *arguments])
        with contextlib.suppress(SystemExit):  # --print_config exits
            runpy.run_path(str(ROOT / "recipes" / "cli.py"), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.mark.filterwarnings("ignore")  # as at a shell
def test_the_example_runs_and_its_configuration_round_trips(cli, tmp_path, caplog):
    short = (ROOT / "recipes/configs/digits.yaml").read_text()
    for long, brief in (
        ("1500", "24"),
        ("every_n_steps: 500", "every_n_steps: 8"),
        ("window: 500", "window: 8"),
        ("every_n_epochs: 10", "every_n_epochs: 1"),
        ("samples: 200", "samples: 50"),
        ("hidden: 256", "hidden: 24"),
    ):
        assert long in short
        short = short.replace(long, brief)
    (tmp_path / "short.yaml").write_text(short)
    cli("--config", "short.yaml")
    assert "torch_singlim: verdict" in caplog.text
    assert next(tmp_path.rglob("nearest*.ckpt"))
    assert next(tmp_path.rglob("events.out.tfevents*"))

    printed = cli("--config", "short.yaml", "--print_config")
    assert "dtype: float64" in printed
    (tmp_path / "printed.yaml").write_text(printed)
    assert cli("--config", "printed.yaml", "--print_config") == printed


def test_the_entry_point_gives_nothing_unless_it_is_asked(monkeypatch):
    monkeypatch.delenv("TORCH_SINGLIM", raising=False)
    options = {"logger": False, "enable_checkpointing": False, "accelerator": "cpu"}

    def monitors():
        return [each for each in L.Trainer(**options).callbacks if isinstance(each, SingularLimitMonitor)]

    assert not monitors()
    monkeypatch.setitem(os.environ, "TORCH_SINGLIM", "1")
    assert len(monitors()) == 1
