"""What a training step that runs on a copy may read of the trainer: values and copies of the run's."""

import pytest
import torch

from tests.zoo import Net, fit, scheduled, with_optimizer
from torch_singlim.callbacks.stand_in import StandIn, trainer_values
from torch_singlim.measure.optimizer_copy import copy_optimizer

SCHEDULES = {
    "step": lambda o: torch.optim.lr_scheduler.StepLR(o, 3, 0.5),
    "one cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.3, total_steps=50),
    "two in a row": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o, [torch.optim.lr_scheduler.ConstantLR(o, 0.1, 4), torch.optim.lr_scheduler.ExponentialLR(o, 0.9)], [4]
    ),
    "a function": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
}


@pytest.mark.filterwarnings("ignore")  # torch's own, of SequentialLR
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedulers_are_copies_for_the_optimizer_of_the_copy(name):
    make = with_optimizer(lambda m: scheduled(torch.optim.SGD(m.parameters(), lr=0.2, momentum=0.5), SCHEDULES[name]))
    module = make()
    module, trainer = fit(module, steps=6)
    values = trainer_values(trainer)
    own = trainer.lr_scheduler_configs[0].scheduler
    state = {key: value for key, value in own.state_dict().items() if not key.startswith("_sched")}
    optimizer = copy_optimizer(trainer.optimizers[0], {})
    twin = Net()
    twin._trainer = StandIn(values, optimizer)
    scheduler = twin.lr_schedulers()
    assert scheduler is not own
    assert scheduler.optimizer is optimizer
    assert scheduler.get_last_lr() == own.get_last_lr()
    assert twin.optimizers() is optimizer
    assert twin.global_step == trainer.global_step == 6
    scheduler.step()
    assert {key: value for key, value in own.state_dict().items() if not key.startswith("_sched")} == state


def test_without_schedulers():
    module = Net()
    module, trainer = fit(module, steps=2)
    twin = Net()
    twin._trainer = StandIn.of(trainer)
    assert twin.lr_schedulers() is None
    group = twin.optimizers().param_groups[0]
    assert group["lr"] == trainer.optimizers[0].param_groups[0]["lr"]
    group["lr"] = 100.0
    assert trainer.optimizers[0].param_groups[0]["lr"] != 100.0


@pytest.mark.parametrize("name", ["callbacks", "fit_loop", "train_dataloader", "checkpoint_callback"])
def test_nothing_else_can_be_read(name):
    with pytest.raises(AttributeError, match=rf"trainer\.{name} is not available"):
        getattr(StandIn({}), name)
    with pytest.raises(AttributeError, match=r"trainer\.strategy\.model is not available"):
        StandIn({}).strategy.model  # noqa: B018  # the attribute is the test
