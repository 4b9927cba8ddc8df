"""The YAML example as a user runs it; its printed configuration is one that gives the same again."""

import os
import subprocess
import sys
from pathlib import Path

import lightning as L

from torch_singlim import SingularLimitMonitor

ROOT = Path(__file__).parents[2]


def cli(*arguments, cwd):
    command = [sys.executable, str(ROOT / "recipes/cli.py"), "fit", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)


def test_the_example_runs_and_its_configuration_round_trips(tmp_path):
    short = (ROOT / "recipes/configs/digits.yaml").read_text()
    for long, brief in (
        ("1500", "24"),
        ("every_n_steps: 500", "every_n_steps: 8"),
        ("window: 500", "window: 8"),
        ("every_n_epochs: 10", "every_n_epochs: 1"),
    ):
        assert long in short
        short = short.replace(long, brief)
    (tmp_path / "short.yaml").write_text(short)
    run = cli("--config", "short.yaml", cwd=tmp_path)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "torch_singlim: verdict" in run.stderr + run.stdout
    assert next(tmp_path.rglob("nearest*.ckpt"))
    assert next(tmp_path.rglob("events.out.tfevents*"))

    printed = cli("--config", "short.yaml", "--print_config", cwd=tmp_path)
    assert printed.returncode == 0, printed.stderr[-3000:]
    (tmp_path / "printed.yaml").write_text(printed.stdout)
    again = cli("--config", "printed.yaml", "--print_config", cwd=tmp_path)
    assert again.returncode == 0, again.stderr[-3000:]
    assert again.stdout == printed.stdout
    assert "dtype: float64" in printed.stdout


def test_the_entry_point_gives_nothing_unless_it_is_asked(monkeypatch):
    monkeypatch.delenv("TORCH_SINGLIM", raising=False)
    options = {"logger": False, "enable_checkpointing": False, "accelerator": "cpu"}

    def monitors():
        return [each for each in L.Trainer(**options).callbacks if isinstance(each, SingularLimitMonitor)]

    assert not monitors()
    monkeypatch.setitem(os.environ, "TORCH_SINGLIM", "1")
    assert len(monitors()) == 1
