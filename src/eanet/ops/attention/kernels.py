# ruff: noqa: N803 -- compile-time constants of Triton kernels are written in capitals
# Names inside a kernel stand for pointers and tiles, which have no Python types.
# pyright: basic
"""Triton kernels of external attention, forward; ``launch.py`` runs them.

Letters: B samples, H heads, N tokens, S slots, C channels of a head and of a memory key, V channels
of a memory value. A "pair" is one head of one sample; there are B * H of them. Everything that is
normalized, summed over tokens or kept between passes is float32, whatever the type of the tokens.

Forward, two passes over the tokens::

    1  token_statistics  logits; largest logit and sum of exponentials per slot
    2  mix               normalize over the slots, times M_v, bias, mask, residual

The second pass reads what the first one kept where that is smaller than the tokens, and x again
where not: logits in float32, or with tokens of bfloat16 E = exp(L - largest logit of the tile) in
bfloat16, a rounding of the size of the one that the attention gets before it is multiplied. An
exponential below the smallest number is 0; beside an eps of usual size it does not count, see
``launch.py``.

The backward pass is in ``gradient_kernels.py``; kernels for some layouts that hold a whole memory
on chip are in ``resident_kernels.py``.

Sums over tokens are taken in parts, one for each program, and added afterwards in a fixed order.
There are no atomic additions, so a result repeats to the bit on the same device and shape.

Under ``TRITON_INTERPRET=1`` the same kernels run on CPU tensors. ``no_type_check`` keeps checkers
that wrap functions away from them: Triton compiles their source, not their objects.
"""

from typing import no_type_check

import triton
import triton.language as tl

from eanet.ops.attention.kernel_tiles import (
    INTERPRETED,
    add_part_to_pair,
    dot,
    dropout_factors,
    factors_of_tiles,
    finish_statistics,
    join_statistics,
    let_next_begin,
    load_slots,
    map_inside,
    map_pointers,
    normalize,
    short_exp,
    store_statistics,
    tile_pointers,
    tile_product,
    tile_statistics,
    valid_tokens,
)

__all__ = ["INTERPRETED", "mix", "token_statistics"]


@triton.jit
@no_type_check
def token_statistics(
    x,  # (B, N, H * C), any strides
    memory_key,  # (S, C)
    mask,  # (B, N) or None
    kept,  # (B * H, N, S) to be written, or None: logits, or where largest_of_tiles, exponentials
    largest_of_tiles,  # (B * H, num_blocks, S) to be written, or None
    partial,  # (2, B * H * num_splits, S): largest logit, sum of exponentials
    statistics,  # (2, B * H, S): the same of all tokens, where parts are joined
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
    FLAT: tl.constexpr,
    LONG: tl.constexpr,
):
    """Find the largest logit and the sum of exponentials of each slot over the tokens.

    Each program does a part of the tokens; the one that is done last joins the parts of its pair,
    in the same order whichever it is, unless the next kernel does. That may be launched early
    where this one is FOLLOWED by one that waits.
    """
    if FOLLOWED:
        let_next_begin()
    program = tl.program_id(0).to(tl.int64)
    pair = program // num_splits
    split = program % num_splits
    sample = pair // num_heads
    rows = x + sample * stride_b + (pair % num_heads) * num_channels * stride_c
    largest = tl.full([BLOCK_S], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_S], dtype=tl.float32)
    first = split * tokens_per_split
    last = tl.minimum(first + tokens_per_split, num_tokens)
    # flat: tokens of the next tile are on their way while this one's statistics are taken
    for start in tl.range(first, last, BLOCK_N, flatten=FLAT):
        tokens = start + tl.arange(0, BLOCK_N)
        valid = valid_tokens(mask, sample, tokens, last, num_tokens)
        logits = tile_product(
            rows, memory_key, start, valid, stride_n, stride_c, num_slots, num_channels,
            BLOCK_N, BLOCK_S, BLOCK_C, LONG,
        )  # fmt: skip
        tile_largest, tile_total, exponentials = tile_statistics(
            logits, valid, SHORT=largest_of_tiles is not None
        )
        if kept is not None:
            tl.store(
                map_pointers(kept, pair, start, num_tokens, num_slots, BLOCK_N, BLOCK_S),
                (logits if largest_of_tiles is None else exponentials).to(kept.dtype.element_ty),
                mask=map_inside(tokens, last, num_slots, BLOCK_S),
            )
        if largest_of_tiles is not None:
            block = pair * tl.cdiv(num_tokens, BLOCK_N) + start // BLOCK_N
            slots = tl.arange(0, BLOCK_S)
            tl.store(
                largest_of_tiles + block * num_slots + slots, tile_largest, mask=slots < num_slots
            )
        largest, total = join_statistics(largest, total, tile_largest, tile_total)
    add_part_to_pair(
        largest, total, partial, statistics, parts_done, pair, split, num_pairs, num_slots,
        num_splits, BLOCK_S, BLOCK_SPLITS,
    )  # fmt: skip


@triton.jit
@no_type_check
def _halves(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Cut a tile into its left and its right half."""
    return tl.split(tl.permute(tl.reshape(tile, [ROWS, 2, COLUMNS // 2]), (0, 2, 1)))


@triton.jit
@no_type_check
def _values(memory_value, first_slot, channels, num_slots, num_value_channels, SLOTS: tl.constexpr):
    """Load a tile of M_v, [SLOTS, BLOCK_C]."""
    slots = first_slot + tl.arange(0, SLOTS)
    return tl.load(
        memory_value + slots[:, None] * num_value_channels + channels[None, :],
        mask=(slots < num_slots)[:, None] & (channels < num_value_channels)[None, :],
        other=0.0,
    )


@triton.jit
@no_type_check
def _weighted_values(
    weights,  # [BLOCK_N, BLOCK_S]
    memory_value,
    channels,  # [BLOCK_C]
    num_slots,
    num_value_channels,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
    IN_PARTS: tl.constexpr,
):
    """Multiply weights with a slice of channels of M_v, [BLOCK_N, BLOCK_C].

    Without tensor cores float32 is added slot by slot: four short sums lose less than one.
    """
    zeros = tl.zeros([BLOCK_N, BLOCK_C], dtype=tl.float32)
    if IN_PARTS:
        PART: tl.constexpr = BLOCK_S // 4
        left, right = _halves(weights, BLOCK_N, BLOCK_S)
        part_0, part_1 = _halves(left, BLOCK_N, BLOCK_S // 2)
        part_2, part_3 = _halves(right, BLOCK_N, BLOCK_S // 2)
        values_0 = _values(memory_value, 0, channels, num_slots, num_value_channels, PART)
        values_1 = _values(memory_value, PART, channels, num_slots, num_value_channels, PART)
        values_2 = _values(memory_value, 2 * PART, channels, num_slots, num_value_channels, PART)
        values_3 = _values(memory_value, 3 * PART, channels, num_slots, num_value_channels, PART)
        mixed = dot(part_0, values_0, zeros) + dot(part_1, values_1, zeros)
        mixed += dot(part_2, values_2, zeros) + dot(part_3, values_3, zeros)
    else:
        values = _values(memory_value, 0, channels, num_slots, num_value_channels, BLOCK_S)
        mixed = dot(weights, values, zeros)
    return mixed


@triton.jit
@no_type_check
def _statistics_of_block(
    logits,
    valid,
    statistics,
    pair,
    num_pairs,
    num_slots,
    BLOCK_S: tl.constexpr,
    DOUBLE: tl.constexpr,
    ALONE: tl.constexpr,
):
    """Return largest logit and sum of exponentials, [BLOCK_S]; zeros where the norm has none."""
    largest = tl.zeros([BLOCK_S], dtype=tl.float32)
    sums = largest
    if ALONE:
        largest, sums, _ = tile_statistics(logits, valid, SHORT=False)
        largest, sums = finish_statistics(largest, sums)
        store_statistics(statistics, largest, sums, pair, num_pairs, num_slots, BLOCK_S)
    elif DOUBLE:
        largest = load_slots(statistics + pair * num_slots, num_slots, 0.0, BLOCK_S)
        sums = load_slots(statistics + (num_pairs + pair) * num_slots, num_slots, 1.0, BLOCK_S)
    return largest, sums


@triton.jit
@no_type_check
def _normalize_exponentials(
    exponentials,  # [BLOCK_N, BLOCK_S]
    largest_of_tiles,
    largest,  # [BLOCK_S]
    sums,  # [BLOCK_S]
    pair,
    start,
    num_tokens,
    num_slots,
    log_eps,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
    TOKENS_OF_TILE: tl.constexpr,
):
    """Return attention and denominator as ``normalize`` does, of exponentials kept by tiles."""
    TILES: tl.constexpr = BLOCK_N // TOKENS_OF_TILE if BLOCK_N > TOKENS_OF_TILE else 1
    factors = factors_of_tiles(
        largest_of_tiles, largest, sums, pair, start, num_tokens, num_slots, BLOCK_S,
        TOKENS_OF_TILE, TILES,
    )  # fmt: skip
    weights = tl.reshape(exponentials, [TILES, BLOCK_N // TILES, BLOCK_S]) * factors[:, None, :]
    weights = tl.reshape(weights, [BLOCK_N, BLOCK_S])
    denominator = tl.sum(weights, axis=1) + short_exp(log_eps)
    return weights * (1.0 / denominator)[:, None], denominator


@triton.jit
@no_type_check
def mix(
    x,  # (B, N, H * C), any strides
    memory_key,  # (S, C)
    memory_value,  # (S, V)
    key_bias,  # (S) or None
    value_bias,  # (V) or None
    mask,  # (B, N) or None
    seed,  # (1) or None
    kept,  # (B * H, N, S), or None where logits are computed here; see token_statistics
    largest_of_tiles,  # (B * H, num_tiles, S) or None
    statistics,  # (2, B * H, S) or None; read, or written where ALONE
    out,  # (B, N, H * V), any strides
    attention_out,  # (B, H, N, S) or None
    denominator_out,  # (B, H, N) or None
    num_pairs,
    num_heads,
    num_tokens,
    num_slots,
    num_channels,
    num_value_channels,
    stride_xb,
    stride_xn,
    stride_xc,
    stride_ob,
    stride_on,
    stride_oc,
    num_blocks,
    log_eps,
    dropout,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
    DOUBLE: tl.constexpr,
    ALONE: tl.constexpr,
    RESIDUAL: tl.constexpr,
    IN_PARTS: tl.constexpr,
    TOKENS_OF_TILE: tl.constexpr,
    LONG: tl.constexpr,
):
    """Normalize the logits of a block of tokens and mix the memory values.

    A block that is ALONE holds all tokens of its pair and finds their statistics itself.
    """
    # whole numbers of 64 bits are slow to divide
    pair = tl.program_id(0) // num_blocks
    sample = (pair // num_heads).to(tl.int64)
    head = (pair % num_heads).to(tl.int64)
    pair = pair.to(tl.int64)
    start = tl.program_id(0) % num_blocks
    if LONG:
        start = start.to(tl.int64)
    start *= BLOCK_N
    tokens = start + tl.arange(0, BLOCK_N)
    in_range = tokens < num_tokens
    valid = valid_tokens(mask, sample, tokens, num_tokens, num_tokens)
    rows = x + sample * stride_xb + head * num_channels * stride_xc
    inside_map = map_inside(tokens, num_tokens, num_slots, BLOCK_S)
    if kept is not None:
        logits = tl.load(
            map_pointers(kept, pair, start, num_tokens, num_slots, BLOCK_N, BLOCK_S),
            mask=inside_map,
            other=0.0,
        ).to(tl.float32)
    else:
        logits = tile_product(
            rows, memory_key, start, valid, stride_xn, stride_xc, num_slots, num_channels,
            BLOCK_N, BLOCK_S, BLOCK_C, LONG,
        )  # fmt: skip
    largest, sums = _statistics_of_block(
        logits, valid, statistics, pair, num_pairs, num_slots, BLOCK_S, DOUBLE, ALONE
    )
    if largest_of_tiles is not None:
        attention, denominator = _normalize_exponentials(
            logits, largest_of_tiles, largest, sums, pair, start, num_tokens, num_slots, log_eps,
            BLOCK_N, BLOCK_S, TOKENS_OF_TILE,
        )  # fmt: skip
    else:
        attention, denominator = normalize(
            logits, valid, key_bias, largest, sums, num_slots, log_eps, BLOCK_S, DOUBLE
        )
    if denominator_out is not None:
        tl.store(denominator_out + pair * num_tokens + tokens, denominator, mask=in_range)
    if attention_out is not None:
        tl.store(
            map_pointers(attention_out, pair, start, num_tokens, num_slots, BLOCK_N, BLOCK_S),
            attention.to(attention_out.dtype.element_ty),
            mask=inside_map,
        )
    if seed is not None:
        attention *= dropout_factors(seed, pair, tokens, dropout, BLOCK_N, BLOCK_S)
    weights = attention.to(memory_value.dtype.element_ty)
    out_rows = out + sample * stride_ob + head * num_value_channels * stride_oc
    for first in range(0, num_value_channels, BLOCK_C):
        channels = first + tl.arange(0, BLOCK_C)
        exists = channels < num_value_channels
        mixed = _weighted_values(
            weights, memory_value, channels, num_slots, num_value_channels,
            BLOCK_N, BLOCK_S, BLOCK_C, IN_PARTS,
        )  # fmt: skip
        if value_bias is not None:
            bias = tl.load(value_bias + channels, mask=exists, other=0.0).to(tl.float32)
            mixed += tl.where(valid[:, None], bias[None, :], 0.0)
        inside = in_range[:, None] & exists[None, :]
        if RESIDUAL:
            mixed += tl.load(
                tile_pointers(rows, start, first, stride_xn, stride_xc, BLOCK_N, BLOCK_C, LONG),
                mask=inside,
                other=0.0,
            ).to(tl.float32)
        tl.store(
            tile_pointers(out_rows, start, first, stride_on, stride_oc, BLOCK_N, BLOCK_C, LONG),
            mixed.to(out.dtype.element_ty),
            mask=inside,
        )
