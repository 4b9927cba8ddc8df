"""The device is built once; where it cannot be, the tests on it are skipped with the reason."""

import pytest
import torch

from tests.device import fake_device


def pytest_collection_modifyitems(items):
    """Torch's autograd must know the device before the first backward pass of a process, whichever test makes it."""
    if any("tests/device/" in item.nodeid for item in items) and not fake_device.missing():
        fake_device.load()


@pytest.fixture(scope="session", autouse=True)
def device():
    if lacking := fake_device.missing():
        pytest.skip(f"{lacking}: the tests on another device are skipped")
    return torch.device("fake", 0)
