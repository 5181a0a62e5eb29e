"""What the Triton kernels compute, how their work is cut, and what they leave for one another."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

import torch
from torch import Tensor

__all__ = [
    "HOPPER_SHARED_BYTES",
    "MANY_TOKENS",
    "Kept",
    "Parts",
    "Problem",
    "Tiling",
    "TokenLayout",
    "ceil_div",
    "device_limits",
    "is_long",
    "launch_options",
    "next_power_of_two",
    "split_rows",
    "split_tokens",
]


#: as many tokens, and where the next of a loop begins, may need 64 bits
MANY_TOKENS: Final = 2**30
#: bytes on chip that a program of an H100 or H200 may have
HOPPER_SHARED_BYTES: Final = 232_448


@dataclass(frozen=True)
class Problem:
    """What is computed, apart from tensors."""

    num_heads: int
    norm: str
    eps: float
    dropout: float
    residual: bool

    @property
    def double(self) -> bool:
        """Whether the norm is the double normalization."""
        return self.norm == "double"

    @property
    def log_eps(self) -> float:
        """The constant entry of the softmax over slots."""
        return math.log(self.eps) if self.eps > 0 else -math.inf


@dataclass(frozen=True)
class Tiling:
    """How the work of one kernel is cut into tiles and programs.

    Attributes:
        block_tokens: tokens of a tile; a power of two from 16.
        block_channels: channels of a tile; a power of two from 16.
        num_warps: warps of a program.
        num_stages: tiles that are on their way from memory while one is multiplied, and that one.
        max_registers: of a thread; fewer let more programs run at a time. ``None`` for any number.
    """

    block_tokens: int
    block_channels: int
    num_warps: int
    num_stages: int = 3
    max_registers: int | None = None


@dataclass(frozen=True)
class TokenLayout:
    """All of the tokens but their numbers, and of their device, that tilings are chosen by.

    Attributes:
        dtype: of the tokens.
        shape: (batch, tokens, channels).
        strides: in elements.
        multiprocessors: of the GPU; one for the interpreter.
        shared_bytes: of memory on chip that a program may have.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    multiprocessors: int
    shared_bytes: int

    @classmethod
    def of(cls, x: Tensor) -> "TokenLayout":
        """Describe tokens (batch, tokens, channels)."""
        return cls(x.dtype, tuple(x.shape), x.stride(), *device_limits(x.device))

    @property
    def tokens_last(self) -> bool:
        """Whether tokens lie innermost, not channels."""
        return self.strides[1] < self.strides[2]


@functools.lru_cache
def device_limits(device: torch.device) -> tuple[int, int]:
    """Return multiprocessors of a device, and bytes on chip that a program may have."""
    if device.type != "cuda":  # the interpreter has one, as large as that of a Hopper GPU
        return 1, HOPPER_SHARED_BYTES
    properties = cast("Any", torch.cuda.get_device_properties)(device)
    return (
        int(properties.multi_processor_count),
        int(getattr(properties, "shared_memory_per_block_optin", 0)),
    )


@dataclass(frozen=True)
class Kept:
    """What the first kernel forward leaves for the second.

    Attributes:
        values: (B * H, N, S), logits in float32, or exponentials in bfloat16.
        largest_of_tiles: of exponentials, the largest logits of each tile (B * H, num_tiles, S),
            which were taken away from its logits.
        tokens_of_tile: of exponentials.
    """

    values: Tensor
    largest_of_tiles: Tensor | None = None
    tokens_of_tile: int = 1

    @classmethod
    def exponentials(cls, x: Tensor, num_pairs: int, num_slots: int, tiling: Tiling) -> "Kept":
        """Allocate memory for exponentials in the type of x."""
        num_tiles = ceil_div(x.shape[1], tiling.block_tokens)
        return cls(
            x.new_empty((num_pairs, x.shape[1], num_slots)),
            x.new_empty((num_pairs, num_tiles, num_slots), dtype=torch.float32),
            tiling.block_tokens,
        )


@dataclass(frozen=True)
class Parts:
    """Statistics of the tokens in parts, as the first kernel forward finds them.

    Attributes:
        statistics: largest logits and sums of exponentials (2, B * H * number, S).
        number: of parts of a pair.
        tokens_of_part: as many tokens, or fewer in the last part.
        done: zeros (B * H) to count the parts of a pair in, so that the last program joins them;
            ``None`` where they are left to the second kernel.
    """

    statistics: Tensor
    number: int
    tokens_of_part: int
    done: Tensor | None

    @classmethod
    def of(
        cls,
        statistics: Tensor,
        num_tokens: int,
        num_programs: int,
        block_tokens: int,
        *,
        most_left: int,
    ) -> "Parts":
        """Allocate memory for parts of statistics (2, B * H, S).

        Args:
            statistics: of all tokens.
            num_tokens: N.
            num_programs: about how many share the tokens.
            block_tokens: of a tile.
            most_left: up to so many parts of a pair are left to the second kernel.
        """
        _, num_pairs, num_slots = statistics.shape
        number, tokens_of_part = split_tokens(num_tokens, num_programs // num_pairs, block_tokens)
        return cls(
            statistics.new_empty((2, num_pairs * number, num_slots)),
            number,
            tokens_of_part,
            None if number <= most_left else statistics.new_zeros(num_pairs, dtype=torch.int32),
        )


def ceil_div(number: int, divisor: int) -> int:
    """Divide and round up; Triton's own costs more than some kernels take."""
    return -(-number // divisor)


def next_power_of_two(number: int) -> int:
    """Round a number from 1 up to a power of two."""
    return 1 << (number - 1).bit_length()


def launch_options(tiling: Tiling, block_slots: int) -> dict[str, Any]:
    """Return the compile-time arguments that all kernels over tokens take."""
    return {
        "BLOCK_N": tiling.block_tokens,
        "BLOCK_S": block_slots,
        "BLOCK_C": tiling.block_channels,
        "num_warps": tiling.num_warps,
        "num_stages": tiling.num_stages,
        **({} if tiling.max_registers is None else {"maxnreg": tiling.max_registers}),
    }


def is_long(block_tokens: int, block_channels: int, *strides: Sequence[int]) -> bool:
    """Tell whether places within a tile of (B, N, channels) with such strides need 64 bits."""
    return any(
        block_tokens * token + block_channels * channel >= 2**31 for _, token, channel in strides
    )


def split_tokens(num_tokens: int, wanted: int, block_tokens: int) -> tuple[int, int]:
    """Return into how many parts the tokens of each pair are cut, and the tokens of a part."""
    num_blocks = ceil_div(num_tokens, block_tokens)
    blocks_per_split = ceil_div(num_blocks, max(1, min(wanted, num_blocks)))
    num_splits = ceil_div(num_blocks, blocks_per_split)
    return num_splits, blocks_per_split * block_tokens


def split_rows(num_splits: int, block_slots: int) -> int:
    """Return how many parts have their statistics joined at a time; a power of two."""
    return min(next_power_of_two(num_splits), 4096 // block_slots)
