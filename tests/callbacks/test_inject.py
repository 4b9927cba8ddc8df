"""Injected noise against the same training written out by hand: chain rule, batch, memory, accumulation, resuming."""

import copy

import lightning as L
import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from tests.callbacks.test_monitor import Recorder
from torch_singlim import (
    AntiCorrelated,
    CustomNoise,
    DropConnect,
    Dropout,
    InjectNoise,
    InputNoise,
    LabelFlips,
    LabelNoise,
    Langevin,
    Minibatch,
    SingularLimitMonitor,
    WeightDecay,
)

LR, N = 0.1, 8


class Net(L.LightningModule):
    def __init__(self, loss="mse", **optimizer):
        super().__init__()
        torch.manual_seed(3)
        self.net = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3)).double()
        self.kind, self.optimizer, self.skip = loss, {"lr": LR} | optimizer, ()

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        if batch_idx in self.skip:
            return None
        if self.kind == "mse":
            return F.mse_loss(self(x), y)
        return F.cross_entropy(self(x), y, label_smoothing=0.1 if self.kind == "smoothed" else 0.0)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), **self.optimizer)


def real(n=N, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(
        torch.randn(n, 4, generator=generator).double(), torch.randn(n, 3, generator=generator).double()
    )


def labelled(n=N):
    return TensorDataset(real(n).tensors[0], torch.arange(n) % 3)


def train(model, *callbacks, steps=4, dataset=None, batch_size=N, logger=False, ckpt_path=None, **options):
    loader = DataLoader(dataset or real(), batch_size=batch_size, shuffle=False)
    trainer = L.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=logger,
        callbacks=list(callbacks),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        **options,
    )
    trainer.fit(model, loader, ckpt_path=ckpt_path)
    return trainer


def flat(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def loss_of(model, w, x, y):
    pieces = w.split([p.numel() for p in model.parameters()])
    named = {n: v.view(p.shape) for v, (n, p) in zip(pieces, model.named_parameters(), strict=True)}
    out = functional_call(model, named, (x,))
    return F.mse_loss(out, y) if model.kind == "mse" else F.cross_entropy(out, y)


def by_hand(model, noisy, steps, draw):
    """w <- w - lr grad_w noisy(w, eta), full batch."""
    w = flat(model)
    for _ in range(steps):
        eta = draw()
        v = w.clone().requires_grad_()
        (g,) = torch.autograd.grad(noisy(v, eta), v)
        w = w - LR * g
    return w


def gaussian(std, *shape, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return lambda: (std * torch.randn(*shape, generator=generator, dtype=torch.float64)).squeeze(0)


X, Y = real().tensors
P = 4 * 16 + 16 + 16 * 3 + 3


def custom(loss, w, x, y, eta):
    return loss(w * torch.exp(eta), x, y) + (eta * w.square()).sum()


HAND = {
    "drop_connect": (DropConnect(0.3), lambda m: lambda w, e: loss_of(m, w * (1 + e), X, Y), (1, P), 0.3),
    "langevin": (Langevin(0.3), lambda m: lambda w, e: loss_of(m, w, X, Y) + e @ w, (1, P), 0.3),
    "input_noise": (InputNoise(0.3), lambda m: lambda w, e: loss_of(m, w, X + e, Y), (N, 4), 0.3),
    "label_noise": (LabelNoise(0.3), lambda m: lambda w, e: loss_of(m, w, X, Y + e), (N, 3), 0.3),
    "custom": (
        CustomNoise(custom, std=0.1),
        lambda m: lambda w, e: loss_of(m, w * torch.exp(e), X, Y) + (e * w.square()).sum(),
        (1, P),
        0.1,
    ),
}


@pytest.mark.parametrize("kind", HAND)
def test_training_follows_the_noisy_loss(kind):
    noise, noisy, shape, std = HAND[kind]
    model = Net()
    # what belongs to the samples is drawn by a generator of the process's own
    draw = gaussian(std, *shape, seed=6 if noise.per_sample else 5)
    truth = by_hand(copy.deepcopy(model), noisy(model), 6, draw)
    train(model, InjectNoise(noise, seed=5), steps=6)
    torch.testing.assert_close(flat(model), truth, rtol=0, atol=1e-13)


def test_anti_correlated_noise_is_taken_back_a_step_later():
    model, draw = Net(momentum=0.5), gaussian(0.2, 1, P)
    reference = copy.deepcopy(model)
    w, velocity, last = flat(reference), 0.0, 0.0
    for _ in range(6):
        v = w.clone().requires_grad_()
        (g,) = torch.autograd.grad(loss_of(reference, v, X, Y), v)
        velocity, xi = 0.5 * velocity + g, draw()
        w, last = w - LR * velocity + (xi - last), xi
    inject = InjectNoise(AntiCorrelated(0.2), seed=5)
    train(model, inject, steps=6)
    torch.testing.assert_close(flat(model), w, rtol=0, atol=1e-13)
    torch.testing.assert_close(inject.memory, last)


def test_flipped_labels():
    model, noise = Net("hard"), LabelFlips(0.4)
    dataset = labelled()
    x, y = dataset.tensors
    generator = torch.Generator().manual_seed(6)
    flips = []

    def draw():
        flipped = torch.rand(N, 1, generator=generator, dtype=torch.float64)[:, 0] < 0.4
        return torch.where(flipped, torch.randint(3, (N,), generator=generator), y)

    def noisy(w, labels):
        flips.append((labels != y).float().mean())
        return loss_of(model, w, x, labels)

    truth = by_hand(copy.deepcopy(model), noisy, 6, draw)
    train(model, InjectNoise(noise, seed=5), steps=6, dataset=dataset)
    torch.testing.assert_close(flat(model), truth, rtol=0, atol=1e-13)
    assert 0 < sum(flips) / 6 < 0.6
    assert torch.equal(dataset.tensors[1], torch.arange(N) % 3)


SYSTEMS = [DropConnect(0.3), Langevin(0.3), AntiCorrelated(0.2), CustomNoise(custom, std=0.1)]


@pytest.mark.parametrize("noise", [*SYSTEMS, InputNoise(0.2)], ids=lambda n: type(n).__name__)
def test_accumulated_batches_are_one_step(noise):
    """Two halves accumulated are the whole batch: the step has one eta (or one for each sample)."""
    whole, halves = Net(momentum=0.9), Net(momentum=0.9)
    train(whole, InjectNoise(noise), steps=5)
    train(halves, InjectNoise(noise), steps=5, batch_size=N // 2, accumulate_grad_batches=2)
    torch.testing.assert_close(flat(whole), flat(halves), rtol=0, atol=1e-13)


@pytest.mark.parametrize("noise", [DropConnect(0.3) + LabelNoise(0.1), AntiCorrelated(0.2)], ids=["sum", "memory"])
def test_resumed_training_is_the_same(noise, tmp_path):
    """Generator and memory are in the checkpoint: stopped and resumed is bitwise what one run gives."""
    through, first, second = Net(), Net(), Net()
    train(through, InjectNoise(noise, seed=1), steps=10)
    trainer = train(first, InjectNoise(noise, seed=1), steps=5)
    trainer.save_checkpoint(tmp_path / "middle.ckpt")
    train(second, InjectNoise(noise, seed=99), steps=10, ckpt_path=tmp_path / "middle.ckpt")
    assert torch.equal(flat(second), flat(through))


def test_same_seed_same_noise_and_the_global_generator_is_left_alone():
    runs, watches = [Net(), Net(), Net()], [Watch(), Watch(), Watch(), Watch()]
    for model, seed, watch in zip(runs, (0, 0, 1), watches[:3], strict=True):
        torch.manual_seed(0)
        train(model, InjectNoise(DropConnect(0.1) + LabelNoise(0.1), seed=seed), watch)
    quiet = Net()
    torch.manual_seed(0)
    train(quiet, watches[3])
    for watch in watches[:3]:
        assert all(torch.equal(a, b) for a, b in zip(watch.random, watches[3].random, strict=True))
    assert torch.equal(flat(runs[0]), flat(runs[1]))
    assert not torch.equal(flat(runs[0]), flat(runs[2]))


def test_a_callback_that_is_used_again_starts_anew():
    inject, runs = InjectNoise(AntiCorrelated(0.1) + LabelNoise(0.1)), [Net(), Net()]
    for model in runs:
        train(model, inject)
    assert torch.equal(flat(runs[0]), flat(runs[1]))


class Watch(L.Callback):
    """What other callbacks see of weights and batch."""

    def __init__(self):
        self.seen, self.random = [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.seen.append(flat(pl_module))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.random.append(torch.get_rng_state())


def test_nobody_else_sees_perturbed_weights_and_data_are_left_alone():
    """Also where the loader hands out the data set's own tensors, as a tuple, without collating."""

    class Whole(torch.utils.data.Dataset):
        def __len__(self):
            return 3

        def __getitem__(self, i):
            return X, Y

    before = [t.clone() for t in (X, Y)]
    model, watch = Net(), Watch()
    model.skip = (1,)
    start = flat(model)
    noise = DropConnect(0.3) + InputNoise(0.2)
    loader = DataLoader(Whole(), batch_size=None)
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        callbacks=[watch, InjectNoise(noise)],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with pytest.warns(UserWarning, match="training_step` returned `None"):
        trainer.fit(model, loader)
    assert torch.equal(watch.seen[0], start)
    assert len(watch.seen) == 3
    assert torch.equal(X, before[0])
    assert torch.equal(Y, before[1])


def test_an_exception_leaves_the_weights_unperturbed():
    class Failing(Net):
        def training_step(self, batch, batch_idx):
            if self.trainer.training and not hasattr(self, "ready"):
                raise RuntimeError("no")
            return super().training_step(batch, batch_idx)

    model = Failing()
    start = flat(model)
    with pytest.raises(RuntimeError, match="no"):
        train(model, InjectNoise(DropConnect(0.3)))
    assert torch.equal(flat(model), start)


REFUSED = [
    (lambda: InjectNoise(Dropout()), "own nn.Dropout layers"),
    (lambda: InjectNoise(Minibatch() + Langevin(0.1)), "the DataLoader injects it"),
    (lambda: InjectNoise(WeightDecay(0.1)), "the optimizer does it"),
]


@pytest.mark.parametrize(("make", "message"), REFUSED)
def test_what_is_there_already_is_not_injected(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def manual():
    model = Net()
    model.automatic_optimization = False
    return model


UNFIT = [
    (lambda: Net("hard"), labelled, [LabelNoise(0.1)], r"LabelNoise is for mse.*use LabelFlips"),
    (lambda: Net("smoothed"), labelled, [LabelFlips(0.1)], "label_smoothing=0.1 already"),
    (Net, real, [LabelFlips(0.1)], r"LabelFlips is for cross-entropy.*use LabelNoise"),
    (Net, real, [Langevin(0.1), Langevin(0.2)], "one each"),
    (Net, real, [CustomNoise(lambda loss, w, x, y, eta: loss(w + eta + 1, x, y), std=0.1)], r"Lhat\(w, 0\) = L\(w\)"),
    (Net, real, [CustomNoise(lambda loss, w, x, y, eta: 2 * loss(w, x, y), std=0.1)], r"Lhat\(w, 0\) = L\(w\)"),
    (
        Net,
        real,
        [CustomNoise(lambda loss, w, x, y, eta: (loss(w + eta, x, y) + loss(w - eta, x, y)) / 2, std=0.1)],
        "exactly once",
    ),
    (manual, real, [Langevin(0.1)], "automatic optimization"),
]


@pytest.mark.parametrize(("model", "dataset", "noises", "message"), UNFIT)
def test_noise_that_does_not_fit_is_refused_before_training(model, dataset, noises, message):
    module = model()
    start = flat(module)
    with pytest.raises(ValueError, match=message):
        train(module, *(InjectNoise(noise) for noise in noises), dataset=dataset())
    assert torch.equal(flat(module), start)


@pytest.mark.parametrize("kind", ["drop_connect", "input_noise", "label_noise", "anti_correlated", "langevin", "flips"])
@pytest.mark.filterwarnings("ignore:.*drift not predicted")
def test_the_monitor_predicts_from_the_same_object(kind):
    noise = {"anti_correlated": AntiCorrelated(0.05), "flips": LabelFlips(0.3)}.get(kind) or HAND[kind][0]
    model, recorder = Net("hard" if kind == "flips" else "mse"), Recorder()
    monitor = SingularLimitMonitor(window=50, every_n_steps=50)
    inject = InjectNoise(noise)
    dataset = labelled() if kind == "flips" else real()
    train(model, inject, monitor, steps=200, dataset=dataset, logger=recorder)
    assert monitor._noise == noise
    last = monitor.history[200]
    if kind == "langevin":
        assert "singlim/drift/cosine" not in last
        ratio = last["singlim/limit/spread_measured"] / last["singlim/limit/spread_predicted"]
        assert ratio == pytest.approx(1, abs=0.2)  # chi with about 100 degrees of freedom
    else:
        assert last["singlim/drift/cosine"] > 0.8
    carried = 0.0 if inject.memory is None else inject.memory
    torch.testing.assert_close(monitor.last_observation.drifting, flat(model) - carried)


def test_noise_said_twice():
    with pytest.raises(ValueError, match="the noise is given twice"):
        train(Net(), InjectNoise(Langevin(0.1)), SingularLimitMonitor(max_overhead=None, noise=Langevin(0.1), window=2))
