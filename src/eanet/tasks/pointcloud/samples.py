"""What travels through this room: a cloud of points with its labels, and many of them stacked."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from eanet.tasks.pointcloud.pct import pad_clouds

__all__ = ["Batch", "Sample", "collate"]


@dataclass(frozen=True)
class Sample:
    """One cloud.

    Args:
        points: float32, (points, channels), x, y, z first. Never written to: a data set may hand
            out views of what it holds.
        label: number of its class or category; ``None`` where it is not known.
        parts: part of each point, int64, (points); ``None`` where they are not known.
        name: the file, or where in a data set it stands.
    """

    points: Tensor
    label: int | None
    parts: Tensor | None
    name: str

    def __len__(self) -> int:
        """Return the number of points."""
        return len(self.points)

    def take(self, indices: Tensor) -> "Sample":
        """Return the sample with these of its points, labels along."""
        parts = None if self.parts is None else self.parts[indices]
        return replace(self, points=self.points[indices], parts=parts)

    def with_points(self, points: Tensor) -> "Sample":
        """Return the sample with other values of the same points."""
        return replace(self, points=points)


@dataclass
class Batch:
    """Clouds, padded to one size where they differ.

    Args:
        points: (batch, points, channels).
        mask: True for points that exist, (batch, points); ``None`` where no cloud was padded.
        labels: (batch), int64; ``None`` where they are not known.
        parts: (batch, points), int64, 0 where padded; ``None`` where they are not known.
        names: as in :class:`Sample`.
    """

    points: Tensor
    mask: Tensor | None
    labels: Tensor | None
    parts: Tensor | None
    names: list[str]

    def __len__(self) -> int:
        """Return the number of clouds."""
        return len(self.points)

    def to(self, device: torch.device, *, channels_last: bool = False) -> Self:
        """Return the batch on a device; there are no images to store channels last."""
        del channels_last

        def moved(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device, non_blocking=True)

        return replace(
            self,
            points=self.points.to(device, non_blocking=True),
            mask=moved(self.mask),
            labels=moved(self.labels),
            parts=moved(self.parts),
        )


def collate(samples: Sequence[Sample]) -> Batch:
    """Stack clouds; those of different size are padded.

    Raises:
        ValueError: there are none.
    """
    if not samples:
        raise ValueError("a batch needs at least one sample")
    sizes = {len(sample) for sample in samples}
    mask = None
    if len(sizes) == 1:
        points = torch.stack([sample.points for sample in samples])
    else:
        points, mask = pad_clouds([sample.points for sample in samples])
    labels = [sample.label for sample in samples if sample.label is not None]
    parts = [sample.parts for sample in samples if sample.parts is not None]
    return Batch(
        points=points,
        mask=mask,
        labels=torch.tensor(labels) if len(labels) == len(samples) else None,
        parts=torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)
        if len(parts) == len(samples)
        else None,
        names=[sample.name for sample in samples],
    )
