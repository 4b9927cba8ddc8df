"""Whatever a measurement does may fail: the training goes on, and ends with the weights that it has without a monitor."""

import itertools
import sys
from dataclasses import replace
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger

import torch_singlim
from tests.zoo import Net, Recorder, Trace, assert_identical, data, fit, identical, monitor_of, seeded
from torch_singlim import AntiCorrelated, InjectNoise, SingularLimitMonitor
from torch_singlim.callbacks import isolation
from torch_singlim.measure import Code, StepSums

PACKAGE = str(Path(torch_singlim.__file__).parent)
FEW, LR = data(n=6), 0.2

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


class Fault(RuntimeError):
    """Thrown on purpose."""


class Saboteur:
    """In the place of `isolation.attempt`: watches the calls made of what is attempted, or throws at one of them.

    A call is known by what is attempted (a measurement, a mark, figures, ...) and by where it is made from, or by the
    function of ours that is entered.
    """

    def __init__(self):
        self.seen: dict[tuple[str, int, str, int], int] = {}  # call -> the last step at which it was made
        self.step = 0
        self.targets: dict[tuple[str, int], tuple[str, int, str, int]] = {}  # what is attempted -> call
        self.watching = True

    @property
    def target(self):
        """A call that is still to throw."""
        return next(iter(self.targets.values()), None)

    @target.setter
    def target(self, site):
        self.targets = {} if site is None else {site[:2]: site}

    def attempt(self, what, **options):
        def attempted():
            if self.watching or self.what in self.targets:
                sys.setprofile(self.profile)
            try:
                what()
            finally:
                sys.setprofile(None)

        self.what = (what.__qualname__, what.__code__.co_firstlineno)
        return isolation.attempt(attempted, **options)

    def profile(self, frame, event, arg):
        if event not in ("call", "c_call") or not frame.f_code.co_filename.startswith(PACKAGE):
            return
        site = (*self.what, f"{frame.f_code.co_filename}:{frame.f_code.co_qualname}", frame.f_lineno)
        if self.watching:
            self.seen[site] = self.step
        elif site == self.targets.get(self.what):
            del self.targets[self.what]
            sys.setprofile(None)
            raise Fault(f"at {site}")


@pytest.fixture
def saboteur(monkeypatch):
    found = Saboteur()
    monkeypatch.setattr("torch_singlim.callbacks.attempts.attempt", found.attempt)
    return found


def trained(*callbacks, steps=8, logger=False):
    """All that could have been disturbed in a short training under dropout and transient noise."""
    trace, net = Trace(), seeded(lambda: Net(hidden=8, lr=LR))
    fit(net, InjectNoise(AntiCorrelated(0.01)), *callbacks, trace, steps=steps, dataset=FEW, logger=logger)
    return trace


def monitored(folder, *callbacks, steps=8, board=True):
    """The same under a monitor with everything on, and the monitor."""
    monitor = monitor_of(every_n_steps=2, window=2)
    loggers = [Recorder(), *([TensorBoardLogger(folder)] if board else [])]
    return monitor, trained(monitor, *callbacks, steps=steps, logger=loggers)


def test_an_interruption_of_a_measurement_leaves_the_training_as_it_was():
    """Lightning ends the run as it ends any that is interrupted; weights and random state are those of its last step."""
    monitor, watched = monitor_of(every_n_steps=2, window=2), Trace()

    class Interrupt(L.Callback):
        """Ctrl-C in the middle of the third measurement."""

        def on_train_start(self, trainer, pl_module):
            measure = monitor.engine.measure

            def interrupted(snapshot, **options):
                measured = measure(snapshot, **options)
                if snapshot.step == 4:
                    torch.rand(7)
                    raise KeyboardInterrupt
                return measured

            monitor.engine.measure = interrupted

    with pytest.raises(SystemExit):
        trained(watched, monitor, Interrupt())
    plain = trained()
    *states, left = watched.states
    assert len(states) == 4
    for state in (states[-1], left):
        assert all(identical(state[key], plain.states[3][key]) for key in state)


class Watching(L.Callback):
    """Tells the saboteur which step is made."""

    def __init__(self, saboteur):
        self.saboteur = saboteur

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.saboteur.step = trainer.global_step + 1


@pytest.fixture
def calls(saboteur, tmp_path):
    """Of a training with everything on: those that its last window makes again, and all others."""
    monitored(tmp_path, Watching(saboteur))
    saboteur.watching = False
    again = [
        site
        for site, step in saboteur.seen.items()
        if step > 6
        and any(part in site[0] for part in ("locals>.measure", "on_train_batch_end", "_advance", "_open_paths"))
    ]
    return again, [site for site in saboteur.seen if site not in again]


class Arming(L.Callback):
    """Has one more call throw in each window that follows, after clean ones.

    A fault ends the window in progress: another one is put in its place, so that there is one to be ended.
    """

    def __init__(self, saboteur, sites):
        self.saboteur, self.sites, self.armed, self.hit = saboteur, iter(sites), None, []
        self.window = None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        (engine,) = [each.engine for each in trainer.callbacks if isinstance(each, SingularLimitMonitor)]
        step = trainer.global_step
        if step % 2 == 0 and step >= 4:
            windows = engine.windows
            self.window = self.window or replace(windows.open, followed=None, last=None, closed=True)
            if windows.open is None:
                sums = StepSums(lr=LR * step, alpha=LR * step, alpha_squared=LR**2 * step)
                windows.open = replace(self.window, start=step, stop=step + 2, sums=sums)
            self._disarm()
            self.armed = self.saboteur.target = next(self.sites, None)

    def _disarm(self):
        if self.armed is not None and self.saboteur.target is None:
            self.hit.append(self.armed)
        self.armed = self.saboteur.target = None

    def on_train_end(self, trainer, pl_module):
        self._disarm()


def thrown_alone(saboteur, site, folder, plain, *, shortest):
    """A fault at one call, in a training of its own, which it does not change."""
    saboteur.target = site
    for options in (shortest, {}):
        _, watched = monitored(folder, **options)
        states = zip(watched.states[:-1], plain.states, strict=False)
        assert all(identical(state[key], other[key]) for state, other in states for key in state), site
        if saboteur.target is None:
            return
    raise AssertionError(f"never made: {site}")


@pytest.mark.slow
def test_a_fault_at_any_call_of_a_measurement(saboteur, calls, tmp_path, caplog):
    """One after another, in one training. Every sixth of them, which takes some minutes; thirty windows are let alone."""
    again = calls[0][::6]
    assert len(again) > 150
    steps = 2 * len(again) + 60
    plain, arming = trained(steps=steps), Arming(saboteur, again)
    with caplog.at_level("WARNING"):
        monitor, watched = monitored(tmp_path, arming, steps=steps)
    assert_identical(plain, watched)
    assert len(arming.hit) >= 0.95 * len(again)
    codes = [reason.code for reason in monitor.reasons]
    assert codes.count(Code.FAILED) == 1
    assert set(codes) <= {Code.FAILED, Code.EXPANSION_FAILS, Code.UNRESOLVED, Code.NEAREST}
    assert caplog.text.count("failed: Fault") == 1
    # the last measurements were let alone, and see again; a window of two steps may not resolve its noise
    assert monitor.last_window.stop == steps
    assert {"drift/measured", "window/replay_error"} <= monitor.history[steps].keys()
    assert any("drift/cosine" in scalars for step, scalars in monitor.history.items() if step > steps - 50)
    assert "cosine" in monitor.verdict
    # some depend on the weights
    for site in set(again) - set(arming.hit):
        thrown_alone(saboteur, site, tmp_path, plain, shortest={"board": False})
    print(f"{len(again)} calls, {len(arming.hit)} of them in one training")


@pytest.mark.slow
def test_a_fault_at_any_other_call(saboteur, calls, tmp_path):
    """That only the first measurements make, charts and figures, the verdict: one of each kind in every training.

    Every sixth of them, which takes a minute or two.
    """
    again, others = calls[0], calls[1][::6]
    kinds: dict[tuple[str, int], list] = {}
    for site in others:
        kinds.setdefault(site[:2], []).append(site)
    plain, left = trained(), []
    for sites in itertools.zip_longest(*kinds.values()):
        saboteur.targets = {site[:2]: site for site in sites if site is not None}
        _, watched = monitored(tmp_path)
        assert_identical(plain, watched)
        # a fault may keep others from being made
        left += saboteur.targets.values()
    for site in left:
        thrown_alone(saboteur, site, tmp_path, plain, shortest={"board": "locals>.measure" not in site[0]})
    print(f"{len(others)} calls, {len(left)} of them alone, and {len(again)} in one training")
