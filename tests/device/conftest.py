"""The device is built once; where it cannot be, the tests on it are skipped with the reason."""

import pytest
import torch

from tests.device import fake_device


@pytest.fixture(scope="session", autouse=True)
def device():
    if lacking := fake_device.missing():
        pytest.skip(f"{lacking}: the tests on another device are skipped")
    fake_device.load()
    return torch.device("fake", 0)
