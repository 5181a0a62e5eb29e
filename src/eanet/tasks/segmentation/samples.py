"""What travels through this room: an image with a class for every pixel, and many of them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from eanet.data.labeled_images import image_to_tensor

__all__ = ["IGNORE", "Batch", "Sample", "collate"]

#: the label of pixels that count nowhere
IGNORE = 255


@dataclass(frozen=True)
class Sample:
    """One image.

    Args:
        image: as stored, 8-bit RGB; the transforms hand on a tensor (channels, height, width), of
            bytes or, where something was resampled, of normalized float32.
        labels: (height, width), bytes; the class of each pixel, :data:`IGNORE` where there is
            none; ``None`` where nothing is known.
        name: the file, or where in a data set it stands.
    """

    image: Image.Image | Tensor
    labels: np.ndarray | Tensor | None
    name: str


@dataclass
class Batch:
    """Images of any size, stacked: each at the top left of a frame as large as the largest.

    Args:
        images: (batch, channels, height, width), bytes or normalized float32; 0 beyond an image.
        labels: (batch, height, width), bytes, :data:`IGNORE` beyond an image; ``None`` where
            they are not known.
        sizes: height and width of each image.
        names: as in :class:`Sample`.
    """

    images: Tensor
    labels: Tensor | None
    sizes: list[tuple[int, int]]
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

    def pin_memory(self) -> Self:
        """Return the batch in page-locked memory."""
        return replace(
            self,
            images=self.images.pin_memory(),
            labels=None if self.labels is None else self.labels.pin_memory(),
        )


def collate(samples: Sequence[Sample]) -> Batch:
    """Stack transformed samples.

    Raises:
        ValueError: there are none, or only some have labels.
    """
    if not samples:
        raise ValueError("a batch needs at least one sample")
    images = [
        sample.image if isinstance(sample.image, Tensor) else image_to_tensor(sample.image)
        for sample in samples
    ]
    labels = [
        torch.from_numpy(sample.labels) if isinstance(sample.labels, np.ndarray) else sample.labels
        for sample in samples
    ]
    known = [label for label in labels if label is not None]
    if known and len(known) < len(samples):
        unlabeled = next(s.name for s, label in zip(samples, labels, strict=True) if label is None)
        raise ValueError(f"only some samples of a batch have labels; {unlabeled!r} has none")
    return Batch(
        images=_stacked(images, 0),
        labels=_stacked(known, IGNORE) if known else None,
        sizes=[(image.shape[-2], image.shape[-1]) for image in images],
        names=[sample.name for sample in samples],
    )


def _stacked(tensors: Sequence[Tensor], fill: int) -> Tensor:
    """Stack tensors that may differ in their last two lengths, filled up at bottom and right."""
    if all(tensor.shape == tensors[0].shape for tensor in tensors):
        return torch.stack(list(tensors))
    height, width = (max(tensor.shape[axis] for tensor in tensors) for axis in (-2, -1))
    out = tensors[0].new_full((len(tensors), *tensors[0].shape[:-2], height, width), fill)
    for place, tensor in zip(out, tensors, strict=True):
        place[..., : tensor.shape[-2], : tensor.shape[-1]] = tensor
    return out
