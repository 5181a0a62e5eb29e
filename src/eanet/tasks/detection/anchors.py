"""Anchors: boxes of fixed shapes at every cell of every feature map."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Anchors"]


@dataclass(frozen=True)
class Anchors:
    """Boxes centered at (column * stride, row * stride), not rounded, not shifted by half a cell.

    Args:
        strides: of the feature maps, in pixels; a level's base size is its stride.
        ratios: height over width.
        scales: edge of a square anchor, in strides.
    """

    strides: Sequence[int]
    ratios: Sequence[float] = (0.5, 1.0, 2.0)
    scales: Sequence[float] = (8.0,)

    @property
    def per_cell(self) -> int:
        """Number of anchors at each cell."""
        return len(self.ratios) * len(self.scales)

    def base(self, level: int) -> Tensor:
        """Return the anchors of a level around the origin, (ratios * scales, 4), by ratio first."""
        corners = []
        for ratio in self.ratios:
            for scale in self.scales:
                height = self.strides[level] * scale * math.sqrt(ratio) / 2
                width = self.strides[level] * scale / math.sqrt(ratio) / 2
                corners.append([-width, -height, width, height])
        return torch.tensor(corners)

    def grid(
        self, level: int, size: tuple[int, int], *, device: torch.device | str = "cpu"
    ) -> Tensor:
        """Return all anchors of a level, (rows * columns * anchors per cell, 4), row by row.

        Args:
            level: number of the feature map.
            size: (rows, columns) of it.
            device: of the result.
        """
        rows, columns = (torch.arange(n, device=device) * self.strides[level] for n in size)
        y, x = torch.meshgrid(rows, columns, indexing="ij")
        shifts = torch.stack([x, y, x, y], -1).reshape(-1, 1, 4)
        return (shifts + self.base(level).to(device)).reshape(-1, 4)

    def valid(
        self,
        level: int,
        size: tuple[int, int],
        image: tuple[int, int],
        *,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Return which anchors of a level stand in cells of an image padded by itself.

        Anchors beyond are those of the further padding to a batch, which are not trained on.

        Args:
            level: number of the feature map.
            size: (rows, columns) of it.
            image: (height, width) of the image, without padding.
            device: of the result.
        """
        stride = self.strides[level]
        own = [-(-(-(-length // 32) * 32) // stride) for length in image]
        rows = torch.arange(size[0], device=device) < own[0]
        columns = torch.arange(size[1], device=device) < own[1]
        cells = rows[:, None] & columns
        return cells.reshape(-1, 1).expand(-1, self.per_cell).reshape(-1)
