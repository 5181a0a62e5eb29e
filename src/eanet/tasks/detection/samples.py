"""What travels through this room: an image with its objects, and several of them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from PIL import Image
from torch import Tensor

__all__ = ["Batch", "Instance", "Sample", "Segmentation", "collate"]

#: polygons as lists of x, y, x, y, ...; or a run-length code with ``size`` and ``counts``
Segmentation = list[list[float]] | dict[str, Any]


@dataclass(frozen=True, slots=True)
class Instance:
    """One annotated object, in the pixels of the image as stored.

    Args:
        label: number of its class, from 0.
        box: (x, y, width, height), x and y of the upper left corner.
        area: of the object, which ranks it as small, medium or large.
        is_crowd: whether it stands for several objects: not trained on, and what is found there
            counts neither for nor against.
        segmentation: its outline or mask, where it has one.
        number: of its annotation, for messages.
    """

    label: int
    box: tuple[float, float, float, float]
    area: float
    is_crowd: bool = False
    segmentation: Segmentation | None = None
    number: int | str = 0


@dataclass(frozen=True)
class Sample:
    """One image and its objects.

    Args:
        image: RGB as stored; the transforms hand on a tensor of bytes, (3, height, width).
        instances: its objects; ``None`` where they are not known.
        name: the file, or where in a data set it stands.
        number: of the image within its data set.
        size: (height, width) as stored, whatever the transforms do.
        target: what the network is to learn, in the pixels of the transformed image: ``boxes``
            (N, 4) as corners, ``labels`` (N) and, where asked for, ``masks`` (N, height, width).
    """

    image: Image.Image | Tensor
    instances: tuple[Instance, ...] | None
    name: str
    number: int
    size: tuple[int, int]
    target: dict[str, Tensor] | None = None

    def prepared(self, image: Tensor, target: dict[str, Tensor] | None = None) -> "Sample":
        """Return the sample with a transformed image and what is to be learned of it."""
        return replace(self, image=image, target=target)


@dataclass
class Batch:
    """Transformed samples, their images still of different sizes.

    Args:
        samples: see :class:`Sample`; images are tensors of bytes, normalized and padded only on
            the device of the network.
    """

    samples: list[Sample]

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.samples)

    @property
    def images(self) -> list[Tensor]:
        """The images, bytes of (3, height, width)."""
        return [sample.image for sample in self.samples if isinstance(sample.image, Tensor)]

    @property
    def targets(self) -> list[dict[str, Tensor]]:
        """What is to be learned of each image."""
        found = [sample.target for sample in self.samples if sample.target is not None]
        if len(found) != len(self.samples):
            raise ValueError("the batch has samples without a target")
        return found

    def to(self, device: torch.device, *, channels_last: bool = False) -> Self:
        """Return the batch on a device; the layout is chosen when the images are padded."""
        del channels_last

        def moved(sample: Sample) -> Sample:
            target = sample.target
            if target is not None:
                target = {key: x.to(device, non_blocking=True) for key, x in target.items()}
            assert isinstance(sample.image, Tensor)
            return sample.prepared(sample.image.to(device, non_blocking=True), target)

        return replace(self, samples=[moved(sample) for sample in self.samples])


def collate(samples: Sequence[Sample]) -> Batch:
    """Put transformed samples together.

    Raises:
        ValueError: there are none, or an image is not transformed.
    """
    if not samples:
        raise ValueError("a batch needs at least one sample")
    if not all(isinstance(sample.image, Tensor) for sample in samples):
        raise ValueError("images of a batch must be transformed to tensors")
    return Batch(list(samples))
