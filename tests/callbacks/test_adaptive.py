"""Adaptive optimizers under the monitor: their metric is read at each snapshot, and the limit is that of the metric."""

import math

import lightning as L
import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from tests.zoo import Net, data, fit, monitor_of, reasons_of, seeded, with_optimizer
from torch_singlim import (
    Dropout,
    InjectNoise,
    LabelNoise,
    SecondMoments,
    SGDSettings,
    Snapshot,
    WeightDecay,
    ZeroLossProblem,
    compare,
    nearest_point,
    singular_limit,
    tangent_space,
)
from torch_singlim.measure import Code, tags
from torch_singlim.measure.snapshot import Metric

LR, EPS, BETAS = 0.02, 1e-3, (0.8, 0.95)


class States(L.Callback):
    """Weights, and the root of the second moments plus eps, after each step."""

    def __init__(self):
        self.weights, self.roots, self.rates = {}, {}, {}

    def on_train_batch_end(self, trainer, pl_module, *_):
        (optimizer,), step = trainer.optimizers, trainer.global_step
        named = dict(pl_module.named_parameters())
        states = [
            (optimizer.state[p]["exp_avg_sq"].double(), optimizer.state[p]["step"].item()) for p in named.values()
        ]
        self.weights[step] = {name: p.detach().double() for name, p in named.items()}
        self.weights[step] = {name: w.clone() for name, w in self.weights[step].items()}
        roots = [(v / (1 - BETAS[1] ** k)).sqrt() + EPS for v, k in states]
        self.roots[step] = dict(zip(named, roots, strict=True))
        self.rates[step] = optimizer.param_groups[0]["lr"]


def adam(module, **options):
    return torch.optim.AdamW(
        module.parameters(), **{"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": 0.0} | options
    )


def flat(named):
    return torch.cat([each.reshape(-1) for each in named.values()])


@pytest.fixture(scope="module")
def run():
    states, monitor = States(), monitor_of(window=20, every_n_steps=20, num_draws=64, relaxed_after=0.5)
    fit(seeded(with_optimizer(adam)), monitor, states, steps=60, dataset=data(n=5), batch_size=5)
    return states, monitor


def in_metric(states, step):
    """The problem in coordinates written out here, its weights, and the mean of the roots."""
    roots = states.roots[step]
    mean = flat(roots).mean().item()
    module = seeded(Net)
    module.load_state_dict(states.weights[step])
    x, y = data(n=5).tensors
    ratios = {name: mean / root for name, root in roots.items()}
    problem = ZeroLossProblem(module, "mse", x, F.one_hot(y, 3).float(), step_ratios=ratios)
    return problem, problem.weights(), mean


def test_second_moments_are_not_kept_where_they_are_not_needed(run):
    _, monitor = run
    assert monitor.engine.last_distance.moments is None
    one = torch.ones(1)
    snapshot = Snapshot(0, one, metric=Metric(one, 1.0, SecondMoments(one, one, 0.1)))
    assert snapshot.for_noise(Dropout() + WeightDecay(0.1)).metric == Metric(one, 1.0)
    assert snapshot.for_noise(LabelNoise(0.1) + WeightDecay(0.1)) is snapshot


@pytest.mark.parametrize("step", [20, 60])
def test_step_size_stability_and_distance_are_those_of_the_metric(run, step):
    states, monitor = run
    problem, u, mean = in_metric(states, step)
    point, alpha = monitor.history[step], LR / mean
    assert point["clock/step_size"] == pytest.approx(alpha, rel=1e-5)
    assert point["clock/time_scale"] == pytest.approx(1 / (alpha * point["clock/noise_level"] ** 2))
    # between measurements 20 steps apart, the step sizes are interpolated
    sizes = [states.rates[k] / flat(states.roots[k]).mean().item() for k in range(1, step + 1)]
    assert point["clock/slow_time"] == pytest.approx(sum(sizes) * point["clock/noise_level"] ** 2, rel=0.15)
    # S^(1/2) H S^(1/2) from a dense Jacobian in the weights themselves
    module, (x, y) = problem.function.module.double().eval(), data_of()
    plain = ZeroLossProblem(module, "mse", x, y)
    named = {name: p.detach() for name, p in module.named_parameters()}
    J = torch.func.jacrev(lambda named: torch.func.functional_call(module, named, (x.double(),)))(named)
    J = torch.cat([each.flatten(2) for each in J.values()], -1).flatten(0, 1)  # [N C, P]
    rows = (2 / len(J)) ** 0.5 * J / flat(states.roots[step]).sqrt()  # mse is a mean over samples and outputs
    largest = torch.linalg.eigvalsh(rows @ rows.T)[-1].item()
    beta = BETAS[0]
    assert point["stability"] == pytest.approx(LR * largest * (1 - beta) / (2 * (1 + beta)), rel=1e-3)
    assert point["distance/in_metric"] == pytest.approx(nearest_point(problem, u).distance, rel=0.01)
    plainly = nearest_point(plain, plain.weights()).distance
    assert point["distance/nearest"] == pytest.approx(plainly, rel=0.01)
    assert point["distance/in_metric"] != pytest.approx(plainly, rel=0.015)


def data_of():
    x, y = data(n=5).tensors
    return x, F.one_hot(y, 3).float()


def test_the_frozen_limit_is_that_of_the_metric_at_the_beginning(run):
    states, monitor = run
    problem, u, mean = in_metric(states, 40)
    point = nearest_point(problem, u, rtol=0.01).point
    sgd = SGDSettings(LR / mean, momentum=BETAS[0], dampening=BETAS[0])
    drift = singular_limit(problem, point, Dropout(), sgd, num_draws=64, finite_step=True).drift
    roots = (mean / flat(states.roots[40])).sqrt()
    motion = (flat(states.weights[60]) - flat(states.weights[40])) / roots
    found = compare(tangent_space(problem, point).project(motion), 20 * drift)
    logged = monitor.history[60]
    assert logged["limit/frozen_cosine"] == pytest.approx(found.cosine, abs=0.02)
    assert logged["limit/frozen_speed"] == pytest.approx(found.speed, rel=0.05)


def test_nothing_is_predicted_before_the_first_step(run):
    _, monitor = run
    start = monitor.history[0].keys()
    assert {"distance/half", "distance/nearest"} <= start
    assert not {"distance/in_metric", "stability", "clock/step_size", "potential"} & start
    assert {tag.name for tag in tags.TAGS if tags.Need.METRIC in tag.needs} == {"distance/in_metric"}
    assert not any(name.startswith("moments") for point in monitor.history.values() for name in point)
    (form,) = reasons_of(monitor)
    assert str(form).startswith("a step of AdamW is not linear in the gradient: the averaged path takes the mean of")


def test_decoupled_weight_decay_moves_the_weights_along_the_set():
    """AdamW without noise, on Gamma: the drift by its weight decay alone, in the metric."""
    make = with_optimizer(lambda module: adam(module, lr=5e-3, eps=0.05, weight_decay=0.2))
    states, monitor = States(), monitor_of(window=200, every_n_steps=200, relaxed_after=0.5)
    fit(seeded(lambda: make(dropout=0.0)), monitor, states, steps=600, dataset=data(n=5), batch_size=5)
    assert monitor.engine.noise == WeightDecay(0.2)
    last = monitor.history[600]
    assert last["limit/cosine"] >= 0.99
    assert last["limit/speed"] == pytest.approx(1, abs=0.05)


def test_a_metric_that_changes_is_a_reason():
    """Second moments that forget within a window, in a training that begins far from the set."""
    make = with_optimizer(lambda module: torch.optim.RMSprop(module.parameters(), lr=1e-3, alpha=0.5))
    monitor = monitor_of(window=10, every_n_steps=10)
    fit(seeded(make), monitor, steps=20, shuffle=False)
    found = [reason for reason in monitor.reasons if reason.code is Code.METRIC_CHANGED]
    assert found
    assert "second moments changed its step sizes by" in str(found[0])
    assert not any("limit/frozen_cosine" in monitor.history[r.values["stop"]] for r in found)


def test_a_parameter_without_a_step_is_a_reason():
    class Idle(with_optimizer(adam)):
        def __init__(self):
            super().__init__()
            self.idle = torch.nn.Parameter(torch.ones(2))

    monitor = monitor_of(window=5)
    fit(seeded(Idle), monitor, steps=10)
    assert {r.code for r in reasons_of(monitor)} == {Code.NO_METRIC, Code.AVERAGED_STEPS}
    assert "AdamW has made no step with idle yet" in monitor.verdict
    assert all(math.isfinite(v) for p in monitor.history.values() for v in p.values())


class Shifted(with_optimizer(adam)):
    """Targets that noise can be added to."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.mse_loss(self(x), y)


def test_second_moments_are_compared_with_the_curvature_under_noise_on_the_labels():
    states, monitor, std = States(), monitor_of(window=20, every_n_steps=20, replicas=0), 0.1
    fit(
        seeded(lambda: Shifted(dropout=0.0)),
        monitor,
        states,
        InjectNoise(LabelNoise(std)),
        steps=40,
        dataset=TensorDataset(*data_of()),
        batch_size=5,
    )
    assert Code.ADAPTIVE_NOISE not in {reason.code for reason in monitor.reasons}
    module = seeded(lambda: Shifted(dropout=0.0)).double().eval()
    module.load_state_dict(states.weights[40])
    named = {name: p.detach() for name, p in module.named_parameters()}
    x, y = data_of()
    J = torch.func.jacrev(lambda named: torch.func.functional_call(module, named, (x.double(),)))(named)
    J = torch.cat([each.flatten(2) for each in J.values()], -1).flatten(0, 1)
    expected = 2 * std**2 / y.numel() * (2 / y.numel()) * J.square().sum(0)
    found = compare((flat(states.roots[40]) - EPS).square(), expected)
    logged = monitor.history[40]
    assert logged["moments/ratio"] == pytest.approx(found.speed, rel=1e-4)
    assert logged["moments/cosine"] == pytest.approx(found.cosine, rel=1e-4)
    assert {"potential", "limit/frozen_cosine", "distance/relaxed_expected"} <= logged.keys()


def test_noise_on_the_labels_beside_other_noise_is_a_reason():
    monitor = monitor_of(window=5)
    fit(
        seeded(Shifted),
        monitor,
        InjectNoise(LabelNoise(0.1)),
        steps=5,
        dataset=TensorDataset(*data_of()),
        batch_size=5,
    )
    (reason,) = [each for each in monitor.reasons if each.code is Code.ADAPTIVE_NOISE]
    assert "under AdamW the drift of LabelNoise is not known" in str(reason)
    assert not any("potential" in point for point in monitor.history.values())


@pytest.mark.parametrize("batch_size", [5, 2])
def test_noise_of_a_higher_order_that_the_limit_lacks_is_noted(batch_size):
    """Weight decay is of order 1; in batches, with momentum, the drift of noise on the labels beside it is not known."""

    class Decaying(Shifted):
        def configure_optimizers(self):
            return adam(self, weight_decay=0.01)

    monitor = monitor_of(window=10, every_n_steps=10, replicas=0)
    module, noise = seeded(lambda: Decaying(dropout=0.0)), InjectNoise(LabelNoise(0.1))
    fit(module, monitor, noise, steps=20, dataset=TensorDataset(*data_of()), batch_size=batch_size)
    found = [str(each) for each in monitor.reasons if each.code is Code.SLOWER]
    assert len(found) == (batch_size == 2)
    assert all("is that of WeightDecay alone: the drift of LabelNoise, on a slower" in each for each in found)
    assert "potential" in monitor.history[20]


@pytest.mark.slow
def test_a_run_of_adam_under_noise_on_the_labels_follows_the_limit():
    """One run, alpha lambda_1 = .27, beta_2 = .999, against the limit with the excursions of the step sizes."""

    class Slower(Shifted):
        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-3, weight_decay=0.0)

    module = seeded(lambda: Slower(dropout=0.0, hidden=16))
    monitor = monitor_of(window=2_000, every_n_steps=2_000, num_draws=32, relaxed_after=0.5, draws=2, replicas=0)
    fit(module, monitor, InjectNoise(LabelNoise(0.1)), steps=8_000, dataset=TensorDataset(*data_of()), batch_size=5)
    for step in (6_000, 8_000):
        point = monitor.history[step]
        print({name: round(value, 3) for name, value in point.items() if name.startswith(("limit", "moments"))})
        assert point["limit/cosine"] >= 0.97
        assert point["limit/speed"] == pytest.approx(1, abs=0.15)
        assert point["moments/ratio"] == pytest.approx(1, abs=0.2)
        assert point["moments/cosine"] >= 0.99
        assert point["distance/relaxed"] == pytest.approx(point["distance/relaxed_expected"], rel=0.5)
