"""Two processes, gloo: they log what one logs, and share the work; where one fails, the job ends with a word."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.distributed_run import CASES
from torch_singlim.network.process_group import Team

ROOT = Path(__file__).parents[2]


def run(case, devices, out, *more):
    command = [sys.executable, "-m", "tests.distributed_run", case, str(devices), str(out), *more]
    # a port of its own, so that runs side by side do not meet
    environment = {**os.environ, "MASTER_PORT": str(20_000 + os.getpid() % 20_000), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=240, check=False)


def test_parts_of_a_team():
    for count in (5, 6, 7):
        parts = [Team(rank, 3).own(count) for rank in range(3)]
        assert [i for part in parts for i in range(count)[part]] == list(range(count))
    alone = torch.ones(3)
    assert Team().sum(alone) is alone
    assert Team().whole(alone, 3) is alone


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_processes_log_what_one_logs(case, tmp_path):
    for devices in (1, 2):
        finished = run(case, devices, tmp_path / str(devices))
        assert finished.returncode == 0, finished.stderr[-3000:]
    one = json.loads((tmp_path / "1.0.json").read_text())
    two = [json.loads((tmp_path / f"2.{rank}.json").read_text()) for rank in (0, 1)]
    assert two[0]["weights"] == two[1]["weights"]
    # each process draws the masks of its own samples: the training is another one, but for its beginning
    random = "dropout" in CASES[case]
    if not random:
        assert two[0]["weights"] == pytest.approx(one["weights"], rel=1e-10)
    for each in two:
        assert each["history"].keys() == one["history"].keys()
        for key, value in (two[0] if random else one)["history"].items():
            if "cost/overhead" not in key:
                assert each["history"][key] == pytest.approx(value, rel=1e-6, abs=1e-9), key
    for key, value in one["history"].items():
        if key.startswith("0 ") and "cost/overhead" not in key:
            assert two[0]["history"][key] == pytest.approx(value, rel=1e-6, abs=1e-9), key
    if CASES[case].get("products"):
        assert list(tmp_path.rglob("events.out.tfevents.*"))
    print(f"{case}: samples evaluated alone {one['rows']}, by each of two {[each['rows'] for each in two]}")
    assert all(each["rows"] < 0.65 * one["rows"] for each in two)


@pytest.mark.slow
def test_two_processes_train_the_same_with_and_without_the_monitor(tmp_path):
    for how in ("watched", "alone"):
        finished = run("dropout in training", 2, tmp_path / how, how)
        assert finished.returncode == 0, finished.stderr[-3000:]
    watched, alone = (json.loads((tmp_path / f"{how}.0.json").read_text()) for how in ("watched", "alone"))
    assert watched["history"]
    assert not alone["history"]
    assert watched["weights"] == alone["weights"]


@pytest.mark.slow
def test_a_failing_process_ends_the_job(tmp_path):
    finished = run("plain", 2, tmp_path / "out", "fault")
    assert finished.returncode != 0
    assert "the probe at step 5 failed on rank 1" in finished.stderr
    assert "ArithmeticError: thrown on purpose" in finished.stderr
