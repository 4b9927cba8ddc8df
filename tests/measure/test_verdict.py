"""The verdict from a history made to order, and whether the noise is visible in windows made to order."""

import math
from dataclasses import replace

import pytest

from tests.problems import displaced, make
from torch_singlim import Dropout, Estimate, Minibatch, SGDSettings, Snapshot, measure_distance
from torch_singlim.measure import Agreement, Code, Comparison, Model, NoiseInduced, Window, verdict, visibility
from torch_singlim.measure.distance import Expansion


def test_a_verdict_without_drift_is_a_table_still():
    history = {
        0: {"excess_loss": 1.0, "distance/nearest": 2.0, "quality/nearest_error": 0.034},
        10: {
            "excess_loss": 0.5,
            "distance/half": 0.4,
            "distance/nearest": 1.0,
            "window/steps": 10.0,
            "drift/measured": 0.1,
        },
    }
    assert "| 10 | 0.5 | 0.4 | - | - | 1 | - | - | - |" in verdict(history)
    assert "| 0 | 1 | - | - | - | 2 ± 0.03 | - | - | - |" in verdict(history)
    assert "window" not in verdict(history)  # nothing to compare its motion with
    history[10]["drift/baseline_cosine"] = 0.4
    assert "| 0-10 | - | - | - | 0.4 | - | - | - |" in verdict(history)


def test_a_window_has_one_row_with_the_values_at_its_end():
    steps = {5: (5, 0.8), 10: (10, 0.9), 12: (2, 0.7)}
    history = {step: {"window/steps": float(k), "drift/cosine": cosine} for step, (k, cosine) in steps.items()}
    rows = [line for line in verdict(history, reasons=[Code.MAXIMIZES()], noise="small").splitlines() if line]
    assert rows[0] == "The distance was not measured."
    assert [row[:14] for row in rows[3:5]] == ["| 0-10 | 0.9 |", "| 10-12 | 0.7 "]
    assert rows[5:] == ["Noise: small.", "Unsupported: the optimizer maximizes."]


def window(ratio=Estimate(0.9, 0.1), **changes):  # noqa: B008  # frozen
    agreement = Agreement(cosine=0.9, speed=1.0, residual=0.4, measured=1.0, predicted=1.0)
    noise = None if ratio is None else NoiseInduced(0.5, 0.4, 0.6, ratio, math.nan, share=0.37)
    return replace(Window(0, 100, 1.0, comparisons={Model.AVERAGED: Comparison(agreement)}, noise=noise), **changes)


@pytest.fixture(scope="module")
def distance():
    dense, point = make("two_layers")
    w = displaced(point, 0.02)
    return measure_distance(dense.problem, Snapshot(9, w, sgd=SGDSettings(lr=0.05)), noise=Dropout(), num_draws=40)


def test_noise_is_visible_if_its_ratio_is_known_to_a_quarter(distance):
    found = visibility(window(), distance)
    steps = 0.01 * distance.weight_norm / distance.limit.drift.norm().item()
    assert found.visible
    assert found.words == (
        f"order 1, the singular limit moves the weights by 1 % in {steps:.2g} steps; the noise-induced drift is "
        "0.900 +- 0.1 times the predicted one, whose norm is 37% of that of the predicted motion"
    )
    assert visibility(window(Estimate(0.9, 0.26)), distance).visible is False
    longer = visibility(window(Estimate(0.9, 0.5)), distance).words  # half the error in four times the steps
    assert "not visible in windows of 100 steps" in longer
    assert "it would take windows of about 4e+02 steps" in longer


def test_the_ratio_of_all_windows_counts_if_its_error_is_known():
    pooled = visibility(window(Estimate(0.9, 0.5)), None, Estimate(1.1, 0.05))
    assert pooled.visible
    assert "the limit was not predicted; the noise-induced drift over all windows is 1.100 +- 0.05" in pooled.words
    for unknown in (Estimate(1.1, math.nan), Estimate(math.nan, math.nan)):
        assert "the noise-induced drift is 0.900 +- 0.1" in visibility(window(), None, unknown).words


def test_what_replicas_say_of_a_ratio_that_is_not_one():
    def words(ratio, replicas):
        of = window()
        return visibility(replace(of, noise=replace(of.noise, ratio=ratio, replicas=replicas)), None).words

    too = words(Estimate(0.9, 0.01), Estimate(0.91, 0.01))
    assert "that of the replicas is 0.910 +- 0.01 times, too: fluctuations feed back" in too
    assert "something else makes the difference" in words(Estimate(0.9, 0.01), Estimate(1.0, 0.01))
    assert "replicas" not in words(Estimate(0.99, 0.01), Estimate(0.9, 0.01))
    assert "replicas" not in words(Estimate(0.9, 0.01), Estimate(math.nan, math.nan))
    pooled = visibility(window(Estimate(0.9, 0.5)), None, Estimate(1.1, 0.02), Estimate(1.09, 0.02))
    assert "that of the replicas is 1.090 +- 0.02 times, too" in pooled.words


@pytest.mark.parametrize(
    ("of", "visible", "words"),
    [
        (None, False, "no window was compared with theory"),
        (Window(0, 100, 1.0), False, "no window was compared with theory"),
        (window(None), False, "the noise-induced drift was not resolved"),
        (window(reason=Code.UNCERTAIN(start=0, stop=100)), False, "the noise-induced drift was not resolved"),
        (window(Estimate(0.9, math.nan)), False, "without replicas the error of the noise-induced drift is unknown"),
        (window(None, diffuses=True), True, "only the length of the motion can be predicted"),
    ],
)
def test_what_is_not_visible_and_why(of, visible, words):
    found = visibility(of, None)
    assert found.visible is visible
    assert words in found.words


def test_the_clock_of_the_noise_in_words(distance):
    failed = replace(distance, limit=None, expansion=Expansion(cosine=0.3, ratio=2.0, stderr=0.01))
    assert "too large for the singular limit" in visibility(window(), failed).words
    dense, point = make("two_layers")
    still = measure_distance(dense.problem, Snapshot(9, point, sgd=SGDSettings(lr=0.05)), noise=Minibatch())
    assert "no motion along the zero-loss set at order 1 or 2" in visibility(window(), still).words


def test_reasons_of_several_windows_are_said_once():
    reasons = [Code.CLIPPED(count=k, start=10 * k, stop=10 * k + 10) for k in (1, 2, 3)]
    words = verdict({}, reasons=[*reasons, Code.MAXIMIZES()])
    assert f"{reasons[0].sentence} The same in 2 further windows." in words
    assert words.count("clipped") == 1
    assert Code.MAXIMIZES().sentence in words
