"""Set-ups, good, unusual and bad: each gives its error, its mark, or the same figures as any other; none a wrong one."""

import copy
import math
import warnings
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from tests.callbacks.test_monitor import Net, Normed, Recorder, data, seeded, weights
from torch_singlim import (
    AntiCorrelated,
    DropConnect,
    Dropout,
    InjectNoise,
    InputNoise,
    LabelNoise,
    SingularLimitMonitor,
)


class Noisy(Net):
    def forward(self, x):
        return super().forward(x) + 0 * torch.rand(1) + torch.rand(1)


class Augmented(Dataset):
    def __len__(self):
        return 20

    def __getitem__(self, i):
        return torch.randn(6), 0


class Dicts(Dataset):
    def __len__(self):
        return 20

    def __getitem__(self, i):
        return {"x": torch.zeros(6), "y": 0}


class Triples(Dicts):
    def __getitem__(self, i):
        return torch.zeros(6), 0, 1.0


class Named(Dicts):
    def __getitem__(self, i):
        x, y = data()[i]
        return {"x": x, "y": {"label": y}}


def of_dict(batch):
    return batch["x"], batch["y"]["label"]


class DictNet(Net):
    def training_step(self, batch, batch_idx):
        return super().training_step(of_dict(batch), batch_idx)


class Stream(IterableDataset):
    def __iter__(self):
        return iter([(x, y) for x, y in data()])


class Manual(Net):
    """Its own optimization, two steps a batch."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for _ in range(2):
            loss = super().training_step(batch, batch_idx)["loss"]
            self.optimizers().zero_grad()
            self.manual_backward(loss)
            self.optimizers().step()


class Two(Manual):
    def configure_optimizers(self):
        return [torch.optim.SGD(self.body.parameters(), lr=0.1), torch.optim.SGD(self.head.parameters(), lr=0.1)]


def with_optimizer(make):
    class Optimized(Net):
        def configure_optimizers(self):
            return make(self)

    return Optimized


def scheduled(self):
    optimizer = torch.optim.SGD(self.parameters(), lr=0.2, momentum=0.5)
    return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 4, 0.5), "interval": "step"}]


def warmed_up(self):
    optimizer = torch.optim.SGD(self.parameters(), lr=0.2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(step / 4, 1.0))
    return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def groups(self, first, second, **common):
    parts = [{"params": self.body.parameters(), **first}, {"params": self.head.parameters(), **second}]
    return torch.optim.SGD(parts, lr=0.2, **common)


def scheduled_groups(self):
    optimizer = groups(self, {"lr": 0.1}, {}, momentum=0.5)
    return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 4, 0.5), "interval": "step"}]


class Functional(Net):
    def forward(self, x):
        return F.dropout(super().forward(x), 0.1, self.training)


class FusedNorm(Net):
    def forward(self, x):
        return self.head(F.layer_norm(self.body(x), (32,)))


class Normalised(Net):
    def forward(self, x):
        return self.head(self.norm(self.body(x)))

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(32)


class Frozen(Net):
    def __init__(self):
        super().__init__()
        self.body[0].weight.requires_grad_(False)

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.2)


class Held(Frozen):
    """Frozen weights, which the optimizer is given all the same."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.2)


class OwnClipping(Net):
    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        self.clip_gradients(optimizer, gradient_clip_val=1.0, gradient_clip_algorithm="norm")


class Module(L.LightningDataModule):
    def train_dataloader(self):
        return DataLoader(data(), batch_size=6, shuffle=True)


class Tied(Net):
    def __init__(self, **options):
        super().__init__(**options)
        self.middle = nn.Linear(32, 32)

    def forward(self, x):
        return self.head(self.middle(torch.tanh(self.middle(self.body(x)))))


class Late(Net):
    def configure_model(self):
        self.head = nn.Linear(32, 3) if not hasattr(self, "made") else self.head
        self.made = True


class Compiled(Net):
    def __init__(self):
        super().__init__()
        self.body = torch.compile(self.body, backend="eager")


class Words(Net):
    """Integer inputs."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 6)

    def forward(self, x):
        return super().forward(self.embedding(x).mean(1))


def words():
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randint(5, (20, 4), generator=generator), data().tensors[1])


class Validated(Net):
    def validation_step(self, batch, batch_idx):
        self.log("val_loss", super().training_step(batch, batch_idx)["loss"])

    def val_dataloader(self):
        return DataLoader(data(seed=1), batch_size=5)


@dataclass
class Case:
    """What is trained, with which monitor and trainer."""

    make: Any = Net
    monitor: dict = field(default_factory=dict)
    trainer: dict = field(default_factory=dict)
    dataset: Any = None
    callbacks: Any = tuple
    message: str = ""


Bad = (torch.full((4, 6), math.inf), torch.zeros(4, dtype=torch.long))
Far = (torch.zeros(4, 6), torch.full((4,), 7))

REFUSED = {
    "hard labels": Case(lambda: Net("hard"), message="label_smoothing"),
    "unknown loss": Case(lambda: Net("half"), message="was not recognised; write the training loss as a mean"),
    "wrong loss": Case(monitor={"loss": nn.CrossEntropyLoss(label_smoothing=0.1)}, message="where training_step gives"),
    "step needs trainer": Case(lambda: Net("trainer"), message=r"pass it: SingularLimitMonitor\(loss"),
    "random forward": Case(Noisy, {"loss": "mse"}, message="random in evaluation mode"),
    "augmentation": Case(dataset=Augmented(), message="random augmentation"),
    "dict batches": Case(monitor={"loss": "mse"}, dataset=Dicts(), message=r"data=\(inputs, targets\)"),
    "batches of three": Case(monitor={"loss": "mse"}, dataset=Triples(), message="two tensors, got list of 3"),
    "several loaders": Case(dataset=[data(), data()], message="one DataLoader, got list"),
    "a hook that does not fit": Case(
        monitor={"batch_to_problem": lambda batch: batch["x"], "loss": "mse"},
        dataset=Dicts(),
        message=r"batch_to_problem must return \(inputs, targets\), two tensors, got Tensor",
    ),
    "two optimizers": Case(Two, {"loss": "mse"}, message="one optimizer, got 2"),
    "no such parameters": Case(
        monitor={"parameters": "heads.*"}, message=r"'heads\.\*' matches none .* which are body"
    ),
    "tensors of one's own": Case(
        DictNet,
        {"batch_to_problem": of_dict},
        dataset=Named(),
        callbacks=lambda: [InjectNoise(InputNoise(0.1), batch_to_problem=lambda b: (b["x"] * 1, b["y"]["label"]))],
        message="batch's own tensors",
    ),
    "dropout missing": Case(lambda: Net(dropout=0.0), {"noise": Dropout()}, message=r"needs nn\.Dropout layers"),
    "infinite data": Case(monitor={"data": Bad}, message="inputs contain nan"),
    "labels out of range": Case(monitor={"data": Far, "loss": "mse"}, message="class labels must be 0 to 2 .* got 7"),
    "noise given twice": Case(
        monitor={"noise": DropConnect(0.1)}, callbacks=lambda: [InjectNoise(DropConnect(0.1))], message="given twice"
    ),
    "label noise on class labels": Case(
        callbacks=lambda: [InjectNoise(LabelNoise(0.1))], message="floating point targets"
    ),
    "fused normalisation": Case(FusedNorm, message="differentiates this network wrongly.*use the module"),
}
MARKED = {
    "adam": Case(with_optimizer(lambda m: torch.optim.Adam(m.parameters())), message="Adam rescales"),
    "adamw": Case(with_optimizer(lambda m: torch.optim.AdamW(m.parameters())), message="AdamW rescales"),
    "rmsprop": Case(with_optimizer(lambda m: torch.optim.RMSprop(m.parameters())), message="RMSprop rescales"),
    "batch norm": Case(Normed, message="batch normalisation couples"),
    "functional dropout": Case(Functional, message="random beyond the nn.Dropout layers"),
    "groups with different momentum": Case(
        with_optimizer(lambda m: groups(m, {"momentum": 0.5}, {})),
        message="groups differ in momentum; the learning rate",
    ),
    "groups with and without decay": Case(
        with_optimizer(lambda m: groups(m, {"weight_decay": 1e-3}, {})), message="groups differ in weight_decay"
    ),
    "groups and decay": Case(
        with_optimizer(lambda m: groups(m, {"lr": 0.1}, {}, weight_decay=1e-3)),
        message="different learning rates under WeightDecay",
    ),
    "a group that stands": Case(
        with_optimizer(lambda m: groups(m, {"lr": 0.0}, {})), message="rate of a parameter group is 0"
    ),
    "part of the weights": Case(
        with_optimizer(lambda m: torch.optim.SGD(m.head.parameters(), lr=0.2)),
        message=r"holds 2 parameters, 4 are probed.*parameters=",
    ),
    "part of the weights probed": Case(
        monitor={"parameters": ["head.weight", "body.*"]}, message="holds 4 parameters, 3 are probed"
    ),
    "part of the weights probed under noise": Case(
        monitor={"parameters": "head.*"},
        callbacks=lambda: [InjectNoise(AntiCorrelated(0.01))],
        message="holds 4 parameters, 2 are probed",
    ),
    "maximize": Case(
        with_optimizer(lambda m: torch.optim.SGD(m.parameters(), lr=1e-3, maximize=True)), message="maximizes"
    ),
    "no step size": Case(with_optimizer(lambda m: torch.optim.SGD(m.parameters(), lr=0.0)), message="rate is 0"),
    "clipping of one's own": Case(OwnClipping, message="clips gradients in its own way"),
    "subset": Case(monitor={"num_samples": 10}, message="10 of 20 training samples"),
    "a long stream": Case(monitor={"num_samples": 10}, dataset=Stream(), message="10 of a stream of training samples"),
    "manual optimization": Case(Manual, {"loss": "mse"}, message="manual optimization"),
}
FINE = {
    "plain": Case(),
    "accumulation": Case(trainer={"accumulate_grad_batches": 4}),
    "bf16-mixed": Case(trainer={"precision": "bf16-mixed"}),
    "bf16-true": Case(trainer={"precision": "bf16-true"}),
    "64-true": Case(trainer={"precision": "64-true"}),
    "float32 probes": Case(monitor={"dtype": "float32"}),
    "chunks": Case(monitor={"batch_size": 7}),
    "momentum and schedule": Case(with_optimizer(scheduled)),
    "warm-up from zero": Case(with_optimizer(warmed_up)),
    "groups": Case(with_optimizer(lambda m: groups(m, {"lr": 0.1}, {}))),
    "groups with momentum and schedule": Case(with_optimizer(scheduled_groups)),
    "groups and weight noise": Case(
        with_optimizer(lambda m: groups(m, {"lr": 0.1}, {})), callbacks=lambda: [InjectNoise(DropConnect(0.1))]
    ),
    "the weights that are trained": Case(
        with_optimizer(lambda m: torch.optim.SGD(m.head.parameters(), lr=0.2)), {"parameters": "head.*"}
    ),
    "clipping that never acts": Case(trainer={"gradient_clip_val": 1e3}),
    "clipping by value that never acts": Case(trainer={"gradient_clip_val": 1e3, "gradient_clip_algorithm": "value"}),
    "nesterov": Case(lambda: Net("smoothed", momentum=0.9, nesterov=True, lr=0.02)),
    "dampening": Case(lambda: Net(momentum=0.5, dampening=0.5)),
    "weight decay": Case(lambda: Net(weight_decay=1e-3)),
    "injected noise": Case(callbacks=lambda: [InjectNoise(DropConnect(0.1))]),
    "early stopping": Case(
        callbacks=lambda: [EarlyStopping("singlim/loss_gap", patience=50, check_on_train_epoch_end=True)]
    ),
    "layer norm": Case(Normalised),
    "frozen weights": Case(Frozen),
    "frozen weights in the optimizer": Case(Held),
    "tied weights": Case(Tied),
    "weights added late": Case(Late),
    "compiled": Case(Compiled),
    "compiled whole": Case(lambda: torch.compile(Net(), backend="eager")),
    "integer inputs": Case(Words, dataset=words()),
    "validation in between": Case(Validated, trainer={"val_check_interval": 1}),
    "a stream": Case(dataset=Stream()),
    "a data module": Case(dataset=Module()),
    "dict batches": Case(DictNet, {"batch_to_problem": of_dict}, dataset=Named()),
    "dict batches with noise": Case(
        DictNet,
        {"batch_to_problem": of_dict},
        dataset=Named(),
        callbacks=lambda: [InjectNoise(InputNoise(0.1), batch_to_problem=of_dict)],
    ),
    "probe set given": Case(monitor={"data": data().tensors}),
    "profiler": Case(trainer={"profiler": "simple"}),
    "no logger": Case(trainer={"logger": False}),
    "anomaly detection": Case(trainer={"detect_anomaly": True}),
}


def run(case, *monitors, logger=True):
    L.seed_everything(0, verbose=False)
    model = copy.deepcopy(seeded(case.make))
    dataset = data() if case.dataset is None else case.dataset
    options = {"max_steps": 12, "accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
    options |= {"logger": Recorder()} if logger else {}
    # a monitor before those who read from it
    trainer = L.Trainer(
        **options | case.trainer,
        callbacks=[*monitors, *case.callbacks()],
        enable_checkpointing=False,
        log_every_n_steps=1,
    )
    if isinstance(dataset, L.LightningDataModule):
        trainer.fit(model, dataset)
        return weights(model), trainer
    several = dataset if isinstance(dataset, list) else [dataset]
    loaders = [DataLoader(each, batch_size=6, shuffle=not isinstance(each, IterableDataset)) for each in several]
    trainer.fit(model, loaders if len(loaders) > 1 else loaders[0])
    return weights(model), trainer


def monitor_of(case, **options):
    return SingularLimitMonitor(max_overhead=None, **{"window": 5} | case.monitor | options)


def refused(case):
    """Before training, with advice."""
    with pytest.raises(ValueError, match=case.message):
        run(case, monitor_of(case))


def marked(case):
    """Outside the theory: geometry is measured, the drift marked."""
    monitor = monitor_of(case)
    with pytest.warns(UserWarning, match="drift not predicted: .*" + case.message):
        trained, trainer = run(case, monitor)
    tags = {tag for _, metrics in trainer.logger.points for tag in metrics}
    assert {"singlim/loss_gap", "singlim/distance/measured"} <= tags
    assert not {tag for tag in tags if tag.startswith(("singlim/drift", "singlim/limit", "singlim/distance/predicted"))}
    assert monitor.last_window is None
    assert "Drift not predicted: " in monitor.verdict
    assert torch.equal(trained, run(case)[0])


def measured(case):
    """As any other training, and no weight changed."""
    monitor = monitor_of(case)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's own, about a run this small
        trained, _ = run(case, monitor)
        reads = bool(case.callbacks()) and isinstance(case.callbacks()[0], EarlyStopping)
        alone, _ = run(Case(case.make, trainer=case.trainer, dataset=case.dataset) if reads else case)
    assert monitor.not_covered == ()
    logged = {tag for metrics in monitor.history.values() for tag in metrics}
    assert {"singlim/distance/measured", "singlim/drift/cosine", "singlim/drift/null_cosine"} <= logged
    assert torch.equal(trained, alone)


SETUPS = [
    *(pytest.param(refused, case, id=f"refused: {name}") for name, case in REFUSED.items()),
    *(pytest.param(marked, case, id=f"marked: {name}") for name, case in MARKED.items()),
    *(pytest.param(measured, case, id=f"measured: {name}") for name, case in FINE.items()),
]


@pytest.mark.parametrize(("outcome", "case"), SETUPS)
@pytest.mark.filterwarnings("ignore:.*not over-parameterised")
def test_setups(outcome, case):
    """Each has its outcome, and there are 40 and more."""
    outcome(case)


class Moves(L.Callback):
    """Whether each step has moved the weights."""

    def __init__(self):
        self.moved = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.before = weights(pl_module)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.moved.append(not torch.equal(self.before, weights(pl_module)))


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_16_mixed_counts_the_steps_that_its_loss_scaling_lets_through():
    """The scale starts too high: the first steps are left out, by torch, and the clock stands."""

    def scaled():
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
        return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler=scaler)], "max_steps": 20}

    moves, monitor = Moves(), monitor_of(Case(), every_n_steps=5)
    trained, _ = run(Case(trainer=scaled(), callbacks=lambda: [moves]), monitor)
    assert torch.equal(trained, run(Case(trainer=scaled()))[0])
    assert not all(moves.moved[:5])
    assert all(moves.moved[10:])
    assert monitor.state_dict()["step_lengths"] == pytest.approx(0.2 * sum(moves.moved))
    assert 20 in {step for step, point in monitor.history.items() if "singlim/drift/cosine" in point}
    if not any(moves.moved[:5]):
        assert monitor.withdrawn == ["no weight was moved in the steps 0-5"]


class Norms(L.Callback):
    """Sizes of the gradients before they are clipped."""

    def __init__(self, order):
        self.order, self.sizes = order, []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        gradient = torch.cat([p.grad.reshape(-1) for p in pl_module.parameters()])
        self.sizes.append(torch.linalg.vector_norm(gradient, self.order).item())


@pytest.mark.parametrize(("algorithm", "order", "bound"), [("norm", 2, 0.8), ("value", math.inf, 0.25)])
def test_clipping_that_acts_withdraws_its_windows(algorithm, order, bound):
    norms = Norms(order)
    clipping = {"gradient_clip_val": bound, "gradient_clip_algorithm": algorithm, "max_steps": 60}
    case = Case(trainer=clipping, callbacks=lambda: [norms])
    monitor = monitor_of(case, window=5, every_n_steps=5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run(case, monitor)
    starts = range(0, 60, 5)
    counts = {start: sum(size > bound for size in norms.sizes[start : start + 5]) for start in starts}
    assert 0 in counts.values()
    assert any(counts.values())
    predicted = {step - 5 for step, point in monitor.history.items() if "singlim/drift/window" in point}
    assert predicted == {start for start, count in counts.items() if count == 0}
    assert monitor.withdrawn == [
        f"gradients were clipped in {count} of the steps {start}-{start + 5}"
        for start, count in counts.items()
        if count
    ]


def test_a_schedule_that_changes_the_groups_ratio_ends_the_predictions():
    def drifting_apart(self):
        optimizer = groups(self, {"lr": 0.1}, {})
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda step: 1.0, lambda step: 0.9 ** (step // 6)])
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    case = Case(with_optimizer(drifting_apart))
    monitor = monitor_of(case)
    with pytest.warns(UserWarning, match="changes the ratio of the parameter groups' learning rates"):
        run(case, monitor)
    windows = [step for step, point in monitor.history.items() if "singlim/drift/window" in point]
    assert windows == [5]
    assert "changes the ratio" in monitor.verdict


def test_half_precision_is_upcast_and_said(caplog):
    case = FINE["bf16-true"]
    with warnings.catch_warnings(), caplog.at_level("INFO"):
        warnings.simplefilter("ignore")
        run(case, monitor_of(case))
    assert "weights in bfloat16 probed in float64" in caplog.text


def test_two_monitors_two_probe_sets(tmp_path):
    """Each logs under its own name; what others monitor is there; any logger takes it."""
    first, second = monitor_of(Case()), monitor_of(Case(), data=data(n=8, seed=3).tensors, name="other")
    best = ModelCheckpoint(tmp_path, monitor="other/distance/measured", every_n_train_steps=5, filename="best")
    L.seed_everything(0, verbose=False)
    board, table = TensorBoardLogger(tmp_path), CSVLogger(tmp_path)
    trainer = L.Trainer(
        max_steps=12,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=[board, table],
        callbacks=[first, second, best],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(seeded(Net), DataLoader(data(), batch_size=6))
    assert (tmp_path / "best.ckpt").exists()
    seen = [
        second.history[step]["singlim/distance/measured"] for step in (0, 7)
    ]  # the last ones known at steps 5 and 10
    assert best.best_model_score == pytest.approx(min(seen))
    keys = torch.load(tmp_path / "best.ckpt", weights_only=True)["callbacks"]
    assert len([key for key in keys if key.startswith("SingularLimitMonitor")]) == 2
    written = next(tmp_path.rglob("metrics.csv")).read_text().splitlines()[0]
    assert "singlim/loss_gap" in written
    assert "other/loss_gap" in written
    assert first.history[0] != second.history[0]


def test_one_name_twice_is_refused_by_lightning():
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `SingularLimitMonitor`"):
        L.Trainer(callbacks=[SingularLimitMonitor(), SingularLimitMonitor()], logger=False)


def test_strategies_that_spread_the_weights_are_refused(monkeypatch):
    class FSDPStrategy(L.pytorch.strategies.SingleDeviceStrategy):
        """Goes by the name."""

    with pytest.raises(ValueError, match=r'FSDPStrategy spreads .* use strategy="ddp"'):
        run(Case(trainer={"strategy": FSDPStrategy(device="cpu")}), monitor_of(Case()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window must be at least 1"),
        ({"num_samples": 0}, "num_samples must be at least 1"),
        ({"window": 10, "every_n_steps": 5}, "may not overlap"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        SingularLimitMonitor(max_overhead=None, **options)
