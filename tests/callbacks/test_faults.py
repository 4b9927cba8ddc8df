"""Whatever a probe does may fail: the training goes on, and ends with the weights that it has without a monitor."""

import sys
import warnings
from pathlib import Path

import lightning as L
import pytest
import torch

import torch_singlim
from tests.callbacks.test_monitor import Net, Recorder, fit, seeded, weights
from torch_singlim import AntiCorrelated, InjectNoise, SingularLimitMonitor
from torch_singlim.measure.schedule import OpenWindow

PACKAGE = str(Path(torch_singlim.__file__).parent)


class Fault(RuntimeError):
    """Thrown on purpose."""


class Saboteur:
    """Watches the calls that a probe makes, or throws at one of them.

    A call is known by where it is made from, or by the function of ours that is entered.
    """

    def __init__(self):
        self.seen: dict[tuple[str, int], None] = {}
        self.target: tuple[str, int] | None = None

    def __call__(self, frame, event, arg):
        if event not in ("call", "c_call") or not frame.f_code.co_filename.startswith(PACKAGE):
            return
        site = (f"{frame.f_code.co_filename}:{frame.f_code.co_qualname}", frame.f_lineno)
        if self.target is None:
            self.seen.setdefault(site)
        elif site == self.target:
            self.target = None
            sys.setprofile(None)
            raise Fault(f"at {site}")


class Sabotaged(SingularLimitMonitor):
    """Watches what its probes call; or, given calls, has one more of them throw at every probe, after two clean ones."""

    def __init__(self, sites=None, **options):
        super().__init__(**options)
        self.saboteur, self.sites, self.hits = Saboteur(), sites, []
        self.forecast = None

    def _observe(self, trainer):
        if self.sites is not None and self.forecast is None:
            super()._observe(trainer)
            self.forecast = None if self._open is None else self._open.forecast
            return
        target = None if self.sites is None else next(self.sites, None)
        if target is not None:
            # a fault ends the window in progress: another one, so that this probe has something to compare
            start = trainer.global_step - self.window
            lengths = self._step_lengths - 0.4
            self._open = OpenWindow(start, self._drifting(trainer), None, lengths, 0, self.forecast)
        elif self.sites is not None:
            return super()._observe(trainer)
        if self.sites is not None:
            self.saboteur.target = target
        sys.setprofile(self.saboteur)
        try:
            super()._observe(trainer)
        finally:
            sys.setprofile(None)
            if target is not None:
                self.hits.append((target, self.saboteur.target is None))


class Watch(L.Callback):
    """Weights and random state after every step."""

    def __init__(self):
        self.states = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        gradients = [p.grad for p in pl_module.parameters()]
        noise = sum(g.double().sum().item() for g in gradients if g is not None)
        self.states.append((weights(pl_module), torch.get_rng_state(), pl_module.training, noise))

    def on_exception(self, trainer, pl_module, exception):
        self.on_train_batch_end(trainer, pl_module, None, None, 0)


OPTIONS = {"max_overhead": None, "every_n_steps": 2, "window": 2, "replicas": 2, "reference": True, "num_draws": 2}


def sabotaged_from_the_start(site, plain):
    """A run whose first probes fail there, once; whether it was thrown."""
    watch, monitor = Watch(), Sabotaged(**OPTIONS)
    monitor.saboteur.target = site
    fit(seeded(Net), InjectNoise(AntiCorrelated(0.01)), monitor, watch, steps=8)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(watch.states, plain.states, strict=False)), site
    return monitor.saboteur.target is None


class Interrupting(SingularLimitMonitor):
    """Ctrl-C in the middle of a probe."""

    def _look(self, trainer, w, step):
        if step == 4:
            torch.rand(7)
            raise KeyboardInterrupt
        return super()._look(trainer, w, step)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_interruption_in_a_probe_leaves_the_training_as_it_was():
    """Lightning ends the run as it ends any that is interrupted; weights and random state are those of its last step."""
    watch, plain = Watch(), Watch()
    with pytest.raises(SystemExit):
        fit(seeded(Net), InjectNoise(AntiCorrelated(0.01)), watch, Interrupting(**OPTIONS), steps=8)
    fit(seeded(Net), InjectNoise(AntiCorrelated(0.01)), plain, steps=8)
    left = watch.states.pop()
    assert len(watch.states) == 4
    for state in (watch.states[-1], left):
        assert all(torch.equal(a, b) for a, b in zip(state[:2], plain.states[3][:2], strict=True))
        assert state[2:] == plain.states[3][2:]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_fault_at_any_call_of_a_probe():
    scout = Sabotaged(**OPTIONS)
    fit(seeded(Net), InjectNoise(AntiCorrelated(0.01)), scout, steps=8)
    sites = list(scout.saboteur.seen)
    assert len(sites) > 300
    steps = 2 * len(sites) + 12
    plain = Watch()
    fit(seeded(Net), InjectNoise(AntiCorrelated(0.01)), plain, steps=steps)
    watch, monitor, recorder = Watch(), Sabotaged(iter(sites), **OPTIONS), Recorder()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        _, trainer = fit(seeded(Net), InjectNoise(AntiCorrelated(0.01)), monitor, watch, steps=steps, logger=recorder)
    assert trainer.global_step == steps
    hit = [site for site, thrown in monitor.hits if thrown]
    print(f"{len(sites)} calls, {len(hit)} faults thrown")
    # calls that only the first probes make
    rest = [site for site in sites if site not in hit]
    thrown = [site for site in rest if sabotaged_from_the_start(site, plain)]
    print(f"{len(rest)} in the first probes alone, {len(thrown)} faults thrown")
    assert set(thrown) | set(hit) == set(sites)
    for step, (a, b) in enumerate(zip(watch.states, plain.states, strict=True)):
        assert torch.equal(a[0], b[0]), (
            f"weights after step {step + 1}, the faults before it: {monitor.hits[: step // 2][-3:]}"
        )
        assert torch.equal(a[1], b[1]), f"random state after step {step + 1}"
        assert a[2:] == b[2:]
    failures = [str(w.message) for w in told if "failed and was left out" in str(w.message)]
    assert len(failures) == 1
    assert "training goes on" in failures[0]
    # the last probes were let alone, and see again
    assert monitor.last_window is not None
    assert monitor.verdict
