"""How distance and drift are distributed over the layers."""

from dataclasses import replace

import pytest
import torch

from torch_singlim.linalg import Estimate, Result
from torch_singlim.measure import Agreement, Comparison, Model, NoiseInduced, Window, drift_by_layer, shares
from torch_singlim.theory import WindowPrediction

SIZES = {"first": 2, "second": 1}
AGREEMENT = Agreement(cosine=0.9, speed=1.0, residual=0.4, measured=1.0, predicted=1.0)


def window(measured, averaged, baseline):
    def moved(vector):
        return Comparison(AGREEMENT, WindowPrediction(torch.tensor([vector]), 0.0, 0.0, 1, Result.SUCCESSFUL))

    noise = NoiseInduced(0.5, 0.4, 0.6, Estimate(1.0, 0.1), 1.0, share=0.37)
    comparisons = {Model.AVERAGED: moved(averaged), Model.BASELINE: moved(baseline)}
    return Window(0, 10, 1.0, torch.tensor(measured), comparisons, noise=noise)


def test_shares_are_those_of_the_squared_norm():
    assert shares(torch.tensor([1.0, 1.0, 2.0]), SIZES) == pytest.approx({"first": 1 / 3, "second": 2 / 3})
    assert shares(torch.zeros(3), SIZES) == {"first": 0.0, "second": 0.0}


def test_the_drift_is_that_beside_the_baseline():
    found = drift_by_layer(window([2.0, 1.0, 1.0], [1.0, 1.0, 4.0], [1.0, 1.0, 1.0]), SIZES)
    assert found == (
        ("noise-induced drift, measured", {"first": 1.0, "second": 0.0}),
        ("noise-induced drift, predicted", {"first": 0.0, "second": 1.0}),
    )


def test_without_a_noise_induced_drift_there_are_none():
    whole = window([2.0, 1.0, 1.0], [1.0, 1.0, 4.0], [1.0, 1.0, 1.0])
    assert drift_by_layer(whole, {"first": 2}) == ()  # other parameters
    assert drift_by_layer(replace(whole, noise=None), SIZES) == ()
    assert drift_by_layer(replace(whole, displacement=None), SIZES) == ()
    assert drift_by_layer(replace(whole, comparisons={}), SIZES) == ()
