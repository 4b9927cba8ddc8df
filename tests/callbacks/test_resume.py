"""A run that is stopped and goes on from a checkpoint: same weights, same series as one that never stopped."""

import random
import re

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from tests.zoo import (
    Recorder,
    Trace,
    assert_identical,
    fit,
    monitor_of,
    reasons_of,
    scheduled,
    seeded,
    weights,
    with_optimizer,
)
from torch_singlim import AntiCorrelated, CustomNoise, InjectNoise
from torch_singlim.measure import Code, Need
from torch_singlim.measure.tags import TAGS

STEPS = 40
OF_PATHS = {name for tag in TAGS if {Need.PATHS, Need.BASELINE} & tag.needs for name in (tag.name, tag.stderr_name)} | {
    "window/steps",
    "window/status",
    "drift/measured",
    "drift/ceiling",
}
# wall time is not the same twice
TIMED = "cost/overhead"

pytestmark = pytest.mark.filterwarnings(
    "ignore:The dirpath has changed", "ignore:Be aware that when using `ckpt_path`", "ignore:You're resuming from"
)


class Reseed(L.Callback):
    """The global random state follows from the step, as no checkpoint holds it: dropout is the same again."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        torch.manual_seed(trainer.global_step)


# with dropout, momentum and a schedule
Heavy = with_optimizer(lambda module: scheduled(torch.optim.SGD(module.parameters(), lr=0.2, momentum=0.5)))


Adaptive = with_optimizer(lambda module: scheduled(torch.optim.AdamW(module.parameters(), lr=0.01)))


def nudge(loss, w, x, y, eta):
    return loss(w + eta, x, y)


NOISES = {
    "dropout": lambda: [],
    "anti-correlated": lambda: [InjectNoise(AntiCorrelated(std=0.01))],
    "custom": lambda: [InjectNoise(CustomNoise(nudge, std=0.01))],
    "dropout under AdamW": lambda: [],
}


class Stop(L.Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.should_stop = trainer.global_step == self.step


def run(folder, *monitors, noise, checkpoint=None, stop=STEPS):
    """Weights and what was logged, from the start or from a checkpoint; stopped at a step."""
    recorder, saver = Recorder(), ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    callbacks = [Reseed(), *NOISES[noise](), *monitors, saver, Stop(stop)]
    # the order of a custom noise takes draws for every weight
    make = Adaptive if "AdamW" in noise else Heavy
    net = seeded(lambda: make(hidden=12 if noise == "custom" else 32))
    # one batch an epoch: Lightning does not put a loader back to where it was within one
    model, _ = fit(net, *callbacks, steps=STEPS, batch_size=20, shuffle=False, logger=recorder, ckpt_path=checkpoint)
    return weights(model), dict(recorder.of_monitor())


def untimed(history, inside=()):
    """Without wall times, and without what paths give at the steps `inside`."""
    found = {}
    for step, point in history.items():
        own = {tag: value for tag, value in point.items() if tag != TIMED and not (step in inside and tag in OF_PATHS)}
        found |= {step: own} if own else {}
    return found


def watching():
    return monitor_of(window=8, replicas=2)


@pytest.mark.parametrize("noise", [pytest.param("dropout", marks=pytest.mark.slow), *list(NOISES)[1:]])
def test_interrupted_and_resumed(tmp_path, noise):
    monitor = watching()
    whole, logged = run(tmp_path / "whole", monitor, noise=noise)
    # random steps, inside windows and at their ends
    steps = random.Random(0).sample(range(1, STEPS), 10) if noise == "dropout" else [11, 16]
    for step in steps:
        at, again = tmp_path / "whole" / f"step={step}.ckpt", watching()
        resumed, rest = run(tmp_path / f"again {step}", again, noise=noise, checkpoint=at)
        assert torch.equal(resumed, whole)
        later = {k: point for k, point in logged.items() if k > step}
        # the paths of the window in progress are gone: of it, the motion alone is measured
        start = step // 8 * 8
        interrupted = step % 8 and start != 24  # no window begins there
        inside = range(step + 1, start + 9) if interrupted else range(0)
        assert untimed(rest, inside) == untimed(later, inside), f"resumed at {step}"
        assert [reason for reason in again.reasons if reason.code is Code.INTERRUPTED] == (
            [Code.INTERRUPTED(start=start)] if interrupted else []
        )
        if interrupted:
            assert again.history[start + 8]["window/status"] == 0.0
            assert again.history[start + 8]["drift/measured"] == pytest.approx(
                monitor.history[start + 8]["drift/measured"], rel=1e-5
            )


@pytest.fixture(scope="module")
def part(tmp_path_factory):
    """The checkpoint of a run that was stopped within a window."""
    folder = tmp_path_factory.mktemp("part")
    run(folder, watching(), noise="anti-correlated", stop=12)
    return folder / "step=12.ckpt"


def test_resumed_without_the_monitor_the_weights_are_the_same(part, tmp_path):
    monitor = watching()
    with_it, _ = run(tmp_path / "with", monitor, noise="anti-correlated", checkpoint=part)
    without, _ = run(tmp_path / "without", noise="anti-correlated", checkpoint=part)
    assert max(monitor.history) == STEPS
    assert torch.equal(with_it, without)


def test_a_checkpoint_holds_tensors_and_plain_values(part):
    state = torch.load(part, weights_only=True)["callbacks"]
    (own,) = [value for key, value in state.items() if key.startswith("SingularLimitMonitor")]
    assert own["engine"]["windows"]["open"]["start"] == 8
    assert own["engine"]["windows"]["open"]["forecast"]["point"].shape == (323,)
    assert own["steps"]["lr"] == pytest.approx(4 * 0.2 + 4 * 0.1 + 4 * 0.05)


def test_a_checkpoint_of_a_run_without_the_monitor(tmp_path):
    """It begins where it is, as in a new run."""
    _, trainer = fit(seeded(Heavy), steps=8, batch_size=20)
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    monitor = watching()
    run(tmp_path / "new", monitor, noise="dropout", checkpoint=tmp_path / "plain.ckpt")
    assert min(monitor.history) == 8
    assert max(monitor.history) == STEPS
    assert reasons_of(monitor) == []


FOREIGN = {
    "of another edition": (
        lambda own: own.update(open=own.pop("engine"), clipped=own.pop("steps")),
        "missing: engine, steps; unknown: clipped, open",
    ),
    "no steps": (lambda own: own.pop("steps"), "missing: steps"),
    "part of the steps": (lambda own: own["steps"].pop("alpha"), "missing: alpha"),
    "steps that are none": (lambda own: own.update(steps=None), "AttributeError"),
    "no history": (lambda own: own["engine"].pop("history"), "missing: history"),
    "more": (lambda own: own["engine"].update(extra=1), "unknown: extra"),
    "another version": (lambda own: own["engine"].update(version=0), "version 5 was expected, got version 0"),
    "a window of another network": (
        lambda own: own["engine"]["windows"]["open"].update(iterate=torch.zeros(3)),
        "a window of 3 weights for 323 weights",
    ),
    "a window without a start": (lambda own: own["engine"]["windows"]["open"].pop("start"), "KeyError.*start"),
    "an unknown reason": (
        lambda own: own["engine"]["reasons"].append({"code": "NOBODY", "step": 0, "values": {}}),
        "KeyError.*NOBODY",
    ),
    "no generator": (lambda own: own["engine"].update(generator=torch.zeros(3)), "Error"),
    "part of the budget": (lambda own: own["engine"]["budget"].pop("spent"), "missing: spent"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_state_that_is_foreign_or_not_whole_is_a_reason(name, part, tmp_path, caplog):
    """The training goes on as it would, the monitor begins anew."""
    change, message = FOREIGN[name]
    checkpoint = torch.load(part, weights_only=True)
    (own,) = [value for key, value in checkpoint["callbacks"].items() if key.startswith("SingularLimitMonitor")]
    change(own)
    torch.save(checkpoint, tmp_path / "foreign.ckpt")
    monitor, plain, watched = monitor_of(max_overhead=0), Trace(), Trace()
    options = {"steps": 20, "batch_size": 20, "shuffle": False, "ckpt_path": tmp_path / "foreign.ckpt"}
    fit(seeded(Heavy), Reseed(), *NOISES["anti-correlated"](), plain, **options)
    with caplog.at_level("WARNING"):
        fit(seeded(Heavy), Reseed(), *NOISES["anti-correlated"](), monitor, watched, **options)
    assert_identical(plain, watched)
    (reason,) = reasons_of(monitor)
    assert reason.code is Code.STATE
    assert re.search(message, str(reason))
    assert caplog.text.count("the monitor's state in the checkpoint was not restored") == 1
    assert reason.sentence in monitor.verdict
    assert (min(monitor.history), max(monitor.history)) == (12, 20)
    assert monitor.history[20]["window/steps"] == 5
