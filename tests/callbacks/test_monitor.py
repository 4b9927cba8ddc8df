"""The monitor in real trainers: what it finds, what it logs, what it refuses, and that it changes nothing."""

import copy
import math
import random
import warnings
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from torch_singlim import SingularLimitMonitor, WeightDecay
from torch_singlim.callbacks.detect import read_probe_set
from torch_singlim.callbacks.monitor import _out_of_memory
from torch_singlim.measure.schedule import probe_starts
from torch_singlim.measure.distance import FiniteNoise, observe


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


def data(n=20, d=6, classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(n, d, generator=generator), torch.randint(classes, (n,), generator=generator))


class Net(L.LightningModule):
    def __init__(self, loss="mse", dropout=0.2, hidden=32, **optimizer):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, hidden), nn.Tanh(), nn.Dropout(dropout))
        self.head = nn.Linear(hidden, 3)
        self.kind, self.optimizer = loss, {"lr": 0.2} | optimizer

    def forward(self, x):
        return self.head(self.body(x))

    def training_step(self, batch, batch_idx):
        x, y = batch
        f = self(x)
        losses = {
            "mse": lambda: F.mse_loss(f, F.one_hot(y, 3).float()),
            "smoothed": lambda: F.cross_entropy(f, y, label_smoothing=0.13),
            "hard": lambda: F.cross_entropy(f, y),
            "half": lambda: 0.5 * F.mse_loss(f, F.one_hot(y, 3).float()),
            "trainer": lambda: F.mse_loss(f, F.one_hot(y, 3).float()) * (1 if self.trainer.training else 2),
        }
        loss = losses[self.kind]()
        self.log("train_loss", loss)
        return {"loss": loss}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), **self.optimizer)


def fit(model, *callbacks, steps=20, dataset=None, batch_size=6, shuffle=True, logger=False, seed=0, **trainer_options):
    L.seed_everything(seed, verbose=False)
    model = copy.deepcopy(model)
    loader = DataLoader(data() if dataset is None else dataset, batch_size=batch_size, shuffle=shuffle)
    options = {"max_steps": steps, "accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(
        **options | trainer_options,
        logger=logger,
        enable_checkpointing=False,
        callbacks=list(callbacks),
        log_every_n_steps=1,
    )
    trainer.fit(model, loader)
    return model, trainer


def seeded(make):
    torch.manual_seed(7)
    return make()


def weights(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def test_no_arguments_logs_every_tag_and_a_verdict(tmp_path):
    recorder, board = Recorder(), TensorBoardLogger(tmp_path)
    monitor = SingularLimitMonitor(max_overhead=None, window=10, replicas=2)
    _, trainer = fit(seeded(Net), monitor, steps=40, logger=[recorder, board])
    logged = {tag for _, metrics in recorder.points for tag in metrics if tag.startswith("singlim/")}
    assert logged == {
        "singlim/" + tag
        for tag in [
            "loss_gap",
            "distance/measured",
            "distance/linearised",
            "distance/separated",
            "distance/predicted",
            "separation",
            "potential",
            "potential_stderr",
            "clock/step_size",
            "clock/noise_level",
            "clock/slow_time",
            "clock/time_scale",
            "quality/residual",
            "quality/converged",
            "quality/unresolved",
            "quality/stderr",
            "quality/error",
            "drift/cosine",
            "drift/speed_ratio",
            "drift/residual_ratio",
            "drift/measured",
            "drift/predicted",
            "drift/pull",
            "drift/pull_stderr",
            "drift/pull_share",
            "drift/null_cosine",
            "drift/ceiling",
            "drift/window",
            "drift/finite_noise_cosine",
            "drift/finite_noise_ratio",
            "drift/finite_noise_stderr",
            "drift/cosine_stderr",
            "drift/speed_ratio_stderr",
            "distance/cosine",
            "limit/cosine",
            "limit/speed_ratio",
            "limit/measured",
            "limit/predicted",
            "cost/overhead",
            "cost/products",
        ]
    }
    assert recorder.series("singlim/drift/window") == {10: 10, 20: 10, 30: 10, 40: 10}
    assert monitor.history == {step: m for step, m in recorder.points if "singlim/loss_gap" in m}
    assert all(math.isfinite(v) for _, m in recorder.points for v in m.values())
    # one step per probe, each tag once a step
    steps = [step for step, metrics in recorder.points if "singlim/distance/measured" in metrics]
    assert steps == [0, 10, 20, 30, 40]
    gaps = [step for step, metrics in recorder.points if "singlim/loss_gap" in metrics]
    assert len(gaps) == len(set(gaps))
    assert recorder.series("singlim/clock/slow_time")[40] == pytest.approx(40 * 0.2 * 0.25)
    assert recorder.series("singlim/clock/time_scale")[40] == pytest.approx(1 / (0.2 * 0.25))
    assert "| 30-40 |" in monitor.verdict
    assert "singlim/drift/cosine" in trainer.callback_metrics
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(board.log_dir).Reload()
    assert "singlim/drift/cosine" in events.Tags()["scalars"]
    assert "singlim/verdict/text_summary" in events.Tags()["tensors"]


def test_the_measured_drift_is_the_change_of_the_weights():
    taken = {}

    class Snapshots(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            taken[trainer.global_step] = weights(pl_module).double()

    monitor = SingularLimitMonitor(window=10, every_n_steps=10)
    fit(seeded(Net), monitor, Snapshots(), steps=20)
    torch.testing.assert_close(monitor.last_window.displacement, taken[20] - taken[10], rtol=0, atol=0)


def test_a_noise_free_full_batch_run_is_predicted_to_rounding():
    """Without dropout, with the whole set as the batch, the flow is the training itself, momentum and schedule aside."""
    monitor = SingularLimitMonitor(window=10, every_n_steps=10)
    fit(seeded(lambda: Net(dropout=0.0, momentum=0.9, weight_decay=0.01)), monitor, steps=30, batch_size=20)
    assert monitor._noise == WeightDecay(0.01)
    residuals = [p["singlim/drift/residual_ratio"] for p in monitor.history.values() if "singlim/drift/window" in p]
    assert len(residuals) == 3
    assert max(residuals) < 1e-4  # float32 training against float64 prediction
    assert monitor.last_window.null.residual_ratio > 1e-3  # which leaves the weight decay out


class Trace(L.Callback):
    """What a probe could disturb, after every batch."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append(
            (
                weights(pl_module).clone(),
                [None if p.grad is None else p.grad.clone() for p in pl_module.parameters()],
                [m.training for m in pl_module.modules()],
                [b.clone() for b in pl_module.buffers()],
                torch.get_rng_state(),
                random.getstate(),
                np.random.get_state()[1].tolist(),  # noqa: NPY002  # the legacy global state is what must not change
            )
        )


class Normed(Net):
    def __init__(self, **options):
        super().__init__(**options)
        self.body = nn.Sequential(nn.Linear(6, 32), nn.BatchNorm1d(32), nn.Tanh(), nn.Dropout(0.2))


@pytest.mark.parametrize("make", [Net, Normed, lambda: Net("smoothed", momentum=0.9, nesterov=True)])
@pytest.mark.filterwarnings("ignore:.*drift not predicted")
def test_no_harm(make):
    model = seeded(make)
    runs = []
    for callbacks in ([], [SingularLimitMonitor(window=5, every_n_steps=5, replicas=1, num_draws=4)]):
        trace = Trace()
        trained, _ = fit(model, trace, *callbacks, steps=13)  # the trace first: it sees the batch before the probe
        late = Trace()
        fit(model, *callbacks, late, steps=13)  # and after it
        runs.append((weights(trained), trace.seen, late.seen))
    (plain, before, after), (watched, before_w, after_w) = runs
    assert torch.equal(plain, watched)
    for ours, theirs in ((before, before_w), (after, after_w)):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kind", ["smoothed", "mse"])
def test_the_loss_is_recognised(kind):
    monitor = SingularLimitMonitor(max_overhead=None, window=5)
    fit(seeded(lambda: Net(kind)), monitor, steps=1)
    expected = {"smoothed": "SoftCrossEntropy(label_smoothing=0.13)", "mse": "MeanSquaredError()"}
    assert str(monitor._problem.sample_loss) == expected[kind]


def test_passing_the_loss():
    monitor = SingularLimitMonitor(
        max_overhead=None, loss=lambda f, y: 0.5 * (f - 1.0 * (torch.arange(3) == y)).square().mean(), window=5
    )
    fit(seeded(lambda: Net("half")), monitor, steps=1)
    assert monitor.history[0]["singlim/loss_gap"] > 0
    named = SingularLimitMonitor(max_overhead=None, loss=nn.MSELoss(), window=5)
    fit(seeded(lambda: Net("trainer")), named, steps=1)  # its step cannot be checked, so what is passed is taken
    assert named.history


@pytest.mark.filterwarnings("ignore:.*not over-parameterised")
def test_fewer_weights_than_residuals_is_only_a_warning():
    monitor = SingularLimitMonitor(max_overhead=None, window=5)
    fit(seeded(lambda: Net(hidden=4)), monitor, steps=5)
    assert {0, 5} <= set(monitor.history)


def test_empty_dataset():
    trainer = SimpleNamespace(train_dataloader=DataLoader(data(0), batch_size=2))  # Lightning itself skips such a fit
    with pytest.raises(ValueError, match="training dataset is empty"):
        read_probe_set(trainer, 5)


def test_a_failing_probe_does_not_end_the_run(monkeypatch):
    model = seeded(Net)
    plain, _ = fit(model, steps=15)

    def fails(*args, **kwargs):
        torch.rand(10)  # and leaves the random state disturbed
        raise RuntimeError("out of luck")

    monkeypatch.setattr("torch_singlim.callbacks.monitor.observe", fails)
    with pytest.warns(
        UserWarning, match="failed and was left out, training goes on: RuntimeError: out of luck"
    ) as caught:
        trained, _ = fit(model, SingularLimitMonitor(max_overhead=None, window=5), steps=15)
    assert len([w for w in caught if "out of luck" in str(w.message)]) == 1
    assert torch.equal(weights(plain), weights(trained))


def test_out_of_memory_takes_fewer_samples_at_once(monkeypatch):
    sizes = []

    def hungry(problem, w, **options):
        sizes.append(problem.batch_size)
        if problem.batch_size > 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return observe(problem, w, **options)

    monkeypatch.setattr("torch_singlim.callbacks.monitor.observe", hungry)
    model = seeded(Net)
    plain, _ = fit(model, steps=10)
    monitor = SingularLimitMonitor(max_overhead=None, window=5)
    trained, _ = fit(model, monitor, steps=10)
    assert sizes[:3] == [20, 10, 5]
    assert set(sizes[2:]) == {5}
    assert monitor.last_window is not None
    assert torch.equal(weights(plain), weights(trained))


def test_memory_that_never_suffices_is_a_warning(monkeypatch):
    def hungry(problem, w, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("torch_singlim.callbacks.monitor.observe", hungry)
    with pytest.warns(UserWarning, match="left out, training goes on: OutOfMemoryError"):
        fit(seeded(Net), SingularLimitMonitor(max_overhead=None, window=5), steps=10)


def test_a_layer_that_torch_differentiates_wrongly_is_refused(monkeypatch):
    class Normalised(Net):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Dropout(0.2), nn.Linear(32, 32), nn.LayerNorm(32))

    monitor = SingularLimitMonitor(max_overhead=None, window=5)
    fit(seeded(Normalised), monitor, steps=5)  # taken apart: measured as any other
    assert monitor.history
    monkeypatch.setattr("torch_singlim.network.functional._DecomposedLayerNorm", lambda layer: layer)
    recorder = Recorder()
    with pytest.raises(ValueError, match="the layer responsible is LayerNorm"):
        fit(seeded(Normalised), SingularLimitMonitor(max_overhead=None, window=5), steps=5, logger=recorder)
    assert not [tag for _, metrics in recorder.points for tag in metrics if tag.startswith("singlim/")]


def test_what_counts_as_out_of_memory():
    assert _out_of_memory(MemoryError())
    assert _out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"))
    assert not _out_of_memory(RuntimeError("out of luck"))


def test_a_failing_expansion_is_withdrawn_with_its_reason(monkeypatch):
    found = FiniteNoise(cosine=0.98, norm_ratio=1.3, stderr=0.02)
    monkeypatch.setattr("torch_singlim.measure.distance.finite_noise", lambda *args, **options: found)
    monitor = SingularLimitMonitor(max_overhead=None, window=10)
    fit(seeded(Net), monitor, steps=20)
    assert "Prediction withdrawn: the noise is too large for the second-order expansion" in monitor.verdict
    assert "cosine 0.98 and 1.30 times the norm" in monitor.verdict
    logged = {tag for point in monitor.history.values() for tag in point}
    assert not {tag for tag in logged if tag.startswith("singlim/limit/") or tag == "singlim/potential"}
    assert {"singlim/drift/cosine", "singlim/distance/predicted", "singlim/drift/finite_noise_ratio"} <= logged


def test_diverging_training_is_survived():
    monitor = SingularLimitMonitor(window=5, every_n_steps=5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(seeded(lambda: Net(lr=1e6)), monitor, steps=20)
    assert monitor.history
    assert monitor.verdict


def test_accumulation_and_schedule_enter_the_clock():
    class Scheduled(Net):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.2)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 0.5**k)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    recorder = Recorder()
    monitor = SingularLimitMonitor(window=4, every_n_steps=4)
    fit(seeded(Scheduled), monitor, steps=4, batch_size=5, accumulate_grad_batches=2, logger=recorder)
    assert monitor._sgd.batch_size == 10
    expected = 0.25 * sum(0.2 * 0.5**k for k in range(4))
    assert recorder.series("singlim/clock/slow_time")[4] == pytest.approx(expected)


def test_probe_schedule():
    assert list(probe_starts(500, None, 4000)) == [0, 500, 1000, 2000, 3500]
    assert list(probe_starts(500, None, 300)) == [0]
    assert list(probe_starts(10, None, None))[:5] == [0, 10, 20, 40, 80]
