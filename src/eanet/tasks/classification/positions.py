"""The frozen position table of T2T-ViT."""

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["SinusoidPositions", "resize_table", "sinusoid_table"]


def sinusoid_table(
    num_tokens: int, channels: int, *, device: torch.device | None = None
) -> Float[Tensor, "tokens channels"]:
    """Return sines and cosines of the position in the sequence, computed in float64.

    Position p and channel j hold sin or cos, by the parity of j, of p / 10000^(2 floor(j/2) / D).
    The row of a position does not depend on the length of the table. The table is
    one-dimensional: it knows the order of the tokens, row by row, and not their two coordinates.

    Args:
        num_tokens: rows.
        channels: columns D.
        device: where.

    Returns:
        Float32 values.
    """
    position = torch.arange(num_tokens, dtype=torch.float64, device=device)[:, None]
    channel = torch.arange(channels, dtype=torch.float64, device=device)
    angle = position / 10000.0 ** (2 * (channel / 2).floor() / channels)
    # The published tables are float32; in float64 runs too they hold the rounded values.
    return torch.where(channel % 2 == 0, angle.sin(), angle.cos()).float()


def resize_table(
    table: Float[Tensor, "1 tokens channels"],
    old_grid: tuple[int, int],
    new_grid: tuple[int, int],
    *,
    num_prefix: int = 1,
) -> Float[Tensor, "1 new_tokens channels"]:
    """Resize the patch rows of a position table bicubically, keeping the rows before them.

    Args:
        table: rows of the class token (``num_prefix`` of them), then of the patches row by row.
        old_grid: rows and columns of patches in ``table``.
        new_grid: rows and columns asked for.
        num_prefix: rows that are kept as they are.

    Raises:
        ValueError: the table has another number of rows than ``old_grid`` says.
    """
    num_patches = table.shape[1] - num_prefix
    if num_patches != old_grid[0] * old_grid[1]:
        raise ValueError(f"{num_patches} patch rows do not make a grid of {old_grid}")
    prefix, patches = table[:, :num_prefix], table[:, num_prefix:]
    image = patches.reshape(1, *old_grid, -1).permute(0, 3, 1, 2)
    image = F.interpolate(image, size=new_grid, mode="bicubic", align_corners=False)
    return torch.cat([prefix, image.flatten(2).transpose(1, 2)], dim=1)


class SinusoidPositions(nn.Module):
    """Adds a row of a frozen table to every token.

    The table of the grid given at construction is a parameter without gradient, as in the
    published networks, so that it is counted and stored with them and a converted network may
    bring its own. Other grids are served at call time.

    Args:
        grid: rows and columns of patches the table is made for.
        channels: width D of the tokens.
        num_prefix: tokens before the patches (the class token).
        other_grids: what another grid than ``grid`` gets: ``"regenerate"`` the sinusoid of its
            own sequence, ``"resize"`` the stored table resized bicubically.
    """

    def __init__(
        self,
        grid: tuple[int, int],
        channels: int,
        *,
        num_prefix: int = 1,
        other_grids: Literal["regenerate", "resize"] = "regenerate",
    ) -> None:
        super().__init__()
        if other_grids not in ("regenerate", "resize"):
            raise ValueError(f"other_grids must be 'regenerate' or 'resize', got {other_grids!r}")
        self.grid = grid
        self.num_prefix = num_prefix
        self.other_grids = other_grids
        rows = sinusoid_table(num_prefix + grid[0] * grid[1], channels)
        self.table = nn.Parameter(rows.to(torch.get_default_dtype())[None], requires_grad=False)

    def forward(
        self,
        tokens: Float[Tensor, "batch tokens channels"],
        grid: tuple[int, int],
        mask: Bool[Tensor, "batch tokens"] | None = None,
    ) -> Float[Tensor, "batch tokens channels"]:
        """Return tokens plus their rows.

        Args:
            tokens: the prefix, then the patches row by row.
            grid: rows and columns of the patches.
            mask: True for tokens that take part. Those are numbered without the others, so that a
                padded image gets the rows it would get by itself.
        """
        table = self._rows(grid).to(tokens.dtype)
        if mask is None:
            return tokens + table
        number = mask.long().cumsum(dim=1) - 1
        return tokens + table[0][number.clamp(min=0)]

    def _rows(self, grid: tuple[int, int]) -> Float[Tensor, "1 tokens channels"]:
        """Return the table for a grid."""
        # A size that an exported program leaves open can be compared with none: such programs
        # always generate, which is the same table wherever the stored one is the sinusoid.
        is_open = isinstance(grid[0], torch.SymInt) or isinstance(grid[1], torch.SymInt)
        if not is_open and grid == self.grid:
            return self.table
        if self.other_grids == "resize":
            return resize_table(self.table, self.grid, grid, num_prefix=self.num_prefix)
        num_tokens = self.num_prefix + grid[0] * grid[1]
        rows = sinusoid_table(num_tokens, self.table.shape[2], device=self.table.device)
        return rows.to(self.table.dtype)[None]

    def extra_repr(self) -> str:
        """Describe the table in a printed network."""
        return f"grid={self.grid}, channels={self.table.shape[2]}, other_grids={self.other_grids!r}"
