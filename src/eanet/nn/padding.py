"""What part of a padded batch is image: told to the blocks inside a network, beside its inputs.

Softmax over positions sees all of them, so without a mask the result for an image would depend on
how much its batch pads it. A block that was inserted into a network gets feature maps alone; the
sizes of the images reach it through a record that it shares with whatever knows them.
"""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from eanet.nn.external_attention import ExternalAttention2d

__all__ = ["ImageSizes", "PaddedExternalAttention2d", "find_image_sizes", "image_sizes"]


class ImageSizes:
    """Sizes of the images of the padded batch that is on its way through a network.

    One record is shared by all blocks of a network and by what fills it in. It is a plain object
    without tensors: no state dict knows it, and copying the network copies it once.
    """

    def __init__(self) -> None:
        self.sizes: list[tuple[int, int]] | None = None
        self.padded: tuple[int, int] | None = None

    def set(self, sizes: Sequence[tuple[int, int]], padded: tuple[int, int]) -> None:
        """Say which part of each image is no padding.

        Args:
            sizes: (height, width) of each image in pixels.
            padded: (height, width) of the batch.
        """
        self.sizes = [(int(height), int(width)) for height, width in sizes]
        self.padded = (int(padded[0]), int(padded[1]))

    def clear(self) -> None:
        """Forget the sizes: everything is image again."""
        self.sizes = self.padded = None

    def mask(self, features: Tensor) -> Bool[Tensor, "batch height width"] | None:
        """Return which cells of a feature map hold any of their image.

        Cell (i, j) is valid where i < ceil(h / stride) and j < ceil(w / stride).

        Args:
            features: (batch, channels, height, width), of the whole padded batch.

        Returns:
            ``None`` where no size is known or every cell is valid.

        Raises:
            ValueError: the batch has another number of images than there are sizes.
        """
        if self.sizes is None or self.padded is None:
            return None
        batch, _, rows, columns = features.shape
        if len(self.sizes) != batch:
            raise ValueError(f"{len(self.sizes)} image sizes for a batch of {batch}")
        valid = [
            (-(-height * rows // self.padded[0]), -(-width * columns // self.padded[1]))
            for height, width in self.sizes
        ]
        if all(height >= rows and width >= columns for height, width in valid):
            return None
        limits = torch.tensor(valid, device=features.device)
        in_rows = torch.arange(rows, device=features.device) < limits[:, :1]
        in_columns = torch.arange(columns, device=features.device) < limits[:, 1:]
        return in_rows.unsqueeze(2) & in_columns.unsqueeze(1)


class PaddedExternalAttention2d(ExternalAttention2d):
    """External attention that leaves out the padding that a record of image sizes tells of.

    Args:
        channels: as for :class:`ExternalAttention2d`, like all others.
        num_slots: the same.
        record: the sizes, shared with whatever knows them.
        options: further arguments.
    """

    def __init__(
        self, channels: int, num_slots: int = 64, *, record: ImageSizes, **options: Any
    ) -> None:
        super().__init__(channels, num_slots, **options)
        self.image_sizes = record

    def forward(
        self, x: Tensor, mask: Tensor | None = None, *, out: Tensor | None = None
    ) -> Tensor:
        """Attend; a mask that is given counts more than the record."""
        return super().forward(x, self.image_sizes.mask(x) if mask is None else mask, out=out)

    def attention_map(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return A; masked positions are 0."""
        return super().attention_map(x, self.image_sizes.mask(x) if mask is None else mask)

    def fused(self) -> nn.Module:
        """Return the folded block, which goes on to read the record."""
        folded = super().fused()
        return folded if folded is self else _PaddedBlock(folded, self.image_sizes)


class _PaddedBlock(nn.Module):
    """A block of any kind that takes a mask, told of padding by a record."""

    def __init__(self, block: nn.Module, record: ImageSizes) -> None:
        super().__init__()
        self.block = block
        self.image_sizes = record

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Run the block."""
        return self.block(x, self.image_sizes.mask(x) if mask is None else mask)


def find_image_sizes(model: nn.Module) -> ImageSizes | None:
    """Return the record that the blocks inside a network read, if it has any such block."""
    for module in model.modules():
        record = getattr(module, "image_sizes", None)
        if isinstance(record, ImageSizes):
            return record
    return None


@contextmanager
def image_sizes(
    model: nn.Module, sizes: Sequence[tuple[int, int]], padded: tuple[int, int]
) -> Generator[None]:
    """Tell the blocks inside a network, while the context lasts, what of a batch is no padding.

    Args:
        model: the network; one without such blocks is left alone.
        sizes: (height, width) of each image in pixels.
        padded: (height, width) of the batch.
    """
    record = find_image_sizes(model)
    if record is None:
        yield
        return
    record.set(sizes, padded)
    try:
        yield
    finally:
        record.clear()
