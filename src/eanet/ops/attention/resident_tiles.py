# ruff: noqa: N803 -- compile-time constants of Triton kernels are written in capitals
# Names inside a kernel stand for pointers and tiles, which have no Python types.
# pyright: basic
"""Functions over tiles with their tokens side by side, for kernels that hold a memory on chip.

Letters are those of ``kernels.py``. A tile is (slots or channels, tokens).
"""

from typing import no_type_check

import triton
import triton.language as tl

__all__ = ["load_map", "load_memory", "map_columns", "slice_and_part", "token_columns"]


@triton.jit
@no_type_check
def slice_and_part(num_slices, num_splits, tokens_per_split, num_tokens):
    """Return slice of channels, pair (64 bits), part, and where its tokens begin and end.

    The slices of a part lie side by side in the grid and find what they share in the cache.
    """
    program = tl.program_id(0).to(tl.int64)
    part = program // num_slices
    split = (part % num_splits).to(tl.int32)
    first = split * tokens_per_split
    last = tl.minimum(first + tokens_per_split, num_tokens)
    return (program % num_slices).to(tl.int32), part // num_splits, split, first, last


@triton.jit
@no_type_check
def token_columns(
    rows,  # pointer to (N, channels) with strides
    first_token,
    first_channel,
    stride_n,
    stride_c,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Return pointers to a tile of tokens, [BLOCK_C, BLOCK_N]; places within it have 32 bits."""
    zero = tl.full((), 0, dtype=tl.int64)
    corner = rows + (zero + first_token) * stride_n + (zero + first_channel) * stride_c
    channels = tl.arange(0, BLOCK_C)[:, None] * stride_c
    return corner + (channels + tl.arange(0, BLOCK_N)[None, :] * stride_n)


@triton.jit
@no_type_check
def map_columns(
    maps, pair, first_token, num_tokens, num_slots, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr
):
    """Return pointers to a tile of a map (B * H, N, S), [BLOCK_S, BLOCK_N]; pair has 64 bits."""
    zero = tl.full((), 0, dtype=tl.int64)
    corner = maps + pair * num_tokens * num_slots + (zero + first_token) * num_slots
    return corner + (tl.arange(0, BLOCK_S)[:, None] + tl.arange(0, BLOCK_N)[None, :] * num_slots)


@triton.jit
@no_type_check
def load_map(
    maps,
    pair,
    first_token,
    inside,  # [BLOCK_S, BLOCK_N]
    num_tokens,
    num_slots,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Load a tile of a map (B * H, N, S), [BLOCK_S, BLOCK_N]; 0 where it is not inside."""
    return tl.load(
        map_columns(maps, pair, first_token, num_tokens, num_slots, BLOCK_N, BLOCK_S),
        mask=inside,
        other=0.0,
    )


@triton.jit
@no_type_check
def load_memory(
    memory, first_channel, num_slots, num_channels, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Load channels of all slots of a memory (S, channels), [BLOCK_S, BLOCK_C]."""
    slots = tl.arange(0, BLOCK_S)
    channels = first_channel + tl.arange(0, BLOCK_C)
    return tl.load(
        memory + slots[:, None] * num_channels + channels[None, :],
        mask=(slots < num_slots)[:, None] & (channels < num_channels)[None, :],
        other=0.0,
    )
