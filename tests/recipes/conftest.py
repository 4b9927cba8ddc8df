"""Images made on the fly, and experiments of a size that a test can run."""

import dataclasses
import logging

import pytest
import torch
from PIL import Image

from recipes import images


@pytest.fixture
def folder(tmp_path):
    """Ten classes, three images of 12 x 12 pixels each."""
    generator = torch.Generator().manual_seed(0)
    for label in range(10):
        where = tmp_path / "images" / f"{label}"
        where.mkdir(parents=True)
        for i in range(3):
            pixels = torch.randint(256, (12, 12, 3), generator=generator, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(where / f"{i}.png")
    return tmp_path / "images"


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """A quick experiment on images takes seconds."""
    size = {"samples": 12, "clean": 20, "steps": 16, "window": 8, "batch_size": 4, "num_draws": 4}
    quick = {key: dataclasses.replace(experiment, **size) for key, experiment in images.QUICK.items()}
    monkeypatch.setattr(images, "QUICK", quick)


@pytest.fixture(autouse=True)
def levels():
    """What a recipe does not want to be logged is logged again in the tests that follow."""
    loggers = [logging.getLogger(name) for name in ("torch_singlim", "lightning.pytorch")]
    before = [each.level for each in loggers]
    yield
    for each, level in zip(loggers, before, strict=True):
        each.setLevel(level)
