"""Coupled paths and replays on trainings written out by hand."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.problems import Lion, Muon
from torch_singlim import handwritten_digits
from torch_singlim.measure.coupling import noise_ceiling_of
from torch_singlim.measure.paths import CoupledPaths, LossGradient, Path, is_affine
from torch_singlim.measure.replay import replay
from torch_singlim.measure.steps import Before, Recorded, Step, flat, held_by
from torch_singlim.network import RandomState


def network(dropout=0.2, norm=False, dtype=torch.float64):
    torch.manual_seed(0)
    layers = [nn.Linear(4, 16), *([nn.BatchNorm1d(16)] if norm else []), nn.Tanh(), nn.Dropout(dropout)]
    return nn.Sequential(*layers, nn.Linear(16, 2)).to(dtype)


def mse(module, batch):
    x, y = batch
    return F.mse_loss(module(x), y)


GRADIENT = LossGradient(mse)


def coupled(net, optimizer, **options):
    generator = torch.Generator().manual_seed(0)
    return CoupledPaths(lambda: Path(net, optimizer), GRADIENT, **options, generator=generator)


def batches(count, size=6, seed=1, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(24, 4, generator=generator), torch.randn(24, 2, generator=generator)
    for _ in range(count):
        index = torch.randperm(24, generator=generator)[:size]
        yield x[index].to(dtype), y[index].to(dtype)


def sgd(net, **options):
    return torch.optim.SGD(net.parameters(), **{"lr": 0.1} | options)


def record(net, optimizer, *micro, habit=None):
    """A step of the run, and everything that is recorded of it; `habit` acts between backward and step."""
    before, step = Before.of(net, optimizer), Step.of(net, optimizer, micro)
    optimizer.zero_grad()
    for batch in micro:
        (mse(net, batch) / len(micro)).backward()
    if habit is not None:
        habit(net)
    optimizer.step()
    after = weights(net)
    return Recorded(step, before, after, after, (after - before.weights).norm().item())


def advance(net, optimizer, *micro):
    """A step of the run, and what it was."""
    return record(net, optimizer, *micro).step


def weights(net):
    return flat(list(net.parameters()))


OPTIMIZERS = {
    "sgd": sgd,
    "nesterov": lambda net: sgd(net, momentum=0.9, nesterov=True, weight_decay=1e-2),
    "adamw": lambda net: torch.optim.AdamW(net.parameters(), lr=1e-2),
    "rmsprop": lambda net: torch.optim.RMSprop(net.parameters(), lr=1e-3),
    "lion": lambda net: Lion(net.parameters(), lr=1e-3, weight_decay=0.1),
    "muon": lambda net: Muon(net.parameters(), lr=1e-2),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_without_noise_every_path_is_the_run(name):
    """Micro-batches, momentum, schedules: all of the run's rule, bit for bit."""
    net = network(dropout=0.0)
    optimizer = OPTIMIZERS[name](net)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    pairs = list(batches(24))
    for pair in pairs[:4]:
        advance(net, optimizer, pair)
        schedule.step()
    paths = coupled(net, optimizer, draws=2)
    for first, second in zip(pairs[4::2], pairs[5::2], strict=True):
        paths.advance(advance(net, optimizer, first, second))
        schedule.step()
    for path in (paths.baseline, *paths.replicas):
        assert torch.equal(path.weights(), weights(net))
    for path in paths.averaged:
        torch.testing.assert_close(path.weights(), weights(net), rtol=1e-12, atol=1e-14)


def test_paths_change_neither_the_run_nor_the_random_state():
    runs = []
    for watched in (False, True):
        net = network(norm=True)
        optimizer = sgd(net, momentum=0.9)
        torch.manual_seed(3)
        paths = None
        for i, pair in enumerate(batches(12)):
            step = advance(net, optimizer, pair)
            if watched and i == 3:
                paths = coupled(net, optimizer)
            elif paths is not None:
                paths.advance(step)
        buffers = [b.clone() for b in net.buffers()]
        state = [s["momentum_buffer"] for s in optimizer.state.values()]
        runs.append((weights(net), buffers, state, torch.get_rng_state(), net.training))
    torch.testing.assert_close(runs[0], runs[1], rtol=0, atol=0)


def test_one_draw_with_the_run_s_random_numbers_is_the_run():
    net = network()
    optimizer = sgd(net, momentum=0.9)
    path = Path(net, optimizer)
    for seed, pair in enumerate(batches(6)):
        torch.manual_seed(seed)
        path.descend(GRADIENT, advance(net, optimizer, pair), [seed])
    assert torch.equal(path.weights(), weights(net))


def test_the_noise_is_off_in_the_baseline_alone():
    """Dropout off, batch normalisation by the batch: against a network without dropout, in training mode."""
    net = network(norm=True)
    bare = nn.Sequential(*(part for part in copy.deepcopy(net) if not isinstance(part, nn.Dropout)))
    optimizer, plain = sgd(net), sgd(bare)
    paths = coupled(net, optimizer)
    for pair in batches(5):
        paths.advance(advance(net, optimizer, pair))
        advance(bare, plain, pair)
    torch.testing.assert_close(paths.baseline.weights(), weights(bare), rtol=0, atol=0)
    assert not torch.equal(paths.averaged[0].weights(), paths.averaged[1].weights())
    assert all(part.training for part in paths.baseline.module.modules())


def test_many_draws_approach_the_mean_gradient():
    """Linear network, dropout on the inputs: E grad is known, (1/n) sum x (x.w - y) and p/(1-p) diag(x^2) w besides."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Dropout(0.2), nn.Linear(4, 1, bias=False)).double()
    x, y = torch.randn(6, 4).double(), torch.randn(6, 1).double()
    w = net[1].weight.detach().clone()
    mean = 2 * ((x @ w.T - y).T @ x + 0.25 * (x.square().sum(0) * w)) / 6
    optimizer = sgd(net)
    step = Step.of(net, optimizer, [(x, y)])
    errors = []
    for draws in (64, 4096):
        path = Path(net, optimizer)
        path.descend(GRADIENT, step, list(range(draws)))
        errors.append((path.weights() - (w - 0.1 * mean).reshape(-1)).norm().item())
    assert errors[1] < 0.01 * (0.1 * mean).norm()
    assert errors[1] < errors[0] / 3  # 1/8 expected


def test_averaged_updates_are_those_of_adam_on_each_draw():
    """Three optimizers on shared weights, against torch.optim.Adam by hand."""
    net = network()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for pair in batches(3):
        advance(net, optimizer, pair)
    assert not is_affine(net, optimizer, generator=torch.Generator().manual_seed(0))
    path = Path(net, optimizer)
    twins = path.twin_optimizers(3)
    reference, states = copy.deepcopy(net), [copy.deepcopy(optimizer.state_dict()) for _ in range(3)]
    for pair in batches(2, seed=5):
        path.descend_by_updates(GRADIENT, Step.of(net, optimizer, [pair]), [0, 1, 2], twins)
        start, moved = weights(reference), 0
        for seed in range(3):
            trial = copy.deepcopy(reference)
            adam = torch.optim.Adam(trial.parameters(), lr=1e-2)
            adam.load_state_dict(states[seed])
            torch.manual_seed(seed)
            advance(trial, adam, pair)
            states[seed] = copy.deepcopy(adam.state_dict())
            moved = moved + (weights(trial) - start) / 3
        nn.utils.vector_to_parameters(start + moved, reference.parameters())
    torch.testing.assert_close(path.weights(), weights(reference), rtol=1e-12, atol=1e-14)


class SignDescent(torch.optim.Optimizer):
    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.01})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["lr"] * p.grad.sign())


@pytest.mark.parametrize(
    ("make", "affine"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.1), True),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.5, weight_decay=0.1), True),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True), True),
        (lambda p: torch.optim.Adam(p), False),
        (lambda p: torch.optim.RMSprop(p), False),
        (lambda p: torch.optim.Adagrad(p), False),
        (SignDescent, False),
        (lambda p: Lion(p, lr=1e-3), False),
        (lambda p: Muon(p, lr=1e-2), False),
    ],
)
def test_which_rules_are_affine_in_the_gradient(make, affine):
    net = network()
    assert is_affine(net, make(net.parameters()), generator=torch.Generator().manual_seed(0)) is affine


# --- replays ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_replayed_step_is_the_step(name, dtype):
    net = network(norm=True, dtype=dtype)
    optimizer = OPTIMIZERS[name](net)
    path = Path(net, optimizer)
    for i, pair in enumerate(batches(8, dtype=dtype)):
        recorded = record(net, optimizer, pair, pair)
        if i in (0, 7):
            state = torch.get_rng_state()
            found = replay(path, GRADIENT, recorded)
            assert found.error < 1e-6
            assert found.passed
            assert torch.equal(torch.get_rng_state(), state)


class Counting(torch.optim.SGD):
    """A rule with attributes that are neither in its state nor in its groups."""

    def __init__(self, parameters):
        super().__init__(parameters, lr=0.05)
        self.made, self.first = 0, self.param_groups[0]["params"][0]

    def step(self, closure=None):
        self.made += 1
        with torch.no_grad():
            self.first.mul_(1 - 0.01 * self.made)
        return super().step()


def test_attributes_of_an_optimizer_are_copied_and_belong_to_the_copy():
    net = network()
    optimizer = Counting(net.parameters())
    path, before = Path(net, optimizer), weights(net)
    assert path.optimizer.first is path.parameters[0]
    for pair in batches(5):
        recorded = record(net, optimizer, pair, pair)
        assert replay(path, GRADIENT, recorded).error < 1e-12
        assert path.optimizer.made == optimizer.made
    assert optimizer.first is optimizer.param_groups[0]["params"][0]
    assert not torch.equal(weights(net), before)
    twin = path.twin_optimizers(1)[0]
    assert twin.made == 5
    assert twin.first is path.parameters[0]


def doubled(net):
    for p in net.parameters():
        p.grad *= 2


def clipped(net):
    nn.utils.clip_grad_norm_(net.parameters(), 0.05)


def perturbed(net):
    for p in net.parameters():
        p.grad += 0.1 * torch.randn_like(p)


@pytest.mark.parametrize("habit", [doubled, clipped, perturbed])
def test_what_acts_between_backward_and_step_fails_the_replay(habit):
    net = network()
    optimizer = sgd(net)
    path, pair = Path(net, optimizer), next(batches(1))
    found = replay(path, GRADIENT, record(net, optimizer, pair, habit=habit))
    assert found.error > 0.1
    assert not found.passed


def test_a_step_that_did_not_move_is_not_judged():
    net = network()
    optimizer = sgd(net, lr=0.0)
    path, pair = Path(net, optimizer), next(batches(1))
    found = replay(path, GRADIENT, record(net, optimizer, pair))
    assert (found.error, found.passed, found.judged) == (0.0, True, False)


def test_tensors_on_a_graph_and_wrapped_steps_can_be_copied():
    net = network()
    net.kept = {"losses": [net(torch.randn(3, 4).double())]}  # as auxiliary losses are kept
    optimizer = sgd(net)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    path = Path(net, optimizer)
    assert "step" not in vars(path.optimizer)
    assert path.module.kept["losses"][0].grad_fn is None
    assert net.kept["losses"][0].grad_fn is not None
    assert {id(p) for p in path.parameters} == {id(p) for p in path.module.parameters()}
    assert not {id(p) for p in path.parameters} & {id(p) for p in net.parameters()}


def test_all_generators_are_isolated():
    import random

    import numpy as np

    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002  # the global one
    with RandomState.isolated():
        torch.rand(3), random.random(), np.random.rand(3)  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]  # noqa: NPY002


def test_the_state_before_a_step_is_without_perturbation():
    """Where noise is added to the parameters for the time of a step: their true values are known by id."""
    net = network()
    optimizer, plain = sgd(net), Before.of(net, sgd(net))
    first = next(net.parameters())
    truth = {id(first): first.detach().clone()}
    with torch.no_grad():
        first.add_(1.0)
    assert torch.equal(held_by(first, truth), truth[id(first)])
    before = Before.of(net, optimizer, truth)
    assert torch.equal(before.weights, plain.weights)
    torch.testing.assert_close(dict(before.state), dict(plain.state), rtol=0, atol=0)


def test_only_the_watched_parameters_are_compared():
    net = network()
    optimizer = sgd(net)
    paths = coupled(net, optimizer, watched=[2], replicas=2)
    start = weights(net)
    paths.advance(advance(net, optimizer, next(batches(1))))
    index = slice(4 * 16 + 16, 4 * 16 + 16 + 16 * 2)  # of the second layer's weights
    assert torch.equal(paths.moved(weights(net)), (weights(net) - start)[index])
    ends = [path.weights()[index] - start[index] for path in (*paths.averaged, paths.baseline, *paths.replicas)]
    torch.testing.assert_close(paths.displacement(), (ends[0] + ends[1]) / 2)
    assert torch.equal(paths.displacement_of_baseline(), ends[2])
    gram = paths.window(weights(net)).gram
    assert gram[0, 5].item() == pytest.approx((paths.moved(weights(net)) @ ends[4]).item())
    assert paths.gradients_per_step == 4 + 2 + 1


def test_without_a_baseline():
    net = network()
    optimizer = sgd(net)
    paths = coupled(net, optimizer, baseline=False, replicas=0)
    paths.advance(advance(net, optimizer, next(batches(1))))
    assert paths.gradients_per_step == 4
    assert not paths.displacement_of_baseline().any()
    window = paths.window(weights(net))
    assert (window.has_baseline, window.noise, window.num_replicas) == (False, None, 0)


def test_clipping_and_loss_scaling_are_made_by_paths_too():
    """Against a step by hand; the mean over draws is one of updates, since clipping is not linear."""
    net, pair = network(), next(batches(1))
    optimizer = sgd(net)

    def clip(parameters):
        nn.utils.clip_grad_norm_(parameters, 0.05)

    step = Step.of(net, optimizer, [pair, pair], divisor=4, clip=clip, scale=1024.0)
    assert step.share == 256.0
    start, moved = weights(net), []
    for seed in (0, 1):
        trial = copy.deepcopy(net)
        torch.manual_seed(seed)
        for _ in range(2):
            (mse(trial, pair) / 4).backward()
        clip(list(trial.parameters()))
        sgd(trial).step()
        moved.append(weights(trial) - start)
    path = Path(net, optimizer)
    path.descend_by_updates(GRADIENT, step, [0, 1], path.twin_optimizers(2))
    torch.testing.assert_close(path.weights() - start, (moved[0] + moved[1]) / 2)
    paths = coupled(net, optimizer, replicas=0)
    paths.advance(step)
    assert paths.affine
    assert all((path.weights() - start).norm() <= 0.1 * 0.05 * (1 + 1e-9) for path in paths.averaged)


def test_a_scale_under_which_gradients_overflow_is_reduced():
    """As in half precision, where the paths' gradients may be larger than those of the run."""
    net, pair = network(dropout=0.0, dtype=torch.float32), next(batches(1, dtype=torch.float32))
    optimizer = sgd(net)
    ends = []
    for scale in (1.0, 2.0**127):
        path = Path(net, optimizer)
        path.descend(GRADIENT, Step.of(net, optimizer, [pair], scale=scale), [0, 1])
        ends.append(path.weights())
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-5, atol=1e-7)


class Constant:
    """A potential whose gradient is 1 at order 2 and 10 at order 1."""

    second = True

    def add(self, path, step, seed, *, first):
        for p in path.parameters:
            p.grad = p.grad + (11.0 if first else 1.0)


def test_the_gradient_of_a_potential_is_added_where_it_belongs():
    """That of order 2 to averaged paths, which lack it; all of it to the expanded path, which is otherwise the baseline."""
    net, pair = network(dropout=0.0), next(batches(1))
    optimizer = sgd(net)
    paths = coupled(net, optimizer, potential=Constant(), expanded=True)
    paths.advance(advance(net, optimizer, pair))
    end = paths.baseline.weights()
    assert torch.equal(end, weights(net))
    for path, added in ((paths.expanded, 11.0), *((path, 1.0) for path in paths.averaged)):
        torch.testing.assert_close(path.weights(), end - 0.1 * added)
    assert torch.equal(paths.replicas[0].weights(), end)
    assert paths.window(weights(net)).has_expanded
    assert coupled(net, optimizer, expanded=True).expanded is None  # without a potential


def test_an_odd_number_of_draws_is_refused():
    net = network()
    with pytest.raises(ValueError, match="draws must be even"):
        coupled(net, sgd(net), draws=3)


# --- a real training -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_digits_under_dropout_follow_the_averaged_path():
    """200 digits, 64-256-10 GELU, dropout .1, SGD .5, batches of 25, after 2,000 noisy steps, over 500."""
    x, labels = handwritten_digits(200)
    x, y = (x - x.mean()) / x.std(), F.one_hot(labels, 10).float()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Dropout(0.1), nn.Linear(256, 10))
    optimizer = sgd(net, lr=0.5)

    def one():
        index = torch.randint(200, (25,))
        return advance(net, optimizer, (x[index], y[index]))

    for _ in range(2000):
        one()
    paths = coupled(net, optimizer)
    for _ in range(500):
        paths.advance(one())
    window = paths.window(weights(net))
    ceiling = noise_ceiling_of(window.cosines(relative=False))
    print(window.speed, window.noise, ceiling, window.baseline.cosine)
    assert window.speed.resolved
    assert window.speed.cosine > 0.97 * ceiling
    assert window.speed.ratio.mean == pytest.approx(1, abs=0.05)
    assert window.noise.ratio.mean == pytest.approx(1, abs=0.07)
    assert window.baseline.cosine < window.speed.cosine - 0.1
