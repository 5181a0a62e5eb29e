# ruff: noqa: N803 -- compile-time constants of Triton kernels are written in capitals
# Names inside a kernel stand for pointers and tiles, which have no Python types.
# pyright: basic
"""Triton kernels, forward, that hold a whole memory on chip while tokens go by, for bfloat16.

Letters are those of ``kernels.py``. A program holds all S slots of all C channels, or of a slice of
them, and walks over some of the tokens of one pair; there are about as many programs as the GPU can
run at a time. Tiles lie with their tokens side by side, (slots or channels, tokens): slots fill the
rows of the tensor cores, so that a tile may have few tokens and many are on their way at a time.

Forward, in place of ``token_statistics`` and ``mix``, with E kept between them::

    1  slot_exponentials  E, and the statistics of a part of the tokens
    2  mix_exponentials   the statistics of all tokens; A; the mixed memory values

Sums over tokens are taken in parts, one for each program, and added in a fixed order: results
repeat to the bit. The backward pass is in ``resident_gradient_kernels.py``.
"""

from typing import no_type_check

import triton
import triton.language as tl

from eanet.ops.attention.kernel_tiles import (
    add_part_to_pair,
    combine_parts,
    dot,
    factors_of_tiles,
    finite,
    join_statistics,
    let_next_begin,
    short_exp,
    store_statistics,
    valid_tokens,
    wait_for_previous,
)
from eanet.ops.attention.resident_tiles import (
    load_map,
    load_memory,
    map_columns,
    slice_and_part,
    token_columns,
)

__all__ = ["mix_exponentials", "slot_exponentials"]


@triton.jit
@no_type_check
def slot_exponentials(
    x,  # (B, N, H * C), any strides
    memory_key,  # (S, C)
    mask,  # (B, N) or None
    exponentials,  # (B * H, N, S)
    largest_of_tiles,  # (B * H, num_blocks, S)
    partial,  # (2, B * H * num_splits, S)
    statistics,  # (2, B * H, S)
    parts_done,  # (B * H) zeros, or None where the next kernel joins the parts
    num_pairs,
    num_heads,
    num_tokens,
    num_slots,
    num_channels,
    stride_b,
    stride_n,
    stride_c,
    num_splits,
    tokens_per_split,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    FOLLOWED: tl.constexpr,
):
    """Do what ``token_statistics`` does, where it keeps exponentials."""
    if FOLLOWED:
        let_next_begin()
    _, pair, split, first, last = slice_and_part(1, num_splits, tokens_per_split, num_tokens)
    sample = pair // num_heads
    rows = x + sample * stride_b + (pair % num_heads) * num_channels * stride_c
    slots = tl.arange(0, BLOCK_S)
    slot_exists = slots < num_slots
    channel_exists = tl.arange(0, BLOCK_C) < num_channels
    keys = load_memory(memory_key, 0, num_slots, num_channels, BLOCK_S, BLOCK_C)
    largest = tl.full([BLOCK_S], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_S], dtype=tl.float32)
    for start in range(first, last, BLOCK_N):
        tokens = start + tl.arange(0, BLOCK_N)
        valid = valid_tokens(mask, sample, tokens, last, num_tokens)
        tile = tl.load(
            token_columns(rows, start, 0, stride_n, stride_c, BLOCK_N, BLOCK_C),
            mask=channel_exists[:, None] & valid[None, :],
            other=0.0,
        )
        logits = dot(keys, tile, tl.zeros([BLOCK_S, BLOCK_N], dtype=tl.float32))
        logits = tl.where(valid[None, :], logits, float("-inf"))
        tile_largest = tl.max(logits, axis=1)
        weights = short_exp(logits - finite(tile_largest)[:, None])
        tl.store(
            map_columns(exponentials, pair, start, num_tokens, num_slots, BLOCK_N, BLOCK_S),
            weights.to(exponentials.dtype.element_ty),
            mask=slot_exists[:, None] & (tokens < last)[None, :],
        )
        block = pair * tl.cdiv(num_tokens, BLOCK_N) + start // BLOCK_N
        tl.store(largest_of_tiles + block * num_slots + slots, tile_largest, mask=slot_exists)
        largest, total = join_statistics(largest, total, tile_largest, tl.sum(weights, axis=1))
    add_part_to_pair(
        largest, total, partial, statistics, parts_done, pair, split, num_pairs, num_slots,
        num_splits, BLOCK_S, BLOCK_SPLITS,
    )  # fmt: skip


@triton.jit
@no_type_check
def _store_once(
    statistics, largest, sums, pair, split, num_pairs, num_slots, BLOCK_S: tl.constexpr
):
    """Store the statistics of a pair, by one of its programs."""
    if split == 0:
        store_statistics(statistics, largest, sums, pair, num_pairs, num_slots, BLOCK_S)


@triton.jit
@no_type_check
def mix_exponentials(
    x,  # (B, N, H * V), any strides; read under RESIDUAL alone
    memory_value,  # (S, V)
    value_bias,  # (V) or None
    mask,  # (B, N) or None
    exponentials,  # (B * H, N, S)
    largest_of_tiles,  # (B * H, num_tiles, S)
    partial,  # (2, B * H * num_parts, S); with one part, statistics of all tokens
    statistics,  # (2, B * H, S) to be written, or None where they are there
    out,  # (B, N, H * V), any strides
    attention_out,  # (B, H, N, S) or None
    denominator_out,  # (B, H, N) or None
    num_pairs,
    num_heads,
    num_tokens,
    num_slots,
    num_value_channels,
    stride_xb,
    stride_xn,
    stride_xc,
    stride_ob,
    stride_on,
    stride_oc,
    num_parts,
    num_splits,
    log_eps,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    TOKENS_OF_TILE: tl.constexpr,
    TOKENS_LAST: tl.constexpr,
    RESIDUAL: tl.constexpr,
):
    """Do what ``mix`` does, where exponentials were kept and nothing is dropped.

    Each program joins the statistics of its pair. It takes every so many-th tile of the pair, so
    that tiles which lie side by side are written at the same time.
    """
    # all channels of M_v are held, in slices: their products have no room in registers together
    SLICE: tl.constexpr = 128 if BLOCK_C > 128 else BLOCK_C
    TILES: tl.constexpr = BLOCK_N // TOKENS_OF_TILE if BLOCK_N > TOKENS_OF_TILE else 1
    SLICES: tl.constexpr = BLOCK_C // SLICE
    values = ()
    for index in tl.static_range(SLICES):
        values = values + (  # noqa: RUF005 - Triton does not unpack
            load_memory(memory_value, index * SLICE, num_slots, num_value_channels, BLOCK_S, SLICE),
        )
    wait_for_previous()
    pair = (tl.program_id(0) // num_splits).to(tl.int64)
    split = tl.program_id(0) % num_splits
    largest, sums = combine_parts(
        partial, pair, num_pairs, num_slots, num_parts, BLOCK_S, BLOCK_SPLITS
    )
    if statistics is not None:
        _store_once(statistics, largest, sums, pair, split, num_pairs, num_slots, BLOCK_S)
    sample = pair // num_heads
    channel_offset = (pair % num_heads) * num_value_channels
    x_rows = x + sample * stride_xb + channel_offset * stride_xc
    out_rows = out + sample * stride_ob + channel_offset * stride_oc
    slot_exists = tl.arange(0, BLOCK_S) < num_slots
    for start in range(split * BLOCK_N, num_tokens, num_splits * BLOCK_N):
        tokens = start + tl.arange(0, BLOCK_N)
        in_range = tokens < num_tokens
        valid = valid_tokens(mask, sample, tokens, num_tokens, num_tokens)
        inside_map = slot_exists[:, None] & in_range[None, :]
        tile = load_map(
            exponentials, pair, start, inside_map, num_tokens, num_slots, BLOCK_N, BLOCK_S
        ).to(tl.float32)
        factors = factors_of_tiles(
            largest_of_tiles, largest, sums, pair, start, num_tokens, num_slots, BLOCK_S,
            TOKENS_OF_TILE, TILES,
        )  # fmt: skip
        tile = tl.reshape(tile, [BLOCK_S, TILES, BLOCK_N // TILES]) * tl.trans(factors)[:, :, None]
        tile = tl.reshape(tile, [BLOCK_S, BLOCK_N])
        denominator = tl.sum(tile, axis=0) + short_exp(log_eps)
        weights = (tile * (1.0 / denominator)[None, :]).to(memory_value.dtype.element_ty)
        if denominator_out is not None:
            tl.store(denominator_out + pair * num_tokens + tokens, denominator, mask=in_range)
        if attention_out is not None:
            tl.store(
                map_columns(attention_out, pair, start, num_tokens, num_slots, BLOCK_N, BLOCK_S),
                weights.to(attention_out.dtype.element_ty),
                mask=inside_map,
            )  # fmt: skip
        for index in tl.static_range(SLICES):
            first = index * SLICE
            channels = first + tl.arange(0, SLICE)
            exists = channels < num_value_channels
            # what lies side by side makes the columns of the product: it is stored as it comes
            if TOKENS_LAST:
                zeros = tl.zeros([SLICE, BLOCK_N], dtype=tl.float32)
                mixed = dot(tl.trans(values[index]), weights, zeros)
            else:
                zeros = tl.zeros([BLOCK_N, SLICE], dtype=tl.float32)
                mixed = tl.trans(dot(tl.trans(weights), values[index], zeros))
            if value_bias is not None:
                bias = tl.load(value_bias + channels, mask=exists, other=0.0).to(tl.float32)
                mixed += tl.where(valid[None, :], bias[:, None], 0.0)
            inside = exists[:, None] & in_range[None, :]
            if RESIDUAL:
                mixed += tl.load(
                    token_columns(x_rows, start, first, stride_xn, stride_xc, BLOCK_N, SLICE),
                    mask=inside,
                    other=0.0,
                ).to(tl.float32)
            tl.store(
                token_columns(out_rows, start, first, stride_on, stride_oc, BLOCK_N, SLICE),
                mixed.to(out.dtype.element_ty),
                mask=inside,
            )
