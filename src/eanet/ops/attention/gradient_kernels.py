# ruff: noqa: N803 -- compile-time constants of Triton kernels are written in capitals
# Names inside a kernel stand for pointers and tiles, which have no Python types.
# pyright: basic
"""Triton kernels of the backward pass; letters and conventions are those of ``kernels.py``.

Two passes over x and the gradient of the result::

    1  attention_gradient A and w = A * (dA - <A, dA>), and the sum of w over the tokens
    2  operand_gradient   dz = w - P * sum(w); gradients of x, and of the memories for a part
"""

from typing import no_type_check

import triton
import triton.language as tl

from eanet.ops.attention.kernels import (
    _dot,
    _dropout_factors,
    _load_slots,
    _normalize,
    _tile_product,
    _valid_tokens,
)

__all__ = ["attention_gradient", "operand_gradient"]


@triton.jit
@no_type_check
def attention_gradient(
    x,  # (B, N, H * C), any strides
    grad_out,  # (B, N, H * V), any strides
    grad_attention,  # (B, H, N, S), contiguous, or None
    memory_key,  # (S, C)
    memory_value,  # (S, V)
    key_bias,  # (S) or None
    mask,  # (B, N) or None
    seed,  # (1) or None
    statistics,  # (2, B * H, S) or None
    attention,  # (B * H, N, S); read where KEPT, else written, as denominator
    denominator,  # (B * H, N)
    weighted_out,  # (B * H, N, S)
    partial_weighted,  # (B * H, num_splits, S)
    num_pairs,
    num_heads,
    num_tokens,
    num_slots,
    num_channels,
    num_value_channels,
    stride_xb,
    stride_xn,
    stride_xc,
    stride_gb,
    stride_gn,
    stride_gc,
    num_splits,
    tokens_per_split,
    log_eps,
    dropout,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
    DOUBLE: tl.constexpr,
    KEPT: tl.constexpr,
):
    """Compute w = A * (dA - <A, dA>) in a part of the tokens, and the sum of w per slot.

    A is what the forward pass kept, or is computed from x once more.
    """
    program = tl.program_id(0).to(tl.int64)
    pair = program // num_splits
    split = program % num_splits
    sample = pair // num_heads
    head = pair % num_heads
    rows = x + sample * stride_xb + head * num_channels * stride_xc
    grad_rows = grad_out + sample * stride_gb + head * num_value_channels * stride_gc
    slots = tl.arange(0, BLOCK_S)
    total = tl.zeros([BLOCK_S], dtype=tl.float32)
    largest = total
    sums = total
    if DOUBLE and not KEPT:
        largest = _load_slots(statistics + pair * num_slots, num_slots, 0.0, BLOCK_S)
        sums = _load_slots(statistics + (num_pairs + pair) * num_slots, num_slots, 1.0, BLOCK_S)
    first = split * tokens_per_split
    last = tl.minimum(first + tokens_per_split, num_tokens)
    for start in range(first, last, BLOCK_N):
        tokens = start + tl.arange(0, BLOCK_N).to(tl.int64)
        valid = _valid_tokens(mask, sample, tokens, last, num_tokens)
        position = (pair * num_tokens + tokens[:, None]) * num_slots + slots[None, :]
        inside = (tokens < last)[:, None] & (slots < num_slots)[None, :]
        if KEPT:
            weights = tl.load(attention + position, mask=inside, other=0.0).to(tl.float32)
        else:
            logits = _tile_product(
                rows, memory_key, tokens, valid, stride_xn, stride_xc, num_slots, num_channels,
                BLOCK_N, BLOCK_S, BLOCK_C,
            )  # fmt: skip
            weights, divisor = _normalize(
                logits, valid, key_bias, largest, sums, num_slots, log_eps, BLOCK_S, DOUBLE
            )
            tl.store(attention + position, weights, mask=inside)
            if DOUBLE:
                tl.store(denominator + pair * num_tokens + tokens, divisor, mask=tokens < last)
        gradient = _tile_product(
            grad_rows, memory_value, tokens, valid, stride_gn, stride_gc, num_slots,
            num_value_channels, BLOCK_N, BLOCK_S, BLOCK_C,
        )  # fmt: skip
        if seed is not None:
            gradient *= _dropout_factors(seed, pair, tokens, dropout, BLOCK_N, BLOCK_S)
        if grad_attention is not None:
            gradient += tl.load(
                grad_attention + position, mask=inside & valid[:, None], other=0.0
            ).to(tl.float32)
        mean = tl.sum(weights * gradient, axis=1)
        weighted = weights * (gradient - mean[:, None])
        total += tl.sum(weighted, axis=0)
        tl.store(weighted_out + position, weighted, mask=inside)
    position = (pair * num_splits + split) * num_slots + slots
    tl.store(partial_weighted + position, total, mask=slots < num_slots)


@triton.jit
@no_type_check
def _load_slot_tiles(
    attention,
    denominator,
    weighted,
    weighted_sum,
    pair,
    tokens,
    num_tokens,
    num_slots,
    BLOCK_S: tl.constexpr,
    DOUBLE: tl.constexpr,
):
    """Load A and form the gradient of the logits, w - P * sum(w) with P = A * denominator."""
    slots = tl.arange(0, BLOCK_S)
    in_range = tokens < num_tokens
    inside = in_range[:, None] & (slots < num_slots)[None, :]
    position = (pair * num_tokens + tokens[:, None]) * num_slots + slots[None, :]
    weights = tl.load(attention + position, mask=inside, other=0.0).to(tl.float32)
    grad_logits = tl.load(weighted + position, mask=inside, other=0.0)
    if DOUBLE:
        scale = tl.load(denominator + pair * num_tokens + tokens, mask=in_range, other=0.0)
        sums = _load_slots(weighted_sum + pair * num_slots, num_slots, 0.0, BLOCK_S)
        grad_logits -= weights * scale[:, None] * sums[None, :]
    return weights, grad_logits


@triton.jit
@no_type_check
def _scale_to_half(tile):
    """Return a power of two that brings a tile near 1, and its inverse.

    Gradients of logits are of the size of 1 / N, below what float16 holds with all its digits.
    """
    largest = tl.max(tl.max(tl.abs(tile), axis=1), axis=0)
    exponent = tl.floor(tl.log2(tl.maximum(largest, 1e-30)))
    return tl.exp2(-exponent), tl.exp2(exponent)


@triton.jit
@no_type_check
def operand_gradient(
    x,  # (B, N, H * C), any strides
    grad_out,  # (B, N, H * V), any strides
    memory_key,  # (S, C)
    mask,  # (B, N) or None
    seed,  # (1) or None
    attention,  # (B * H, N, S)
    denominator,  # (B * H, N)
    weighted,  # (B * H, N, S)
    weighted_sum,  # (B * H, S)
    grad_x,  # (B, N, H * C), any strides
    partial_key,  # (num_programs, S, C), each program's entries side by side, as the next two
    partial_value,  # (num_programs, S, V)
    partial_bias,  # (num_programs, V)
    stride_program,
    num_heads,
    num_tokens,
    num_slots,
    num_channels,
    num_value_channels,
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
    num_blocks,
    total_blocks,
    blocks_per_program,
    dropout,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
    DOUBLE: tl.constexpr,
    RESIDUAL: tl.constexpr,
    SCALED: tl.constexpr,
):
    """Compute the gradients of a slice of channels, for a run of token blocks of any pairs.

    No sum over channels is left to do, so slices are independent; those of one run lie side by side
    in the grid and find its tiles over the slots in the cache.
    """
    program = (tl.program_id(0) // num_slices).to(tl.int64)
    slots = tl.arange(0, BLOCK_S)
    slot_exists = slots < num_slots
    channels = (tl.program_id(0) % num_slices) * BLOCK_C + tl.arange(0, BLOCK_C)
    key_exists = channels < num_channels
    value_exists = channels < num_value_channels
    long_channels = channels.to(tl.int64)[None, :]
    keys = tl.load(
        memory_key + slots[:, None] * num_channels + channels[None, :],
        mask=slot_exists[:, None] & key_exists[None, :],
        other=0.0,
    )  # [BLOCK_S, BLOCK_C]
    key_total = tl.zeros([BLOCK_S, BLOCK_C], dtype=tl.float32)
    value_total = tl.zeros([BLOCK_S, BLOCK_C], dtype=tl.float32)
    bias_total = tl.zeros([BLOCK_C], dtype=tl.float32)
    first = program * blocks_per_program
    last = tl.minimum(first + blocks_per_program, total_blocks)
    for block in range(first, last):
        pair = block // num_blocks
        sample = pair // num_heads
        head = pair % num_heads
        tokens = (block % num_blocks) * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
        in_range = tokens < num_tokens
        valid = _valid_tokens(mask, sample, tokens, num_tokens, num_tokens)
        weights, grad_logits = _load_slot_tiles(
            attention, denominator, weighted, weighted_sum, pair, tokens, num_tokens, num_slots,
            BLOCK_S, DOUBLE,
        )  # fmt: skip
        if seed is not None:
            weights *= _dropout_factors(seed, pair, tokens, dropout, BLOCK_N, BLOCK_S)
        grad_rows = grad_out + sample * stride_gb + head * num_value_channels * stride_gc
        grad_tile = tl.load(
            grad_rows + tokens[:, None] * stride_gn + long_channels * stride_gc,
            mask=in_range[:, None] & value_exists[None, :],
            other=0.0,
        )  # [BLOCK_N, BLOCK_C]
        branch_grad = tl.where(valid[:, None], grad_tile, 0.0).to(grad_tile.dtype)
        x_tile = tl.load(
            x + sample * stride_xb + head * num_channels * stride_xc
            + tokens[:, None] * stride_xn + long_channels * stride_xc,
            mask=valid[:, None] & key_exists[None, :],
            other=0.0,
        )  # fmt: skip
        zeros = tl.zeros([BLOCK_N, BLOCK_C], dtype=tl.float32)
        if SCALED:
            factor, inverse = _scale_to_half(grad_logits)
            scaled = (grad_logits * factor).to(x_tile.dtype)
            grad_tokens = _dot(scaled, keys, zeros) * inverse
            key_zeros = tl.zeros([BLOCK_S, BLOCK_C], dtype=tl.float32)
            key_total += _dot(tl.trans(scaled), x_tile, key_zeros) * inverse
        else:
            cast = grad_logits.to(x_tile.dtype)
            grad_tokens = _dot(cast, keys, zeros)
            key_total = _dot(tl.trans(cast), x_tile, key_total)
        value_total = _dot(tl.trans(weights.to(grad_tile.dtype)), branch_grad, value_total)
        bias_total += tl.sum(branch_grad.to(tl.float32), axis=0)
        if RESIDUAL:
            grad_tokens += grad_tile.to(tl.float32)
        tl.store(
            grad_x + sample * stride_db + head * num_channels * stride_dc
            + tokens[:, None] * stride_dn + long_channels * stride_dc,
            grad_tokens.to(grad_x.dtype.element_ty),
            mask=in_range[:, None] & key_exists[None, :],
        )  # fmt: skip
    offset = program * stride_program
    tl.store(
        partial_key + offset + slots[:, None] * num_channels + channels[None, :],
        key_total,
        mask=slot_exists[:, None] & key_exists[None, :],
    )
    tl.store(
        partial_value + offset + slots[:, None] * num_value_channels + channels[None, :],
        value_total,
        mask=slot_exists[:, None] & value_exists[None, :],
    )
    tl.store(partial_bias + offset + channels, bias_total, mask=value_exists)
