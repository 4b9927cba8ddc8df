"""The device, built once, in words if it cannot be; trainings on it."""

import pytest
import torch

from tests.device import fake_device


@pytest.fixture(scope="session", autouse=True)
def device():
    """The fake device; without a compiler its tests are skipped."""
    if lacking := fake_device.missing():
        pytest.skip(f"{lacking}: the tests on another device are skipped")
    fake_device.load()
    return torch.device("fake", 0)
