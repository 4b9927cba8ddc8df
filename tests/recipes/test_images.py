"""The image recipe at a small size, on a folder of images made here; its messages for unusable folders and options."""

import pytest
import torch
from PIL import Image
from torch import nn

from recipes import images, networks

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")


@pytest.mark.parametrize(
    ("dataset", "network", "loss"),
    [("mnist", "mlp", "mse"), ("mnist", "cnn", "cross_entropy"), ("cifar10", "cnn", "cross_entropy")],
)
def test_images(dataset, network, loss, folder, tmp_path, capsys):
    options = {"dataset": dataset, "network": network, "loss": loss, "data_dir": folder, "out": tmp_path}
    images.main(**options, quick=True, accelerator="cpu", check=False)
    printed = capsys.readouterr().out
    assert f"tensorboard --logdir {tmp_path}" in printed
    assert "dropout 0.1" in printed
    assert (tmp_path / "noisy" / "version_0" / "drift.png").stat().st_size > 10_000


def test_another_noise(folder, tmp_path, capsys):
    options = {"data_dir": folder, "quick": True, "accelerator": "cpu", "out": tmp_path, "epochs": 4, "check": False}
    images.main(noise="label_flips", loss="cross_entropy", **options)
    assert "LabelFlips" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="pass --loss cross_entropy"):
        images.main(noise="label_flips", **options)


def test_each_data_set_has_its_networks():
    with pytest.raises(SystemExit, match="the networks for cifar10 are cnn and resnet, got --network mlp"):
        images.main(dataset="cifar10", network="mlp")
    pairs = {(dataset, network) for dataset, known in images.NETWORKS.items() for network in known}
    assert pairs == images.FULL.keys() == images.QUICK.keys()


def test_the_resnet_has_group_normalisation_and_dropout():
    net = networks.resnet((3, 32, 32))
    assert net(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    kinds = {type(module) for module in net.modules()}
    assert nn.GroupNorm in kinds
    assert nn.Dropout in kinds
    assert nn.BatchNorm2d not in kinds


@pytest.mark.parametrize("dataset", ["mnist", "cifar10"])
def test_unusable_folders(dataset, folder, tmp_path):
    def run(where, **options):
        options |= {"dataset": dataset, "data_dir": where, "download": False, "out": tmp_path / "out"}
        images.main(**options, quick=True, accelerator="cpu")

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
