"""What is read from an optimizer, and from the steps that it makes: on optimizers alone, without any training."""

import math
from types import SimpleNamespace

import pytest
import torch

from tests.zoo import Manual, Net, OwnClipping, groups, seeded
from torch_singlim import SGDSettings
from torch_singlim.callbacks.optimizer import StepRecorder, read_groups, read_optimizer, select_parameters
from torch_singlim.measure import Code, StepSums


def trainer_of(*optimizers, **options):
    """What is read of a Trainer."""
    plain = {"gradient_clip_val": None, "gradient_clip_algorithm": "norm", "precision_plugin": SimpleNamespace()}
    return SimpleNamespace(optimizers=list(optimizers), **plain | options)


def read(module, optimizer, patterns=None):
    return read_optimizer(trainer_of(optimizer), module, select_parameters(module, patterns), 6)


def sgd(module, **options):
    return torch.optim.SGD(module.parameters(), **{"lr": 0.2} | options)


# --- settings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.5},
        {"momentum": 0.5, "dampening": 0.5},
        {"momentum": 0.9, "nesterov": True},
        {"weight_decay": 1e-3},
    ],
    ids=str,
)
def test_sgd_is_read_as_it_is(options):
    module = Net()
    found = read(module, sgd(module, **options))
    decay = options.pop("weight_decay", 0.0)
    assert found.sgd == SGDSettings(lr=0.2, batch_size=6, **options)
    assert found.weight_decay == decay
    assert found.reasons == ()
    assert set(found.step_ratios.values()) == {1.0}
    assert found.group_ratios == (1.0,)


def test_learning_rates_of_groups_are_step_ratios():
    module = Net()
    found = read(module, groups(module, {"lr": 0.1}, {}, momentum=0.5))
    assert found.sgd == SGDSettings(lr=0.1, momentum=0.5, batch_size=6)
    assert found.step_ratios == {"body.0.weight": 1.0, "body.0.bias": 1.0, "head.weight": 2.0, "head.bias": 2.0}
    assert found.group_ratios == (1.0, 2.0)
    assert found.reasons == ()


def test_a_warm_up_from_zero_has_the_rates_that_it_was_given():
    module = Net()
    optimizer = groups(module, {"lr": 0.1}, {})
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(step / 4, 1.0))
    found = read(module, optimizer)
    assert found.sgd is None  # it does not move at present
    assert found.group_ratios == (1.0, 2.0)
    assert found.reasons == ()


# what groups may not differ in
DIFFERENT = {"momentum": 0.5, "dampening": 0.5, "nesterov": True, "weight_decay": 1e-3, "maximize": True}


@pytest.mark.parametrize("key", DIFFERENT)
def test_groups_that_differ_in_more_than_the_learning_rate(key):
    common = {"momentum": 0.9} if key == "nesterov" else {}
    module = Net()
    found = read(module, groups(module, {}, {key: DIFFERENT[key]}, **common))
    assert found.reasons == (Code.GROUPS_DIFFER(keys=key),)
    assert "the learning rate alone may differ" in str(found.reasons[0])


def test_all_that_they_differ_in_is_named():
    module = Net()
    found = read(module, groups(module, {"momentum": 0.5}, {"weight_decay": 0.1}))
    assert found.reasons == (Code.GROUPS_DIFFER(keys="momentum, weight_decay"),)


@pytest.mark.parametrize(
    ("first", "second", "codes"),
    [
        ({"lr": 0.0}, {"lr": 0.0}, [Code.NO_STEP_SIZE]),
        ({"lr": 0.0}, {}, [Code.NO_STEP_SIZE_OF_GROUP]),
        ({}, {"lr": 0.0}, [Code.NO_STEP_SIZE_OF_GROUP]),
        ({"maximize": True}, {"maximize": True}, [Code.MAXIMIZES]),
        ({"lr": 0.0, "maximize": True}, {"lr": 0.0, "maximize": True}, [Code.MAXIMIZES, Code.NO_STEP_SIZE]),
    ],
)
def test_optimizers_that_stand_or_climb(first, second, codes):
    module = Net()
    found = read(module, groups(module, first, second))
    assert [reason.code for reason in found.reasons] == codes
    assert (found.sgd is None) == (codes != [Code.MAXIMIZES])
    assert set(found.step_ratios.values()) == {1.0}


@pytest.mark.parametrize("name", ["NAdam", "LBFGS", "Rprop"])
def test_other_optimizers(name):
    module = Net()
    optimizer = getattr(torch.optim, name)(module.parameters(), lr=0.1)
    found = read(module, optimizer)
    assert found.reasons == (Code.OPTIMIZER(optimizer=name),)
    assert str(found.reasons[0]).startswith(f"{name} rescales")
    assert (found.sgd, found.weight_decay, found.group_ratios) == (None, 0.0, ())
    assert set(found.step_ratios) == {name for name, _ in module.named_parameters()}


def test_what_lightning_wraps_around_an_optimizer_is_looked_through():
    module = Net()
    assert read(module, SimpleNamespace(optimizer=sgd(module))).sgd.lr == 0.2


@pytest.mark.parametrize("count", [0, 2])
def test_several_optimizers_or_none(count):
    module = Net()
    found = read_optimizer(trainer_of(*[sgd(module)] * count), module, ["head.bias"], None)
    assert found.reasons == (Code.SEVERAL_OPTIMIZERS(count=count),)
    assert f"expected one optimizer, got {count}" in str(found.reasons[0])
    assert (found.sgd, found.step_ratios) == (None, {"head.bias": 1.0})


@pytest.mark.parametrize(
    ("held", "patterns", "message"),
    [
        ("head", None, "holds 2 parameters, 4 are measured"),
        ("", ["head.weight", "body.*"], "holds 4 parameters, 3 are measured"),
        ("", "head.*", "holds 4 parameters, 2 are measured"),
        ("head", "body.*", "holds 2 parameters, 2 are measured, and these are not the same"),
    ],
)
def test_part_of_the_weights(held, patterns, message):
    module = Net()
    found = read(module, sgd(module.get_submodule(held)), patterns)
    (reason,) = found.reasons
    assert reason.code is Code.OTHER_PARAMETERS
    assert message in str(reason)
    assert "parameters=" in str(reason)


def test_the_weights_that_are_trained():
    module = Net()
    assert read(module, sgd(module.head), "head.*").reasons == ()
    module.body.requires_grad_(False)  # frozen weights may be in the optimizer, too
    assert read(module, sgd(module.head)).reasons == ()
    assert read(module, sgd(module)).reasons == ()


def test_no_such_parameters():
    with pytest.raises(ValueError, match=r"'heads\.\*' matches none .* which are body"):
        select_parameters(Net(), ["head.*", "heads.*"])


def test_what_a_module_does_to_steps():
    manual, clipping = Manual(), OwnClipping()
    assert read(manual, sgd(manual)).reasons == (Code.MANUAL_OPTIMIZATION(),)
    assert read(clipping, sgd(clipping)).reasons == (Code.OWN_CLIPPING(),)


def test_groups_of_a_state_are_read_as_those_of_an_optimizer():
    module = Net()
    optimizer = sgd(module, momentum=0.5, weight_decay=0.1)
    found = read_groups(optimizer.state_dict()["param_groups"], {}, None)
    assert found.sgd == SGDSettings(lr=0.2, momentum=0.5)
    assert (found.weight_decay, found.reasons) == (0.1, ())


# --- steps ---------------------------------------------------------------------------------------------------------


def followed(optimizer, module, *, rates, **options):
    """A recorder of steps at these learning rates of each group, and its Trainer."""
    trainer = trainer_of(optimizer, **options)
    recorder = StepRecorder(read(module, optimizer))
    for each in rates:
        for group, rate in zip(optimizer.param_groups, each, strict=True):
            group["lr"] = rate
        recorder.before_step(trainer, optimizer)
        recorder.after_step(trainer)
    return recorder, trainer


def test_sums_over_steps_use_the_rate_of_each():
    module = Net()
    recorder, _ = followed(sgd(module, momentum=0.5), module, rates=[(0.2,), (0.1,), (0.0,)])
    assert recorder.sums == StepSums(lr=pytest.approx(0.3), alpha=pytest.approx(0.6), alpha_squared=pytest.approx(0.2))
    assert recorder.reasons == ()


def test_a_ratio_that_changes_is_noted_for_good():
    module = Net()
    assert followed(groups(module, {"lr": 0.1}, {}), module, rates=[(0.1, 0.2), (0.05, 0.1)])[0].reasons == ()
    recorder, _ = followed(groups(module, {"lr": 0.1}, {}), module, rates=[(0.1, 0.2), (0.1, 0.1), (0.1, 0.2)])
    assert recorder.reasons == (Code.RATIO_CHANGES(),)


def test_steps_of_other_optimizers_are_not_known():
    module = Net()
    recorder, _ = followed(torch.optim.NAdam(module.parameters()), module, rates=[(0.1,)])
    assert recorder.sums is None


def test_steps_of_adaptive_optimizers_have_learning_rates():
    """Their metric is read at snapshots."""
    module = Net()
    optimizer = torch.optim.AdamW(module.parameters(), weight_decay=0.3)
    recorder, _ = followed(optimizer, module, rates=[(0.1,), (0.2,)])
    assert recorder.sums.lr == pytest.approx(0.3)
    found = read(module, optimizer)
    assert (found.sgd, found.adaptive, found.weight_decay, found.reasons) == (None, "AdamW", 0.3, ())


def test_sums_in_a_metric_are_integrals_of_what_is_interpolated():
    """The scale is 2 until the first reading, then it rises to 4: the integrals of s and of s^2."""
    module = Net()
    optimizer = torch.optim.AdamW(module.parameters())
    recorder, trainer = followed(optimizer, module, rates=[(0.1,)])
    first = recorder.sums_in_metric(2.0)
    assert (first.alpha, first.alpha_squared) == (pytest.approx(0.2), pytest.approx(0.04))
    kept = recorder.state_dict()
    for group in optimizer.param_groups:
        group["lr"] = 0.2
    other = StepRecorder(read(module, optimizer))
    other.load_state_dict(kept)
    for each in (recorder, other):
        each.before_step(trainer, optimizer)
        assert each.sums_in_metric(4.0) == each.sums_in_metric(4.0)
        found = each.sums_in_metric(4.0)
        assert (found.lr, found.alpha) == (pytest.approx(0.3), pytest.approx(0.2 + 3 * 0.2))
        assert found.alpha_squared == pytest.approx(0.04 + 28 / 3 * 0.04)


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"weight_decay": 0.1}, Code.COUPLED_DECAY),
        ({"maximize": True}, Code.MAXIMIZES),
        ({"lr": 0.0}, Code.NO_STEP_SIZE),
    ],
)
def test_adaptive_optimizers_that_are_not_covered(options, code):
    module = Net()
    assert [reason.code for reason in read(module, torch.optim.Adam(module.parameters(), **options)).reasons] == [code]


def with_gradients(module, value):
    for p in module.parameters():
        p.grad = torch.full_like(p, value)
    return module


@pytest.mark.parametrize(("algorithm", "size"), [("norm", 0.1 * math.sqrt(323)), ("value", 0.1)])
def test_clipped_steps_are_counted_at_the_bound(algorithm, size):
    """A gradient that was clipped is left at the bound, up to rounding."""
    module = with_gradients(seeded(Net), 0.1)
    clipping = {"gradient_clip_algorithm": algorithm, "rates": 3 * [(0.2,)]}
    for bound, count in [(size * (1 + 1e-4), 0), (size * (1 + 1e-6), 3), (size * (1 - 1e-6), 3)]:
        recorder, _ = followed(sgd(module), module, gradient_clip_val=bound, **clipping)
        assert recorder.sums.clipped == count, bound


def test_a_step_without_gradients_is_not_clipped():
    module = Net()
    recorder, _ = followed(sgd(module), module, rates=[(0.2,)], gradient_clip_val=1.0)
    assert recorder.sums.clipped == 0


@pytest.mark.parametrize("value", [1.0, math.inf, math.nan])
def test_steps_that_loss_scaling_skips_do_not_count(value):
    module = with_gradients(Net(), value)
    recorder, _ = followed(sgd(module), module, rates=[(0.2,)], precision_plugin=SimpleNamespace(scaler=object()))
    assert recorder.sums.lr == (0.2 if value == 1 else 0.0)


def test_a_recorder_goes_on_with_a_state():
    module = with_gradients(Net(), 1.0)
    optimizer = sgd(module)
    first, trainer = followed(optimizer, module, rates=2 * [(0.2,)], gradient_clip_val=1.0)
    second = StepRecorder(read(module, optimizer))
    second.load_state_dict(first.state_dict())
    for recorder in (first, second):
        recorder.before_step(trainer, optimizer)
        recorder.after_step(trainer)
    assert second.sums == first.sums
    assert second.sums.clipped == 3
    for changed, message in (({"lr": 1.0}, "missing: alpha, alpha_squared, clipped"), ({"steps": 1}, "unknown: steps")):
        with pytest.raises(ValueError, match=message):
            second.load_state_dict(changed)
    assert second.sums == first.sums
