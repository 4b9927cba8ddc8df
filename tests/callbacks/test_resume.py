"""A run that is stopped and goes on from a checkpoint: same weights, same series as one that never stopped."""

import random

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from tests.callbacks.test_monitor import Net, Recorder, data, seeded, weights
from torch_singlim import AntiCorrelated, CustomNoise, InjectNoise, SingularLimitMonitor

STEPS = 40
# wall time, and what is worth it, are not the same twice
TIMED = "singlim/cost/overhead"


class Reseed(L.Callback):
    """The global random state follows from the step, as no checkpoint holds it: dropout is the same again."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        torch.manual_seed(trainer.global_step)


class Heavy(Net):
    """With dropout, momentum and a schedule."""

    def __init__(self):
        super().__init__(momentum=0.5)

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.9), "interval": "step"},
        }


def nudge(loss, w, x, y, eta):
    return loss(w + eta, x, y)


NOISES = {
    "dropout": lambda: [],
    "anti-correlated": lambda: [InjectNoise(AntiCorrelated(std=0.01))],
    "custom": lambda: [InjectNoise(CustomNoise(nudge, std=0.01))],
}


def run(folder, *, noise, checkpoint=None, stop=STEPS, watched=True):
    """Weights, monitor and what was logged, from the start or from a checkpoint; stopped at a step."""
    monitor, recorder = SingularLimitMonitor(max_overhead=None, window=8, replicas=2), Recorder()
    saver = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)

    class Stop(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == stop:
                trainer.should_stop = True

    trainer = L.Trainer(
        max_steps=STEPS,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Reseed(), *NOISES[noise](), *([monitor] if watched else []), saver, Stop()],
        logger=recorder,
        log_every_n_steps=1,
    )
    model = seeded(Heavy)
    # one batch an epoch: Lightning does not put a loader back to where it was within one
    trainer.fit(model, DataLoader(data(), batch_size=20), ckpt_path=checkpoint)
    return weights(model), monitor, recorder


def series(recorder):
    return {
        (step, tag): value
        for step, metrics in recorder.points
        for tag, value in metrics.items()
        if tag.startswith("singlim/") and tag != TIMED
    }


# ModelCheckpoint, of its own folder
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize("noise", [pytest.param("dropout", marks=pytest.mark.slow), *list(NOISES)[1:]])
def test_interrupted_and_resumed(tmp_path, noise):
    whole, monitor, recorder = run(tmp_path / "whole", noise=noise)
    expected = series(recorder)
    # random steps, inside windows and at their ends
    steps = random.Random(0).sample(range(1, STEPS), 10) if noise == "dropout" else [11, 16]
    for step in steps:
        at = tmp_path / "whole" / f"step={step}.ckpt"
        resumed, again, rest = run(tmp_path / f"again {step}", noise=noise, checkpoint=at)
        assert torch.equal(resumed, whole)
        later = {key: value for key, value in expected.items() if key[0] > step}
        assert series(rest) == later, f"resumed at {step}"
        assert list(again.history) == list(monitor.history)
        assert [h.keys() for h in again.history.values()] == [h.keys() for h in monitor.history.values()]
        assert again.verdict == monitor.verdict


@pytest.mark.filterwarnings("ignore:The dirpath has changed", "ignore:Be aware that when using `ckpt_path`")
def test_resumed_without_the_monitor_the_weights_are_the_same(tmp_path):
    at = tmp_path / "part" / "step=12.ckpt"
    run(tmp_path / "part", noise="anti-correlated", stop=12)
    with_it, monitor, _ = run(tmp_path / "with", noise="anti-correlated", checkpoint=at)
    without, _, _ = run(tmp_path / "without", noise="anti-correlated", checkpoint=at, watched=False)
    assert monitor.history
    assert torch.equal(with_it, without)


def test_a_checkpoint_holds_tensors_and_numbers_alone(tmp_path):
    run(tmp_path, noise="anti-correlated", stop=12)
    state = torch.load(tmp_path / "step=12.ckpt", weights_only=True)["callbacks"]
    (own,) = [value for key, value in state.items() if key.startswith("SingularLimitMonitor")]
    assert own["open"]["start"] == 8
    assert own["open"]["forecast"]["point"].shape == (323,)


def test_a_checkpoint_of_a_run_without_the_monitor(tmp_path):
    """It begins where it is, as in a new run."""
    trainer = L.Trainer(
        max_steps=8,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
        enable_checkpointing=False,
    )
    model = seeded(Heavy)
    trainer.fit(model, DataLoader(data(), batch_size=20))
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    _, monitor, _ = run(tmp_path / "new", noise="dropout", checkpoint=tmp_path / "plain.ckpt")
    assert min(monitor.history) == 8
    assert max(monitor.history) == STEPS
