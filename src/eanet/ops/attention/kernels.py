# ruff: noqa: N803 -- compile-time constants of Triton kernels are written in capitals
# Names inside a kernel stand for pointers and tiles, which have no Python types.
# pyright: basic
"""Triton kernels of external attention, forward; ``launch.py`` runs them.

Letters: B samples, H heads, N tokens, S slots, C channels of a head and of a memory key, V channels
of a memory value. A "pair" is one head of one sample; there are B * H of them. Everything that is
normalized, summed over tokens or kept between passes is float32, whatever the type of the tokens.

Forward, two passes over x::

    1  token_statistics   largest logit and sum of exponentials per slot, for a part of the tokens
       combine_statistics one result from the parts
    2  mix                logits again, normalize over the slots, times M_v, bias, mask, residual

The backward pass is in ``gradient_kernels.py``.

Sums over tokens are taken in parts, one for each program, and added afterwards in a fixed order.
There are no atomic additions, so a result repeats to the bit on the same device and shape.

Under ``TRITON_INTERPRET=1`` the same kernels run on CPU tensors. ``no_type_check`` keeps checkers
that wrap functions away from them: Triton compiles their source, not their objects.
"""

from typing import Final, no_type_check

import triton
import triton.language as tl

__all__ = ["INTERPRETED", "combine_statistics", "mix", "token_statistics"]


@triton.jit
@no_type_check
def _dot(a, b, accumulator):
    """Multiply tiles, adding to float32; float32 operands keep all their digits."""
    if _INTERPRETED:
        # the interpreter would multiply the bit patterns of bfloat16 as integers
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision="ieee")


#: whether TRITON_INTERPRET was set when Triton was imported
INTERPRETED: Final = not isinstance(_dot, triton.runtime.JITFunction)
_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
@no_type_check
def _valid_tokens(mask, sample, tokens, last, num_tokens):
    """Tell which tokens of a tile exist and take part, [BLOCK_N]."""
    valid = tokens < last
    if mask is not None:
        valid = valid & (tl.load(mask + sample * num_tokens + tokens, mask=valid, other=0) != 0)
    return valid


@triton.jit
@no_type_check
def _tile_product(
    rows,  # pointer to (N, channels) with strides
    memory,  # pointer to (S, channels), contiguous
    tokens,  # [BLOCK_N]
    valid,  # [BLOCK_N]
    stride_n,
    stride_c,
    num_slots,
    num_channels,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Multiply rows of tokens with the rows of a memory; rows that are not valid count as 0."""
    slots = tl.arange(0, BLOCK_S)
    product = tl.zeros([BLOCK_N, BLOCK_S], dtype=tl.float32)
    for first in range(0, num_channels, BLOCK_C):
        channels = first + tl.arange(0, BLOCK_C)
        exists = channels < num_channels
        tile = tl.load(
            rows + tokens[:, None] * stride_n + channels.to(tl.int64)[None, :] * stride_c,
            mask=valid[:, None] & exists[None, :],
            other=0.0,
        )  # [BLOCK_N, BLOCK_C]
        memory_tile = tl.load(
            memory + slots[None, :] * num_channels + channels[:, None],
            mask=exists[:, None] & (slots < num_slots)[None, :],
            other=0.0,
        )  # [BLOCK_C, BLOCK_S]
        product = _dot(tile, memory_tile, product)
    return product


@triton.jit
@no_type_check
def _load_slots(vector, num_slots, other, BLOCK_S: tl.constexpr):
    """Load a vector over the slots as float32, [BLOCK_S]."""
    slots = tl.arange(0, BLOCK_S)
    return tl.load(vector + slots, mask=slots < num_slots, other=other).to(tl.float32)


@triton.jit
@no_type_check
def _normalize(
    logits,  # [BLOCK_N, BLOCK_S]
    valid,  # [BLOCK_N]
    key_bias,
    statistics,
    pair,
    num_pairs,
    num_slots,
    log_eps,
    BLOCK_S: tl.constexpr,
    DOUBLE: tl.constexpr,
):
    """Return attention [BLOCK_N, BLOCK_S] and the denominator of Eq. 11 [BLOCK_N] (of "double").

    Numerator and denominator of Eq. 11 are divided by the largest exponential of the token, or by
    eps if that is larger: nothing underflows, and eps = 0 (log_eps = -inf) is no special case.
    """
    slots = tl.arange(0, BLOCK_S)
    if DOUBLE:
        largest = _load_slots(statistics + pair * num_slots, num_slots, 0.0, BLOCK_S)
        logits = logits - largest[None, :]
    elif key_bias is not None:
        logits = logits + _load_slots(key_bias, num_slots, 0.0, BLOCK_S)[None, :]
    logits = tl.where((slots < num_slots)[None, :], logits, float("-inf"))
    offset = tl.max(logits, axis=1)  # [BLOCK_N]
    if DOUBLE:
        offset = tl.maximum(offset, log_eps)
    weights = tl.exp(logits - offset[:, None])
    if DOUBLE:
        sums = _load_slots(statistics + (num_pairs + pair) * num_slots, num_slots, 1.0, BLOCK_S)
        weights /= sums[None, :]
    total = tl.sum(weights, axis=1)
    denominator = total
    if DOUBLE:
        total += tl.exp(log_eps - offset)
        denominator = tl.exp(offset) * total
    attention = tl.where(valid[:, None], weights / total[:, None], 0.0)
    return attention, denominator


@triton.jit
@no_type_check
def _dropout_factors(seed, pair, tokens, dropout, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr):
    """Return 0 or 1 / (1 - dropout) for each entry of a tile, [BLOCK_N, BLOCK_S].

    A counter-based generator: the number depends on seed, pair, token and slot alone, so that the
    backward pass finds the same ones without having kept them.
    """
    zeros = tl.zeros([BLOCK_N, BLOCK_S], dtype=tl.int32)
    token_counter = zeros + tokens.to(tl.int32)[:, None]
    slot_counter = zeros + tl.arange(0, BLOCK_S)[None, :]
    pair_counter = zeros + pair.to(tl.int32)
    bits, _, _, _ = tl.philox(tl.load(seed), token_counter, slot_counter, pair_counter, zeros)
    return tl.where(tl.uint_to_uniform_float(bits) >= dropout, 1.0 / (1.0 - dropout), 0.0)


@triton.jit
@no_type_check
def token_statistics(
    x,  # (B, N, H * C), any strides
    memory_key,  # (S, C)
    mask,  # (B, N) or None
    partial,  # (2, B * H, num_splits, S): largest logit, sum of exponentials
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
):
    """Find the largest logit and the sum of exponentials of each slot in a part of the tokens."""
    program = tl.program_id(0).to(tl.int64)
    pair = program // num_splits
    split = program % num_splits
    sample = pair // num_heads
    rows = x + sample * stride_b + (pair % num_heads) * num_channels * stride_c
    slots = tl.arange(0, BLOCK_S)
    largest = tl.full([BLOCK_S], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_S], dtype=tl.float32)
    first = split * tokens_per_split
    last = tl.minimum(first + tokens_per_split, num_tokens)
    for start in range(first, last, BLOCK_N):
        tokens = start + tl.arange(0, BLOCK_N).to(tl.int64)
        valid = _valid_tokens(mask, sample, tokens, last, num_tokens)
        logits = _tile_product(
            rows, memory_key, tokens, valid, stride_n, stride_c, num_slots, num_channels,
            BLOCK_N, BLOCK_S, BLOCK_C,
        )  # fmt: skip
        logits = tl.where(valid[:, None], logits, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(logits, axis=0))
        # where no token was valid yet, -inf - -inf would be no number
        reference = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        exponentials = tl.exp(logits - reference[None, :])
        total = total * tl.exp(largest - reference) + tl.sum(exponentials, axis=0)
        largest = new_largest
    exists = slots < num_slots
    position = (pair * num_splits + split) * num_slots + slots
    tl.store(partial + position, largest, mask=exists)
    tl.store(partial + num_pairs * num_splits * num_slots + position, total, mask=exists)


@triton.jit
@no_type_check
def combine_statistics(
    partial,  # (2, B * H, num_splits, S)
    statistics,  # (2, B * H, S): largest logit, sum of exponentials
    num_pairs,
    num_slots,
    num_splits,
    BLOCK_S: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
):
    """Join the statistics of the parts; a pair without valid tokens gets zeros."""
    pair = tl.program_id(0).to(tl.int64)
    slots = tl.arange(0, BLOCK_S)
    slot_exists = slots < num_slots
    partial_sums = partial + num_pairs * num_splits * num_slots
    largest = tl.full([BLOCK_S], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_S], dtype=tl.float32)
    for first in range(0, num_splits, BLOCK_SPLITS):
        splits = first + tl.arange(0, BLOCK_SPLITS)
        exists = (splits < num_splits)[:, None] & slot_exists[None, :]
        position = (pair * num_splits + splits[:, None]) * num_slots + slots[None, :]
        tile_largest = tl.load(partial + position, mask=exists, other=float("-inf"))
        tile_total = tl.load(partial_sums + position, mask=exists, other=0.0)
        new_largest = tl.maximum(largest, tl.max(tile_largest, axis=0))
        reference = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        tile_total *= tl.exp(tile_largest - reference[None, :])
        total = total * tl.exp(largest - reference) + tl.sum(tile_total, axis=0)
        largest = new_largest
    largest = tl.where(largest == float("-inf"), 0.0, largest)
    # the largest exponential is 1, so only a pair without valid tokens is changed by this
    total = tl.maximum(total, 1.0)
    tl.store(statistics + pair * num_slots + slots, largest, mask=slots < num_slots)
    tl.store(statistics + (num_pairs + pair) * num_slots + slots, total, mask=slots < num_slots)


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
    statistics,  # (2, B * H, S) or None
    out,  # (B, N, H * V), any strides
    attention_out,  # (B, H, N, S) or None
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
    RESIDUAL: tl.constexpr,
):
    """Normalize the logits of a block of tokens and mix the memory values."""
    program = tl.program_id(0).to(tl.int64)
    pair = program // num_blocks
    sample = pair // num_heads
    head = pair % num_heads
    slots = tl.arange(0, BLOCK_S)
    tokens = (program % num_blocks) * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    in_range = tokens < num_tokens
    valid = _valid_tokens(mask, sample, tokens, num_tokens, num_tokens)
    rows = x + sample * stride_xb + head * num_channels * stride_xc
    logits = _tile_product(
        rows, memory_key, tokens, valid, stride_xn, stride_xc, num_slots, num_channels,
        BLOCK_N, BLOCK_S, BLOCK_C,
    )  # fmt: skip
    attention, _ = _normalize(
        logits, valid, key_bias, statistics, pair, num_pairs, num_slots, log_eps, BLOCK_S, DOUBLE
    )
    if attention_out is not None:
        tl.store(
            attention_out + (pair * num_tokens + tokens[:, None]) * num_slots + slots[None, :],
            attention.to(attention_out.dtype.element_ty),
            mask=in_range[:, None] & (slots < num_slots)[None, :],
        )
    if seed is not None:
        attention *= _dropout_factors(seed, pair, tokens, dropout, BLOCK_N, BLOCK_S)
    weights = attention.to(memory_value.dtype.element_ty)
    out_rows = out + sample * stride_ob + head * num_value_channels * stride_oc
    for first in range(0, num_value_channels, BLOCK_C):
        channels = first + tl.arange(0, BLOCK_C)
        exists = channels < num_value_channels
        values = tl.load(
            memory_value + slots[:, None] * num_value_channels + channels[None, :],
            mask=(slots < num_slots)[:, None] & exists[None, :],
            other=0.0,
        )  # [BLOCK_S, BLOCK_C]
        mixed = _dot(weights, values, tl.zeros([BLOCK_N, BLOCK_C], dtype=tl.float32))
        if value_bias is not None:
            bias = tl.load(value_bias + channels, mask=exists, other=0.0).to(tl.float32)
            mixed += tl.where(valid[:, None], bias[None, :], 0.0)
        inside = in_range[:, None] & exists[None, :]
        long_channels = channels.to(tl.int64)[None, :]
        if RESIDUAL:
            position = tokens[:, None] * stride_xn + long_channels * stride_xc
            mixed += tl.load(rows + position, mask=inside, other=0.0).to(tl.float32)
        tl.store(
            out_rows + tokens[:, None] * stride_on + long_channels * stride_oc,
            mixed.to(out.dtype.element_ty),
            mask=inside,
        )
