"""The data sets of the recipes, read into memory: handwritten digits, MNIST, CIFAR-10, folders of images."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import TensorDataset
from torchvision.datasets import CIFAR10, MNIST, ImageFolder, VisionDataset
from torchvision.transforms.functional import pil_to_tensor

from torch_singlim import handwritten_digits


def as_dataset(images: Tensor, labels: Tensor, *, one_hot: bool) -> TensorDataset:
    """Images, standardised over all pixels, with their labels or one-hot targets."""
    images = (images - images.mean()) / images.std()
    return TensorDataset(images, F.one_hot(labels, 10).float() if one_hot else labels)


def digits(samples: int, *, one_hot: bool) -> TensorDataset:
    """The first of the 1,797 handwritten digits that come with the package."""
    return as_dataset(*handwritten_digits(samples), one_hot=one_hot)


def open_images(known: type[MNIST | CIFAR10], where: Path, *, download: bool) -> VisionDataset:
    """A training set in torchvision's format, or any folder that has one folder of images for each class.

    Args:
        known: torchvision's class.
        where: the folder; one that has other folders than the data set's own is taken as a folder of images.
        download: fetch the data set if it is not there.
    """
    own = "MNIST" if known is MNIST else CIFAR10.base_folder
    if any(path.is_dir() and path.name != own for path in where.glob("*")):
        try:
            return ImageFolder(str(where))
        except FileNotFoundError as error:
            raise SystemExit(f"no images in {where}, or in one of its folders: {error}") from error
    try:
        return known(str(where), train=True, download=download)
    except RuntimeError as error:
        raise SystemExit(
            f"no {known.__name__} in {where}: {error}; pass --download true, or --data-dir with a folder that holds "
            f"{own} or one folder of images for each class"
        ) from error


def first_images(dataset: VisionDataset, samples: int, *, where: Path) -> tuple[Tensor, Tensor]:
    """The first images of a data set ``[n, channels, height, width]`` and their labels ``[n]``.

    A folder is sorted by class: its images are taken in a fixed random order.

    Args:
        dataset: gives PIL images and labels.
        samples: how many.
        where: the folder, named in errors.
    """
    size = len(dataset)
    if size < samples:
        raise SystemExit(f"{where} has {size} images, {samples} were asked for: pass --samples {size} or fewer")
    order = torch.arange(size)
    if isinstance(dataset, ImageFolder):
        order = torch.randperm(size, generator=torch.Generator().manual_seed(0))
    images, labels = [], []
    for i in order[:samples].tolist():
        try:
            image, label = dataset[i]
        except OSError as error:
            name = getattr(dataset, "samples", {i: (f"image {i}",)})[i][0]
            raise SystemExit(f"{name} cannot be read as an image: {error}; remove it or replace it") from error
        images.append(pil_to_tensor(image).float())
        labels.append(label)
    shapes = {tuple(image.shape) for image in images}
    if len(shapes) > 1:
        raise SystemExit(f"the images in {where} have different shapes, {sorted(shapes)}: resize them to one")
    if max(labels) > 9:
        raise SystemExit(f"the networks here have 10 outputs, {where} has {max(labels) + 1} classes: use 10 folders")
    return torch.stack(images), torch.tensor(labels)
