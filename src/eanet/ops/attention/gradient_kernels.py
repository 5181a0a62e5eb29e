# ruff: noqa: N803 -- compile-time constants of Triton kernels are written in capitals
# Names inside a kernel stand for pointers and tiles, which have no Python types.
# pyright: basic
"""Triton kernels of the backward pass; letters and conventions are those of ``kernels.py``.

Two passes over the tokens::

    1  attention_gradient  A and w = A * (dA - <A, dA>), and the sum of w over the tokens
    2  key_gradient        dz = w - P * sum(w); gradients of x, and of M_k for a part of the tokens
       value_gradient      gradients of M_v and its bias for a part of the tokens

``add_parts`` adds the gradients of the parts.
"""

from typing import no_type_check

import triton
import triton.language as tl

from eanet.ops.attention.kernel_tiles import (
    dot,
    dropout_factors,
    load_slots,
    map_inside,
    map_pointers,
    normalize,
    tile_pointers,
    tile_product,
    valid_tokens,
)

__all__ = ["add_parts", "attention_gradient", "key_gradient", "value_gradient"]


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
    LONG: tl.constexpr,
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
        largest = load_slots(statistics + pair * num_slots, num_slots, 0.0, BLOCK_S)
        sums = load_slots(statistics + (num_pairs + pair) * num_slots, num_slots, 1.0, BLOCK_S)
    first = split * tokens_per_split
    last = tl.minimum(first + tokens_per_split, num_tokens)
    for start in range(first, last, BLOCK_N):
        tokens = start + tl.arange(0, BLOCK_N)
        valid = valid_tokens(mask, sample, tokens, last, num_tokens)
        attention_tile = map_pointers(
            attention, pair, start, num_tokens, num_slots, BLOCK_N, BLOCK_S
        )
        inside = map_inside(tokens, last, num_slots, BLOCK_S)
        if KEPT:
            weights = tl.load(attention_tile, mask=inside, other=0.0).to(tl.float32)
        else:
            logits = tile_product(
                rows, memory_key, start, valid, stride_xn, stride_xc, num_slots, num_channels,
                BLOCK_N, BLOCK_S, BLOCK_C, LONG,
            )  # fmt: skip
            weights, divisor = normalize(
                logits, valid, key_bias, largest, sums, num_slots, log_eps, BLOCK_S, DOUBLE
            )
            tl.store(attention_tile, weights, mask=inside)
            if DOUBLE:
                tl.store(denominator + pair * num_tokens + tokens, divisor, mask=tokens < last)
        gradient = tile_product(
            grad_rows, memory_value, start, valid, stride_gn, stride_gc, num_slots,
            num_value_channels, BLOCK_N, BLOCK_S, BLOCK_C, LONG,
        )  # fmt: skip
        if seed is not None:
            gradient *= dropout_factors(seed, pair, tokens, dropout, BLOCK_N, BLOCK_S)
        if grad_attention is not None:
            gradient += tl.load(
                map_pointers(grad_attention, pair, start, num_tokens, num_slots, BLOCK_N, BLOCK_S),
                mask=inside & valid[:, None],
                other=0.0,
            ).to(tl.float32)
        mean = tl.sum(weights * gradient, axis=1)
        weighted = weights * (gradient - mean[:, None])
        total += tl.sum(weighted, axis=0)
        tl.store(
            map_pointers(weighted_out, pair, start, num_tokens, num_slots, BLOCK_N, BLOCK_S),
            weighted,
            mask=inside,
        )
    position = (pair * num_splits + split) * num_slots + slots
    tl.store(partial_weighted + position, total, mask=slots < num_slots)


@triton.jit
@no_type_check
def _logit_gradient(
    attention,
    denominator,
    weighted,
    weighted_sum,
    pair,
    start,
    num_tokens,
    num_slots,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
    DOUBLE: tl.constexpr,
):
    """Form the gradient of the logits, w - P * sum(w) with P = A * denominator."""
    tokens = start + tl.arange(0, BLOCK_N)
    inside = map_inside(tokens, num_tokens, num_slots, BLOCK_S)
    grad_logits = tl.load(
        map_pointers(weighted, pair, start, num_tokens, num_slots, BLOCK_N, BLOCK_S),
        mask=inside,
        other=0.0,
    )
    if DOUBLE:
        weights = tl.load(
            map_pointers(attention, pair, start, num_tokens, num_slots, BLOCK_N, BLOCK_S),
            mask=inside,
            other=0.0,
        ).to(tl.float32)
        scale = tl.load(
            denominator + pair * num_tokens + tokens, mask=tokens < num_tokens, other=0.0
        )
        sums = load_slots(weighted_sum + pair * num_slots, num_slots, 0.0, BLOCK_S)
        grad_logits -= weights * scale[:, None] * sums[None, :]
    return grad_logits


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
def key_gradient(
    x,  # (B, N, H * C), any strides
    grad_out,  # (B, N, H * V), any strides; read under RESIDUAL alone
    memory_key,  # (S, C)
    mask,  # (B, N) or None
    attention,  # (B * H, N, S)
    denominator,  # (B * H, N)
    weighted,  # (B * H, N, S)
    weighted_sum,  # (B * H, S)
    grad_x,  # (B, N, H * C), any strides
    partial_key,  # (num_runs, S, C), with a stride between runs
    stride_run,
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
    num_blocks,
    total_blocks,
    blocks_per_run,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
    DOUBLE: tl.constexpr,
    RESIDUAL: tl.constexpr,
    SCALED: tl.constexpr,
    LONG: tl.constexpr,
):
    """Compute the gradients of x and M_k in a slice of channels, for a run of token blocks.

    A run goes through blocks of any pairs. No sum over channels is left to do, so slices are
    independent; those of one run lie side by side in the grid and find its maps in the cache.
    """
    run = (tl.program_id(0) // num_slices).to(tl.int64)
    slots = tl.arange(0, BLOCK_S)
    first_channel = (tl.program_id(0) % num_slices) * BLOCK_C
    channels = first_channel + tl.arange(0, BLOCK_C)
    exists = channels < num_channels
    entries = slots[:, None] * num_channels + channels[None, :]
    entry_exists = (slots < num_slots)[:, None] & exists[None, :]
    keys = tl.load(memory_key + entries, mask=entry_exists, other=0.0)  # [BLOCK_S, BLOCK_C]
    total = tl.zeros([BLOCK_S, BLOCK_C], dtype=tl.float32)
    first = run * blocks_per_run
    last = tl.minimum(first + blocks_per_run, total_blocks)
    for block in range(first, last):
        pair = block // num_blocks
        sample = pair // num_heads
        head = pair % num_heads
        start = (block % num_blocks) * BLOCK_N
        tokens = start + tl.arange(0, BLOCK_N)
        in_range = tokens < num_tokens
        valid = valid_tokens(mask, sample, tokens, num_tokens, num_tokens)
        grad_logits = _logit_gradient(
            attention, denominator, weighted, weighted_sum, pair, start, num_tokens, num_slots,
            BLOCK_N, BLOCK_S, DOUBLE,
        )  # fmt: skip
        x_tile = tl.load(
            tile_pointers(
                x + sample * stride_xb + head * num_channels * stride_xc,
                start, first_channel, stride_xn, stride_xc, BLOCK_N, BLOCK_C, LONG,
            ),
            mask=valid[:, None] & exists[None, :],
            other=0.0,
        )  # fmt: skip
        zeros = tl.zeros([BLOCK_N, BLOCK_C], dtype=tl.float32)
        if SCALED:
            factor, inverse = _scale_to_half(grad_logits)
            scaled = (grad_logits * factor).to(x_tile.dtype)
            grad_tokens = dot(scaled, keys, zeros) * inverse
            key_zeros = tl.zeros([BLOCK_S, BLOCK_C], dtype=tl.float32)
            total += dot(tl.trans(scaled), x_tile, key_zeros) * inverse
        else:
            cast = grad_logits.to(x_tile.dtype)
            grad_tokens = dot(cast, keys, zeros)
            total = dot(tl.trans(cast), x_tile, total)
        inside = in_range[:, None] & exists[None, :]
        if RESIDUAL:
            grad_tokens += tl.load(
                tile_pointers(
                    grad_out + sample * stride_gb + head * num_channels * stride_gc,
                    start, first_channel, stride_gn, stride_gc, BLOCK_N, BLOCK_C, LONG,
                ),
                mask=inside,
                other=0.0,
            ).to(tl.float32)  # fmt: skip
        tl.store(
            tile_pointers(
                grad_x + sample * stride_db + head * num_channels * stride_dc,
                start, first_channel, stride_dn, stride_dc, BLOCK_N, BLOCK_C, LONG,
            ),
            grad_tokens.to(grad_x.dtype.element_ty),
            mask=inside,
        )  # fmt: skip
    tl.store(partial_key + run * stride_run + entries, total, mask=entry_exists)


@triton.jit
@no_type_check
def value_gradient(
    grad_out,  # (B, N, H * V), any strides
    mask,  # (B, N) or None
    seed,  # (1) or None
    attention,  # (B * H, N, S)
    partial_value,  # (num_runs, S, V), with a stride between runs
    partial_bias,  # (num_runs, V), likewise
    stride_run,
    num_heads,
    num_tokens,
    num_slots,
    num_value_channels,
    stride_gb,
    stride_gn,
    stride_gc,
    num_slices,
    num_blocks,
    total_blocks,
    blocks_per_run,
    dropout,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
    LONG: tl.constexpr,
):
    """Compute the gradients of M_v and its bias as :func:`key_gradient` does those of M_k."""
    run = (tl.program_id(0) // num_slices).to(tl.int64)
    slots = tl.arange(0, BLOCK_S)
    first_channel = (tl.program_id(0) % num_slices) * BLOCK_C
    channels = first_channel + tl.arange(0, BLOCK_C)
    exists = channels < num_value_channels
    total = tl.zeros([BLOCK_S, BLOCK_C], dtype=tl.float32)
    bias_total = tl.zeros([BLOCK_C], dtype=tl.float32)
    first = run * blocks_per_run
    last = tl.minimum(first + blocks_per_run, total_blocks)
    for block in range(first, last):
        pair = block // num_blocks
        sample = pair // num_heads
        head = pair % num_heads
        start = (block % num_blocks) * BLOCK_N
        tokens = start + tl.arange(0, BLOCK_N)
        valid = valid_tokens(mask, sample, tokens, num_tokens, num_tokens)
        weights = tl.load(
            map_pointers(attention, pair, start, num_tokens, num_slots, BLOCK_N, BLOCK_S),
            mask=map_inside(tokens, num_tokens, num_slots, BLOCK_S),
            other=0.0,
        )  # [BLOCK_N, BLOCK_S]
        grad_tile = tl.load(
            tile_pointers(
                grad_out + sample * stride_gb + head * num_value_channels * stride_gc,
                start, first_channel, stride_gn, stride_gc, BLOCK_N, BLOCK_C, LONG,
            ),
            mask=valid[:, None] & exists[None, :],
            other=0.0,
        )  # fmt: skip
        if seed is not None:
            weights *= dropout_factors(seed, pair, tokens, dropout, BLOCK_N, BLOCK_S)
        total = dot(tl.trans(weights.to(grad_tile.dtype)), grad_tile, total)
        bias_total += tl.sum(grad_tile.to(tl.float32), axis=0)
    tl.store(
        partial_value + run * stride_run + slots[:, None] * num_value_channels + channels[None, :],
        total,
        mask=(slots < num_slots)[:, None] & exists[None, :],
    )
    tl.store(partial_bias + run * stride_run + channels, bias_total, mask=exists)


@triton.jit
@no_type_check
def _add_parts_of_block(
    partial, sums, num_parts, length, block, BLOCK_PARTS: tl.constexpr, BLOCK: tl.constexpr
):
    """Add the parts of some numbers of a sum."""
    columns = block * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK_PARTS, BLOCK], dtype=tl.float32)
    # nearly always one round: all parts are asked for at a time
    for first in range(0, num_parts, BLOCK_PARTS):
        parts = first + tl.arange(0, BLOCK_PARTS)
        total += tl.load(
            partial + parts[:, None] * length + columns[None, :],
            mask=(parts < num_parts)[:, None] & (columns < length)[None, :],
            other=0.0,
        )
    total = tl.sum(total, axis=0).to(sums.dtype.element_ty)
    tl.store(sums + columns, total, mask=columns < length)


@triton.jit
@no_type_check
def add_parts(
    partial,  # (num_parts, length)
    sums,  # (length)
    num_parts,
    length,
    more_partial,  # another sum, or None
    more_sums,
    more_parts,
    more_length,
    BLOCK_PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add the parts of one sum or two, always in the same order."""
    block = tl.program_id(0)
    num_blocks = tl.cdiv(length, BLOCK)
    if block < num_blocks:
        _add_parts_of_block(partial, sums, num_parts, length, block, BLOCK_PARTS, BLOCK)
    elif more_partial is not None:
        _add_parts_of_block(
            more_partial, more_sums, more_parts, more_length, block - num_blocks,
            BLOCK_PARTS, BLOCK,
        )  # fmt: skip
