"""Labeled images as the tasks that learn from them share them: one, many stacked, and lists."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from eanet.data.files import decode_image
from eanet.data.splits import Dataset, Subset

__all__ = [
    "Batch",
    "LabeledArrays",
    "LabeledFiles",
    "Sample",
    "collate",
    "image_to_tensor",
    "labels_of",
    "normalize",
    "pixel_statistics",
]


@dataclass(frozen=True)
class Sample:
    """One image.

    Args:
        image: as stored, 8-bit of mode ``L`` or ``RGB``; the transforms hand on a tensor of bytes,
            (channels, height, width).
        label: number of its class; ``None`` where it is not known.
        name: the file, or where in a data set it stands.
    """

    image: Image.Image | Tensor
    label: int | None
    name: str

    def with_image(self, image: Image.Image | Tensor) -> "Sample":
        """Return the sample with another image."""
        return replace(self, image=image)


@dataclass
class Batch:
    """Images of one size, stacked.

    Args:
        images: bytes, (batch, channels, height, width). They stay bytes until they are on the
            device of the network: a quarter of the memory and of the transfer of float32.
        labels: (batch), int64; ``None`` where they are not known.
        names: as in :class:`Sample`.
    """

    images: Tensor
    labels: Tensor | None
    names: list[str]

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.images)

    def to(self, device: torch.device, *, channels_last: bool = False) -> Self:
        """Return the batch on a device; images channels last where asked."""
        layout = torch.channels_last if channels_last else torch.preserve_format
        return replace(
            self,
            images=self.images.to(device, non_blocking=True, memory_format=layout),
            labels=None if self.labels is None else self.labels.to(device, non_blocking=True),
        )


def image_to_tensor(image: Image.Image) -> Tensor:
    """Return an 8-bit image as bytes, (channels, height, width)."""
    array = np.array(image)  # a copy: a tensor must be writable
    return torch.from_numpy(array[None] if array.ndim == 2 else array.transpose(2, 0, 1).copy())


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return bytes as float32, ``(x / 255 - mean) / std`` for each channel.

    Args:
        images: bytes, (..., channels, height, width).
        mean: of each channel, for values of 0..1.
        std: of each channel, for values of 0..1.

    Raises:
        ValueError: the images have another number of channels.
    """
    if images.shape[-3] != len(mean) or len(std) != len(mean):
        raise ValueError(
            f"images have {images.shape[-3]} channels, mean {len(mean)} and std {len(std)} values"
        )
    scale = torch.tensor([1 / (255 * value) for value in std], device=images.device)
    offset = torch.tensor(
        [-center / value for center, value in zip(mean, std, strict=True)], device=images.device
    )
    return torch.addcmul(offset.view(-1, 1, 1), images, scale.view(-1, 1, 1))


def collate(samples: Sequence[Sample]) -> Batch:
    """Stack transformed samples.

    Raises:
        ValueError: there are none, or their sizes differ.
    """
    if not samples:
        raise ValueError("a batch needs at least one sample")
    images = [
        sample.image if isinstance(sample.image, Tensor) else image_to_tensor(sample.image)
        for sample in samples
    ]
    for image, sample in zip(images, samples, strict=True):
        if image.shape != images[0].shape:
            raise ValueError(
                f"images of one batch differ in size: {samples[0].name!r} is "
                f"{tuple(images[0].shape)}, {sample.name!r} is {tuple(image.shape)}"
            )
    labels = [sample.label for sample in samples]
    known = [label for label in labels if label is not None]
    return Batch(
        images=torch.stack(images),
        labels=torch.tensor(known) if len(known) == len(labels) else None,
        names=[sample.name for sample in samples],
    )


@dataclass
class LabeledFiles:
    """Image files and their classes.

    Args:
        paths: the files.
        labels: class of each.
        mode: ``"L"`` or ``"RGB"``.
    """

    paths: Sequence[Path]
    labels: Sequence[int]
    mode: Literal["L", "RGB"] = "RGB"

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.paths)

    def __getitem__(self, index: int) -> Sample:
        """Decode one file."""
        path = self.paths[index]
        return Sample(decode_image(path, mode=self.mode), self.labels[index], str(path))


@dataclass
class LabeledArrays:
    """Images held in memory.

    Args:
        images: bytes, (samples, height, width) or (samples, height, width, 3).
        labels: class of each.
        name: how the data set is called in the names of its samples.
    """

    images: np.ndarray
    labels: Sequence[int]
    name: str

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        """Return one image."""
        image = Image.fromarray(self.images[index])
        return Sample(image, int(self.labels[index]), f"{self.name}[{index}]")


def labels_of(dataset: Dataset) -> list[int]:
    """Return the class of every sample, from what the data set knows without decoding."""
    if isinstance(dataset, Subset):
        labels = labels_of(dataset.dataset)
        return [labels[index] for index in dataset.indices]
    if isinstance(dataset, LabeledFiles | LabeledArrays):
        return [int(label) for label in dataset.labels]
    return [dataset[index].label for index in range(len(dataset))]


def pixel_statistics(images: np.ndarray) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation of each channel, of values scaled to 0..1.

    Args:
        images: bytes, (samples, height, width) or (samples, height, width, channels).
    """
    channels = 1 if images.ndim == 3 else images.shape[-1]
    flat = images.reshape(-1, channels) / np.float32(255)
    mean = flat.mean(axis=0, dtype=np.float64)
    std = flat.std(axis=0, dtype=np.float64)
    return mean.tolist(), np.maximum(std, 1e-3).tolist()
