# ruff: noqa: N803 -- compile-time constants of Triton kernels are written in capitals
# Names inside a kernel stand for pointers and tiles, which have no Python types.
# pyright: basic
"""Triton kernels that hold a whole memory on chip while tokens go by, for tokens of bfloat16.

Letters are those of ``kernels.py``. A program holds all S slots of all C channels, or of a slice of
them, and walks over some of the tokens of one pair; there are about as many programs as the GPU can
run at a time.
Tiles lie with their tokens side by side, (slots or channels, tokens): slots fill the rows of the
tensor cores, so a tile may have few tokens, and many of them are on their way at a time.

Forward, in place of ``token_statistics`` and ``mix``, with E kept between them::

    1  slot_exponentials  E, and the statistics of a part of the tokens
    2  mix_exponentials   the statistics of all tokens; A; the mixed memory values

Backward, from the attention that the forward pass kept, in place of three kernels two::

    1  value_side  dA = dY M_v^T; w = A * (dA - <A, dA>); gradients of M_v and its bias
    2  key_side    dz = w - P * sum(w) with P = A * denominator; gradients of x and of M_k

Each reads the tokens once. Between them w lies in bfloat16. Sums over tokens are taken in parts,
one for each program, and added in a fixed order: results repeat to the bit.
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

__all__ = ["key_side", "mix_exponentials", "slot_exponentials", "value_side"]


@triton.jit
@no_type_check
def _slice_and_part(num_slices, num_splits, tokens_per_split, num_tokens):
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
def _columns(
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
def _map_columns(map_of_pair, first_token, num_slots, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr):
    """Return pointers to a tile of a map (N, S), [BLOCK_S, BLOCK_N]."""
    corner = map_of_pair + (tl.full((), 0, dtype=tl.int64) + first_token) * num_slots
    return corner + (tl.arange(0, BLOCK_S)[:, None] + tl.arange(0, BLOCK_N)[None, :] * num_slots)


@triton.jit
@no_type_check
def _load_memory(
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
    _, pair, split, first, last = _slice_and_part(1, num_splits, tokens_per_split, num_tokens)
    sample = pair // num_heads
    rows = x + sample * stride_b + (pair % num_heads) * num_channels * stride_c
    slots = tl.arange(0, BLOCK_S)
    slot_exists = slots < num_slots
    channel_exists = tl.arange(0, BLOCK_C) < num_channels
    keys = _load_memory(memory_key, 0, num_slots, num_channels, BLOCK_S, BLOCK_C)
    largest = tl.full([BLOCK_S], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_S], dtype=tl.float32)
    for start in range(first, last, BLOCK_N):
        tokens = start + tl.arange(0, BLOCK_N)
        valid = valid_tokens(mask, sample, tokens, last, num_tokens)
        tile = tl.load(
            _columns(rows, start, 0, stride_n, stride_c, BLOCK_N, BLOCK_C),
            mask=channel_exists[:, None] & valid[None, :],
            other=0.0,
        )
        logits = dot(keys, tile, tl.zeros([BLOCK_S, BLOCK_N], dtype=tl.float32))
        logits = tl.where(valid[None, :], logits, float("-inf"))
        tile_largest = tl.max(logits, axis=1)
        weights = short_exp(logits - finite(tile_largest)[:, None])
        tl.store(
            _map_columns(
                exponentials + pair * num_tokens * num_slots, start, num_slots, BLOCK_N, BLOCK_S
            ),
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
            _load_memory(
                memory_value, index * SLICE, num_slots, num_value_channels, BLOCK_S, SLICE
            ),
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
        tile = tl.load(
            _map_columns(
                exponentials + pair * num_tokens * num_slots, start, num_slots, BLOCK_N, BLOCK_S
            ),
            mask=inside_map,
            other=0.0,
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
                _map_columns(
                    attention_out + pair * num_tokens * num_slots, start, num_slots, BLOCK_N,
                    BLOCK_S,
                ),
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
                    _columns(x_rows, start, first, stride_xn, stride_xc, BLOCK_N, SLICE),
                    mask=inside,
                    other=0.0,
                ).to(tl.float32)
            tl.store(
                _columns(out_rows, start, first, stride_on, stride_oc, BLOCK_N, SLICE),
                mixed.to(out.dtype.element_ty),
                mask=inside,
            )


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
    _, pair, split, first, last = _slice_and_part(1, num_splits, tokens_per_split, num_tokens)
    sample = pair // num_heads
    rows = grad_out + sample * stride_gb + (pair % num_heads) * num_value_channels * stride_gc
    slots = tl.arange(0, BLOCK_S)
    slot_exists = slots < num_slots
    channels = tl.arange(0, BLOCK_C)
    channel_exists = channels < num_value_channels
    values = _load_memory(memory_value, 0, num_slots, num_value_channels, BLOCK_S, BLOCK_C)
    weighted_total = tl.zeros([BLOCK_S], dtype=tl.float32)
    total = tl.zeros([BLOCK_S, BLOCK_C], dtype=tl.float32)
    bias_total = tl.zeros([BLOCK_C], dtype=tl.float32)
    for start in range(first, last, BLOCK_N):
        tokens = start + tl.arange(0, BLOCK_N)
        valid = valid_tokens(mask, sample, tokens, last, num_tokens)
        inside_map = slot_exists[:, None] & (tokens < last)[None, :]
        tile = tl.load(
            _columns(rows, start, 0, stride_gn, stride_gc, BLOCK_N, BLOCK_C),
            mask=channel_exists[:, None] & valid[None, :],
            other=0.0,
        )
        weights = tl.load(
            _map_columns(
                attention + pair * num_tokens * num_slots, start, num_slots, BLOCK_N, BLOCK_S
            ),
            mask=inside_map,
            other=0.0,
        )
        # before the other product: ptxas makes every instruction of both wait if this one is
        # still running where the loop begins anew
        total = dot(weights, tl.trans(tile), total)
        gradient = dot(values, tile, tl.zeros([BLOCK_S, BLOCK_N], dtype=tl.float32))
        if grad_attention is not None:
            gradient += tl.load(
                _map_columns(
                    grad_attention + pair * num_tokens * num_slots,
                    start,
                    num_slots,
                    BLOCK_N,
                    BLOCK_S,
                ),
                mask=slot_exists[:, None] & valid[None, :],
                other=0.0,
            ).to(tl.float32)
        factors = weights.to(tl.float32)
        mean = tl.sum(factors * gradient, axis=0)
        weighted = (factors * (gradient - mean[None, :])).to(weighted_out.dtype.element_ty)
        # what is added are the rounded numbers, so that their rounding cancels in w - P * sum(w)
        weighted_total += tl.sum(weighted.to(tl.float32), axis=1)
        tl.store(
            _map_columns(
                weighted_out + pair * num_tokens * num_slots, start, num_slots, BLOCK_N, BLOCK_S
            ),
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
    slice_of_channels, pair, split, first, last = _slice_and_part(
        num_slices, num_splits, tokens_per_split, num_tokens
    )
    sample = pair // num_heads
    first_channel = slice_of_channels * BLOCK_C
    channel_offset = (pair % num_heads) * num_channels + first_channel
    slots = tl.arange(0, BLOCK_S)
    slot_exists = slots < num_slots
    channels = first_channel + tl.arange(0, BLOCK_C)
    channel_exists = channels < num_channels
    keys = _load_memory(memory_key, first_channel, num_slots, num_channels, BLOCK_S, BLOCK_C)
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
            _columns(
                x + sample * stride_xb, start, channel_offset, stride_xn, stride_xc,
                BLOCK_N, BLOCK_C,
            ),
            mask=channel_exists[:, None] & valid[None, :],
            other=0.0,
        )  # fmt: skip
        weights = tl.load(
            _map_columns(
                attention + pair * num_tokens * num_slots, start, num_slots, BLOCK_N, BLOCK_S
            ),
            mask=inside_map,
            other=0.0,
        ).to(tl.float32)
        gradient = tl.load(
            _map_columns(
                weighted + pair * num_tokens * num_slots, start, num_slots, BLOCK_N, BLOCK_S
            ),
            mask=inside_map,
            other=0.0,
        ).to(tl.float32)
        scale = tl.load(denominator + pair * num_tokens + tokens, mask=in_range, other=0.0)
        gradient -= weights * scale[None, :] * weighted_sum[:, None]
        rounded = gradient.to(tile.dtype)
        # This product first, as in value_side. In both, the gradient stands on the right, which
        # tensor cores read from memory on chip; on the left it would be computed twice, the other
        # time with its rows across the registers.
        total = dot(tile, tl.trans(rounded), total)
        zeros = tl.zeros([BLOCK_C, BLOCK_N], dtype=tl.float32)
        grad_tokens = dot(tl.trans(keys), rounded, zeros)
        inside = channel_exists[:, None] & in_range[None, :]
        if RESIDUAL:
            grad_tokens += tl.load(
                _columns(
                    grad_out + sample * stride_gb, start, channel_offset, stride_gn, stride_gc,
                    BLOCK_N, BLOCK_C,
                ),
                mask=inside,
                other=0.0,
            ).to(tl.float32)  # fmt: skip
        tl.store(
            _columns(
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
