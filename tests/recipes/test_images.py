"""The image recipes at a small size, on a folder of images made here; what they say of folders that do not do."""

import dataclasses

import pytest
import torch
from PIL import Image
from torch import nn

from recipes import cifar10, mnist

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")


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
    for recipe in (mnist, cifar10):
        plans = {
            name: (12, dataclasses.replace(plan, clean=20, steps=16, window=8, batch_size=4, num_draws=4))
            for name, (_, plan) in recipe.QUICK.items()
        }
        monkeypatch.setattr(recipe, "QUICK", plans)


@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
@pytest.mark.parametrize(("recipe", "network"), [(mnist, "mlp"), (mnist, "cnn"), (cifar10, "cnn")])
def test_images(recipe, network, loss, folder, tmp_path, capsys):
    recipe.main(data_dir=folder, network=network, loss=loss, quick=True, accelerator="cpu", out=tmp_path, check=False)
    printed = capsys.readouterr().out
    assert f"tensorboard --logdir {tmp_path}" in printed
    assert "dropout 0.1" in printed
    assert (tmp_path / "noisy" / "version_0" / "drift.png").stat().st_size > 10_000


def test_another_noise(folder, tmp_path, capsys):
    options = {"data_dir": folder, "quick": True, "accelerator": "cpu", "out": tmp_path, "epochs": 4, "check": False}
    mnist.main(noise="label_flips", loss="cross_entropy", **options)
    assert "LabelFlips" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="pass --loss cross_entropy"):
        mnist.main(noise="label_flips", **options)


def test_the_resnet_has_group_normalisation_and_dropout():
    net = cifar10.resnet((3, 32, 32))
    assert net(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    kinds = {type(module) for module in net.modules()}
    assert nn.GroupNorm in kinds
    assert nn.Dropout in kinds
    assert nn.BatchNorm2d not in kinds


@pytest.mark.parametrize("recipe", [mnist, cifar10])
def test_folders_that_do_not_do(recipe, folder, tmp_path):
    def run(where, **options):
        recipe.main(data_dir=where, download=False, quick=True, accelerator="cpu", out=tmp_path / "out", **options)

    with pytest.raises(SystemExit, match="pass --download true"):
        run(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match="pass --download true"):
        run(tmp_path / "empty")
    (tmp_path / "bare" / "cat").mkdir(parents=True)
    with pytest.raises(SystemExit, match="no images in"):
        run(tmp_path / "bare")
    with pytest.raises(SystemExit, match="has 30 images, 40 were asked for: pass --samples 30 or fewer"):
        run(folder, samples=40)
    broken = folder / "3" / "1.png"
    broken.write_bytes(b"not an image")
    with pytest.raises(SystemExit, match=r"3/1\.png cannot be read as an image"):
        run(folder, samples=30)
    Image.new("RGB", (9, 12)).save(broken)
    with pytest.raises(SystemExit, match="different shapes"):
        run(folder, samples=30)
    Image.new("RGB", (12, 12)).save(broken)
    (folder / "x").mkdir()
    Image.new("RGB", (12, 12)).save(folder / "x" / "0.png")
    with pytest.raises(SystemExit, match="have 10 outputs"):
        run(folder, samples=31)
