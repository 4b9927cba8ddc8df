"""The distance measurement: what is measured at the weights, and what at the iterate."""

import pytest
import torch

from tests.problems import displaced, make
from torch_singlim import AntiCorrelated, Dropout, SGDSettings, Snapshot, ZeroLossProblem, measure_distance
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


def test_where_many_residuals_are_factored_the_search_begins_at_the_last_point():
    """Many residuals: here, above max_dense. The factor of the last step serves the projections, too."""
    dense, point = make("many_outputs")
    problem = ZeroLossProblem(dense.net, dense.loss, dense.inputs, dense.targets, batch_size=len(dense.inputs))
    before, w, sgd = displaced(point, 0.018), displaced(point, 0.02), SGDSettings(lr=0.05)
    start = measure_distance(problem, Snapshot(5, before), max_dense=0).nearest.point.float()
    exact = measure_distance(problem, Snapshot(5, w, sgd=sgd), noise=Dropout(), num_draws=1000)
    assert exact.nearest.linearised_distance is not None
    found = measure_distance(
        problem, Snapshot(5, w, sgd=sgd), noise=Dropout(), num_draws=1000, max_dense=0, start=start
    )
    assert (found.nearest.steps, found.nearest.linearised_distance) == (1, None)
    assert found.nearest.factor is found.tangent.hessian.factor
    assert found.nearest.distance == pytest.approx(
        exact.nearest.distance, abs=found.nearest.error + exact.nearest.error
    )
    assert found.relaxed.measured == pytest.approx(exact.relaxed.measured, rel=0.03)
    torch.testing.assert_close(
        found.limit.drift, exact.limit.drift, rtol=0, atol=0.02 * exact.limit.drift.norm().item()
    )
    # without all eigenvectors the drift is that of small steps
    assert (exact.limit.finite_step, found.limit.finite_step) == (True, False)
    # what is decomposed is cheap: the search begins at w
    whole = measure_distance(problem, Snapshot(5, w, sgd=sgd), start=start)
    assert whole.nearest.point.equal(exact.nearest.point)


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
