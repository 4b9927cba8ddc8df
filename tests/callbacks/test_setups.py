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
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from tests.callbacks.test_monitor import Net, Normed, Recorder, data, seeded, weights
from torch_singlim import DropConnect, Dropout, InjectNoise, LabelNoise, SingularLimitMonitor


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


class Tied(Net):
    def __init__(self):
        super().__init__()
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
    "groups": Case(
        with_optimizer(
            lambda m: torch.optim.SGD(
                [{"params": m.body.parameters(), "lr": 0.1}, {"params": m.head.parameters()}], lr=0.2
            )
        ),
        message="parameter groups",
    ),
    "part of the weights": Case(
        with_optimizer(lambda m: torch.optim.SGD(m.head.parameters(), lr=0.2)), message="does not hold exactly"
    ),
    "maximize": Case(
        with_optimizer(lambda m: torch.optim.SGD(m.parameters(), lr=1e-3, maximize=True)), message="maximizes"
    ),
    "no step size": Case(with_optimizer(lambda m: torch.optim.SGD(m.parameters(), lr=0.0)), message="rate is 0"),
    "clipping": Case(trainer={"gradient_clip_val": 1.0}, message="gradient clipping is on"),
    "clipping by value": Case(
        trainer={"gradient_clip_val": 1.0, "gradient_clip_algorithm": "value"}, message="gradient clipping is on"
    ),
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
    "nesterov": Case(lambda: Net("smoothed", momentum=0.9, nesterov=True, lr=0.02)),
    "dampening": Case(lambda: Net(momentum=0.5, dampening=0.5)),
    "weight decay": Case(lambda: Net(weight_decay=1e-3)),
    "injected noise": Case(callbacks=lambda: [InjectNoise(DropConnect(0.1))]),
    "early stopping": Case(
        callbacks=lambda: [EarlyStopping("singlim/loss_gap", patience=50, check_on_train_epoch_end=True)]
    ),
    "layer norm": Case(Normalised),
    "frozen weights": Case(Frozen),
    "tied weights": Case(Tied),
    "weights added late": Case(Late),
    "compiled": Case(Compiled),
    "compiled whole": Case(lambda: torch.compile(Net(), backend="eager")),
    "integer inputs": Case(Words, dataset=words()),
    "validation in between": Case(Validated, trainer={"val_check_interval": 1}),
    "a stream": Case(dataset=Stream()),
    "dict batches": Case(DictNet, {"batch_to_problem": of_dict}, dataset=Named()),
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
    several = dataset if isinstance(dataset, list) else [dataset]
    loaders = [DataLoader(each, batch_size=6, shuffle=not isinstance(each, IterableDataset)) for each in several]
    trainer.fit(model, loaders if len(loaders) > 1 else loaders[0])
    return weights(model), trainer


def monitor_of(case, **options):
    return SingularLimitMonitor(max_overhead=None, **{"window": 5} | case.monitor | options)


def test_there_are_forty_and_more():
    assert len(REFUSED) + len(MARKED) + len(FINE) > 40


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_training(name):
    with pytest.raises(ValueError, match=REFUSED[name].message):
        run(REFUSED[name], monitor_of(REFUSED[name]))


@pytest.mark.parametrize("name", MARKED)
def test_outside_the_theory_geometry_is_measured_and_the_drift_marked(name):
    case, monitor = MARKED[name], monitor_of(MARKED[name])
    with pytest.warns(UserWarning, match="drift not predicted: .*" + case.message):
        trained, trainer = run(case, monitor)
    tags = {tag for _, metrics in trainer.logger.points for tag in metrics}
    assert {"singlim/loss_gap", "singlim/distance/measured"} <= tags
    assert not {tag for tag in tags if tag.startswith(("singlim/drift", "singlim/limit", "singlim/distance/predicted"))}
    assert monitor.last_window is None
    assert "Drift not predicted: " in monitor.verdict
    assert torch.equal(trained, run(case)[0])


@pytest.mark.parametrize("name", FINE)
@pytest.mark.filterwarnings("ignore:.*not over-parameterised")
def test_measured_as_any_other_and_no_weight_changed(name):
    case, monitor = FINE[name], monitor_of(FINE[name])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's own, about a run this small
        trained, _ = run(case, monitor)
        reads = bool(case.callbacks()) and isinstance(case.callbacks()[0], EarlyStopping)
        alone, _ = run(Case(case.make, trainer=case.trainer, dataset=case.dataset) if reads else case)
    assert monitor.not_covered == ()
    logged = {tag for metrics in monitor.history.values() for tag in metrics}
    assert {"singlim/distance/measured", "singlim/drift/cosine", "singlim/drift/null_cosine"} <= logged
    assert torch.equal(trained, alone)


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
