"""The distance measurement: what is measured at the weights, and what at the iterate."""

import torch

from tests.problems import displaced, make
from torch_singlim import AntiCorrelated, Dropout, SGDSettings, Snapshot, measure_distance
from torch_singlim.measure.distance import compare_expansion
from torch_singlim.theory import averaged_gradient, potential


def test_a_transient_perturbation_does_not_drift():
    """The distance is that of the weights; the noise is averaged at the iterate, which the recursion is written in."""
    dense, w = make("scalar")
    xi = torch.linspace(-0.1, 0.1, len(w), dtype=w.dtype)
    snapshot = Snapshot(5, w + xi, xi, sgd=SGDSettings(lr=0.05))
    torch.testing.assert_close(snapshot.iterate, w)
    torch.testing.assert_close(snapshot.weights, w + xi)
    plain = Snapshot(5, w)
    assert plain.iterate is plain.weights
    assert measure_distance(dense.problem, plain).nearest.distance == 0.0

    noise, seeded = AntiCorrelated(0.1), lambda: torch.Generator().manual_seed(0)
    found = measure_distance(dense.problem, snapshot, noise=noise, num_draws=40, generator=seeded())
    assert found.nearest.distance > 0.01
    assert found.weight_norm == torch.linalg.vector_norm(w + xi).item()
    expanded = potential(noise, dense.problem, w, num_draws=40).gradient  # exact: no draw is random
    averaged = averaged_gradient(noise, dense.problem, w, num_draws=40, generator=seeded())
    truth = compare_expansion(averaged, expanded)
    torch.testing.assert_close(found.expansion.cosine, truth.cosine)
    torch.testing.assert_close(found.expansion.ratio, truth.ratio)


def test_the_geometry_needs_no_noise_and_the_relaxed_part_a_step_size():
    dense, point = make("two_layers")
    w = displaced(point, 0.02)
    bare = measure_distance(dense.problem, Snapshot(5, w))
    assert (bare.relaxed, bare.limit, bare.expansion, bare.forecast, bare.reason) == (None,) * 5
    geometry = measure_distance(dense.problem, Snapshot(5, w, sgd=SGDSettings(lr=0.05)))
    assert geometry.relaxed.expected is None
    assert 0 < geometry.relaxed.measured <= geometry.nearest.linearised_distance
    whole = measure_distance(dense.problem, Snapshot(5, w, sgd=SGDSettings(lr=0.05)), noise=Dropout(), num_draws=40)
    assert whole.relaxed.measured == geometry.relaxed.measured
    assert whole.relaxed.expected > 0
