"""Trainings on the fake device."""

import math

import torch
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import SingleDeviceStrategy

from tests.zoo import LEVELS, WHOLE


class Fake(Accelerator):
    """Lightning's name for the device."""

    def setup_device(self, device): ...

    def teardown(self): ...

    def get_device_stats(self, device):
        return {}

    @staticmethod
    def parse_devices(devices):
        return [0]

    @staticmethod
    def get_parallel_devices(devices):
        return [torch.device("fake", 0)]

    @staticmethod
    def auto_device_count():
        return 1

    @staticmethod
    def is_available():
        return True

    @staticmethod
    def name():
        return "fake"


def on_device(options):
    """The Trainer options of the same training on the device.

    Lightning's mixed precision knows CUDA and the CPU alone, and takes a plugin for other devices.
    """
    options = dict(options)
    if str(options.get("precision")).endswith("-mixed"):
        options["plugins"] = [MixedPrecision(options.pop("precision"), "fake")]
    for plugin in options.get("plugins", []):
        plugin.device = "fake"
        if plugin.scaler is not None:
            plugin.scaler = torch.amp.GradScaler("fake", init_scale=plugin.scaler.get_scale())
    return options | {"accelerator": Fake(), "strategy": SingleDeviceStrategy(device=torch.device("fake", 0))}


# the searches for a level are in single precision, and rounding errors change their course
_COURSE = 0.02


def largest_difference(history, other):
    """Relative, of two monitors' figures, and where: (difference, tag, step); what a measurement costs is left aside.

    Distances to a level, and what rests on them, count as equal if they differ by little.
    """
    assert history.keys() == other.keys()
    found = (0.0, "", 0)
    for step, point in history.items():
        assert point.keys() == other[step].keys(), step
        for tag, value in point.items():
            there = other[step][tag]
            if tag.startswith("cost/") or value == there or (math.isnan(value) and math.isnan(there)):
                continue
            difference = abs(there - value) / max(abs(value), abs(there))
            if tag in LEVELS | WHOLE and difference <= _COURSE:
                continue
            found = max(found, (math.inf if math.isnan(difference) else difference, tag, step))
    return found


def assert_same_path(trace, other):
    """That two trainings, on whichever device, had the same weights and buffers at every step, to the last bit."""
    assert len(trace.states) == len(other.states)
    for i, (a, b) in enumerate(zip(trace.states, other.states, strict=True)):
        for here, there in zip([a["weights"], *a["buffers"]], [b["weights"], *b["buffers"]], strict=True):
            assert torch.equal(here, there.cpu()), f"after batch {i + 1}"
