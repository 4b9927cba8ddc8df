"""Coupled paths beside trainings of Lightning: what people do, each replayed, followed or found out."""

import gc
import shutil
from dataclasses import dataclass
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch import callbacks as of_lightning
from lightning.pytorch.callbacks import BackboneFinetuning, GradientAccumulationScheduler, StochasticWeightAveraging
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities import CombinedLoader
from torch import nn
from torch.nn import functional as F
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)
from torchmetrics import MeanSquaredError

from tests.problems import Lion, Muon
from tests.zoo import Trace, assert_identical
from torch_singlim import AntiCorrelated, DropConnect, InjectNoise, InputNoise, SingularLimitMonitor
from torch_singlim.callbacks.twin import MicroBatch, TrainingStepGradient, make_twin
from torch_singlim.measure import Code, tags
from torch_singlim.measure.steps import Step
from torch_singlim.network import RandomState


class Digits(L.LightningModule):
    """64-64-10, dropout .1, on 100 random prototypes: small, and near its zero-loss set within some hundred steps."""

    def __init__(self, dropout=0.1, **optimizer):
        super().__init__()
        torch.manual_seed(1)
        self.body = nn.Sequential(nn.Linear(20, 64), nn.GELU(), nn.Dropout(dropout))
        self.head = nn.Linear(64, 4)
        self.options = {"lr": 0.5} | optimizer

    def forward(self, x):
        return self.head(self.body(x))

    def loss(self, x, y):
        return F.mse_loss(self(x), y)

    def training_step(self, batch, batch_idx):
        loss = self.loss(*batch)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), **self.options)


def data(n=100):
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(n, 20, generator=generator), torch.randn(n, 4, generator=generator))


def loader(dataset=None, batch_size=20, **options):
    return DataLoader(data() if dataset is None else dataset, batch_size=batch_size, **{"shuffle": True} | options)


def fit(model, *callbacks, steps=350, window=150, loaders=None, watch=True, loss=None, **options):
    """A training whose last window ends with it; the monitor, and all that it could have disturbed."""
    L.seed_everything(0, verbose=False)
    options_of = {"window": window, "max_overhead": None, "num_samples": 8, "num_draws": 2, "loss": loss}
    monitor, trace = SingularLimitMonitor(**options_of), Trace()
    trainer = L.Trainer(
        **{"max_steps": steps, "accelerator": "cpu", "logger": False} | options,
        callbacks=[*callbacks, *([monitor] if watch else []), trace],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, loader() if loaders is None else loaders)
    return monitor, trace


# --- habits that paths follow ----------------------------------------------------------------------------------------


class NoisyData(Dataset):
    """Noise on inputs, in the data set, by its own generator; labels as they are."""

    def __init__(self, std=0.2, *, labels=False):
        self.data, self.std, self.labels = data(), std, labels
        self.generator = torch.Generator().manual_seed(3)

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        x, y = self.data[i]
        noisy = y if self.labels else x
        noisy = noisy + self.std * torch.randn(noisy.shape, generator=self.generator)
        return (x, noisy) if self.labels else (noisy, y)


def changed(**methods):
    """Digits with some methods of another kind."""
    return type("Changed", (Digits,), methods)


def of_inputs(self, batch, batch_idx):
    x, y = batch
    return self.loss(x + 0.2 * torch.randn_like(x) if self.training else x, y)


def of_labels(self, batch, batch_idx):
    x, y = batch
    return self.loss(x, y + 0.3 * torch.randn_like(y) if self.training else y)


def mixup(self, batch, batch_idx):
    x, y = batch
    share, order = torch.distributions.Beta(0.2, 0.2).sample(), torch.randperm(len(x))
    return self.loss(share * x + (1 - share) * x[order], share * y + (1 - share) * y[order])


def penalised(self, batch, batch_idx):
    return self.loss(*batch) + (1e-3 * self.head.weight.square().sum() if self.training else 0)


def with_warm_up(self, batch, batch_idx):
    return self.loss(*batch) + 1e-3 * min(self.global_step / 600, 1) * self.head.weight.square().sum()


def r_drop(self, batch, batch_idx):
    x, y = batch
    a, b = self(x), self(x)
    return 0.5 * (F.mse_loss(a, y) + F.mse_loss(b, y)) + 0.1 * F.mse_loss(a, b)


def after_transfer(self, batch, dataloader_idx):
    return batch[0] + 0.2 * torch.randn_like(batch[0]), batch[1]


def every_50th(self, batch, batch_idx):
    return self.loss(*batch) * (2.0 if self.global_step % 50 == 0 else 1.0)


def keeps_lists(self, batch, batch_idx):
    loss = self.loss(*batch)
    self.kept = [*getattr(self, "kept", []), loss]
    self.last = loss  # hangs on a graph
    self.log("epoch", float(self.trainer.current_epoch))
    return {"loss": loss, "outputs": None}


def functional(self, x):
    return self.head(F.dropout(self.body[1](self.body[0](x)), 0.1, self.training))


def stochastic_depth(self, x):
    h = self.body[1](self.body[0](x))
    keep = torch.rand_like(x[:, :1]) > 0.1 if self.training else torch.ones_like(x[:, :1])
    return self.head(h * keep / (0.9 if self.training else 1.0))


def frozen_in_evaluation(self, *args, **kwargs):
    self.body.eval()


def one_cycle(self):
    optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.3, total_steps=700)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def groups(self):
    return torch.optim.SGD([{"params": self.body.parameters(), "lr": 0.2}, {"params": self.head.parameters()}], lr=0.5)


def adamw(self):
    return torch.optim.AdamW(self.parameters(), lr=1e-3)


def rmsprop(self):
    return torch.optim.RMSprop(self.parameters(), lr=2e-4)


def sampled(sampler):
    return lambda: loader(shuffle=False, sampler=sampler(data()))


def still():
    return Digits(dropout=0.0, lr=0.1)


class SignDescent(torch.optim.SGD):
    """A rule of one's own."""

    @torch.no_grad()
    def step(self, closure=None):
        loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["lr"] * p.grad.sign())
        return loss


def sign_descent(self):
    return SignDescent(self.parameters(), lr=2e-4)


class WarmedUp(torch.optim.SGD):
    """A rule with a counter and a parameter among its attributes, which are neither in its state nor in its groups."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, lr=lr)
        self.made, self.first = 0, self.param_groups[0]["params"][0]

    def step(self, closure=None):
        loss = closure()
        self.made += 1
        with torch.no_grad():
            self.first.mul_(1 - 1e-4)
        for group in self.param_groups:
            group["lr"] *= self.made / 500
        super().step()
        for group in self.param_groups:
            group["lr"] /= self.made / 500
        return loss


def warmed_up(self):
    return WarmedUp(self.parameters(), lr=0.5)


def decaying(self):
    optimizer = torch.optim.SGD(self.parameters(), lr=0.5)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.decay)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def decay(self, step):
    return 1 / (1 + step / 500)


def reads_its_learning_rate(self, batch, batch_idx):
    (rate,), (group,) = self.lr_schedulers().get_last_lr(), self.optimizers().param_groups
    self.log("rate", group["lr"])
    return (1 + rate) * self.loss(*batch)


def needs_the_trainer(self, batch, batch_idx):
    return self.loss(*batch) * (1 + 0 * self.trainer.fit_loop.total_batch_idx)


class CompiledWithin(Digits):
    def __init__(self, *, compiled):
        super().__init__()
        self.body = compiled(self.body)


def in_place(module):
    module.compile()
    return module


class Normed(Digits):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(20, 64), nn.BatchNorm1d(64), nn.GELU(), nn.Dropout(0.1))


class Measured(Digits):
    """With a metric, a validation, and an output object."""

    def __init__(self):
        super().__init__()
        self.error = MeanSquaredError()

    def forward(self, x):
        return SimpleNamespace(logits=super().forward(x), features=self.body(x))

    def training_step(self, batch, batch_idx):
        x, y = batch
        out = self(x)
        self.error(out.logits, y)
        self.log("error", self.error)
        return {"loss": F.mse_loss(out.logits, y) + 1e-3 * out.features.square().mean()}  # and an auxiliary loss

    def validation_step(self, batch, batch_idx):
        self.log("val", F.mse_loss(self(batch[0]).logits, batch[1]))

    def val_dataloader(self):
        return DataLoader(data(), batch_size=50)


@dataclass
class Pair:
    """A batch."""

    x: torch.Tensor
    y: torch.Tensor


def of_pair(self, batch, batch_idx):
    return self.loss(batch.x, batch.y)


def of_dict(self, batch, batch_idx):
    return self.loss(batch["x"], batch["more"]["y"])


def of_two_loaders(self, batch, batch_idx):
    return self.loss(*batch["a"]) + self.loss(*batch["b"])


def pairs(items):
    return Pair(*(torch.stack(each) for each in zip(*items, strict=True)))


def dicts(items):
    x, y = (torch.stack(each) for each in zip(*items, strict=True))
    return {"x": x, "more": {"y": y}}


class Endless(IterableDataset):
    """Samples without end, each with noise of its own."""

    def __iter__(self):
        generator, tensors = torch.Generator().manual_seed(5), data().tensors
        while True:
            i = torch.randint(100, (), generator=generator)
            yield tensors[0][i] + 0.1 * torch.randn(20, generator=generator), tensors[1][i]


def scaled():
    """16-mixed on the CPU, with a loss scaling that begins too high."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)
    return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler=scaler)]}


def finetuned(self):
    """The optimizer holds the head; a callback adds the body later."""
    return torch.optim.SGD(self.head.parameters(), lr=0.1)


class Backbone(Digits):
    def __init__(self):
        super().__init__()
        self.backbone = self.body

    configure_optimizers = finetuned


FOLLOWED = {
    "metric, validation, output object, auxiliary loss": {"make": Measured, "options": {"val_check_interval": 2}},
    "batches as objects": {"make": changed(training_step=of_pair), "loaders": lambda: loader(collate_fn=pairs)},
    "batches as dictionaries": {"make": changed(training_step=of_dict), "loaders": lambda: loader(collate_fn=dicts)},
    "several loaders": {
        "make": changed(training_step=of_two_loaders),
        "loaders": lambda: CombinedLoader({"a": loader(), "b": loader(data(60))}, "max_size_cycle"),
    },
    "an endless stream": {"loaders": lambda: DataLoader(Endless(), batch_size=20)},
    "16-mixed": {"make": lambda: Digits(lr=0.1), "options": scaled},
    "accumulation that changes": {"callbacks": [lambda: GradientAccumulationScheduler({0: 1, 5: 2})]},
    "stochastic weight averaging": {
        "callbacks": [lambda: StochasticWeightAveraging(swa_lrs=0.3, swa_epoch_start=10, annealing_epochs=5)],
        "options": {"max_epochs": 70},
    },
    "a backbone that is unfrozen before the window": {
        "make": Backbone,
        "callbacks": [lambda: BackboneFinetuning(unfreeze_backbone_at_epoch=10, verbose=False)],
    },
    "dropout alone": {},
    "momentum, decay": {"make": lambda: Digits(momentum=0.9, lr=0.05, weight_decay=1e-3)},
    "noise on inputs in the data set": {"loaders": lambda: loader(NoisyData())},
    "noise on labels in the data set": {"loaders": lambda: loader(NoisyData(labels=True))},
    "noise on inputs after transfer": {"make": changed(on_after_batch_transfer=after_transfer)},
    "noise on inputs in the step": {"make": changed(training_step=of_inputs)},
    "noise on labels in the step": {"make": changed(training_step=of_labels)},
    "mixup": {"make": changed(training_step=mixup)},
    "a subset of the data": {"loaders": sampled(lambda d: SubsetRandomSampler(range(50)))},
    "weighted samples": {"loaders": sampled(lambda d: WeightedRandomSampler(torch.arange(1.0, 101), 100))},
    "samples twice": {"loaders": sampled(lambda d: RandomSampler(d, replacement=True))},
    "limited batches": {"options": {"limit_train_batches": 3}},
    "overfitted batches": {"options": {"overfit_batches": 3}},
    "accumulation": {"options": {"accumulate_grad_batches": 2}},
    "one cycle with cycled momentum": {"make": changed(configure_optimizers=one_cycle)},
    "clipping by the trainer": {"options": {"gradient_clip_val": 0.1}},
    "clipping by value": {"options": {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}},
    "parameter groups": {"make": changed(configure_optimizers=groups)},
    "adamw": {"make": changed(configure_optimizers=adamw)},
    "rmsprop": {"make": changed(configure_optimizers=rmsprop)},
    "nadam": {
        "make": changed(configure_optimizers=lambda self: torch.optim.NAdam(self.parameters(), lr=1e-3, foreach=False))
    },
    "lion": {"make": changed(configure_optimizers=lambda self: Lion(self.parameters(), lr=2e-4, weight_decay=0.1))},
    "muon": {"make": changed(configure_optimizers=lambda self: Muon(self.parameters(), lr=5e-3))},
    "an optimizer of one's own": {"make": changed(configure_optimizers=sign_descent)},
    "an optimizer with attributes": {"make": changed(configure_optimizers=warmed_up)},
    "learning rates that are read": {
        "make": changed(configure_optimizers=decaying, decay=decay, training_step=reads_its_learning_rate)
    },
    "a step that needs the trainer, and a known loss": {
        "make": changed(training_step=needs_the_trainer),
        "loss": "mse",
    },
    "a compiled module": {"make": lambda: torch.compile(Digits())},
    "a compiled part": {"make": lambda: CompiledWithin(compiled=torch.compile)},
    "a part that is compiled in place": {"make": lambda: CompiledWithin(compiled=in_place)},
    "functional dropout": {"make": changed(forward=functional)},
    "stochastic depth": {"make": changed(forward=stochastic_depth)},
    "a part in evaluation mode": {"make": changed(on_train_batch_start=frozen_in_evaluation, training_step=of_inputs)},
    "a penalty under self.training": {"make": changed(training_step=penalised)},
    "a penalty that is warmed up": {"make": changed(training_step=with_warm_up)},
    "r-drop": {"make": changed(training_step=r_drop)},
    "another loss at every 50th step": {"make": changed(training_step=every_50th)},
    "lists and graphs that are kept": {"make": changed(training_step=keeps_lists)},
    "batch normalisation": {"make": Normed},
    "bf16": {"options": {"precision": "bf16-mixed"}},
    "float64": {"options": {"precision": "64-true"}},
    # with small steps: at larger ones fluctuations of the run add a drift that a path without them does not have
    "injected input noise": {"make": still, "callbacks": [lambda: InjectNoise(InputNoise(0.1))]},
    "injected weight noise": {"make": still, "callbacks": [lambda: InjectNoise(DropConnect(0.05))]},
    "transient noise": {"make": still, "callbacks": [lambda: InjectNoise(AntiCorrelated(0.01))]},
    "two injections": {
        "make": still,
        "callbacks": [lambda: InjectNoise(InputNoise(0.05)), lambda: InjectNoise(DropConnect(0.05))],
    },
}
if hasattr(of_lightning, "EMAWeightAveraging"):  # from 2.6 on
    averaging = {"callbacks": [lambda: of_lightning.EMAWeightAveraging(decay=0.9)]}
    FOLLOWED["averaging beside the training"] = averaging


def run(case, *, watch=True, **more):
    options = case.get("options", {})
    options = (options() if callable(options) else options) | more
    loaders = case["loaders"]() if "loaders" in case else None
    callbacks = [make() for make in case.get("callbacks", ())]
    loss = case.get("loss")
    return fit(case.get("make", Digits)(), *callbacks, loaders=loaders, watch=watch, loss=loss, **options)


def steps_of(monitor):
    """The steps at which each window was logged."""
    return tags.windows(monitor.history)


SHOWN = ("window/replay_error", "drift/cosine", "drift/ceiling", "drift/speed", "drift/baseline_cosine", "noise/ratio")
# reasons with which paths end
WINDOW_ENDS = {
    Code.REPLAY,
    Code.WEIGHTS_MOVED,
    Code.PARAMETERS_CHANGED,
    Code.NO_STEP_ON_COPY,
    Code.NO_COPY,
    Code.FAILED,
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FOLLOWED)
def test_habits_that_are_followed(name):
    """Replayed to rounding, and right: direction at the ceiling, speed 1. And the training is the one without it."""
    if "compiled" in name and not shutil.which("g++"):
        pytest.skip("torch.compile needs a C++ compiler")
    monitor, trace = run(FOLLOWED[name])
    last = monitor.history[max(monitor.history)]
    print(f"{name}: " + ", ".join(f"{tag} {last.get(tag, float('nan')):.3g}" for tag in SHOWN))
    start = max(steps_of(monitor))
    assert not [
        each for each in monitor.reasons if each.code in WINDOW_ENDS and each.values.get("start") in (None, start)
    ]
    replays = [point["window/replay_error"] for point in monitor.history.values() if "window/replay_error" in point]
    assert len(replays) >= 20
    assert max(replays) < 1e-5
    assert last["drift/cosine"] > 0.9 * last["drift/ceiling"]
    assert abs(last["drift/speed"] - 1) < 0.15
    assert_identical(trace, run(FOLLOWED[name], watch=False)[1])


# --- habits that are found out ---------------------------------------------------------------------------------------


def clips_in_a_hook(self):
    nn.utils.clip_grad_norm_(self.parameters(), 0.02)


def noise_on_gradients(self):
    for p in self.parameters():
        p.grad.add_(0.01 * torch.randn_like(p))


def projects(self, *args, **kwargs):
    with torch.no_grad():
        self.head.weight.clamp_(-0.05, 0.05)


def schedules_dropout(self, *args, **kwargs):
    self.body[2].p = 0.05 + 0.0002 * self.global_step


def own_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
    self.clip_gradients(optimizer, gradient_clip_val=0.02, gradient_clip_algorithm="norm")


class Ema(L.Callback):
    """Lookahead: every tenth step the weights go half of the way back."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step % 10 == 0:
            now = [p.detach().clone() for p in pl_module.parameters()]
            with torch.no_grad():
                for p, slow in zip(pl_module.parameters(), getattr(self, "slow", now), strict=True):
                    p.lerp_(slow, 0.5)
            self.slow = [p.detach().clone() for p in pl_module.parameters()]


FOUND_OUT = {
    "a backbone that is unfrozen in the window": {
        "make": Backbone,
        "callbacks": [lambda: BackboneFinetuning(unfreeze_backbone_at_epoch=60, verbose=False)],
    },
    "clipping in a hook": {"make": changed(on_after_backward=clips_in_a_hook)},
    "noise on gradients in a hook": {"make": changed(on_after_backward=noise_on_gradients)},
    "a projection after the step": {"make": changed(on_train_batch_end=projects)},
    "a scheduled dropout rate": {"make": changed(on_train_batch_start=schedules_dropout)},
    "clipping of one's own": {"make": changed(configure_gradient_clipping=own_clipping)},
    "lookahead": {"callbacks": [Ema]},
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FOUND_OUT)
def test_habits_that_are_found_out(name):
    """The window ends with a reason, and what was logged before is right; the training goes on as without it."""
    monitor, trace = run(FOUND_OUT[name])
    reasons = [each for each in monitor.reasons if each.code in WINDOW_ENDS]
    print(f"{name}: {reasons[-1]}")
    assert reasons[-1].values["start"] == max(steps_of(monitor))
    last = monitor.history[max(monitor.history)]
    assert "drift/cosine" not in last
    assert last["window/status"] == 0.0
    assert last["drift/measured"] > 0
    assert_identical(trace, run(FOUND_OUT[name], watch=False)[1])


def needs_a_strategy(self, batch, batch_idx):
    return self.loss(*batch) / self.trainer.strategy.root_device.index


def test_what_a_copy_cannot_have_is_said():
    model = changed(training_step=needs_a_strategy)()
    optimizer = model.configure_optimizers()
    path = make_twin(model, optimizer)
    batch = data()[:4]
    step = Step.of(model, optimizer, [MicroBatch((batch, 0), {}, {"global_step": 0}, RandomState.now())])
    with pytest.raises(
        AttributeError, match=r"trainer\.strategy\.root_device is not available to a training step that runs on a copy"
    ):
        path.descend(TrainingStepGradient(), step, [0])


def test_a_copy_keeps_nothing_and_logs_nothing():
    """What training_step appends, logs and keeps is put back; data sets are shared."""
    model = changed(training_step=keeps_lists)()
    model.data = data()
    optimizer = model.configure_optimizers()
    path = make_twin(model, optimizer)
    values = {"global_step": 0, "current_epoch": 3}
    step = Step.of(model, optimizer, [MicroBatch((data()[:4], 0), {}, values, RandomState.now())])
    before = model.head.weight.detach().clone()
    for _ in range(3):
        path.descend(TrainingStepGradient(), step, [0])
    assert not hasattr(path.module, "kept")
    assert path.module.data is model.data
    assert torch.equal(model.head.weight, before)
    assert not torch.equal(path.module.head.weight, before)
    assert model._trainer is None


def test_the_wrapper_is_taken_off_again():
    model = Digits()
    monitor, _ = fit(model, steps=12, window=8)
    assert "training_step" not in vars(model)
    assert [step for step, point in monitor.history.items() if "drift/cosine" in point] == list(range(5, 13))


def test_windows_that_follow_one_another_keep_no_batches():
    model, kept = Digits(), []

    class Count(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            kept.append(sum(type(each) is MicroBatch for each in gc.get_objects()))

    fit(model, Count(), steps=24, window=6)
    assert max(kept) <= 2
    assert "training_step" not in vars(model)
