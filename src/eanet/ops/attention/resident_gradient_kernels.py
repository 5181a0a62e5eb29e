# ruff: noqa: N803 -- compile-time constants of Triton kernels are written in capitals
# Names inside a kernel stand for pointers and tiles, which have no Python types.
# pyright: basic
"""Triton kernels of the backward pass that hold a whole memory on chip, for tokens of bfloat16.

Letters, tiles and conventions are those of ``resident_kernels.py``. From the attention that the
forward pass kept, in place of three kernels two::

    1  value_side  dA = dY M_v^T; w = A * (dA - <A, dA>); gradients of M_v and its bias
    2  key_side    dz = w - P * sum(w) with P = A * denominator; gradients of x and of M_k

Each reads the tokens once. Between them w lies in bfloat16.
"""

from typing import no_type_check

import triton
import triton.language as tl

from eanet.ops.attention.kernel_tiles import dot, valid_tokens
from eanet.ops.attention.resident_tiles import (
    load_map,
    load_memory,
    map_columns,
    slice_and_part,
    token_columns,
)

__all__ = ["key_side", "value_side"]


@triton.jit
@no_type_check
def value_side(
    grad_out,  # (B, N, H * V), any strides
    grad_attention,  # (B, H, N, S), contiguous, or None
    memory_value,  # (S, V)
    mask,  # (B, N) or None
    attention,  # (B, H, N, S)
    weighted_out,  # (B * H, N, S)
    partial_weighted,  # (B * H, num_splits, S)
    partial_value,  # (B * H * num_splits, S, V), with a stride between parts
    partial_bias,  # (B * H * num_splits, V), likewise
    stride_part,
    num_heads,
    num_tokens,
    num_slots,
    num_value_channels,
    stride_gb,
    stride_gn,
    stride_gc,
    num_splits,
    tokens_per_split,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
    WITH_BIAS: tl.constexpr,
):
    """Compute w = A * (dA - <A, dA>), its sum, and the gradients of M_v and its bias."""
    _, pair, split, first, last = slice_and_part(1, num_splits, tokens_per_split, num_tokens)
    sample = pair // num_heads
    rows = grad_out + sample * stride_gb + (pair % num_heads) * num_value_channels * stride_gc
    slots = tl.arange(0, BLOCK_S)
    slot_exists = slots < num_slots
    channels = tl.arange(0, BLOCK_C)
    channel_exists = channels < num_value_channels
    values = load_memory(memory_value, 0, num_slots, num_value_channels, BLOCK_S, BLOCK_C)
    weighted_total = tl.zeros([BLOCK_S], dtype=tl.float32)
    total = tl.zeros([BLOCK_S, BLOCK_C], dtype=tl.float32)
    bias_total = tl.zeros([BLOCK_C], dtype=tl.float32)
    for start in range(first, last, BLOCK_N):
        tokens = start + tl.arange(0, BLOCK_N)
        valid = valid_tokens(mask, sample, tokens, last, num_tokens)
        inside_map = slot_exists[:, None] & (tokens < last)[None, :]
        tile = tl.load(
            token_columns(rows, start, 0, stride_gn, stride_gc, BLOCK_N, BLOCK_C),
            mask=channel_exists[:, None] & valid[None, :],
            other=0.0,
        )
        weights = load_map(
            attention, pair, start, inside_map, num_tokens, num_slots, BLOCK_N, BLOCK_S
        )
        # before the other product: ptxas makes every instruction of both wait if this one is
        # still running where the loop begins anew
        total = dot(weights, tl.trans(tile), total)
        gradient = dot(values, tile, tl.zeros([BLOCK_S, BLOCK_N], dtype=tl.float32))
        if grad_attention is not None:
            gradient += load_map(
                grad_attention,
                pair,
                start,
                slot_exists[:, None] & valid[None, :],
                num_tokens,
                num_slots,
                BLOCK_N,
                BLOCK_S,
            ).to(tl.float32)
        factors = weights.to(tl.float32)
        mean = tl.sum(factors * gradient, axis=0)
        weighted = (factors * (gradient - mean[None, :])).to(weighted_out.dtype.element_ty)
        # what is added are the rounded numbers, so that their rounding cancels in w - P * sum(w)
        weighted_total += tl.sum(weighted.to(tl.float32), axis=1)
        tl.store(
            map_columns(weighted_out, pair, start, num_tokens, num_slots, BLOCK_N, BLOCK_S),
            weighted,
            mask=inside_map,
            # to be found in the cache by key_side
            eviction_policy="evict_last",
        )
        if WITH_BIAS:
            bias_total += tl.sum(tile.to(tl.float32), axis=1)
    part = pair * num_splits + split
    tl.store(partial_weighted + part * num_slots + slots, weighted_total, mask=slot_exists)
    tl.store(
        partial_value
        + part * stride_part
        + slots[:, None] * num_value_channels
        + channels[None, :],
        total,
        mask=slot_exists[:, None] & channel_exists[None, :],
    )
    tl.store(partial_bias + part * stride_part + channels, bias_total, mask=channel_exists)


@triton.jit
@no_type_check
def key_side(
    x,  # (B, N, H * C), any strides
    grad_out,  # (B, N, H * C), any strides; read under RESIDUAL alone
    memory_key,  # (S, C)
    mask,  # (B, N) or None
    attention,  # (B, H, N, S)
    denominator,  # (B, H, N)
    weighted,  # (B * H, N, S)
    partial_weighted,  # (B * H, weighted_splits, S)
    grad_x,  # (B, N, H * C), any strides
    partial_key,  # (B * H * num_splits, S, C), with a stride between parts
    stride_part,
    num_heads,
    num_tokens,
    num_slots,
    num_channels,
    stride_xb,
    stride_xn,
    stride_xc,
    stride_gb,
    stride_gn,
    stride_gc,
    stride_db,
    stride_dn,
    stride_dc,
    num_slices,
    num_splits,
    tokens_per_split,
    weighted_splits,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    RESIDUAL: tl.constexpr,
):
    """Compute the gradients of x and M_k in a slice of channels for a part of the tokens."""
    slice_of_channels, pair, split, first, last = slice_and_part(
        num_slices, num_splits, tokens_per_split, num_tokens
    )
    sample = pair // num_heads
    first_channel = slice_of_channels * BLOCK_C
    channel_offset = (pair % num_heads) * num_channels + first_channel
    slots = tl.arange(0, BLOCK_S)
    slot_exists = slots < num_slots
    channels = first_channel + tl.arange(0, BLOCK_C)
    channel_exists = channels < num_channels
    keys = load_memory(memory_key, first_channel, num_slots, num_channels, BLOCK_S, BLOCK_C)
    weighted_sum = tl.zeros([BLOCK_S], dtype=tl.float32)
    for first_split in range(0, weighted_splits, BLOCK_SPLITS):
        splits = first_split + tl.arange(0, BLOCK_SPLITS)
        weighted_sums = tl.load(
            partial_weighted
            + (pair * weighted_splits + splits[:, None]) * num_slots
            + slots[None, :],
            mask=(splits < weighted_splits)[:, None] & slot_exists[None, :],
            other=0.0,
        )
        weighted_sum += tl.sum(weighted_sums, axis=0)
    total = tl.zeros([BLOCK_C, BLOCK_S], dtype=tl.float32)
    for start in range(first, last, BLOCK_N):
        tokens = start + tl.arange(0, BLOCK_N)
        in_range = tokens < last
        valid = valid_tokens(mask, sample, tokens, last, num_tokens)
        inside_map = slot_exists[:, None] & in_range[None, :]
        tile = tl.load(
            token_columns(
                x + sample * stride_xb, start, channel_offset, stride_xn, stride_xc,
                BLOCK_N, BLOCK_C,
            ),
            mask=channel_exists[:, None] & valid[None, :],
            other=0.0,
        )  # fmt: skip
        weights = load_map(
            attention, pair, start, inside_map, num_tokens, num_slots, BLOCK_N, BLOCK_S
        ).to(tl.float32)
        gradient = load_map(
            weighted, pair, start, inside_map, num_tokens, num_slots, BLOCK_N, BLOCK_S
        ).to(tl.float32)
        scale = tl.load(denominator + pair * num_tokens + tokens, mask=in_range, other=0.0)
        gradient -= weights * scale[None, :] * weighted_sum[:, None]
        rounded = gradient.to(tile.dtype)
        # This product first, as in value_side. In both products here the gradient stands on the
        # right, which tensor cores read from memory on chip; on the left it would be computed
        # twice, the other time with its rows across the registers.
        total = dot(tile, tl.trans(rounded), total)
        zeros = tl.zeros([BLOCK_C, BLOCK_N], dtype=tl.float32)
        grad_tokens = dot(tl.trans(keys), rounded, zeros)
        inside = channel_exists[:, None] & in_range[None, :]
        if RESIDUAL:
            grad_tokens += tl.load(
                token_columns(
                    grad_out + sample * stride_gb, start, channel_offset, stride_gn, stride_gc,
                    BLOCK_N, BLOCK_C,
                ),
                mask=inside,
                other=0.0,
            ).to(tl.float32)  # fmt: skip
        tl.store(
            token_columns(
                grad_x + sample * stride_db, start, channel_offset, stride_dn, stride_dc,
                BLOCK_N, BLOCK_C,
            ),
            grad_tokens.to(grad_x.dtype.element_ty),
            mask=inside,
        )  # fmt: skip
    part = pair * num_splits + split
    tl.store(
        partial_key + part * stride_part + slots[None, :] * num_channels + channels[:, None],
        total,
        mask=slot_exists[None, :] & channel_exists[:, None],
    )
