"""Checkpoints of a finished run: the same distances and displacements as the live monitor's."""

import csv
import sys
import warnings

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from tests.callbacks.test_monitor import Net, data, seeded, weights
from torch_singlim import AntiCorrelated, InjectNoise, SingularLimitMonitor
from torch_singlim.__main__ import main
from torch_singlim.callbacks.offline import probe_checkpoints

SAME = ("loss_gap", "distance/measured", "distance/linearised", "distance/separated", "separation", "drift/measured")


class Saver(ModelCheckpoint):
    """Keeps a checkpoint of every tenth step and of the first."""

    def on_train_start(self, trainer, pl_module):
        trainer.save_checkpoint(f"{self.dirpath}/step=0.ckpt")


def trained(folder, *, make=Net, noise=None):
    """Live monitor and checkpoints of the same steps."""
    monitor = SingularLimitMonitor(every_n_steps=10, window=10)
    saver = Saver(folder, filename="{step}", every_n_train_steps=10, save_top_k=-1)
    injected = [] if noise is None else [InjectNoise(noise)]
    L.seed_everything(0, verbose=False)
    trainer = L.Trainer(
        max_steps=30,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
        callbacks=[*injected, monitor, saver],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(seeded(make), DataLoader(data(), batch_size=6, shuffle=True))
    return monitor, sorted(folder.glob("*.ckpt"))


@pytest.mark.parametrize(
    ("make", "noise"),
    [(Net, None), (lambda: Net(momentum=0.5), None), (lambda: Net(dropout=0.0), AntiCorrelated(0.05))],
    ids=["dropout", "momentum", "carried"],
)
def test_the_same_as_live(make, noise, tmp_path):
    monitor, files = trained(tmp_path, make=make, noise=noise)
    assert len(files) == 4
    module = make()
    before = weights(module).clone()
    history = probe_checkpoints(module, data().tensors, files[::-1], batch_size=6, noise=noise)
    assert torch.equal(weights(module), before)
    assert list(history) == [0, 10, 20, 30]
    for step, point in history.items():
        live = monitor.history[step]
        for tag in (f"singlim/{tag}" for tag in SAME):
            assert (tag in point) == (tag in live), (step, tag)
            if tag in live:
                assert point[tag] == pytest.approx(live[tag], rel=1e-6), (step, tag)
        # what is drawn at random agrees within its errors
        if step:
            error = 3 * (point["singlim/quality/stderr"] + live["singlim/quality/stderr"])
            predicted = [each["singlim/drift/predicted"] for each in (point, live)]
            assert predicted[0] == pytest.approx(predicted[1], abs=error + 1e-9)
            assert "singlim/limit/cosine" in point


def test_from_the_shell(tmp_path, capsys, monkeypatch):
    monitor, files = trained(tmp_path)
    (tmp_path / "mine.py").write_text(
        "from tests.callbacks.test_monitor import Net, data\n\n\ndef module():\n    return Net()\n\n\n"
        "def samples():\n    return data().tensors\n"
    )
    out = tmp_path / "probe"
    command = ["probe", *map(str, files), "--batch-size", "6", "--out", str(out)]
    command += ["--module", f"{tmp_path / 'mine.py'}:module", "--data", f"{tmp_path / 'mine.py'}:samples"]
    main(command)
    printed = capsys.readouterr().out
    assert "| step | loss gap | distance |" in printed
    rows = {int(row["step"]): row for row in csv.DictReader((out / "metrics.csv").read_text().splitlines())}
    live = monitor.history[30]["singlim/distance/measured"]
    assert float(rows[30]["singlim/distance/measured"]) == pytest.approx(live, rel=1e-6)
    main(["report", str(out), "--out", str(tmp_path / "report")])
    assert (tmp_path / "report" / "report.html").exists()
    # a second time nothing is replaced
    with pytest.raises(SystemExit):
        main(command)
    assert "metrics.csv is there already" in capsys.readouterr().err
    sys.modules.pop("mine", None)


class Other(Net):
    def __init__(self):
        super().__init__(hidden=16)


def test_bad_input(tmp_path):
    _, files = trained(tmp_path)
    probe = {"batch_size": 6}
    with pytest.raises(ValueError, match=r"step=0\.ckpt is a checkpoint of another module than Other: size mismatch"):
        probe_checkpoints(Other(), data().tensors, files, **probe)
    with pytest.raises(ValueError, match="no checkpoints"):
        probe_checkpoints(Net(), data().tensors, [], **probe)
    with pytest.raises(ValueError, match=r"no checkpoint .*absent\.ckpt"):
        probe_checkpoints(Net(), data().tensors, [tmp_path / "absent.ckpt"], **probe)
    (tmp_path / "cut.ckpt").write_bytes(files[0].read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"cut\.ckpt cannot be read as a checkpoint"):
        probe_checkpoints(Net(), data().tensors, [tmp_path / "cut.ckpt"], **probe)
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "plain.pt")
    with pytest.raises(ValueError, match=r"plain\.pt is no checkpoint of Lightning"):
        probe_checkpoints(Net(), data().tensors, [tmp_path / "plain.pt"], **probe)
    with pytest.raises(ValueError, match="two checkpoints of step 0"):
        probe_checkpoints(Net(), data().tensors, [files[0], files[0]], **probe)
    state = torch.load(files[0], weights_only=True)
    torch.save({**state, "optimizer_states": []}, tmp_path / "weights.ckpt")
    with pytest.raises(ValueError, match=r"does not hold the state of one torch\.optim\.SGD"):
        probe_checkpoints(Net(), data().tensors, [tmp_path / "weights.ckpt"], **probe)


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("nothing", "expected package.module:name"),
        ("absent.py:x", "absent.py:x was not found"),
        ("math:x", "math:x was"),
    ],
)
def test_names_that_are_not_there(reference, message, capsys, tmp_path):
    with pytest.raises(SystemExit):
        main(["probe", "a.ckpt", "--module", reference, "--data", reference, "--out", str(tmp_path)])
    assert message in capsys.readouterr().err
