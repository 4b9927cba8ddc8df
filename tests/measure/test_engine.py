"""The engine on a training written out by hand: no Lightning anywhere, and this module passes where it is blocked."""

import copy
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from torch_singlim import CustomNoise, SGDSettings, Snapshot, ZeroLossProblem
from torch_singlim.measure import Budget, Code, Due, Engine, Need, Options, Schedule, Scope, StepSums, training_of

LR, STEPS, WINDOW = 0.1, 24, 8


def network(layers=()):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Dropout(0.2), *layers, nn.Linear(16, 2))


class Run:
    """Full-batch SGD under dropout, in float64, and snapshots of it."""

    def __init__(self, net=None, lr=LR):
        self.net, self.lr, self.step, self.lrs = (net or network()).double(), lr, 0, 0.0
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(5, 3, generator=generator, dtype=torch.float64)
        self.y = torch.randn(5, 2, generator=generator, dtype=torch.float64)
        self.problem = ZeroLossProblem(self.net, "mse", self.x, self.y)

    def train(self, steps=1):
        optimizer = torch.optim.SGD(self.net.parameters(), lr=self.lr)
        for _ in range(steps):
            optimizer.zero_grad()
            F.mse_loss(self.net(self.x), self.y).backward()
            optimizer.step()
            self.step, self.lrs = self.step + 1, self.lrs + self.lr

    def snapshot(self, **changes):
        sums = StepSums(lr=self.lrs, alpha=self.lrs, alpha_squared=self.lrs * self.lr)
        sgd = SGDSettings(lr=self.lr) if self.lr > 0 else None
        return replace(Snapshot(self.step, self.problem.weights(), sgd=sgd, sums=sums), **changes)

    def engine(self, *, noise=None, budget=None, options=None, every=WINDOW, reasons=(), problem=None):
        problem = problem or self.problem
        training = training_of(problem, given=noise, weight_decay=0.0, injected=None, reasons=reasons)
        return Engine(
            problem,
            training,
            options or Options(num_draws=8, replicas=1),
            Schedule.of_run(window=WINDOW, every_n_steps=every, total=STEPS),
            budget or Budget(None),
            torch.Generator().manual_seed(0),
        )

    def follow(self, engine, steps=STEPS):
        """Train, and measure whatever is due."""
        if not self.step:
            engine.measure(self.snapshot())
        for _ in range(steps):
            self.train()
            due = engine.due(self.step - 1, self.step)
            if due is Due.MEASUREMENT:
                engine.measure(self.snapshot())
            elif due is Due.MARK:
                engine.mark(self.snapshot())
            elif due is Due.EXCESS_LOSS:
                engine.measure_loss(self.snapshot())
        return engine


@pytest.mark.skipif("LIGHTNING_IS_BLOCKED" in os.environ, reason="this is that run")
def test_this_module_passes_where_lightning_is_blocked():
    code = (
        "import sys; sys.modules['lightning'] = sys.modules['pytorch_lightning'] = None; import pytest; "
        f"sys.exit(pytest.main(['-q', '-n0', '-p', 'no:cacheprovider', {__file__!r}]))"
    )
    environment = {**os.environ, "LIGHTNING_IS_BLOCKED": "1"}
    environment.pop("PYTEST_XDIST_WORKER", None)
    root = Path(__file__).parents[2]
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=root, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    assert " passed" in run.stdout


@pytest.fixture(scope="module")
def followed():
    run = Run()
    return run, run.follow(run.engine())


def test_everything_is_measured(followed):
    _, engine = followed
    assert [step for step, point in engine.history.items() if "distance/nearest" in point] == [0, 8, 16, 24]
    last = engine.history[STEPS]
    assert {"drift/cosine", "drift/ceiling", "noise/ratio", "limit/frozen_cosine", "potential_stderr"} <= last.keys()
    assert last["clock/slow_time"] == pytest.approx(STEPS * LR * 0.25)
    assert last["clock/time_scale"] == pytest.approx(1 / (LR * 0.25))
    assert not any(tag.startswith("singlim") for tag in last)
    assert all(math.isfinite(value) for point in engine.history.values() for value in point.values())
    assert "| 16-24 |" in engine.verdict()
    assert "Noise: order 1" in engine.verdict()
    assert engine.reasons == []


def test_a_measurement_changes_nothing():
    run, plain = Run(), Run()
    torch.manual_seed(5)
    plain.train(STEPS)
    after = torch.get_rng_state()
    torch.manual_seed(5)
    run.follow(run.engine())
    assert torch.equal(run.problem.weights(), plain.problem.weights())
    assert torch.equal(torch.get_rng_state(), after)
    assert all(module.training for module in run.net.modules())


def test_the_constructor_does_no_work():
    """Neither a pass through the network nor a random number."""
    run = Run()
    calls = []
    handle = run.net[0].register_forward_hook(lambda *args: calls.append(args))
    training = training_of(run.problem, given=None, weight_decay=0.0, injected=None)
    calls.clear()
    before = torch.get_rng_state()
    Engine(run.problem, training, Options(), Schedule.between([0, 5]), Budget(0.1), torch.Generator())
    handle.remove()
    assert calls == []
    assert torch.equal(torch.get_rng_state(), before)


def test_w_is_linearised_once_and_the_loss_evaluated_once(monkeypatch):
    """Counted by the passes through the network at w itself, of a measurement without prediction."""
    run = Run()
    engine = run.engine(reasons=(Code.MAXIMIZES(),))
    engine.measure(run.snapshot())  # the check of the derivatives evaluates the loss for itself, once
    run.train(3)
    seen = []
    original = type(run.problem).loss
    monkeypatch.setattr(type(run.problem), "loss", lambda self, w: seen.append(w) or original(self, w))
    from torch_singlim.measure import distance

    points = []
    linearize = distance.linearize
    monkeypatch.setattr(distance, "linearize", lambda problem, w: points.append(w) or linearize(problem, w))
    engine.measure(run.snapshot())
    assert len(seen) == 1
    assert len(points) == 1


def test_without_a_problem_the_motion_is_measured_all_the_same():
    run = Run()
    engine = run.follow(run.engine(problem=Code.NO_PROBLEM(why="no loss")))
    assert set(engine.history[STEPS]) == {"window/steps", "drift/measured", "cost/overhead"}
    assert engine.last_distance is None
    assert engine.last_window.displacement.norm() > 0
    assert engine.expects() == frozenset()
    assert "Unsupported: no loss." in engine.verdict()


def test_what_is_unsupported_comes_with_the_snapshot():
    """Also in the middle of a run: from there on nothing is predicted, and geometry still measured."""
    run = Run()
    engine = run.engine()
    run.follow(engine, steps=8)
    assert "drift/cosine" in engine.history[8]
    run.train(8)
    engine.measure(run.snapshot(reasons=(Code.RATIO_CHANGES(),)))
    assert "drift/cosine" not in engine.history[16]
    assert {"drift/measured", "distance/nearest"} <= engine.history[16].keys()
    assert engine.reasons == [Code.RATIO_CHANGES()]
    assert not engine.supports(Scope.DRIFT)
    assert engine.supports(Scope.GEOMETRY)


def test_clipped_windows_and_windows_that_did_not_move_are_invalidated():
    run = Run()
    engine = run.engine()
    engine.measure(run.snapshot())
    run.train(8)
    clipped = run.snapshot()
    engine.measure(replace(clipped, sums=replace(clipped.sums, clipped=3)))
    assert engine.reasons == [Code.CLIPPED(count=3, start=0, stop=8)]
    run.lr = 0.0
    run.train(8)
    still = run.snapshot()
    engine.measure(replace(still, sums=replace(still.sums, clipped=3), sgd=SGDSettings(lr=LR)))
    assert engine.reasons[1:] == [Code.NOT_MOVED(start=8, stop=16)]
    for step in (8, 16):
        assert "drift/cosine" not in engine.history[step]
        assert "drift/measured" in engine.history[step]


class Fused(nn.Module):
    """torch's fused layer normalisation, whose higher derivatives are wrong."""

    def forward(self, x):
        return F.layer_norm(x, (16,))


def test_wrong_derivatives_are_found_before_the_first_measurement():
    run = Run(network([Fused()]))
    engine = run.follow(run.engine())
    if not engine.reasons:
        pytest.skip("this torch differentiates F.layer_norm rightly")
    assert [reason.code for reason in engine.reasons] == [Code.DERIVATIVES]
    assert "differentiates this network wrongly" in engine.verdict()
    assert not any("distance/nearest" in point for point in engine.history.values())
    assert {"excess_loss", "drift/measured"} <= engine.history[STEPS].keys()


def custom(loss, w, x, y, eta):
    return loss(w + eta, x, y)


def test_the_order_of_a_custom_noise_is_measured_at_first_use():
    run = Run(nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 2)))
    engine = run.engine(noise=CustomNoise(custom, std=0.05))
    assert Need.MOVES not in engine.expects()
    run.follow(engine, steps=8)
    assert engine.noise.order == 1
    assert {Need.MOVES, Need.FLOW} <= engine.expects()
    assert "drift/cosine" in engine.history[8]


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        self.now += 1e-6
        return self.now


def test_a_budget_that_is_spent_skips_and_says_so():
    run = Run()
    clock = Clock()
    engine = run.engine(budget=Budget(0.0, clock=clock))
    run.follow(engine)
    assert {tag for point in engine.history.values() for tag in point} <= {
        *("excess_loss", "cost/overhead", "window/steps", "drift/measured"),
        *("clock/slow_time", "clock/time_scale", "clock/step_size", "clock/noise_level"),
    }
    assert "Skipped: to keep measurements below 0% of the wall time: the check of the derivatives" in engine.verdict()
    # time enough, and nothing is skipped
    clock.now = 1e9
    run.follow(run_engine := run.engine(budget=Budget(0.5, clock=clock)), steps=0)
    clock.now = 3e9
    run_engine.measure(run.snapshot())
    assert "distance/nearest" in run_engine.history[run.step]


def test_interrupted_and_resumed():
    run = Run()
    torch.manual_seed(3)
    engine = run.engine()
    run.follow(engine, steps=11)  # within a window
    state, net, random = copy.deepcopy(engine.state_dict()), copy.deepcopy(run.net), torch.get_rng_state()
    lrs = run.lrs
    run.follow(engine, steps=13)

    again = Run(net)
    again.step, again.lrs = 11, lrs
    resumed = again.engine()
    resumed.load_state_dict(state)
    torch.set_rng_state(random)
    again.follow(resumed, steps=13)
    assert torch.equal(again.problem.weights(), run.problem.weights())
    assert resumed.history.keys() == engine.history.keys()
    for step, point in engine.history.items():
        ours, theirs = ({t: v for t, v in p.items() if t != "cost/overhead"} for p in (point, resumed.history[step]))
        assert ours == theirs, step


def test_a_state_holds_tensors_and_plain_values(tmp_path):
    run = Run()
    engine = run.engine()
    run.follow(engine, steps=11)
    engine.note(Code.CLIPPED(count=1, start=0, stop=8))
    torch.save(engine.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    other = run.engine()
    other.load_state_dict(state)
    assert other.reasons == engine.reasons
    assert other.window.start == 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("window"), "missing: window"),
        (lambda s: s.update(extra=1), "unknown: extra"),
        (lambda s: s.update(version=0), "version 1 was expected, got version 0"),
        (lambda s: s["window"].update(iterate=torch.zeros(3)), r"a window of 3 weights for \d+ weights"),
    ],
)
def test_a_foreign_or_incomplete_state_is_refused_by_name(change, message):
    run = Run()
    engine = run.engine()
    run.follow(engine, steps=11)
    state = copy.deepcopy(engine.state_dict())
    change(state)
    other = run.engine()
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(state)
    assert other.history == {}
    assert other.window is None


def test_a_failed_measurement_gives_up_its_window_alone():
    run = Run()
    engine = run.engine()
    run.follow(engine, steps=4)
    engine.abandon(0)  # the window that began at this step goes on
    assert engine.window is not None
    engine.abandon(4)
    assert engine.window is None
    run.follow(engine, steps=4)
    assert "window/steps" not in engine.history[8]
    assert "distance/nearest" in engine.history[8]
