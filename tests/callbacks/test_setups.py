"""Every training has its outcome, none a wrong figure; and apart from contradictions, none is changed by a monitor."""

import math
import re

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins import MixedPrecision

from tests.callbacks.setups import MEASURED, NO_PROBLEM, RAISES, UNSUPPORTED, Case, OfIterator, Weightless
from tests.zoo import (
    LEVELS,
    Net,
    Recorder,
    Trace,
    assert_identical,
    data,
    fit,
    groups,
    monitor_of,
    reasons_of,
    scheduled,
    seeded,
    tags_of,
    weights,
    with_optimizer,
)
from torch_singlim import SingularLimitMonitor
from torch_singlim.measure import Code, Kind, Need, Scope
from torch_singlim.measure.tags import TAGS

# all that rests on the theory of this noise, or on its clock
LIMIT = {name for tag in TAGS if Need.LIMIT in tag.needs for name in (tag.name, tag.stderr_name)}
LIMIT -= {"distance/relaxed", "distance/relaxed_share", "stability"}  # measured at any known step size
# paths beside the training, in any of them
PATHS = {"drift/predicted", "drift/cosine", "drift/speed", "drift/residual", "drift/ceiling", "window/replay_error"}
# and those that are only there if the noise can be seen
OF_PATHS = {
    name
    for tag in TAGS
    if Need.PATHS in tag.needs or Need.BASELINE in tag.needs
    for name in (tag.name, tag.stderr_name)
}
OF_PATHS |= {"drift/ceiling"}
HALF = {"excess_loss", "distance/half", "distance/half_linear"}
GEOMETRY = HALF | {"distance/linearised", "quality/residual"}
MOTION = {"window/steps", "window/status", "drift/measured"}
ALWAYS = MOTION | {"cost/overhead"}

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # Lightning's own, about trainings this small


def run(case, *monitors, alone=False):
    """A training of this kind, all that could be disturbed in it, and its Trainer; monitors before who reads them."""
    trace, reading = Trace(), case.callbacks()
    if alone:
        reading = [each for each in reading if not isinstance(each, EarlyStopping)]
    options = {"logger": Recorder(), "max_steps": 12} | case.trainer
    _, trainer = fit(seeded(case.make), *monitors, *reading, trace, dataset=case.dataset, **options)
    return trace, trainer


@pytest.mark.parametrize("name", RAISES)
def test_contradictions_raise(name):
    """Before anything is trained, with advice."""
    case = RAISES[name]
    with pytest.raises(ValueError, match=case.message):
        run(case, monitor_of(**case.monitor))


@pytest.mark.parametrize("name", [*NO_PROBLEM, *UNSUPPORTED])
def test_what_is_unsupported_is_said_and_the_rest_measured(name, caplog):
    case = (NO_PROBLEM | UNSUPPORTED)[name]
    monitor = monitor_of(**case.monitor)
    with caplog.at_level("WARNING"):
        watched, trainer = run(case, monitor)
    assert_identical(watched, run(case, alone=True)[0])

    found = [each for each in reasons_of(monitor) if each.code.scope is not Scope.NOTHING]
    assert {each.code for each in found[1:]} == ({case.also} if case.also else set())
    reason = found[0]
    assert reason.code is (case.code or Code.NO_PROBLEM)
    assert reason.code.kind is Kind.UNSUPPORTED
    assert re.search(case.message, str(reason), re.DOTALL)
    assert caplog.text.count(str(reason)) == 1
    assert reason.sentence in monitor.verdict

    tags = tags_of(monitor)
    assert not tags & LIMIT
    assert tags >= ALWAYS
    followed = reason.code.scope not in (Scope.MOTION, Scope.PATHS) and reason.code is not Code.NO_STEP_SIZE
    followed = followed and case.also not in (Code.SEVERAL_CALLS, Code.NO_STEP_ON_COPY)
    assert (tags >= PATHS) == followed
    if not followed:
        assert not tags & OF_PATHS
    if name in UNSUPPORTED:
        assert tags >= GEOMETRY
        assert monitor.last_distance.limit is None
    else:
        levels = set() if reason.code is Code.NO_PROBLEM else HALF
        assert (tags - OF_PATHS) - LEVELS == (ALWAYS | levels) - LEVELS
        assert tags & HALF == levels
    assert trainer.logger.of_monitor() == list(monitor.history.items())


@pytest.mark.parametrize("name", MEASURED)
def test_what_is_supported_is_measured(name):
    case = MEASURED[name]
    monitor = monitor_of(**case.monitor)
    watched, _ = run(case, monitor)
    assert_identical(watched, run(case, alone=True)[0])
    found = [reason for reason in reasons_of(monitor) if reason.code is not Code.LEVEL_NOT_MET]
    assert {reason.code.scope for reason in found} <= {Scope.NOTHING}
    assert tags_of(monitor) >= ALWAYS | GEOMETRY | PATHS
    assert len([step for step, point in monitor.history.items() if "drift/cosine" in point]) >= 2


def test_a_step_that_takes_an_iterator_has_no_paths():
    monitor = monitor_of(loss="mse")
    watched, _ = run(Case(OfIterator), monitor)
    assert_identical(watched, run(Case(OfIterator))[0])
    assert reasons_of(monitor) == [Code.NO_BATCHES()]
    assert tags_of(monitor) >= ALWAYS | GEOMETRY | {"limit/frozen_cosine"}
    assert not tags_of(monitor) & OF_PATHS


class Moves(L.Callback):
    """Whether each step has moved the weights."""

    def __init__(self):
        self.moved = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.before = weights(pl_module)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.moved.append(not torch.equal(self.before, weights(pl_module)))


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_16_mixed_counts_the_steps_that_its_loss_scaling_lets_through():
    """The scale starts too high: the first steps are skipped, by torch, and the clock stands."""

    def scaled():
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
        return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler=scaler)], "max_steps": 20}

    moves, monitor = Moves(), monitor_of(every_n_steps=5)
    watched, _ = run(Case(trainer=scaled(), callbacks=lambda: [moves]), monitor)
    assert_identical(watched, run(Case(trainer=scaled()))[0])
    assert not all(moves.moved[:5])
    assert all(moves.moved[10:])
    assert monitor.state_dict()["steps"]["lr"] == pytest.approx(0.2 * sum(moves.moved))
    assert 20 in {step for step, point in monitor.history.items() if "drift/cosine" in point}
    if not any(moves.moved[:5]):
        assert reasons_of(monitor) == [Code.NOT_MOVED(start=0, stop=5)]


class Norms(L.Callback):
    """Sizes of the gradients before they are clipped."""

    def __init__(self, order):
        self.order, self.sizes = order, []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        gradient = torch.cat([p.grad.reshape(-1) for p in pl_module.parameters()])
        self.sizes.append(torch.linalg.vector_norm(gradient, self.order).item())


@pytest.mark.parametrize(("algorithm", "order", "bound"), [("norm", 2, 0.8), ("value", math.inf, 0.25)])
def test_clipping_that_acts_is_followed_by_paths_and_not_by_the_limit(algorithm, order, bound, caplog):
    norms = Norms(order)
    clipping = {"gradient_clip_val": bound, "gradient_clip_algorithm": algorithm, "max_steps": 60}
    monitor = monitor_of(every_n_steps=5)
    with caplog.at_level("WARNING"):
        watched, _ = run(Case(trainer=clipping, callbacks=lambda: [norms]), monitor)
    assert_identical(watched, run(Case(trainer=clipping))[0])
    starts = range(0, 60, 5)
    counts = {start: sum(size > bound for size in norms.sizes[start : start + 5]) for start in starts}
    assert 0 in counts.values()
    assert any(counts.values())
    ends = range(5, 65, 5)
    # paths are clipped, too; the limit does not know of it
    assert all(monitor.history[end]["window/status"] == 1.0 for end in ends)
    compared = {end - 5 for end in ends if "limit/frozen_cosine" in monitor.history[end]}
    assert compared == {start for start, count in counts.items() if count == 0}
    expected = [Code.CLIPPED(count=n, start=start, stop=start + 5) for start, n in counts.items() if n]
    form, *found = reasons_of(monitor)
    assert form == Code.AVERAGED_STEPS(why="gradients are clipped")
    assert found == expected
    assert all(caplog.text.count(str(reason)) == 1 for reason in expected)


def test_a_schedule_that_changes_the_groups_ratio_ends_the_limit(caplog):
    def apart(optimizer):
        return torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda step: 1.0, lambda step: 0.9 ** (step // 6)])

    monitor = monitor_of()
    with caplog.at_level("WARNING"):
        run(Case(with_optimizer(lambda m: scheduled(groups(m, {"lr": 0.1}, {}), apart))), monitor)
    assert "changes the ratio of the parameter groups' learning rates" in caplog.text
    assert [step for step, point in monitor.history.items() if "limit/frozen_cosine" in point] == [5]
    assert {5, 12} <= {step for step, point in monitor.history.items() if "drift/cosine" in point}
    assert reasons_of(monitor) == [Code.RATIO_CHANGES()]
    assert "changes the ratio" in monitor.verdict


def test_half_precision_is_upcast_and_said(caplog):
    with caplog.at_level("INFO"):
        run(MEASURED["bf16-true"], monitor_of())
    assert re.search("weights in bfloat16, .* measured in float64", caplog.text)


def test_two_monitors_of_two_sets_of_samples(tmp_path):
    """Each logs under its own name; what others monitor is there; any logger takes it."""
    first, second = monitor_of(), monitor_of(data=data(n=8, seed=3).tensors, name="other")
    best = ModelCheckpoint(tmp_path, monitor="other/distance/nearest", every_n_train_steps=5, filename="best")
    board, table = TensorBoardLogger(tmp_path), CSVLogger(tmp_path)
    fit(seeded(Net), first, second, best, steps=12, shuffle=False, logger=[board, table])
    assert (tmp_path / "best.ckpt").exists()
    seen = [second.history[step]["distance/nearest"] for step in (5, 7)]  # the last ones known at steps 5 and 10
    assert best.best_model_score == pytest.approx(min(seen))
    keys = torch.load(tmp_path / "best.ckpt", weights_only=True)["callbacks"]
    assert len([key for key in keys if key.startswith("SingularLimitMonitor")]) == 2
    written = next(tmp_path.rglob("metrics.csv")).read_text().splitlines()[0]
    assert "singlim/excess_loss" in written
    assert "other/excess_loss" in written
    assert first.history[0] != second.history[0]


def test_one_name_twice_is_refused_by_lightning():
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `SingularLimitMonitor`"):
        L.Trainer(callbacks=[SingularLimitMonitor(), SingularLimitMonitor()], logger=False)


class FSDPStrategy(L.pytorch.strategies.SingleDeviceStrategy):
    """Goes by the name of one that spreads the weights."""


NOTHING = {
    "sharded": (
        lambda: Case(trainer={"strategy": FSDPStrategy(device="cpu")}),
        Code.SHARDED(strategy="FSDPStrategy"),
        'FSDPStrategy shards .* use strategy="ddp"',
    ),
    "no weights": (lambda: Case(Weightless), Code.NO_WEIGHTS(), "no trainable parameters"),
}


@pytest.mark.parametrize("name", NOTHING)
def test_where_nothing_can_be_measured_it_is_said(name, caplog):
    case, reason, message = NOTHING[name]
    monitor = monitor_of()
    with caplog.at_level("WARNING"):
        watched, trainer = run(case(), monitor)
    assert_identical(watched, run(case())[0])
    assert list(monitor.reasons) == [reason]
    assert re.search(f"{message}.*nothing is measured", caplog.text)
    assert reason.sentence in monitor.verdict
    assert monitor.history == {}
    assert trainer.logger.of_monitor() == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window must be at least 1"),
        ({"num_samples": 0}, "num_samples must be at least 1"),
        ({"num_draws": 1}, "num_draws must be at least 2"),
        ({"replicas": -1}, "replicas must be at least 0"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"every_n_steps": 0}, "may not overlap"),
        ({"window": 10, "every_n_steps": 5}, "may not overlap"),
        ({"max_overhead": -0.1}, "max_overhead must be a share"),
        ({"max_overhead": math.nan}, "max_overhead must be a share"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        SingularLimitMonitor(**options)
