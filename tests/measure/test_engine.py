"""The engine on a training written out by hand: no Lightning anywhere, and this module passes where it is blocked."""

import copy
import math
import os
import pathlib
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.problems import Bent
from torch_singlim import CustomNoise, SGDSettings, Snapshot, ZeroLossProblem
from torch_singlim.geometry import LevelPoint
from torch_singlim.measure import (
    Budget,
    Code,
    Due,
    Engine,
    Model,
    Options,
    Schedule,
    Scope,
    StepSums,
    tags,
    training_of,
)
from torch_singlim.measure.paths import CoupledPaths, LossGradient, Path
from torch_singlim.measure.schedule import marks_of
from torch_singlim.measure.steps import Before, Recorded, Step, flat

LR, STEPS, WINDOW = 0.1, 24, 8


def network(layers=()):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Dropout(0.2), *layers, nn.Linear(16, 2))


def mse(net, batch):
    x, y = batch
    return F.mse_loss(net(x), y)


class Run:
    """SGD under dropout on batches of all samples, in float64: its snapshots, its steps, copies of it."""

    def __init__(self, net=None, lr=LR):
        self.net, self.lr, self.step, self.lrs = (net or network()).double(), lr, 0, 0.0
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(5, 3, generator=generator, dtype=torch.float64)
        y = torch.randn(5, 2, generator=generator, dtype=torch.float64)
        self.batch = x, y
        self.problem = ZeroLossProblem(self.net, "mse", x, y)
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=lr)
        self.last = self.weights()
        self.recorded = []

    def weights(self):
        return flat(list(self.net.parameters()))

    def train(self, steps=1, *, keep=False, habit=None):
        """Steps of the run; the last one is returned as recorded.

        Args:
            steps: how many.
            keep: whether the state before them is kept.
            habit: what the run does besides, between backward and step: a function of the network.
        """
        recorded = None
        for _ in range(steps):
            moved = (self.weights() - self.last).norm().item()
            before = Before.of(self.net, self.optimizer) if keep else None
            self.optimizer.param_groups[0]["lr"] = self.lr
            self.optimizer.zero_grad()
            mse(self.net, self.batch).backward()
            step = Step.of(self.net, self.optimizer, [self.batch])
            if habit is not None:
                habit(self.net)
            start = self.weights()
            self.optimizer.step()
            self.step, self.lrs, self.last = self.step + 1, self.lrs + self.lr, self.weights()
            length = (self.last - start).norm().item()
            same = all(p.requires_grad for p in self.net.parameters())
            recorded = Recorded(step, before, self.last, self.last, length, moved, same)
        return recorded

    def snapshot(self, **changes):
        sums = StepSums(lr=self.lrs, alpha=self.lrs, alpha_squared=self.lrs * self.lr)
        sgd = SGDSettings(lr=self.lr) if self.lr > 0 else None
        return replace(Snapshot(self.step, self.problem.weights(), sgd=sgd, sums=sums), **changes)

    def engine(self, *, noise=None, budget=None, options=None, every=WINDOW, reasons=(), problem=None, **schedule):
        problem = problem or self.problem
        training = training_of(problem, given=noise, weight_decay=0.0, injected=None, reasons=reasons)
        return Engine(
            problem,
            training,
            options or Options(num_draws=4, replicas=1, draws=16),
            Schedule.of_run(**{"window": WINDOW, "every_n_steps": every, "total": STEPS} | schedule),
            budget or Budget(None),
            torch.Generator().manual_seed(0),
        )

    def open_paths(self, engine, seconds_per_step=None):
        """Open paths if it is time, as a callback does."""
        stop = engine.opens(self.step, seconds_per_step)
        if stop is None:
            return
        paths = CoupledPaths(
            self.path,
            LossGradient(mse),
            draws=engine.options.draws,
            replicas=engine.options.replicas,
            generator=engine.generator,
        )
        engine.windows.follow(paths, self.path(), self.step, stop)

    def path(self):
        return Path(self.net, self.optimizer)

    def measure(self, engine, **changes):
        engine.measure(self.snapshot(**changes))
        self.open_paths(engine)

    def follow(self, engine, steps=STEPS, *, habit=None, paths=True):
        """Train, and measure whatever is due; `habit` as in `train`, `paths`: whether some are opened."""
        measure = self.measure if paths else lambda engine: engine.measure(self.snapshot())
        if not self.step:
            measure(engine)
        for _ in range(steps):
            recorded = self.train(keep=engine.windows.replays(self.step + 1), habit=habit)
            if engine.windows.followed is not None:
                engine.advance(self.step, recorded)
            due = engine.due(self.step - 1, self.step)
            if due is Due.MEASUREMENT:
                measure(engine)
            elif due is Due.EXCESS_LOSS:
                engine.measure_loss(self.snapshot())
        return engine


@pytest.mark.skipif("LIGHTNING_IS_BLOCKED" in os.environ, reason="this is that run")
def test_this_module_passes_where_lightning_is_blocked():
    """The tests of a whole training, of an order that is measured, and of states."""
    chosen = "everything or logged or custom or plain_values"
    code = (
        "import sys; sys.modules['lightning'] = sys.modules['pytorch_lightning'] = None; import pytest; "
        f"sys.exit(pytest.main(['-q', '-n0', '-p', 'no:cacheprovider', '-k', {chosen!r}, {__file__!r}]))"
    )
    environment = {**os.environ, "LIGHTNING_IS_BLOCKED": "1"}
    environment.pop("PYTEST_XDIST_WORKER", None)
    root = pathlib.Path(__file__).parents[2]
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=root, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    assert "5 passed" in run.stdout


@pytest.fixture(scope="module")
def followed():
    run = Run()
    return run, run.follow(run.engine(options=Options(num_draws=4, replicas=1, draws=128)))


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


# at each logged step with paths; where the averaged paths are resolved; where the noise-induced drift is
ALWAYS = {"drift/measured", "drift/ceiling", "drift/baseline_cosine", "distance/baseline_moved", "cost/gradients"}
ALWAYS |= {"window/steps", "window/status", "window/replay_error"}
ALONG = ALWAYS | {"drift/predicted", "drift/cosine", "drift/cosine_stderr", "drift/speed", "drift/residual"}
INDUCED = {"noise/measured", "noise/predicted", "noise/cosine", "noise/ratio", "noise/ratio_stderr", "noise/share"}


def test_a_window_is_logged_as_it_goes(followed):
    """Each of up to 20 steps of it, with the values since its beginning."""
    _, engine = followed
    for start in (0, 8, 16):
        for step in range(start + 1, start + 9):
            point = engine.history[step]
            assert point.keys() >= ALWAYS, step
            assert point["window/steps"] == step - start
            assert point["window/status"] == 1
            assert point["window/replay_error"] < 1e-12
            assert point["cost/gradients"] == (step - start) * (128 + 1 + 1)
        assert engine.history[start + 8].keys() >= ALONG
    assert engine.history[8].keys() >= INDUCED
    assert tags.windows(engine.history) == {start: list(range(start + 1, start + 9)) for start in (0, 8, 16)}


def test_a_longer_window_is_logged_at_twenty_steps_as_it_moves():
    """Against paths advanced by hand: baseline and displacement of the run."""
    run = Run()
    engine = run.engine(window=STEPS, every=None, problem=Code.NO_PROBLEM(why="no loss"))
    bare, start, there = copy.deepcopy(run.net), run.weights(), {0: run.weights()}
    run.measure(engine)
    for step in range(1, STEPS + 1):
        run.follow(engine, 1)
        there[step] = run.weights()
    logged = [step for step in range(1, STEPS + 1) if "window/steps" in engine.history.get(step, {})]
    assert logged == sorted(marks_of(0, STEPS))
    assert len(logged) == 20
    bare.eval()
    optimizer = torch.optim.SGD(bare.parameters(), lr=LR)
    for step in range(1, STEPS + 1):
        optimizer.zero_grad()
        mse(bare, run.batch).backward()
        optimizer.step()
        if step in logged:
            moved, baseline = there[step] - start, flat(list(bare.parameters())) - start
            point = engine.history[step]
            assert point["drift/measured"] == pytest.approx(moved.norm().item())
            assert point["distance/baseline_moved"] == pytest.approx(baseline.norm().item())
            induced = (moved - baseline).norm().item()
            assert point.get("noise/measured", induced) == pytest.approx(induced)  # if it is resolved
            cosine = torch.cosine_similarity(moved, baseline, dim=0).item()
            assert point["drift/baseline_cosine"] == pytest.approx(cosine)
    assert "drift/cosine" in point
    window = engine.windows.last
    assert torch.equal(window.displacement, there[STEPS] - start)
    prediction = window.drift.prediction
    assert prediction.stderr == window.coupled.sampling_error == engine.history[STEPS]["quality/stderr"]
    assert window.comparisons[Model.BASELINE].prediction.displacement.norm().item() == pytest.approx(
        baseline.norm().item()
    )


def noted(engine):
    """All reasons, but for noise-induced drifts that a few draws do not resolve."""
    return [reason for reason in engine.reasons if reason.code is not Code.UNRESOLVED]


def test_without_noise_nothing_is_resolved_and_the_verdict_says_so():
    run = Run(nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 2)))
    engine = run.follow(run.engine(problem=Code.NO_PROBLEM(why="no loss")), steps=8)
    assert engine.history[8]["drift/cosine"] == pytest.approx(1)
    assert not INDUCED & engine.history[8].keys()
    assert "in the window 0-8 is smaller than the sampling error" in engine.verdict()


# --- paths that do not follow the training -------------------------------------------------------------------------


def perturb(net):
    """Gradient noise from a hook: a source of random numbers that no copy can know."""
    generator = torch.Generator().manual_seed(int(1e6 * net[0].weight.sum().item()) % 2**31)
    for p in net.parameters():
        p.grad += 0.01 * torch.randn(p.shape, generator=generator, dtype=p.dtype)


def project(run):
    """The weights are scaled to a fixed norm, outside the optimizer."""
    with torch.no_grad():
        for p in run.net.parameters():
            p.mul_(0.99)


def freeze(run):
    run.net[0].requires_grad_(False)


@pytest.mark.parametrize(
    ("change", "habit", "code", "words"),
    [
        (None, perturb, Code.REPLAY, "step 4, repeated on a copy"),
        (project, None, Code.WEIGHTS_MOVED, "after step 3 something other than the optimizer moved the weights"),
        (freeze, None, Code.PARAMETERS_CHANGED, "at step 4, within the window from step 0"),
    ],
)
def test_a_window_that_paths_do_not_follow_ends_with_a_reason(change, habit, code, words):
    """What was logged until then stays; the motion is measured at the end, and the next window is followed again."""
    run = Run()
    engine = run.engine(reasons=(Code.MAXIMIZES(),))
    run.follow(engine, steps=3)
    if change is not None:
        change(run)
    run.follow(engine, steps=1, habit=habit)
    run.net.requires_grad_(True)
    run.follow(engine, steps=4)
    (reason,) = noted(engine)[1:]
    assert reason.code is code
    assert words in str(reason)
    assert reason.sentence in engine.verdict()
    assert engine.history[3].keys() >= ALWAYS
    assert not any("drift/measured" in engine.history.get(step, {}) for step in (4, 5, 6, 7))
    end = engine.history[8]
    assert (end["window/steps"], end["window/status"]) == (8, 0)
    assert ALONG & end.keys() == {"drift/measured", "window/steps", "window/status"}
    assert engine.windows.last.displacement.norm().item() == pytest.approx(end["drift/measured"])
    run.follow(engine, steps=8)
    assert engine.history[16].keys() >= ALWAYS
    assert len(noted(engine)) == 2


@pytest.mark.filterwarnings("ignore:.*not over-parameterised")
def test_small_errors_that_may_add_up_end_a_window():
    """A run that swings to and fro: each step is repeated to half a thousandth, and together they move next to nothing."""
    run = Run(nn.Sequential(nn.Linear(3, 2, bias=False)), lr=0.0)
    x, _ = run.batch
    run.lr = 1.999 / torch.linalg.eigvalsh(x.T @ x / 5).max().item()  # of F.mse_loss with two outputs: its Hessian
    engine = run.engine(problem=Code.NO_PROBLEM(why="no loss"))
    with torch.no_grad():  # along the stiffest direction from the least squares solution
        solution = torch.linalg.lstsq(x, run.batch[1]).solution.T
        run.net[0].weight.copy_(solution + torch.linalg.eigh(x.T @ x).eigenvectors[:, -1])
    run.last = run.weights()

    def stretch(net):
        net[0].weight.grad *= 1 + 5e-4

    run.follow(engine, steps=8, habit=stretch)
    assert engine.history[1]["window/replay_error"] == pytest.approx(5e-4, rel=0.01)
    assert [reason.code for reason in noted(engine)[1:]] == [Code.REPLAY]
    assert noted(engine)[1].step == 2


def test_a_path_that_diverges_ends_its_window():
    run = Run()
    engine = run.engine(reasons=(Code.MAXIMIZES(),))
    run.follow(engine, steps=3)
    with torch.no_grad():
        engine.windows.followed.paths.averaged[0].parameters[0].fill_(math.inf)
    run.follow(engine, steps=5)
    assert noted(engine)[1:] == [Code.DIVERGED(start=0, stop=4)]
    assert engine.history[8]["window/status"] == 0


def test_paths_that_are_given_up_leave_the_motion():
    run = Run()
    engine = run.engine(problem=Code.NO_PROBLEM(why="no loss"))
    run.follow(engine, steps=3)
    engine.give_up(Code.MEMORY(step=3, needed=2.0, free=1.0))
    run.follow(engine, steps=5)
    assert engine.reasons[-1].code is Code.MEMORY
    assert engine.history[8]["window/status"] == 0
    # a reason for the whole run: no paths are opened any more
    engine.note(Code.SEVERAL_CALLS(count=2))
    assert engine.opens(8, None) is None
    assert not engine.supports(Scope.PATHS)


# --- isolation, cost -----------------------------------------------------------------------------------------------


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
    from torch_singlim.measure import distance, levels

    searched = []
    monkeypatch.setattr(
        levels,
        "level_distance",
        lambda problem, w, level, **_: searched.append(level) or LevelPoint(w, 1, level, 0, 1, 1, True),
    )
    points = []
    linearize = distance.linearize
    monkeypatch.setattr(distance, "linearize", lambda problem, w: points.append(w) or linearize(problem, w))
    engine.measure(run.snapshot())
    assert len(seen) == 1
    assert len(points) == 1
    assert searched == [0.5, 0.1, 0.01]


def test_a_search_that_ran_out_of_time_is_skipped_and_goes_on_from_where_it_was(monkeypatch):
    """Not a reason: there is time for the rest of it later. Before the first step low levels are not looked for."""
    from torch_singlim.measure import levels

    run = Run()
    engine = run.engine(budget=Budget(0.1))
    monkeypatch.setattr(engine.budget, "cost", lambda kind: 0.01 if kind == "gradient" else 0.0)
    monkeypatch.setattr(engine.budget, "left", lambda account: 1.0)
    searched = []

    def search(problem, w, level, *, start, max_gradients):
        searched.append((level, start, max_gradients))
        v = 0.9 * w
        return LevelPoint(v, 1.0, level, 0.0, 1.0, 1.0, certified=level == 0.5)

    monkeypatch.setattr(levels, "level_distance", search)
    engine.measure(run.snapshot())
    assert [level for level, *_ in searched] == [0.5]
    run.train(3)
    searched.clear()
    engine.measure(run.snapshot())
    assert [(level, round(most)) for level, _, most in searched] == [(0.5, 100), (0.1, 90), (0.01, 90)]
    assert {"tenth", "hundredth"} <= engine.budget.skipped.keys()
    assert not any(reason.code is Code.LEVEL_NOT_MET for reason in engine.reasons)
    run.train(3)
    w = engine.geometry.levels.points[levels.Level.TENTH]
    searched.clear()
    engine.measure(run.snapshot())
    assert torch.equal(searched[1][1], w)


def test_without_a_problem_the_motion_is_measured_all_the_same():
    run = Run()
    engine = run.follow(run.engine(problem=Code.NO_PROBLEM(why="no loss")))
    assert engine.history[STEPS].keys() >= ALWAYS
    assert not any(tag.startswith(("limit/", "clock/")) or tag == "excess_loss" for tag in engine.history[STEPS])
    assert engine.last_distance is None
    assert engine.windows.last.displacement.norm() > 0
    assert engine.supports(Scope.PATHS)
    assert "Unsupported: no loss." in engine.verdict()


def test_without_a_problem_and_without_paths_the_motion_is_measured_all_the_same():
    run = Run()
    reasons = (Code.MANUAL_OPTIMIZATION(),)
    engine = run.follow(run.engine(problem=Code.NO_PROBLEM(why="no loss"), reasons=reasons))
    assert set(engine.history[STEPS]) == {"window/steps", "window/status", "drift/measured", "cost/overhead"}
    assert engine.history[STEPS]["window/status"] == 0
    assert engine.windows.last.displacement.norm() > 0
    assert not engine.supports(Scope.PATHS)


def test_between_checkpoints_the_model_is_full_batch():
    run = Run()
    engine = run.engine()
    engine.full_batch = True
    engine.measure(run.snapshot())
    run.train(8)
    engine.measure(run.snapshot())
    window = engine.windows.last
    assert window.comparisons.keys() == {Model.BASELINE, Model.FULL_BATCH, Model.FROZEN_LIMIT}
    assert window.drift is window.comparisons[Model.FULL_BATCH]
    point = engine.history[8]
    assert {"drift/cosine", "drift/ceiling", "drift/baseline_cosine", "noise/ratio", "quality/error"} <= point.keys()
    assert point["window/status"] == 1
    assert not {"window/replay_error", "distance/baseline_moved"} & point.keys()
    assert engine.budget.skipped == {}


def test_what_is_unsupported_comes_with_the_snapshot():
    """Also in the middle of a run: from there on the limit is not predicted; geometry and paths go on."""
    run = Run()
    engine = run.engine()
    run.follow(engine, steps=15)
    assert "limit/frozen_cosine" in engine.history[8]
    engine.advance(16, run.train(keep=True))
    run.measure(engine, reasons=(Code.RATIO_CHANGES(),))
    assert "limit/frozen_cosine" not in engine.history[16]
    assert {"drift/cosine", "distance/nearest"} <= engine.history[16].keys()
    assert noted(engine) == [Code.RATIO_CHANGES()]
    assert not engine.supports(Scope.LIMIT)
    assert engine.supports(Scope.GEOMETRY)
    assert engine.supports(Scope.PATHS)


def test_the_limit_is_not_compared_with_windows_that_were_clipped_or_did_not_move():
    run = Run()
    engine = run.engine(reasons=(Code.NO_BATCHES(),))
    engine.measure(run.snapshot())
    run.train(8)
    clipped = run.snapshot()
    engine.measure(replace(clipped, sums=replace(clipped.sums, clipped=3)))
    assert engine.reasons[1:] == [Code.CLIPPED(count=3, start=0, stop=8)]
    run.lr = 0.0
    run.train(8)
    still = run.snapshot()
    engine.measure(replace(still, sums=replace(still.sums, clipped=3), sgd=SGDSettings(lr=LR)))
    assert engine.reasons[2:] == [Code.NOT_MOVED(start=8, stop=16)]
    for step in (8, 16):
        assert "limit/frozen_cosine" not in engine.history[step]
        assert "drift/measured" in engine.history[step]


def test_steps_that_do_not_move_are_not_judged():
    """Neither replayed nor logged: there is nothing to compare."""
    run = Run(lr=0.0)
    engine = run.follow(run.engine(problem=Code.NO_PROBLEM(why="no loss")), steps=8)
    assert not any("drift/cosine" in point for point in engine.history.values())
    assert engine.history[8]["drift/measured"] == 0
    assert engine.history[8]["window/status"] == 0
    assert engine.reasons[1:] == [Code.NOT_MOVED(start=0, stop=8)]


def test_wrong_derivatives_are_found_before_the_first_measurement():
    run = Run(network([Bent()]))
    engine = run.follow(run.engine())
    assert {reason.code for reason in engine.reasons} - {Code.UNRESOLVED} == {Code.DERIVATIVES}
    assert "differentiates this network wrongly" in engine.verdict()
    assert not any("distance/nearest" in point for point in engine.history.values())
    assert {"excess_loss", "drift/measured"} <= engine.history[STEPS].keys()


def custom(loss, w, x, y, eta):
    return loss(w + eta, x, y)


def test_the_order_of_a_custom_noise_is_measured_at_first_use():
    run = Run(nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 2)))
    engine = run.engine(noise=CustomNoise(custom, std=0.05))
    run.follow(engine, steps=8)
    assert engine.noise.order == 1
    assert "limit/frozen_cosine" in engine.history[8]


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        self.now += 1e-6
        return self.now


def test_without_any_time_the_excess_loss_alone_is_measured():
    run = Run()
    engine = run.follow(run.engine(budget=Budget(0.0, clock=Clock())))
    assert {tag for point in engine.history.values() for tag in point} <= {
        *("excess_loss", "cost/overhead", "window/steps", "window/status", "drift/measured"),
        *("clock/slow_time", "clock/time_scale", "clock/step_size", "clock/noise_level"),
    }
    assert "excess_loss" in engine.history[STEPS]
    assert "with max_overhead=0, all but the excess loss" in engine.verdict()


def test_what_there_was_no_time_for_is_measured_once_there_is():
    run, clock = Run(), Clock()
    engine = run.engine(budget=Budget(0.5, clock=clock))
    with engine.budget.timed("loss"), engine.budget.timed("check"):  # they take long
        clock.now += 100.0
    engine.measure(run.snapshot())
    assert not {"excess_loss", "distance/nearest"} & engine.history[0].keys()
    assert engine.budget.skipped == {"loss": 1, "check": 1}
    clock.now = 1e9
    run.train()
    engine.measure(run.snapshot())
    assert {"excess_loss", "distance/nearest"} <= engine.history[1].keys()


def test_all_but_the_last_distance_may_take_half_of_the_time_that_is_left():
    run, clock = Run(), Clock()
    engine = run.engine(budget=Budget(0.5, clock=clock))
    engine.measure(run.snapshot())
    for step, measured in ((8, False), (16, True)):
        run.train(8)
        with engine.budget.timed("limit"), engine.budget.timed("distance"):  # 7.5 seconds are left
            clock.now += 5.0
        clock.now -= 5.0
        engine.measure(run.snapshot())
        assert ("distance/nearest" in engine.history[step]) is measured, step


def test_paths_are_opened_within_a_window_when_there_is_time():
    """A window of automatic length waits, and becomes shorter; its values are those of the steps on paths."""
    run, clock = Run(), Clock()
    why = Code.NO_PROBLEM(why="no loss")
    engine = run.engine(budget=Budget(0.5, clock=clock), window="auto", every=None, total=400, problem=why)
    assert engine.schedule.windows[0] == 100
    engine.measure(run.snapshot())
    run.open_paths(engine, seconds_per_step=0.1)  # an eighth of 15 seconds is not enough for 50 steps
    assert engine.windows.followed is None
    run.follow(engine, steps=20)
    start, clock.now = run.weights(), 52.0
    run.open_paths(engine, seconds_per_step=0.1)  # an eighth of 15 + 26 seconds
    assert (engine.windows.followed.start, engine.windows.open.stop) == (20, 71)
    run.follow(engine, steps=51)
    point = engine.history[71]
    assert point.keys() >= ALWAYS
    assert (point["window/steps"], point["window/status"]) == (51, 1)
    assert point["drift/measured"] == pytest.approx((run.weights() - start).norm().item())
    assert engine.windows.open is None
    assert len(tags.windows(engine.history)[20]) == 20
    assert engine.budget.skipped == {}


# --- resuming ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("every", "paths"), [(12, True), (WINDOW, False)])
def test_interrupted_and_resumed(every, paths):
    """To the last bit: between windows, so that the paths of later ones draw the same; and in one without paths."""
    run = Run()
    torch.manual_seed(3)
    engine = run.engine(every=every)
    run.follow(engine, steps=11, paths=paths)
    assert (engine.windows.open is None) == paths
    again, state, random = copy.deepcopy(run), copy.deepcopy(engine.state_dict()), torch.get_rng_state()
    run.follow(engine, steps=13, paths=paths)

    resumed = again.engine(every=every)
    resumed.load_state_dict(state)
    torch.set_rng_state(random)
    again.follow(resumed, steps=13, paths=paths)
    assert torch.equal(again.weights(), run.weights())
    assert resumed.reasons == engine.reasons
    assert resumed.history.keys() == engine.history.keys()
    assert any("drift/cosine" in point for point in engine.history.values()) == paths
    for step, point in engine.history.items():
        ours, theirs = ({t: v for t, v in p.items() if t != "cost/overhead"} for p in (point, resumed.history[step]))
        assert ours == theirs, step
    if paths:
        assert resumed.windows.noise_ratio == engine.windows.noise_ratio


def test_a_window_that_was_interrupted_has_its_motion_and_the_reason(tmp_path):
    """Paths are not stored. The next window has them again, and the noise ratio pools all windows with paths."""
    run = Run()
    engine = run.engine(reasons=(Code.MAXIMIZES(),))
    run.follow(engine, steps=11)
    torch.save(engine.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    again = copy.deepcopy(run)
    resumed = again.engine(reasons=(Code.MAXIMIZES(),))
    resumed.load_state_dict(state)
    assert noted(resumed) == [Code.MAXIMIZES(), Code.INTERRUPTED(start=8)]
    assert (resumed.windows.open.start, resumed.windows.open.stop) == (8, 16)
    assert resumed.windows.followed is None
    assert resumed.opens(11, None) is None
    start = resumed.windows.open.iterate
    again.follow(resumed, steps=5)
    point = resumed.history[16]
    assert point["drift/measured"] == pytest.approx((again.weights() - start).norm().item())
    assert (point["window/steps"], point["window/status"]) == (8, 0)
    again.follow(resumed, steps=8)
    assert resumed.history[24].keys() >= ALWAYS
    assert list(resumed.windows.projections) == [0, 8, 16]
    assert "was in progress when the checkpoint was written" in resumed.verdict()


def test_paths_that_have_made_no_step_are_opened_again():
    """As those that were opened at the step of the checkpoint."""
    run = Run()
    engine = run.engine(reasons=(Code.MAXIMIZES(),))
    run.follow(engine, steps=8)
    again, state = copy.deepcopy(run), copy.deepcopy(engine.state_dict())
    resumed = again.engine(reasons=(Code.MAXIMIZES(),))
    resumed.load_state_dict(state)
    assert noted(resumed) == [Code.MAXIMIZES()]
    again.open_paths(resumed)
    again.follow(resumed, steps=8)
    assert resumed.history[16].keys() >= ALWAYS
    assert noted(resumed) == [Code.MAXIMIZES()]


def test_a_state_holds_tensors_and_plain_values(tmp_path):
    run = Run()
    engine = run.engine()
    run.follow(engine, steps=11)
    engine.note(Code.CLIPPED(count=1, start=0, stop=8))
    torch.save(engine.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    other = run.engine()
    other.load_state_dict(state)
    assert other.reasons == [*engine.reasons, Code.INTERRUPTED(start=8)]
    assert other.windows.open.start == 8
    before, after = engine.windows.open.forecast, other.windows.open.forecast
    assert torch.equal(before.drift, after.drift)
    v = torch.linspace(-1, 1, len(before.drift), dtype=torch.float64)
    torch.testing.assert_close(after.tangent.project(v), before.tangent.project(v))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("windows"), "missing: windows"),
        (lambda s: s["windows"].pop("open"), "missing: open"),
        (lambda s: s.update(extra=1), "unknown: extra"),
        (lambda s: s.update(version=1), "a state of version 5 was expected, got version 1"),
        (lambda s: s["windows"]["open"].update(iterate=torch.zeros(3)), r"a window of 3 weights for \d+ weights"),
    ],
)
def test_a_foreign_or_incomplete_state_is_refused_by_name(change, message):
    run = Run()
    engine = run.engine(reasons=(Code.MAXIMIZES(),))
    run.follow(engine, steps=3)
    state = copy.deepcopy(engine.state_dict())
    change(state)
    other = run.engine()
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(state)
    assert other.history == {}
    assert other.windows.open is None


def test_a_part_of_a_measurement_that_fails_costs_that_part_alone(monkeypatch):
    run, calls = Run(), []
    original = type(run.problem).loss

    def fail_once(problem, w):
        calls.append(w)
        if len(calls) == 1:
            raise ArithmeticError("no loss today")
        return original(problem, w)

    monkeypatch.setattr(type(run.problem), "loss", fail_once)
    engine = run.engine()
    run.follow(engine, steps=8)
    assert "excess_loss" not in engine.history[0]
    assert "distance/nearest" in engine.history[0]
    assert noted(engine) == [Code.FAILED(step=0, error="ArithmeticError: no loss today")]
    assert {"excess_loss", "distance/nearest"} | ALWAYS <= engine.history[8].keys()


def test_a_failed_measurement_gives_up_its_window_alone():
    run = Run()
    engine = run.engine(reasons=(Code.MAXIMIZES(),))
    run.follow(engine, steps=4)
    engine.windows.abandon(0)  # the window that began at this step goes on
    assert engine.windows.open is not None
    engine.windows.abandon(4)
    assert engine.windows.open is None
    run.follow(engine, steps=4)
    assert "window/steps" not in engine.history[8]
    assert "distance/nearest" in engine.history[8]
