"""Every quantity of every network on another device is what it is on the CPU."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.callbacks.setups import Words, words
from tests.problems import displaced, make
from tests.zoo import FusedNorm, LayerNormed, Net, Normed, Tied, data, seeded
from torch_singlim import (
    AntiCorrelated,
    CustomNoise,
    DropConnect,
    Dropout,
    InputNoise,
    LabelFlips,
    LabelNoise,
    Langevin,
    Minibatch,
    SGDSettings,
    WeightDecay,
    ZeroLossProblem,
    effective_flow,
    finite_window,
    gauss_newton,
    level_distance,
    linearize,
    nearest_point,
    simulate,
    singular_limit,
)
from torch_singlim.network import free_memory
from torch_singlim.noise import draw_noise
from torch_singlim.theory import has_effective_flow

RTOL = 1e-6
SMOOTHED = nn.CrossEntropyLoss(label_smoothing=0.1)


def images(*layers):
    """A convolutional network."""
    return nn.Sequential(nn.Unflatten(1, (1, 2, 3)), *layers, nn.Flatten(), nn.Dropout(0.2), nn.LazyLinear(3))


def made(net):
    """Weights of lazy layers made."""
    net(torch.zeros(2, 6))
    return net


# module, its loss, its samples; off their zero-loss sets
NETWORKS = {
    "mse": lambda: (Net(), "mse", data(8)),
    "cross-entropy": lambda: (Net(), SMOOTHED, data(8)),
    "batch normalisation": lambda: (Normed(), "mse", data(8)),
    "layer normalisation": lambda: (LayerNormed(), "mse", data(8)),
    "fused layer normalisation": lambda: (FusedNorm(), "mse", data(8)),
    "a layer used twice": lambda: (Tied(), "mse", data(8)),
    "integer inputs": lambda: (Words(), "mse", words()),
    "convolutions": lambda: (made(images(nn.Conv2d(1, 8, 2), nn.GELU(), nn.Dropout2d(0.1))), "mse", data(8)),
    "transposed and grouped convolutions, group normalisation": lambda: (
        made(images(nn.ConvTranspose2d(1, 4, 2), nn.GroupNorm(2, 4), nn.SiLU(), nn.Conv2d(4, 4, 2, groups=2))),
        SMOOTHED,
        data(8),
    ),
    "bfloat16": lambda: (Net().bfloat16(), "mse", data(8)),
    "float16": lambda: (Net().half(), "mse", data(8)),
}
if torch.__version__ < "2.9":  # which cuts the weights of grouped convolutions wrongly on a device of this kind
    del NETWORKS["transposed and grouped convolutions, group normalisation"]
# searches from the others are slow
OFTEN = {"mse", "cross-entropy", "convolutions", "bfloat16"}
OFF_GAMMA = [name if name in OFTEN else pytest.param(name, marks=pytest.mark.slow) for name in NETWORKS]
ON_GAMMA = ["scalar", "two_layers", "cross_entropy", "rank_deficient", "many_outputs"]


def close(here, there, name=""):
    """That a figure of the device is the CPU's."""
    if isinstance(there, torch.Tensor):
        assert there.device.type == "fake", name
        there = there.cpu()
    here, there = torch.as_tensor(here, dtype=torch.float64), torch.as_tensor(there, dtype=torch.float64)
    assert torch.linalg.vector_norm(there - here) <= RTOL * torch.linalg.vector_norm(here), name


def pair(network, device):
    """A network's problem and a point near its weights, on the CPU and on the device."""
    if network in ON_GAMMA:
        dense, w = make(network)
        module, loss, x, y, w = dense.net, dense.loss, dense.inputs, dense.targets, displaced(w, 0.02)
    else:
        module, loss, dataset = seeded(NETWORKS[network])
        (x, y), w = dataset.tensors, None
        y = F.one_hot(y, 3).float() if loss == "mse" and not y.is_floating_point() else y
    here = ZeroLossProblem(module, loss, x, y)
    there = ZeroLossProblem(copy.deepcopy(module).to(device), loss, x.to(device), y.to(device))
    w = here.weights() if w is None else w
    return (here, w), (there, w.to(device))


def generator():
    return torch.Generator().manual_seed(0)


def geometry(problem, w):
    v, u = torch.randn(len(w), generator=generator()), torch.randn(problem.num_residuals, generator=generator())
    v, u = v.to(w), u.to(w)
    at, hessian = linearize(problem, w), gauss_newton(problem, w)
    return {
        "outputs": problem.outputs(w),
        "loss": problem.loss(w),
        "gradient": problem.gradient(w),
        "H v, of the loss": problem.hessian_product(w, v),
        "residual": at.residual,
        "B v": at.operator.matvec(v),
        "B^T u": at.operator.rmatvec(u),
        "K": at.gram(),
        "spectrum": hessian.spectrum(),
        "P_T v": hessian.project_kernel(v),
    }


def searches(problem, w):
    nearest = nearest_point(problem, w)
    products = nearest_point(problem, w, max_dense=0, max_steps=3)
    return {
        "nearest point": nearest.point,
        "distance": nearest.distance,
        "residual of the linearisation": nearest.linearised,
        "nearest point by products": products.point,
    }


def theory(problem, w, noise):
    sgd = SGDSettings(lr=0.05, batch_size=3)
    exact = singular_limit(problem, w, noise, sgd, num_draws=1000)
    sampled = singular_limit(problem, w, noise, sgd, num_draws=4, generator=generator())
    return {
        "V": exact.potential.mean,
        "drift": exact.drift,
        "normal variance": exact.normal_variance.mean,
        "distance": exact.distance,
        "V of few draws": sampled.potential.mean,
        "drift of few draws": sampled.drift,
    }


def compared(quantities, here, there, *more):
    found, other = quantities(*here, *more), quantities(*there, *more)
    for name, value in found.items():
        close(value, other[name], name)


@pytest.mark.parametrize("network", [*ON_GAMMA, *NETWORKS])
def test_geometry_is_that_of_the_cpu(network, device):
    compared(geometry, *pair(network, device))


@pytest.mark.parametrize("network", [*ON_GAMMA, *OFF_GAMMA])
def test_searches_find_what_they_find_on_the_cpu(network, device):
    compared(searches, *pair(network, device))


@pytest.mark.parametrize("network", [*ON_GAMMA, *OFF_GAMMA])
def test_a_level_is_as_far_as_on_the_cpu(network, device):
    """But for the course of a search in single precision, which rounding errors change."""
    here, there = (level_distance(*each, 0.1, max_gradients=100) for each in pair(network, device))
    assert here.certified == there.certified
    assert there.distance == pytest.approx(here.distance, rel=0.02)


@pytest.mark.parametrize("network", [*ON_GAMMA, *OFF_GAMMA])
def test_the_singular_limit_is_that_of_the_cpu(network, device):
    compared(theory, *pair(network, device), Dropout())


NOISES = {
    "two_layers": [
        Dropout(),
        DropConnect(0.1),
        AntiCorrelated(0.1),
        InputNoise(0.1),
        LabelNoise(0.1),
        Langevin(0.1),
        WeightDecay(1e-3),
        Minibatch(),
        CustomNoise(lambda loss, w, x, y, eta: loss(w, x + eta, y), std=0.1, like="inputs", claimed_order=1),
    ],
    "cross-entropy": [LabelFlips(0.1)],
}
PAIRS = [(network, noise) for network, noises in NOISES.items() for noise in noises]


def windows(problem, w, noise):
    """Motion in a window by each of the ways to predict it."""
    sgd = SGDSettings(lr=0.05, batch_size=2, momentum=0.5)
    limit = singular_limit(problem, w, noise, sgd, num_draws=4, generator=generator())
    runs = simulate(problem, w, noise, sgd, steps=10, replicas=3, generator=generator())
    found = {"drift": limit.drift, "diffusion": limit.diffusion, "displacements of the runs": runs.displacements}
    if has_effective_flow(noise, problem):
        flow = effective_flow(problem, w, noise, sgd, steps=10, generator=generator())
        window = finite_window(problem, w, noise, sgd, steps=10, generator=generator())
        found |= {"of the flow": flow.displacement, "by exponential steps": window.displacement}
    return found


@pytest.mark.parametrize(("network", "noise"), PAIRS, ids=lambda each: str(each).split("(")[0])
def test_every_noise_moves_the_weights_as_on_the_cpu(network, noise, device):
    compared(windows, *pair(network, device), noise)


@pytest.mark.parametrize(("network", "noise"), PAIRS, ids=lambda each: str(each).split("(")[0])
def test_a_generator_of_the_device_draws_there(network, noise, device):
    """With the same seed, what one of the CPU draws; and neither moves a global random state."""
    (here, _), (there, _) = pair(network, device)
    states = torch.get_rng_state(), torch.fake.get_rng_state()
    of_cpu = draw_noise(noise, here, 3, generator=generator())
    of_device = draw_noise(noise, there, 3, generator=torch.Generator(device).manual_seed(0))
    for a, b in zip(of_cpu, of_device, strict=True):
        close(a, b)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert torch.equal(torch.fake.get_rng_state(), states[1])


def test_chunks_follow_the_memory_that_is_free_on_the_device(device, monkeypatch):
    """As its driver tells, with what torch keeps there for later use."""
    assert free_memory(device) > 2**20  # without a driver that tells: the machine's
    for name, told in {"mem_get_info": (2**13, 2**30), "memory_reserved": 2**12, "memory_allocated": 2**11}.items():
        monkeypatch.setattr(torch.fake, name, lambda device, told=told: told, raising=False)
    assert free_memory(device) == 2**13 + 2**11
    (here, _), (there, _) = pair("mse", device)
    assert here.batch_size == here.num_samples
    assert there.batch_size < there.num_samples
