"""Choose how the work of the Triton kernels is cut, by the tokens and the GPU.

``eanet bench tilings`` measures the kernels under other tilings. Importing this module does not
import Triton.
"""

import functools
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from eanet.ops.attention.tiling import (
    HOPPER_SHARED_BYTES,
    MANY_TOKENS,
    Tiling,
    TokenLayout,
    is_long,
    next_power_of_two,
)

__all__ = [
    "MAX_SLOTS",
    "MOST_CHANNELS",
    "MOST_TOKENS",
    "RESIDENT_SLOTS",
    "ResidentTilings",
    "Tilings",
    "block_slots",
    "choose_resident_tilings",
    "choose_tilings",
]

#: more slots than this do not fit into the registers of a program
MAX_SLOTS: Final = 256
#: slots fill the rows of a tensor core's product
RESIDENT_SLOTS: Final = 64
#: a memory of as many slots, and tokens of as many channels, have room on chip
MOST_CHANNELS: Final = 512
#: tokens of a tile, or fewer
MOST_TOKENS: Final = 128


@dataclass(frozen=True)
class ResidentTilings:
    """A tiling for each kernel that holds a memory on chip.

    Attributes:
        exponentials: of ``slot_exponentials``; ``None`` where ``token_statistics`` is faster.
        exponentials_programs: about how many programs share its sums over tokens.
        mix: of ``mix_exponentials``.
        mix_programs: about how many there are.
        value_side: of the kernel of that name, as the following.
        value_programs: about how many programs share its sums over tokens.
        key_side: its programs do a slice of channels.
        key_programs: about how many there are.
        early: whether ``mix_exponentials`` is launched while the kernel before it ends, and loads
            M_v meanwhile. What a profiler records of it then holds the time that it waits.
    """

    exponentials: Tiling | None
    exponentials_programs: int
    mix: Tiling
    mix_programs: int
    value_side: Tiling
    value_programs: int
    key_side: Tiling
    key_programs: int
    early: bool = True


@dataclass(frozen=True)
class Tilings:
    """A tiling for each kernel, and into how many parts sums over the tokens are cut.

    Attributes:
        statistics: of ``token_statistics``.
        mix: of ``mix``.
        attention_gradient: of the kernel of that name, as the following two.
        key_gradient: its programs do a slice of channels.
        value_gradient: likewise.
        statistics_programs: about how many programs share the sums over tokens forward.
        num_programs: about how many share those backward.
        flat: whether the loops of ``token_statistics``, over tiles and over channels, are one.
        resident: of the kernels that hold a memory on chip; ``None`` where they are not used.
    """

    statistics: Tiling
    mix: Tiling
    attention_gradient: Tiling
    key_gradient: Tiling
    value_gradient: Tiling
    statistics_programs: int
    num_programs: int
    flat: bool = False
    resident: ResidentTilings | None = None


def _power_of_two(number: int, smallest: int, largest: int) -> int:
    """Round up to a power of two within limits."""
    return max(smallest, min(largest, next_power_of_two(max(number, 1))))


def block_slots(num_slots: int) -> int:
    """Return the slots of a tile, which holds them all.

    Raises:
        ValueError: more than 256 slots.
    """
    if num_slots > MAX_SLOTS:
        raise ValueError(
            f"backend 'triton' takes up to {MAX_SLOTS} slots, got {num_slots}; use backend='eager'"
        )
    return _power_of_two(num_slots, 16, MAX_SLOTS)


def choose_tilings(x: Tensor, num_slots: int, num_channels: int, num_heads: int = 1) -> Tilings:
    """Choose tiles that fit into registers, and enough programs to fill the device.

    Args:
        x: tokens (batch, tokens, channels).
        num_slots: S.
        num_channels: the wider of key and value channels of a head.
        num_heads: H.

    Raises:
        ValueError: more than 256 slots.
    """
    return _choose_tilings(TokenLayout.of(x), num_slots, num_channels, num_heads)


@functools.lru_cache(maxsize=1024)
def _choose_tilings(
    layout: TokenLayout, num_slots: int, num_channels: int, num_heads: int
) -> Tilings:
    """Choose once; choosing takes as long as a small kernel."""
    slots = block_slots(num_slots)
    batch, num_tokens, _ = layout.shape
    num_pairs = batch * num_heads
    multiprocessors = layout.multiprocessors
    # GPUs for desktops have less memory on chip
    fewer_stages = 1 if layout.shared_bytes < 128 * 1024 else 0

    def tiling(block_tokens: int, block_channels: int, num_stages: int = 3) -> Tiling:
        # stated for 64 slots; tiles with more of them have fewer tokens
        block_tokens = min(block_tokens, max(16, 64 * block_tokens // slots))
        if slots == MAX_SLOTS:
            block_channels //= 2
        block_tokens = _power_of_two(num_tokens, 16, block_tokens)
        return Tiling(
            block_tokens=block_tokens,
            block_channels=_power_of_two(num_channels, 16, block_channels),
            num_warps=8 if block_tokens * slots > 8192 else 4,
            num_stages=num_stages - fewer_stages,
        )

    # a pair of one block needs no pass before the second, but has one program
    alone = slots <= 64 and num_tokens <= 256 and 4 * num_pairs >= multiprocessors
    if layout.dtype == torch.float32:  # no tensor cores: tiles are held in registers
        general = tiling(64, 32)
        return Tilings(
            statistics=general,
            mix=tiling(256, 32) if alone else general,
            attention_gradient=general,
            key_gradient=general,
            value_gradient=general,
            statistics_programs=16 * multiprocessors,
            num_programs=2 * multiprocessors,
        )
    # the fastest of those tried on an H200 at 8 x 512 x 128 x 128
    return Tilings(
        statistics=tiling(128, 64, num_stages=4),
        mix=tiling(256 if alone else 64, 64),
        attention_gradient=tiling(128, 64),
        key_gradient=tiling(64, 128),
        value_gradient=tiling(128, 64),
        statistics_programs=2 * multiprocessors,
        num_programs=2 * multiprocessors,
        # what that needs on chip leaves room for two programs
        flat=layout.shared_bytes >= HOPPER_SHARED_BYTES,
        resident=choose_resident_tilings(layout, num_slots, num_channels, num_pairs),
    )


def choose_resident_tilings(
    layout: TokenLayout, num_slots: int, num_channels: int, num_pairs: int
) -> ResidentTilings | None:
    """Choose tiles for a GPU whose programs have 227 KiB on chip; ``None`` where others are better.

    Args:
        layout: of the tokens.
        num_slots: S.
        num_channels: the wider of key and value channels of a head.
        num_pairs: of a sample and a head.
    """
    multiprocessors = layout.multiprocessors
    if (
        layout.dtype != torch.bfloat16
        or num_slots > RESIDENT_SLOTS
        or num_channels > MOST_CHANNELS
        or layout.shared_bytes < HOPPER_SHARED_BYTES
        # each program has sums as large as the memories
        or num_pairs > multiprocessors
        # tokens that do not begin at multiples of 16 are copied one by one
        or (layout.tokens_last and layout.strides[2] % 16 != 0)
        or layout.shape[1] >= MANY_TOKENS
        or is_long(MOST_TOKENS, MOST_CHANNELS, layout.strides)
    ):
        return None
    width = max(64, next_power_of_two(num_channels))
    key_side = Tiling(64, min(width, 128), num_warps=4, num_stages=3)
    # the fastest of those tried on an H200 at 8 x 512 x 128 x 128
    if layout.tokens_last:
        value_side = Tiling(64, width, num_warps=8, num_stages=2)
        return ResidentTilings(
            exponentials=None,
            exponentials_programs=0,
            mix=Tiling(128, width, num_warps=8, num_stages=3),
            mix_programs=multiprocessors,
            value_side=value_side,
            value_programs=multiprocessors,
            key_side=key_side,
            key_programs=2 * multiprocessors,
        )
    # half a memory leaves room for two programs at a time
    programs = 2 if width <= MOST_CHANNELS // 2 else 1
    return ResidentTilings(
        exponentials=Tiling(32, width, num_warps=4, num_stages=4),
        exponentials_programs=programs * multiprocessors,
        mix=Tiling(64, width, num_warps=8, num_stages=4, max_registers=128),
        mix_programs=2 * multiprocessors,
        value_side=Tiling(32, width, num_warps=8 // programs, num_stages=4),
        value_programs=programs * multiprocessors,
        key_side=key_side,
        key_programs=2 * multiprocessors,
    )
