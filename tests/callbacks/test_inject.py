"""Injected noise against the same training written out by hand: chain rule, batch, transients, accumulation, resuming."""

import lightning as L
import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset

from tests.zoo import Trace, assert_identical, fit, loader_of, monitor_of, weights
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


def train(model, *callbacks, steps=4, dataset=None, **options):
    """A copy of the model after full-batch steps in the order of the data, and its Trainer."""
    full = {"batch_size": N, "shuffle": False} | options
    return fit(model, *callbacks, steps=steps, dataset=dataset or real(), **full)


def loss_of(model, w, x, y):
    pieces = w.split([p.numel() for p in model.parameters()])
    named = {n: v.view(p.shape) for v, (n, p) in zip(pieces, model.named_parameters(), strict=True)}
    out = functional_call(model, named, (x,))
    return F.mse_loss(out, y) if model.kind == "mse" else F.cross_entropy(out, y)


def by_hand(model, noisy, steps, draw):
    """w <- w - lr grad_w noisy(w, eta), full batch."""
    w = weights(model)
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
    truth = by_hand(model, noisy(model), 6, draw)
    trained, _ = train(model, InjectNoise(noise, seed=5), steps=6)
    torch.testing.assert_close(weights(trained), truth, rtol=0, atol=1e-13)


def test_anti_correlated_noise_is_taken_back_a_step_later():
    model, draw = Net(momentum=0.5), gaussian(0.2, 1, P)
    w, velocity, last = weights(model), 0.0, 0.0
    for _ in range(6):
        v = w.clone().requires_grad_()
        (g,) = torch.autograd.grad(loss_of(model, v, X, Y), v)
        velocity, xi = 0.5 * velocity + g, draw()
        w, last = w - LR * velocity + (xi - last), xi
    inject = InjectNoise(AntiCorrelated(0.2), seed=5)
    trained, _ = train(model, inject, steps=6)
    torch.testing.assert_close(weights(trained), w, rtol=0, atol=1e-13)
    torch.testing.assert_close(inject.transient, last)
    own = torch.cat([inject.perturbation[p].reshape(-1) for p in trained.parameters()])
    torch.testing.assert_close(own, last)


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

    truth = by_hand(model, noisy, 6, draw)
    trained, _ = train(model, InjectNoise(noise, seed=5), steps=6, dataset=dataset)
    torch.testing.assert_close(weights(trained), truth, rtol=0, atol=1e-13)
    assert 0 < sum(flips) / 6 < 0.6
    assert torch.equal(dataset.tensors[1], torch.arange(N) % 3)


SYSTEMS = [DropConnect(0.3), Langevin(0.3), AntiCorrelated(0.2), CustomNoise(custom, std=0.1)]


@pytest.mark.parametrize("noise", [*SYSTEMS, InputNoise(0.2)], ids=lambda n: type(n).__name__)
def test_accumulated_batches_are_one_step(noise):
    """Two halves accumulated are the whole batch: the step has one eta (or one for each sample)."""
    model = Net(momentum=0.9)
    whole, _ = train(model, InjectNoise(noise), steps=5)
    halves, _ = train(model, InjectNoise(noise), steps=5, batch_size=N // 2, accumulate_grad_batches=2)
    torch.testing.assert_close(weights(whole), weights(halves), rtol=0, atol=1e-13)


@pytest.mark.parametrize("noise", [DropConnect(0.3) + LabelNoise(0.1), AntiCorrelated(0.2)], ids=["sum", "transient"])
def test_resumed_training_is_the_same(noise, tmp_path):
    """Generators and transient perturbation are in the checkpoint: stopped and resumed is bitwise what one run gives.

    Also where the trainer has looked at other data before it was written.
    """
    model = Net()
    through, _ = train(model, InjectNoise(noise, seed=1), steps=10)
    first, trainer = train(model, InjectNoise(noise, seed=1), steps=5)
    trainer.predict(first, loader_of(X, N, shuffle=False))
    trainer.save_checkpoint(tmp_path / "middle.ckpt")
    second, _ = train(model, InjectNoise(noise, seed=99), steps=10, ckpt_path=tmp_path / "middle.ckpt")
    assert torch.equal(weights(second), weights(through))


def test_same_seed_same_noise_and_the_global_generator_is_left_alone():
    model, noise = Net(), DropConnect(0.1) + LabelNoise(0.1)
    traces = [Trace() for _ in range(4)]
    runs = [
        train(model, InjectNoise(noise, seed=seed), trace)[0] for seed, trace in zip((0, 0, 1), traces, strict=False)
    ]
    train(model, traces[3])
    for trace in traces[:3]:
        for state, quiet in zip(trace.states, traces[3].states, strict=True):
            assert torch.equal(state["torch"], quiet["torch"])
    assert torch.equal(weights(runs[0]), weights(runs[1]))
    assert not torch.equal(weights(runs[0]), weights(runs[2]))


def test_a_callback_that_is_used_again_starts_anew():
    model, inject, traces = Net(), InjectNoise(AntiCorrelated(0.1) + LabelNoise(0.1)), [Trace(), Trace()]
    for trace in traces:
        train(model, inject, trace)
    assert_identical(*traces)


class Watch(L.Callback):
    """What other callbacks see of the weights."""

    def __init__(self):
        self.seen = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.seen.append(weights(pl_module))


class Whole(Dataset):
    """Hands out its own tensors, as a tuple, which are not collated."""

    def __len__(self):
        return 3

    def __getitem__(self, i):
        return X, Y


# Lightning says so once per process
@pytest.mark.filterwarnings("ignore:.*training_step.* returned")
def test_nobody_else_sees_perturbed_weights_and_data_are_left_alone():
    before = [t.clone() for t in (X, Y)]
    model, watch = Net(), Watch()
    model.skip = (1,)
    noise = InjectNoise(DropConnect(0.3) + InputNoise(0.2))
    train(model, watch, noise, steps=3, dataset=Whole(), batch_size=None)
    assert torch.equal(watch.seen[0], weights(model))
    assert len(watch.seen) == 3
    assert torch.equal(X, before[0])
    assert torch.equal(Y, before[1])


class Failing(Net):
    def training_step(self, batch, batch_idx):
        raise RuntimeError("no")


def test_an_exception_leaves_the_weights_unperturbed():
    model, trace = Failing(), Trace()
    with pytest.raises(RuntimeError, match="no"):
        train(model, InjectNoise(DropConnect(0.3)), trace)
    assert torch.equal(trace.states[-1]["weights"], weights(model))


REFUSED = [
    (lambda: InjectNoise(Dropout()), "own dropout layers"),
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
    (lambda: Net("smoothed"), labelled, [LabelFlips(0.1)], "training_step already has label_smoothing=0.1"),
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
    module, trace = model(), Trace()
    with pytest.raises(ValueError, match=message):
        train(module, *(InjectNoise(noise) for noise in noises), trace, dataset=dataset())
    (state,) = trace.states
    assert torch.equal(state["weights"], weights(module))


class Iterates(L.Callback):
    """The weights without what is taken back a step later, after every step."""

    def __init__(self, inject):
        self.inject, self.after = inject, {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        transient = self.inject.transient
        self.after[trainer.global_step] = weights(pl_module) - (0.0 if transient is None else transient)


@pytest.mark.parametrize("kind", ["drop_connect", "input_noise", "label_noise", "anti_correlated", "langevin", "flips"])
def test_the_monitor_predicts_from_the_same_object(kind):
    noise = {"anti_correlated": AntiCorrelated(0.05), "flips": LabelFlips(0.3)}.get(kind) or HAND[kind][0]
    model, dataset = (Net("hard"), labelled()) if kind == "flips" else (Net(), real())
    inject, monitor = InjectNoise(noise), monitor_of(window=50, every_n_steps=50, num_draws=16)
    iterates = Iterates(inject)
    train(model, inject, monitor, iterates, steps=200, dataset=dataset)
    assert monitor.engine.noise == noise
    last = monitor.history[200]
    if kind == "langevin":
        assert "drift/cosine" not in last
        ratio = last["limit/spread_measured"] / last["limit/spread_predicted"]
        assert ratio == pytest.approx(1, abs=0.2)  # chi with about 100 degrees of freedom
    else:
        assert last["drift/cosine"] > 0.8
    torch.testing.assert_close(monitor.last_window.displacement, iterates.after[200] - iterates.after[150])


def test_noise_said_twice():
    with pytest.raises(ValueError, match="the noise is given twice"):
        train(Net(), InjectNoise(Langevin(0.1)), monitor_of(noise=Langevin(0.1)))
