"""What tests train: Lightning modules, data, one harness to fit them, and recorders of what happens meanwhile."""

import copy
import random

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from tests.problems import Bend
from torch_singlim import InjectNoise, SingularLimitMonitor
from torch_singlim.measure import Code

# --- data and modules ----------------------------------------------------------------------------------------------


def data(n=20, d=6, classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(n, d, generator=generator), torch.randint(classes, (n,), generator=generator))


class Net(L.LightningModule):
    """One hidden layer with dropout, class labels, SGD."""

    def __init__(self, loss="mse", dropout=0.2, hidden=32, classes=3, **optimizer):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, hidden), nn.Tanh(), nn.Dropout(dropout))
        self.head = nn.Linear(hidden, classes)
        self.kind, self.classes, self.optimizer = loss, classes, {"lr": 0.2} | optimizer

    def forward(self, x):
        return self.head(self.body(x))

    def training_step(self, batch, batch_idx):
        x, y = batch
        f = self(x)
        losses = {
            "mse": lambda: F.mse_loss(f, F.one_hot(y, self.classes).to(f)),
            "smoothed": lambda: F.cross_entropy(f, y, label_smoothing=0.13),
            "hard": lambda: F.cross_entropy(f, y),
            "half": lambda: 0.5 * F.mse_loss(f, F.one_hot(y, self.classes).to(f)),
            "trainer": lambda: F.mse_loss(f, F.one_hot(y, self.classes).to(f)) * (1 if self.trainer.training else 2),
            "loop": lambda: F.mse_loss(f, F.one_hot(y, self.classes).to(f)) * (2 if self.trainer.fit_loop.done else 1),
        }
        loss = losses[self.kind]()
        self.log("train_loss", loss)
        return {"loss": loss}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), **self.optimizer)


class Hyper(Net):
    """With hyperparameters, which Lightning logs."""

    def __init__(self, width=32):
        super().__init__(hidden=width)
        self.save_hyperparameters()


class Normed(Net):
    """Batch normalisation."""

    def __init__(self, **options):
        super().__init__(**options)
        self.body = nn.Sequential(nn.Linear(6, 32), nn.BatchNorm1d(32), nn.Tanh(), nn.Dropout(0.2))


class LayerNormed(Net):
    """Layer normalisation by torch's module, or another layer."""

    def __init__(self, kind=lambda: nn.LayerNorm(32)):
        super().__init__()
        self.norm = kind()

    def forward(self, x):
        return self.head(self.norm(self.body(x)))


class FusedNorm(Net):
    """torch's function for layer normalisation, whose higher derivatives are wrong."""

    def forward(self, x):
        return self.head(F.layer_norm(self.body(x), (32,)))


class Bending(Net):
    """A function whose second derivative is wrong."""

    def forward(self, x):
        return self.head(Bend.apply(self.body(x)))


class Attending(Net):
    """Attention with dropout of its weights, between dropout layers."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.1, batch_first=True)

    def forward(self, x):
        h = self.body(x).unflatten(1, (4, 8))
        return self.head((h + self.attention(h, h, h)[0]).flatten(1))


class Recurrent(Net):
    """Two recurrent layers with dropout in between."""

    def __init__(self):
        super().__init__()
        self.recurrent = nn.GRU(16, 16, 2, dropout=0.1, batch_first=True)

    def forward(self, x):
        return self.head(self.recurrent(self.body(x).unflatten(1, (2, 16)))[0].flatten(1))


class Tied(Net):
    """One layer, used twice."""

    def __init__(self, **options):
        super().__init__(**options)
        self.middle = nn.Linear(32, 32)

    def forward(self, x):
        return self.head(self.middle(torch.tanh(self.middle(self.body(x)))))


class Validated(Net):
    def validation_step(self, batch, batch_idx):
        self.log("val_loss", super().training_step(batch, batch_idx)["loss"])

    def val_dataloader(self):
        return DataLoader(data(seed=1), batch_size=5)


class OwnClipping(Net):
    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        self.clip_gradients(optimizer, gradient_clip_val=1.0, gradient_clip_algorithm="norm")


class Manual(Net):
    """Its own optimization, two steps a batch."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizers = self.optimizers()
        for optimizer in optimizers if isinstance(optimizers, list) else 2 * [optimizers]:
            loss = super().training_step(batch, batch_idx)["loss"]
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()


class Two(Manual):
    """Two optimizers."""

    def configure_optimizers(self):
        return [torch.optim.SGD(self.body.parameters(), lr=0.1), torch.optim.SGD(self.head.parameters(), lr=0.1)]


def with_optimizer(make):
    """A `Net` whose optimizer, or optimizer and schedule, comes from a function of the module."""

    class Optimized(Net):
        def configure_optimizers(self):
            return make(self)

    return Optimized


Adam = with_optimizer(lambda module: torch.optim.Adam(module.parameters()))
AdamW = with_optimizer(lambda module: torch.optim.AdamW(module.parameters()))


def groups(module, first, second, **common):
    """SGD with a group for the body of a `Net` and one for its head."""
    parts = [{"params": module.body.parameters(), **first}, {"params": module.head.parameters(), **second}]
    return torch.optim.SGD(parts, **{"lr": 0.2} | common)


def scheduled(optimizer, schedule=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 4, 0.5)):
    """With a schedule of the learning rate, step by step."""
    return [optimizer], [{"scheduler": schedule(optimizer), "interval": "step"}]


# --- training ------------------------------------------------------------------------------------------------------


def seeded(make):
    torch.manual_seed(7)
    return make()


def weights(module):
    return torch.cat([p.detach().reshape(-1) for p in module.parameters()])


def trainer_of(*callbacks, **options):
    """A quiet Trainer on the CPU; it writes checkpoints where a callback is for that."""
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "log_every_n_steps": 1}
    quiet["enable_checkpointing"] = any(isinstance(each, Checkpoint) for each in callbacks)
    return L.Trainer(**{"accelerator": "cpu", **quiet, **options}, callbacks=list(callbacks))


def loader_of(dataset, batch_size=6, *, shuffle=True):
    shuffle = shuffle and not isinstance(dataset, IterableDataset)
    return DataLoader(dataset, batch_size=batch_size, shuffle=shuffle)


def fit(model, *callbacks, steps=20, dataset=None, batch_size=6, shuffle=True, seed=0, ckpt_path=None, **options):
    """A copy of the model after a fit that is always the same, and its Trainer.

    Args:
        model: stays as it is.
        callbacks: of the Trainer.
        steps: of the optimizer.
        dataset: also a list of them, or a data module; default: `data`.
        batch_size: of the loader.
        shuffle: likewise.
        seed: of all global generators.
        ckpt_path: a checkpoint to go on from.
        options: of the Trainer.
    """
    L.seed_everything(seed, verbose=False)
    model, dataset = copy.deepcopy(model), data() if dataset is None else dataset
    trainer = trainer_of(*callbacks, **{"max_steps": steps} | options)
    if not isinstance(dataset, L.LightningDataModule):
        several = [loader_of(each, batch_size, shuffle=shuffle) for each in dataset] if type(dataset) is list else None
        dataset = several or loader_of(dataset, batch_size, shuffle=shuffle)
    trainer.fit(model, dataset, ckpt_path=ckpt_path)
    return model, trainer


def monitor_of(**options):
    """A monitor of short windows, few random directions, and time for all of them."""
    return SingularLimitMonitor(**{"max_overhead": None, "window": 5, "num_draws": 2} | options)


def injected(noise, **options):
    """Callbacks, made anew for each training, that inject a noise."""
    return lambda: [InjectNoise(noise, **options)]


def reasons_of(monitor):
    """All but those that windows of a few steps are too short for their noise to be resolved."""
    return [reason for reason in monitor.reasons if reason.code is not Code.UNRESOLVED]


# what is logged of the levels of the loss, and of its curvature
LEVELS = {"stability"} | {
    f"distance/{level}{model}" for level in ("half", "tenth", "hundredth") for model in ("", "_linear")
}
# at the points of these
WHOLE = {f"distance/{level}_whole" for level in ("half", "tenth", "hundredth")}


def tags_of(monitor):
    """All that it measured."""
    return {tag for point in monitor.history.values() for tag in point}


# --- recorders -----------------------------------------------------------------------------------------------------


class Recorder(Logger):
    """A logger that remembers what it was told."""

    def __init__(self):
        super().__init__()
        self.points: list[tuple[int, dict]] = []

    @property
    def name(self):
        return "recorder"

    @property
    def version(self):
        return 0

    def log_metrics(self, metrics, step=None):
        self.points.append((step, dict(metrics)))

    def log_hyperparams(self, *args, **kwargs):
        pass

    def series(self, tag):
        return {step: metrics[tag] for step, metrics in self.points if tag in metrics}

    def of_monitor(self, name="singlim"):
        """What the monitor of this name has logged, each time: step and tag -> value, tags without the name."""
        own = ((step, {t: v for t, v in metrics.items() if t.startswith(f"{name}/")}) for step, metrics in self.points)
        return [(step, {t.removeprefix(f"{name}/"): v for t, v in point.items()}) for step, point in own if point]


def _random_state_of(device):
    """Of an accelerator."""
    return None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)


class Trace(L.Callback):
    """All of a training that a measurement could disturb: after each batch, at the end, where it is broken off."""

    def __init__(self):
        self.states = []

    def _take(self, trainer, module):
        held = [state for each in trainer.optimizers for state in each.state.values()]
        logged = {tag: value for tag, value in trainer.callback_metrics.items() if "/" not in tag}  # not a monitor's
        self.states.append(
            {
                "optimizer": [v.clone() for state in held for v in state.values() if isinstance(v, Tensor)],
                "logged": [torch.as_tensor(logged[tag]).clone() for tag in sorted(logged)],
                "weights": weights(module).clone(),
                "gradients": [None if p.grad is None else p.grad.clone() for p in module.parameters()],
                "buffers": [b.clone() for b in module.buffers()],
                "modes": [m.training for m in module.modules()],
                "torch": torch.get_rng_state(),
                "device": _random_state_of(module.device),
                "random": random.getstate(),
                "numpy": np.random.get_state()[1].tobytes(),  # noqa: NPY002  # the legacy state is what must not change
            }
        )

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self._take(trainer, pl_module)

    def on_train_end(self, trainer, pl_module):
        self._take(trainer, pl_module)

    def on_exception(self, trainer, pl_module, exception):
        self._take(trainer, pl_module)


def identical(a, b):
    """To the last bit; nan is nan."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(identical, a, b))
    return bool(a == b)


def assert_identical(trace, other):
    """That two trainings went through the same states."""
    assert len(trace.states) == len(other.states)
    for i, (a, b) in enumerate(zip(trace.states, other.states, strict=True)):
        different = [key for key in a if not identical(a[key], b[key])]
        assert not different, f"after batch {i + 1}"
