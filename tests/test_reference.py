"""Reference values of three small networks, by dense brute force in float64 (`reference/make.py`), kept as data."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.reference import make
from torch_singlim import (
    AntiCorrelated,
    DropConnect,
    Dropout,
    InputNoise,
    LabelFlips,
    LabelNoise,
    Langevin,
    Minibatch,
    NoiseSystem,
    SGDSettings,
    ZeroLossProblem,
    degeneracy,
    nearest_point,
    singular_limit,
    tangent_space,
)

CASES = ["tanh_scalar", "gelu_vector", "tanh_smoothed_ce"]
DTYPE = torch.float64


def load(name: str) -> tuple[dict, ZeroLossProblem, torch.Tensor]:
    reference = json.loads((Path(__file__).parent / "reference" / f"{name}.json").read_text())
    spec = reference["spec"]
    activation = {"tanh": nn.Tanh, "gelu": nn.GELU}[spec["activation"]]
    layers: list[nn.Module] = []
    sizes = spec["sizes"]
    for n_in, n_out, rate in zip(sizes[:-2], sizes[1:-1], spec["dropout"], strict=True):
        layers += [nn.Linear(n_in, n_out, bias=spec["bias"]), activation(), nn.Dropout(rate)]
    net = nn.Sequential(*layers, nn.Linear(sizes[-2], sizes[-1], bias=spec["bias"])).double()
    assert [n for n, _ in net.named_parameters()] == reference["parameter_names"]
    w = torch.tensor(reference["weights"], dtype=DTYPE)
    nn.utils.vector_to_parameters(w, net.parameters())
    inputs, targets = (torch.tensor(reference[k], dtype=DTYPE) for k in ("inputs", "targets"))
    return reference, ZeroLossProblem(net, spec["loss"], inputs, targets), w


@pytest.mark.parametrize("name", CASES)
def test_geometry(name):
    reference, problem, w = load(name)
    torch.testing.assert_close(problem.weights(), w, rtol=0, atol=0)
    assert problem.loss(w).item() == pytest.approx(reference["loss"], rel=1e-8)
    nearest = nearest_point(problem, w, rtol=1e-9)
    assert nearest.converged
    assert nearest.linearised_distance == pytest.approx(reference["linearised_distance"], rel=1e-8)
    assert nearest.distance == pytest.approx(reference["nearest_distance"], rel=1e-8)
    point = torch.tensor(reference["nearest_point"], dtype=DTYPE)
    torch.testing.assert_close(nearest.point, point, rtol=0, atol=1e-6)
    T = tangent_space(problem, nearest.point)
    spectrum = torch.tensor(reference["nonzero_eigenvalues_at_nearest"], dtype=DTYPE).flip(0)
    assert (T.rank, problem.num_weights) == (reference["rank"], reference["num_parameters"])
    torch.testing.assert_close(T.spectrum(), spectrum, rtol=1e-6, atol=0)


def system(name: str, spec: dict) -> NoiseSystem:
    sigma = spec["sigma"]
    return {
        "dropout": lambda: Dropout(),
        "drop_connect": lambda: DropConnect(sigma),
        "anti_correlated": lambda: AntiCorrelated(sigma),
        "input_noise": lambda: InputNoise(sigma),
        "label_noise": lambda: (
            LabelNoise(sigma) if spec["loss"] == "mse" else LabelFlips(round(spec["label_smoothing"], 6))
        ),
        "langevin": lambda: Langevin(sigma),
        "minibatch": lambda: Minibatch(),
    }[name]()


SYSTEMS = ["dropout", "drop_connect", "anti_correlated", "input_noise", "label_noise", "langevin", "minibatch"]


@pytest.mark.parametrize("kind", SYSTEMS)
@pytest.mark.parametrize("name", CASES)
def test_every_system(name, kind):
    """Order, V and drift with exact draws; mean offset, variance and distance where the reference has them."""
    reference, problem, _ = load(name)
    spec, truth = reference["spec"], reference["noise"][kind]
    point = torch.tensor(reference["nearest_point"], dtype=DTYPE)
    sgd, noise = SGDSettings(lr=spec["lr"], batch_size=spec["batch"]), system(kind, spec)
    limit = singular_limit(problem, point, noise, sgd, num_draws=1000)
    assert limit.order == truth["order"]
    assert degeneracy(problem, point, noise, num_draws=1000).order == truth["order"]  # the claim, measured
    assert limit.potential.mean == pytest.approx(truth["potential"], rel=1e-7)
    assert (limit.potential.stderr, limit.drift_stderr) == (0.0, 0.0)
    if limit.order is not None:
        drift = torch.tensor(truth["drift_per_step"], dtype=DTYPE)
        assert torch.linalg.vector_norm(limit.drift - drift) <= 1e-7 * torch.linalg.vector_norm(drift)
    if "mean_offset_norm" in truth:
        assert limit.mean_offset_norm == pytest.approx(truth["mean_offset_norm"], rel=1e-7)
    if "normal_variance" in truth:
        assert limit.normal_variance.mean == pytest.approx(truth["normal_variance"], rel=1e-7)
        assert limit.distance == pytest.approx(truth["rms_distance"], rel=1e-7)
    diffusion = (spec["lr"] * spec["sigma"]) ** 2 if kind == "langevin" else 0.0
    assert limit.diffusion == pytest.approx(diffusion)


@pytest.mark.parametrize("name", [CASES[0], *(pytest.param(name, marks=pytest.mark.slow) for name in CASES[1:])])
def test_provenance(name):
    """The stored values are those that the script computes, without the package."""
    differences = make.compare(name)
    assert len(differences) > 30
    assert {key: value for key, value in differences.items() if not value < 1e-8} == {}
