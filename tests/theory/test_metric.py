"""A step size for each weight: the limit, the offset and the nearest point in the metric, and ensembles."""

import pytest
import torch
from torch import nn

from tests.problems import DTYPE, Dense, chain, make
from torch_singlim import (
    DropConnect,
    Dropout,
    SGDSettings,
    ZeroLossProblem,
    compare,
    frozen_metric,
    gauss_newton,
    limit_flow,
    nearest_point,
    singular_limit,
)
from torch_singlim.network import WeightSpace


def in_metric(dense):
    """The problem with step sizes over a factor of 30, and these  [P]."""
    generator = torch.Generator().manual_seed(0)
    named = dict(dense.net.named_parameters())
    ratios = {
        name: 10 ** (1.5 * torch.rand(p.shape, generator=generator, dtype=DTYPE) - 0.75) for name, p in named.items()
    }
    problem = ZeroLossProblem(dense.net, dense.loss, dense.inputs, dense.targets, step_ratios=ratios)
    return problem, torch.cat([ratios[name].reshape(-1) for name in dense.names])


def rows(dense, w):
    """B [M, P] with H = B^T B, by eigenvectors."""
    values, vectors = torch.linalg.eigh(dense.gauss_newton(w))
    kept = values > 1e-9 * values[-1]
    return values[kept].sqrt()[:, None] * vectors[:, kept].T


@pytest.mark.parametrize("name", ["scalar", "two_layers", "cross_entropy", "rank_deficient"])
def test_drift_and_offset_are_those_of_the_dense_metric(name):
    """drift = -alpha M_S grad V, M_S = S - S B^T (B S B^T)^+ B S; offset -S^(1/2) (S^(1/2) H S^(1/2))^+ S^(1/2) grad V."""
    dense, w = make(name)
    problem, S = in_metric(dense)
    u = problem.weights()
    torch.testing.assert_close(u * S.sqrt(), w)
    limit = singular_limit(problem, u, Dropout(), SGDSettings(lr=0.1), num_draws=1_000)
    B, gradient = rows(dense, w), dense.dropout_potential_gradient(w)
    SBt = S[:, None] * B.T
    M_S = torch.diag(S) - SBt @ torch.linalg.pinv(B @ SBt) @ SBt.T
    expected = -0.1 * M_S @ gradient
    torch.testing.assert_close(limit.drift * S.sqrt(), expected, rtol=0, atol=1e-7 * expected.norm().item())
    root = S.sqrt()
    H = root[:, None] * dense.gauss_newton(w) * root
    offset = -torch.linalg.pinv(H, rtol=1e-9, hermitian=True) @ (root * gradient)
    assert limit.mean_offset_norm == pytest.approx(offset.norm().item(), rel=1e-6)


def test_the_nearest_point_is_that_of_the_metric():
    """S^-1 (v - w) is in the range of B^T, and v on Gamma."""
    dense, w = make("two_layers")
    problem, S = in_metric(dense)
    off = w + 0.02 * torch.linspace(-1, 1, len(w), dtype=DTYPE)
    v = nearest_point(problem, off / S.sqrt(), rtol=1e-9, max_steps=100).point * S.sqrt()
    assert dense.L(v).item() < 1e-20
    Q = torch.linalg.qr(rows(dense, v).T)[0]
    normal = (v - off) / S
    torch.testing.assert_close(Q @ (Q.T @ normal), normal, rtol=0, atol=1e-6 * normal.norm().item())


def test_ratios_that_do_not_fit_are_refused():
    net = nn.Linear(2, 1)
    for ratios in (
        {"weight": torch.tensor([[1.0, 0.0]]), "bias": 1.0},
        {"weight": torch.ones(2), "bias": 1.0},
        {"wait": torch.ones(1, 2)},
    ):
        with pytest.raises(ValueError, match="a positive number, or one for each weight"):
            WeightSpace(net, dtype=DTYPE, step_ratios=ratios)


OPTIMIZERS = {
    "adam": lambda p: torch.optim.Adam(p, lr=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, betas=(0.7, 0.9), eps=0.1, weight_decay=0.0),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.1),
    "rmsprop, centred, momentum": lambda p: torch.optim.RMSprop(p, lr=0.1, centered=True, momentum=0.8),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, lr_decay=0.3, eps=0.01),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_metric_of_an_optimizer(kind):
    """A step moves the weights by -lr S m, with S read from the state after it."""
    torch.manual_seed(0)
    net = nn.Linear(3, 2).double()
    optimizer = OPTIMIZERS[kind](net.parameters())
    for k in range(5):
        before = {name: p.detach().clone() for name, p in net.named_parameters()}
        for p in net.parameters():
            p.grad = torch.randn_like(p)
        held = {name: optimizer.state[p].get("momentum_buffer") for name, p in net.named_parameters()}
        held = {name: None if value is None else value.clone() for name, value in held.items()}
        optimizer.step()
        metric = frozen_metric(optimizer, net)
        sgd = metric.sgd
        sizes = {name: sgd.lr * r for name, r in metric.step_ratios.items()}
        assert sgd.lr == pytest.approx(metric.scale * optimizer.param_groups[0]["lr"], rel=1e-12)
        assert torch.cat([1 / r.reshape(-1) for r in metric.step_ratios.values()]).mean().item() == pytest.approx(1)
        for name, p in net.named_parameters():
            state = optimizer.state[p]
            if "exp_avg" in state:
                m = state["exp_avg"] / (1 - sgd.momentum ** (k + 1))
            elif held[name] is not None:  # torch's buffer has S in it: that of the step in which a gradient came
                m = p.grad
                before[name] = before[name] - optimizer.param_groups[0]["lr"] * sgd.momentum * held[name]
            else:
                m = p.grad
            moved = p.detach() - before[name]
            torch.testing.assert_close(moved, -sizes[name] * m, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_groups_with_learning_rates_of_their_own_and_decoupled_decay(decay):
    """A step from a state without momentum: -lr_i S g - lr lambda w, the last by V = c/2 |u|^2 in the metric."""
    torch.manual_seed(0)
    net, rates = nn.Linear(3, 2).double(), (0.2, 0.2 if decay else 0.05)
    groups = [{"params": [p], "lr": lr} for p, lr in zip(net.parameters(), rates, strict=True)]
    optimizer = torch.optim.AdamW(groups, betas=(0.0, 0.9), weight_decay=decay)
    before = [p.detach().clone() for p in net.parameters()]
    for p in net.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    metric = frozen_metric(optimizer, net)
    u = [w / metric.step_ratios[name].sqrt() for w, name in zip(before, ("weight", "bias"), strict=True)]
    for (name, p), v, w, lr in zip(net.named_parameters(), u, before, rates, strict=True):
        r = metric.step_ratios[name]
        by_decay = -metric.sgd.lr * r.sqrt() * metric.weight_decay * v
        torch.testing.assert_close(by_decay, -lr * decay * w)
        torch.testing.assert_close(p.detach() - w, -metric.sgd.lr * r * p.grad + by_decay, rtol=1e-6, atol=1e-12)


def test_optimizers_without_a_metric_are_refused():
    net = nn.Linear(3, 2)
    with pytest.raises(ValueError, match="maximizes"):
        frozen_metric(torch.optim.Adam(net.parameters(), maximize=True), net)
    with pytest.raises(ValueError, match="weight decay and groups with learning rates of their own"):
        frozen_metric(torch.optim.AdamW([{"params": [net.weight], "lr": 0.1}, {"params": [net.bias]}]), net)
    two = [{"params": [net.weight], "eps": 1e-3}, {"params": [net.bias], "betas": (0.5, 0.9)}]
    with pytest.raises(ValueError, match="not in eps, betas"):
        frozen_metric(torch.optim.Adam(two), net)
    with pytest.raises(ValueError, match="has made no step with weight yet"):
        frozen_metric(torch.optim.Adam(net.parameters()), net)
    with pytest.raises(ValueError, match="known for Adam, AdamW, RMSprop, Adagrad, got SGD"):
        frozen_metric(torch.optim.SGD(net.parameters(), lr=0.1), net)
    with pytest.raises(ValueError, match=r"weight decay 0\.1"):
        frozen_metric(torch.optim.Adam(net.parameters(), weight_decay=0.1), net)


REPLICAS = 128


def mean_motion(dense, problem, S, alpha, steps, *, std=None):
    """Mean motion of the nearest points in w, by steps w <- w - alpha S grad Lhat on dense tensors; its relative error."""
    w0, generator = dense.weights(), torch.Generator().manual_seed(1)
    N, D, rate = len(dense.inputs), sum(dense.widths), dense.rates[0]
    if std is None:
        gradient = torch.func.vmap(torch.func.grad(dense.L))
    else:
        gradient = torch.func.vmap(torch.func.grad(lambda w, eta: dense.L(w * (1 + eta))))
    w = w0.expand(REPLICAS, -1).clone()
    for _ in range(steps):
        if std is None:
            kept = torch.rand(REPLICAS, N, D, generator=generator, dtype=DTYPE) >= rate
            eta = kept.to(DTYPE) / (1 - rate) - 1
        else:
            eta = std * torch.randn(REPLICAS, len(w0), generator=generator, dtype=DTYPE)
        w = w - alpha * S * gradient(w, eta)
    root = S.sqrt()
    motions = torch.stack([nearest_point(problem, each / root, rtol=1e-4).point * root for each in w]) - w0
    mean = motions.mean(0)
    return mean, ((motions.std(0) / REPLICAS**0.5).norm() / mean.norm()).item()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["DropConnect", "dropout"])
def test_an_ensemble_in_the_metric(kind):
    """Cosine 0.995 and speed within 3 % of the limit integrated in the metric; the Euclidean limit leads elsewhere."""
    dense, w = make("scalar")
    if kind == "dropout":  # less of it
        net = chain([3, 6, 1], nn.Tanh, [0.01], bias=False, seed=1)
        net.load_state_dict(dense.net.state_dict())
        dense = Dense(net, dense.loss, dense.inputs, dense.targets)
    problem, S = in_metric(dense)
    noise = Dropout() if kind == "dropout" else DropConnect(0.05)
    u = problem.weights()
    sgd = SGDSettings(lr=0.3 / gauss_newton(problem, u).largest)
    limit = singular_limit(problem, u, noise, sgd, num_draws=1_000)
    steps = int((1 if kind == "dropout" else 0.5) * limit.time_scale)
    mean, error = mean_motion(dense, problem, S, sgd.lr, steps, std=None if kind == "dropout" else 0.05)
    flow = limit_flow(problem, u, noise, sgd, steps=steps, num_draws=1_000, finite_step=True)
    found = compare(mean, flow.displacement * S.sqrt())
    euclidean = limit_flow(dense.problem, w, noise, sgd, steps=steps, num_draws=1_000)
    other = compare(mean, euclidean.displacement)
    print(f"\n{kind}: {steps} steps, {found}, relative error {error:.2g}; Euclidean limit: cosine {other.cosine:.3f}")
    assert found.cosine >= 0.995
    assert found.speed == pytest.approx(1, abs=0.03)
    assert other.cosine < 0.97


@pytest.mark.slow
def test_an_ensemble_of_adam():
    """torch's Adam on replicas, whose second moment is stationary at the start: the limit in its metric, with momentum."""
    dense, w = make("scalar")
    std, settle, generator = 0.05, 6_000, torch.Generator().manual_seed(1)
    gradient = torch.func.vmap(torch.func.grad(lambda w, eta: dense.L(w * (1 + eta))))
    p = nn.Parameter(w.expand(REPLICAS, -1).clone())  # Adam acts on each number alone
    adam = torch.optim.Adam([p], lr=0.0, betas=(0.9, 0.999), eps=1e-12)

    def step():
        eta = std * torch.randn(REPLICAS, len(w), generator=generator, dtype=DTYPE)
        p.grad = gradient(p.detach(), eta)
        adam.step()

    for _ in range(settle):
        step()
    # the mean second moment, as the state of one optimizer
    own = torch.optim.Adam(dense.net.parameters(), betas=(0.9, 0.999), eps=1e-12)
    for q, v in zip(
        dense.net.parameters(),
        adam.state[p]["exp_avg_sq"].mean(0).split([q.numel() for q in dense.net.parameters()]),
        strict=True,
    ):
        own.state[q] = {"exp_avg_sq": v.view(q.shape), "step": torch.tensor(float(settle))}
    ratios = frozen_metric(own, dense.net).step_ratios
    S = torch.cat([ratios[name].reshape(-1) for name in dense.names])
    problem = ZeroLossProblem(dense.net, dense.loss, dense.inputs, dense.targets, step_ratios=ratios)
    u, noise = problem.weights(), DropConnect(std)
    scale = frozen_metric(own, dense.net).scale
    own.param_groups[0]["lr"] = adam.param_groups[0]["lr"] = 0.02 / (scale * gauss_newton(problem, u).largest)
    sgd = frozen_metric(own, dense.net).sgd
    drift = singular_limit(problem, u, noise, sgd, num_draws=1_000).drift * S.sqrt()
    steps = int(0.1 / torch.linalg.vector_norm(drift))
    for _ in range(steps):
        step()
    root = S.sqrt()
    motions = torch.stack([nearest_point(problem, v / root, rtol=1e-4).point * root for v in p.detach()]) - w
    flow = limit_flow(problem, u, noise, sgd, steps=steps, num_draws=1_000, finite_step=True)
    found = compare(motions.mean(0), flow.displacement * root)
    print(f"\nAdam: {steps} steps, {found}")
    assert found.cosine >= 0.99
    assert found.speed == pytest.approx(1, abs=0.05)
