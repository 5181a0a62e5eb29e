"""What travels through this room: a labeled image, and many of them stacked."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

__all__ = ["Batch", "Sample", "collate", "image_to_tensor"]


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
