"""The registry: each tag is declared once, and everything that names one derives from there."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import torch_singlim
from torch_singlim.measure import Measurement, Need, Place, scalars, tags

PACKAGE = Path(torch_singlim.__file__).parent
ROOT = PACKAGE.parent


def make_tags():
    spec = importlib.util.spec_from_file_location("make_tags", ROOT / "docs" / "make_tags.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_current():
    module = make_tags()
    present = module.PAGE.read_text(encoding="utf-8")
    assert module.page(present) == present, "python docs/make_tags.py"


def test_each_tag_is_declared_once_and_completely():
    names = [tag.name for tag in tags.TAGS] + [tag.stderr_name for tag in tags.TAGS if tag.stderr is not None]
    assert len(set(names)) == len(names) > 30
    for tag in tags.TAGS:
        assert re.fullmatch(r"[a-z_]+(/[a-z_]+)?", tag.name)
        assert all((tag.label, tag.unit, tag.meaning, tag.advice, tag.group))
        assert tag.stderr is not None or not tag.band
        # no noise moves anything where the limit is unknown
        assert Need.MOVES not in tag.needs or Need.LIMIT in tag.needs
        # a cell of a table
        assert not re.search(r"(?<!\\)\||\n", tag.meaning + tag.advice)
    assert {place for tag in tags.TAGS for place in tag.shown} == set(Place)
    assert {need for tag in tags.TAGS for need in tag.needs} == set(Need)


def test_what_is_mentioned_in_the_meanings_exists():
    known = {tag.name for tag in tags.TAGS}
    for tag in tags.TAGS:
        mentioned = re.findall(r"`([a-z_]+/[a-z_]+)`", tag.meaning + tag.advice)
        assert set(mentioned) <= known, tag.name


def test_no_other_module_spells_a_tag():
    names = "|".join(re.escape(tag.name) for tag in tags.TAGS if "/" in tag.name)
    for path in PACKAGE.rglob("*.py"):
        if path.parent.name != "tags":
            code = re.sub(r'""".*?"""', "", path.read_text(), flags=re.DOTALL)
            assert not re.search(rf"[\"'/]({names})[\"'_]", code), path


def test_what_is_not_measured_or_not_finite_is_not_logged():
    assert scalars(Measurement(0)) == {}
    assert scalars(Measurement(0, excess_loss=float("nan"), overhead=float("inf"))) == {}


def test_the_steps_of_each_window_are_found_in_what_was_logged():
    """Also of windows that were given up, or overlap, or are shorter than planned."""
    lengths = {25: 25, 50: 50, 75: 25, 100: 50, 101: 1, 130: 10}
    history = {step: {"window/steps": float(length)} for step, length in lengths.items()}
    history |= {0: {"excess_loss": 1.0}, 60: {"drift/measured": 1.0}}
    assert tags.windows(history) == {0: [25, 50], 50: [75, 100], 100: [101], 120: [130]}
    assert tags.windows({}) == {}


RENAMED = """
import json, sys, warnings
warnings.simplefilter("ignore")
from pathlib import Path
import torch_singlim
assert Path(torch_singlim.__file__).is_relative_to(sys.argv[1]), torch_singlim.__file__
import lightning as L, torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torch_singlim import SingularLimitMonitor
from torch_singlim.__main__ import main
from torch_singlim.measure.tags import tags_page

class Net(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Dropout(0.1), nn.Linear(16, 2))
    def forward(self, x):
        return self.net(x)
    def training_step(self, batch, batch_idx):
        return F.mse_loss(self(batch[0]), batch[1])
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

torch.manual_seed(0)
out = Path(sys.argv[2])
loader = DataLoader(TensorDataset(torch.randn(6, 4), torch.randn(6, 2)), batch_size=6)
monitor = SingularLimitMonitor(every_n_steps=5, window=5, replicas=2, prog_bar=True)
trainer = L.Trainer(max_steps=10, accelerator="cpu", callbacks=[monitor], enable_progress_bar=False,
                    logger=[TensorBoardLogger(out, name="board"), CSVLogger(out, name="csv")],
                    enable_checkpointing=False, enable_model_summary=False, log_every_n_steps=1)
trainer.fit(Net(), loader)
main(["report", str(out / "csv"), "--out", str(out / "report")])
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
events = EventAccumulator(trainer.loggers[0].log_dir).Reload()
layout = events.Tensors("custom_scalars__config__")[-1].tensor_proto.string_val[0].decode("latin1")
Path(sys.argv[3]).write_text(json.dumps({
    "history": sorted({tag for point in monitor.history.values() for tag in point}),
    "callbacks": sorted(trainer.callback_metrics),
    "scalars": sorted(events.Tags()["scalars"]),
    "layout": layout,
    "hyperparameters": events.summary_metadata["_hparams_/experiment"].plugin_data.content.decode("latin1"),
    "verdict": monitor.verdict,
    "table": (out / "report" / "runs.csv").read_text(),
    "page": "\\n".join(tags_page()),
}))
"""


@pytest.mark.parametrize(
    ("declared", "old", "new"),
    [('name="drift/cosine"', "drift/cosine", "drift/agreement"), ('name="excess_loss"', "excess_loss", "loss_left")],
)
def test_a_tag_renamed_in_the_registry_is_renamed_everywhere(declared, old, new, tmp_path):
    """On a copy of the package whose registry alone is changed."""
    copy = tmp_path / "package" / "torch_singlim"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    changed = 0
    for path in (copy / "measure" / "tags").glob("*.py"):
        text = path.read_text()
        changed += text.count(declared)
        # the declaration, and what other entries say of it
        path.write_text(text.replace(declared, f'name="{new}"').replace(f"`{old}`", f"`{new}`"))
    assert changed == 1
    environment = {**os.environ, "PYTHONPATH": str(copy.parent), "OMP_NUM_THREADS": "1"}
    arguments = [str(copy.parent), str(tmp_path / "out"), str(tmp_path / "found.json")]
    run = subprocess.run(
        [sys.executable, "-c", RENAMED, *arguments],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert new in found["history"]
    assert f"singlim/{new}" in found["callbacks"]
    assert f"singlim/{new}" in found["scalars"]
    assert f"singlim/{new}" in found["hyperparameters"]
    assert new in found["layout"]
    assert f"| `{new}`" in found["page"]
    heading = {"drift/cosine": "cosine", "excess_loss": "excess loss"}[old]
    assert f"| {heading} |" in found["verdict"]
    assert heading in found["table"].splitlines()[0]
    assert re.search(r"\d", found["table"].splitlines()[1])
    for where, text in found.items():
        assert not re.search(rf"(?<![a-z_]){re.escape(old)}(?![a-z_])", str(text).replace("_stderr", "")), where
