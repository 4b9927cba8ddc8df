"""Trainings, usual, unusual and contradictory, and what a monitor is expected to make of each."""

import math
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import EarlyStopping, GradientAccumulationScheduler
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from tests.zoo import (
    Adam,
    Attending,
    Bending,
    FusedNorm,
    LayerNormed,
    Manual,
    Net,
    Normed,
    OwnClipping,
    Tied,
    Two,
    Validated,
    data,
    groups,
    injected,
    scheduled,
    with_optimizer,
)
from torch_singlim import AntiCorrelated, DropConnect, Dropout, InputNoise, LabelNoise
from torch_singlim.measure import Code

# --- unusual data --------------------------------------------------------------------------------------------------


class Augmented(Dataset):
    """Other inputs at every reading."""

    def __len__(self):
        return 20

    def __getitem__(self, i):
        return torch.randn(6), i % 3


class Named(Augmented):
    """Nested dictionaries."""

    def __getitem__(self, i):
        x, y = data()[i]
        return {"x": x, "y": {"label": y}}


class Triples(Augmented):
    def __getitem__(self, i):
        return (*data()[i], 1.0)


class Fragile(Augmented):
    """Items that can be read in training alone."""

    def __getitem__(self, i):
        if not torch.is_grad_enabled():
            raise OSError("the file is gone")
        return data()[i]


class Stream(IterableDataset):
    def __iter__(self):
        return iter([(x, y) for x, y in data()])


class Module(L.LightningDataModule):
    def train_dataloader(self):
        return DataLoader(data(), batch_size=6, shuffle=True)


def words():
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randint(5, (20, 4), generator=generator), data().tensors[1])


def of_dict(batch):
    """`Named` batches as (inputs, targets)."""
    return batch["x"], batch["y"]["label"]


def sentences(*, equal=True):
    """The next word at each of four positions, but the first, and one more of every other sentence if not equal."""
    x = words().tensors[0][:12]
    y = (x + 1) % 5
    y[:, 0] = -100
    y[::2, -1] = y[::2, -1] if equal else -100
    return TensorDataset(x, y)


INFINITE = (torch.full((4, 6), math.inf), torch.zeros(4, dtype=torch.long))
OUT_OF_RANGE = (torch.zeros(4, 6), torch.full((4,), 7))

# --- unusual modules -----------------------------------------------------------------------------------------------


def reading(read):
    """Trained on a part of each batch."""

    class Reading(Net):
        def training_step(self, batch, batch_idx):
            return super().training_step(read(batch), batch_idx)

    return Reading


OfDict = reading(of_dict)


class Noisy(Net):
    """Random in evaluation mode."""

    def forward(self, x):
        return super().forward(x) + torch.rand(1, device=x.device)


class Functional(Net):
    """Dropout that is no layer."""

    def forward(self, x):
        return F.dropout(super().forward(x), 0.1, self.training)


class Drawing(Net):
    """Noise that is drawn in forward."""

    def forward(self, x):
        return super().forward(x + 0.1 * torch.randn_like(x) if self.training else x)


class TwoInputs(Net):
    """Whose forward takes more than the inputs."""

    def forward(self, x, scale):
        return super().forward(x) * scale

    def training_step(self, batch, batch_idx):
        return F.mse_loss(self(batch[0], 2.0), F.one_hot(batch[1], 3).float())


class Skipping(Net):
    """Without a loss in the first step and in another one."""

    def training_step(self, batch, batch_idx):
        return None if self.trainer.global_step in (0, 8) else super().training_step(batch, batch_idx)


class Weightless(Manual):
    """Nothing is trained."""

    def __init__(self):
        super().__init__()
        self.requires_grad_(False)

    def training_step(self, batch, batch_idx):
        self.optimizers().step()


class Brief(Net):
    """A step that does not ask for the number of the batch, which Lightning allows."""

    def training_step(self, batch):
        return super().training_step(batch, 0)


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


class Late(Net):
    """Weights added by Lightning's hook."""

    def configure_model(self):
        self.head = nn.Linear(32, 3) if not hasattr(self, "made") else self.head
        self.made = True


class Compiled(Net):
    def __init__(self):
        super().__init__()
        self.body = torch.compile(self.body, backend="eager")


class Language(Net):
    """Words of which each is predicted from those before it, all of them in one loss."""

    def __init__(self, first=False):
        super().__init__()
        self.body, self.classes_first = nn.Sequential(nn.Embedding(5, 8), nn.Dropout(0.1)), first
        self.mix, self.head = nn.Linear(8, 16), nn.Linear(16, 5)

    def forward(self, x):
        f = self.head(self.mix(self.body(x).cumsum(1)).tanh())
        return f.transpose(1, 2) if self.classes_first else f

    def training_step(self, batch, batch_idx):
        x, y = batch
        f = self(x) if self.classes_first else self(x).transpose(1, 2)
        return F.cross_entropy(f, y, label_smoothing=0.1)


class Words(Net):
    """Integer inputs."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 6)

    def forward(self, x):
        return super().forward(self.embedding(x).mean(1))


def warm_up(optimizer):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(step / 4, 1.0))


class OfIterator(Net):
    """Takes the batches itself."""

    def training_step(self, dataloader_iter):
        (x, y), _, _ = next(dataloader_iter)
        return F.mse_loss(self(x), F.one_hot(y, 3).float())


# --- what is expected of them --------------------------------------------------------------------------------------


@dataclass
class Case:
    """A training.

    Args:
        make: the module.
        monitor: options of the monitor.
        trainer: of the Trainer.
        dataset: default: `data`.
        callbacks: beside the monitor, made anew for each run.
        code: of the one reason that is expected.
        message: what it says, or an error.
        also: of a second reason, for what it does to paths.
    """

    make: Any = Net
    monitor: dict = field(default_factory=dict)
    trainer: dict = field(default_factory=dict)
    dataset: Any = None
    callbacks: Any = tuple
    code: Code | None = None
    message: str = ""
    also: Code | None = None


# options that contradict each other, or the training
RAISES = {
    "no such parameters": Case(
        monitor={"parameters": "heads.*"}, message=r"'heads\.\*' matches none .* which are body"
    ),
    "noise given twice": Case(
        monitor={"noise": DropConnect(0.1)}, callbacks=injected(DropConnect(0.1)), message="given twice"
    ),
    "dropout without layers": Case(lambda: Net(dropout=0.0), {"noise": Dropout()}, message=r"needs nn\.Dropout layers"),
    "label noise on class labels": Case(callbacks=injected(LabelNoise(0.1)), message="floating point targets"),
    "noise on tensors that are not the batch's": Case(
        OfDict,
        {"batch_to_problem": of_dict},
        dataset=Named(),
        callbacks=injected(InputNoise(0.1), batch_to_problem=lambda b: (b["x"] * 1, b["y"]["label"])),
        message="batch's own tensors",
    ),
}
# no zero-loss problem: the motion of the weights is measured, and nothing else
NO_PROBLEM = {
    "hard labels": Case(lambda: Net("hard"), code=Code.NOT_ATTAINED, message="label_smoothing"),
    "sentences of several lengths": Case(
        Language, dataset=sentences(equal=False), message="positions to be predicted are 2 to 3 in a sample"
    ),
    "unknown loss": Case(lambda: Net("half"), message="was not recognised; write the training loss as a mean"),
    "wrong loss": Case(monitor={"loss": nn.CrossEntropyLoss(label_smoothing=0.1)}, message="where training_step gives"),
    "no loss of that kind": Case(monitor={"loss": nn.L1Loss()}, message="loss"),
    "step needs the trainer's loop": Case(
        lambda: Net("loop"), message=r"pass it: SingularLimitMonitor\(loss", also=Code.NO_STEP_ON_COPY
    ),
    "random forward": Case(Noisy, {"loss": "mse"}, message="random in evaluation mode", also=Code.NO_BASELINE),
    "two inputs": Case(TwoInputs, message="TypeError.*scale"),
    "dict batches": Case(OfDict, {"loss": "mse"}, dataset=Named(), message=r"data=\(inputs, targets\)"),
    "batches of three": Case(
        reading(lambda batch: batch[:2]), {"loss": "mse"}, dataset=Triples(), message="two tensors, got list of 3"
    ),
    "several loaders": Case(
        reading(lambda batch: batch[0]), dataset=[data(), data()], message="two tensors, got list of 2"
    ),
    "a hook that does not fit": Case(
        OfDict,
        {"batch_to_problem": lambda batch: batch["x"], "loss": "mse"},
        dataset=Named(),
        message=r"batch_to_problem must return \(inputs, targets\), two tensors, got Tensor",
    ),
    "a hook that fails": Case(
        OfDict, {"batch_to_problem": lambda batch: (batch["x"], batch["z"])}, dataset=Named(), message="'z'"
    ),
    "infinite data": Case(monitor={"data": INFINITE}, message="inputs contain nan"),
    "labels out of range": Case(
        monitor={"data": OUT_OF_RANGE, "loss": "mse"}, message="class labels must be 0 to 2 .* got 7"
    ),
    "wrong derivatives": Case(
        Bending, code=Code.DERIVATIVES, message="differentiates this network wrongly.*elementary"
    ),
}
# distances are measured, and the drift is not predicted
UNSUPPORTED = {
    "an optimizer without a metric": Case(
        with_optimizer(lambda m: torch.optim.NAdam(m.parameters(), foreach=False)),  # rounds the same on every device
        code=Code.OPTIMIZER,
        message="NAdam rescales",
    ),
    "adam with weight decay": Case(
        with_optimizer(lambda m: torch.optim.Adam(m.parameters(), weight_decay=1e-3)),
        code=Code.COUPLED_DECAY,
        message="Adam divides its weight decay by its second moments",
    ),
    "adam and anti-correlated noise": Case(
        Adam,
        callbacks=injected(AntiCorrelated(0.01)),
        code=Code.ADAPTIVE_NOISE,
        message="under Adam the drift of AntiCorrelated is not known",
    ),
    "adamw with groups that differ": Case(
        with_optimizer(
            lambda m: torch.optim.AdamW(
                [{"params": m.body.parameters()}, {"params": m.head.parameters(), "weight_decay": 0.0}]
            )
        ),
        code=Code.GROUPS_DIFFER,
        message="groups differ in weight_decay",
    ),
    "an optimizer with a line search": Case(
        with_optimizer(lambda m: torch.optim.LBFGS(m.parameters(), lr=0.1, max_iter=3)),
        code=Code.OPTIMIZER,
        message="LBFGS rescales",
        also=Code.SEVERAL_CALLS,
    ),
    "two optimizers": Case(Two, {"loss": "mse"}, code=Code.SEVERAL_OPTIMIZERS, message="one optimizer, got 2"),
    "manual optimization": Case(Manual, {"loss": "mse"}, code=Code.MANUAL_OPTIMIZATION, message="manual optimization"),
    "clipping of one's own": Case(
        OwnClipping, code=Code.OWN_CLIPPING, message="clips gradients in its own way", also=Code.REPLAY
    ),
    "groups with different momentum": Case(
        with_optimizer(lambda m: groups(m, {"momentum": 0.5}, {})),
        code=Code.GROUPS_DIFFER,
        message="groups differ in momentum; the learning rate",
    ),
    "groups and decay": Case(
        with_optimizer(lambda m: groups(m, {"lr": 0.1}, {}, weight_decay=1e-3)),
        code=Code.RATIOS_UNDER_NOISE,
        message="different learning rates under WeightDecay",
    ),
    "a group that stands": Case(
        with_optimizer(lambda m: groups(m, {"lr": 0.0}, {})),
        code=Code.NO_STEP_SIZE_OF_GROUP,
        message="rate of a parameter group is 0",
    ),
    "no step size": Case(
        with_optimizer(lambda m: torch.optim.SGD(m.parameters(), lr=0.0)),
        code=Code.NO_STEP_SIZE,
        message="rate is 0",
    ),
    "part of the weights measured under noise": Case(
        monitor={"parameters": "head.*"},
        callbacks=injected(AntiCorrelated(0.01)),
        code=Code.OTHER_PARAMETERS,
        message="holds 4 parameters, 2 are measured",
    ),
    "batch norm": Case(Normed, code=Code.BATCH_NORMALISATION, message="batch normalisation couples"),
    "noise of its own": Case(Drawing, code=Code.OTHER_RANDOMNESS, message="random beyond dropout"),
    "augmentation": Case(dataset=Augmented(), code=Code.FRESH_SAMPLES, message="samples change from epoch to epoch"),
    "subset": Case(monitor={"num_samples": 10}, code=Code.SUBSET, message="10 of 20 training samples"),
    "a long stream": Case(
        monitor={"num_samples": 10}, dataset=Stream(), code=Code.SUBSET, message="10 of a stream of training samples"
    ),
}
MEASURED = {
    "plain": Case(),
    "step reads the trainer": Case(lambda: Net("trainer")),
    "accumulation": Case(trainer={"accumulate_grad_batches": 4}),
    "accumulation that changes": Case(callbacks=lambda: [GradientAccumulationScheduler({1: 2})]),
    "bf16-mixed": Case(trainer={"precision": "bf16-mixed"}),
    "bf16-true": Case(trainer={"precision": "bf16-true"}),
    "64-true": Case(trainer={"precision": "64-true"}),
    "measured in float32": Case(monitor={"dtype": "float32"}),
    "chunks": Case(monitor={"batch_size": 7}),
    "momentum and schedule": Case(
        with_optimizer(lambda m: scheduled(torch.optim.SGD(m.parameters(), lr=0.2, momentum=0.5)))
    ),
    "warm-up from zero": Case(with_optimizer(lambda m: scheduled(torch.optim.SGD(m.parameters(), lr=0.2), warm_up))),
    "groups with momentum and schedule": Case(
        with_optimizer(lambda m: scheduled(groups(m, {"lr": 0.1}, {}, momentum=0.5)))
    ),
    "groups and weight noise": Case(
        with_optimizer(lambda m: groups(m, {"lr": 0.1}, {})), callbacks=injected(DropConnect(0.1))
    ),
    "the weights that are trained": Case(
        with_optimizer(lambda m: torch.optim.SGD(m.head.parameters(), lr=0.2)), {"parameters": "head.*"}
    ),
    "clipping that never acts": Case(trainer={"gradient_clip_val": 1e3}),
    "clipping by value that never acts": Case(trainer={"gradient_clip_val": 1e3, "gradient_clip_algorithm": "value"}),
    "adam": Case(Adam),
    "adamw, decay and schedule": Case(with_optimizer(lambda m: scheduled(torch.optim.AdamW(m.parameters(), lr=1e-2)))),
    "adam with groups": Case(
        with_optimizer(
            lambda m: torch.optim.Adam([{"params": m.body.parameters(), "lr": 1e-3}, {"params": m.head.parameters()}])
        )
    ),
    "nesterov": Case(lambda: Net("smoothed", momentum=0.9, nesterov=True, lr=0.02)),
    "weight decay": Case(lambda: Net(weight_decay=1e-3)),
    "injected noise": Case(callbacks=injected(DropConnect(0.1))),
    "early stopping": Case(
        callbacks=lambda: [EarlyStopping("singlim/excess_loss", patience=50, check_on_train_epoch_end=True)]
    ),
    "layer norm": Case(LayerNormed),
    "functional layer norm": Case(FusedNorm),
    "functional dropout": Case(Functional),
    "attention": Case(Attending),
    "frozen weights": Case(Frozen),
    "frozen weights in the optimizer": Case(Held),
    "tied weights": Case(Tied),
    "weights added late": Case(Late),
    "compiled": Case(Compiled),
    "compiled whole": Case(lambda: torch.compile(Net(), backend="eager")),
    "integer inputs": Case(Words, dataset=words()),
    "a language model": Case(Language, dataset=sentences()),
    "no batch index": Case(Brief),
    "classes before positions": Case(lambda: Language(first=True), dataset=sentences()),
    "a language model, its loss": Case(
        Language, {"loss": nn.CrossEntropyLoss(label_smoothing=0.1)}, dataset=sentences()
    ),
    "validation in between": Case(Validated, trainer={"val_check_interval": 1}),
    "steps without a loss, and clipping": Case(Skipping, {"loss": "mse"}, {"gradient_clip_val": 1e3}),
    "a stream": Case(dataset=Stream()),
    "a stream of unknown length": Case(dataset=Stream(), trainer={"max_steps": -1, "max_epochs": 4}),
    "a data module": Case(dataset=Module()),
    "dict batches": Case(OfDict, {"batch_to_problem": of_dict}, dataset=Named()),
    "dict batches with noise": Case(
        OfDict,
        {"batch_to_problem": of_dict},
        dataset=Named(),
        callbacks=injected(InputNoise(0.1), batch_to_problem=of_dict),
    ),
    "samples given": Case(monitor={"data": data().tensors}),
    "profiler": Case(trainer={"profiler": "simple"}),
    "no logger": Case(trainer={"logger": False}),
    "anomaly detection": Case(trainer={"detect_anomaly": True}),
}
