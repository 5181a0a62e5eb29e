# ruff: noqa: N803 -- compile-time constants of Triton kernels are written in capitals
# Names inside a kernel stand for pointers and tiles, which have no Python types.
# pyright: basic
"""Functions over tiles that the Triton kernels of both directions are made of.

Letters are those of ``kernels.py``. ``no_type_check`` keeps checkers that wrap functions away:
Triton compiles the source of these, not their objects.
"""

from typing import Final, no_type_check

import triton
import triton.language as tl

__all__ = [
    "INTERPRETED",
    "add_part_to_pair",
    "combine_parts",
    "dot",
    "dropout_factors",
    "exp",
    "factors_of_tiles",
    "finish_statistics",
    "finite",
    "join_statistics",
    "let_next_begin",
    "load_slots",
    "map_inside",
    "map_pointers",
    "normalize",
    "short_exp",
    "store_statistics",
    "tile_pointers",
    "tile_product",
    "tile_statistics",
    "valid_tokens",
    "wait_for_previous",
]


@triton.jit
@no_type_check
def dot(a, b, accumulator):
    """Multiply tiles, adding to float32; float32 operands keep all their digits."""
    if _INTERPRETED:
        # the interpreter would multiply the bit patterns of bfloat16 as integers
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision="ieee")


#: whether TRITON_INTERPRET was set when Triton was imported
INTERPRETED: Final = not isinstance(dot, triton.runtime.JITFunction)
_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
@no_type_check
def let_next_begin():
    """Let the next kernel be launched while this one runs; see :func:`wait_for_previous`."""
    if not _INTERPRETED:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
@no_type_check
def wait_for_previous():
    """Wait until the kernel before is done, where this one was launched early (``launch_pdl``)."""
    if not _INTERPRETED:
        tl.extra.cuda.gdc_wait()


@triton.jit
@no_type_check
def exp(x):
    """Return e^x for x up to 0, to the last digits of float32.

    The GPU has 2^x; the rounding of x / ln 2 alone would cost a digit where x is large.
    """
    x = tl.where(x < -200.0, -200.0, x)
    exponent = x * 1.4426950408889634
    # what is lost by rounding the product, and the digits of 1 / ln 2 beyond float32
    lost = tl.fma(x, 1.4426950216293335, -exponent) + x * 1.925963033500011e-08
    return tl.exp2(exponent) * (1.0 + 0.6931471805599453 * lost)


@triton.jit
@no_type_check
def short_exp(x):
    """Return e^x in two instructions, for what is rounded to bfloat16; below 1e-38 it is 0."""
    return tl.exp2(x * 1.4426950408889634)


@triton.jit
@no_type_check
def valid_tokens(mask, sample, tokens, last, num_tokens):
    """Tell which tokens of a tile exist and take part, [BLOCK_N]."""
    valid = tokens < last
    if mask is not None:
        valid = valid & (tl.load(mask + sample * num_tokens + tokens, mask=valid, other=0) != 0)
    return valid


@triton.jit
@no_type_check
def tile_pointers(
    rows,
    first_token,
    first_channel,
    stride_n,
    stride_c,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    LONG: tl.constexpr,
):
    """Return pointers to a tile of (N, channels), [BLOCK_N, BLOCK_C].

    Where a tile ends is told by 64 bits, and places within it by 32 unless LONG: pointers are what
    registers are short of.
    """
    tokens = tl.arange(0, BLOCK_N)
    channels = tl.arange(0, BLOCK_C)
    if LONG:
        tokens = tokens.to(tl.int64)
        channels = channels.to(tl.int64)
    zero = tl.full((), 0, dtype=tl.int64)
    corner = rows + (zero + first_token) * stride_n + (zero + first_channel) * stride_c
    return corner + (tokens[:, None] * stride_n + channels[None, :] * stride_c)


@triton.jit
@no_type_check
def tile_product(
    rows,  # pointer to (N, channels) with strides
    memory,  # pointer to (S, channels), contiguous
    first_token,
    valid,  # [BLOCK_N]
    stride_n,
    stride_c,
    num_slots,
    num_channels,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
    LONG: tl.constexpr,
):
    """Multiply rows of tokens with the rows of a memory; rows that are not valid count as 0."""
    slots = tl.arange(0, BLOCK_S)
    product = tl.zeros([BLOCK_N, BLOCK_S], dtype=tl.float32)
    for first in range(0, num_channels, BLOCK_C):
        channels = first + tl.arange(0, BLOCK_C)
        exists = channels < num_channels
        tile = tl.load(
            tile_pointers(rows, first_token, first, stride_n, stride_c, BLOCK_N, BLOCK_C, LONG),
            mask=valid[:, None] & exists[None, :],
            other=0.0,
        )  # [BLOCK_N, BLOCK_C]
        memory_tile = tl.load(
            memory + slots[None, :] * num_channels + channels[:, None],
            mask=exists[:, None] & (slots < num_slots)[None, :],
            other=0.0,
        )  # [BLOCK_C, BLOCK_S]
        product = dot(tile, memory_tile, product)
    return product


@triton.jit
@no_type_check
def map_pointers(
    maps, pair, first_token, num_tokens, num_slots, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr
):
    """Return pointers to a tile of a map (B * H, N, S), [BLOCK_N, BLOCK_S]."""
    corner = maps + (pair * num_tokens + first_token) * num_slots  # pair has 64 bits
    return corner + (tl.arange(0, BLOCK_N)[:, None] * num_slots + tl.arange(0, BLOCK_S)[None, :])


@triton.jit
@no_type_check
def map_inside(tokens, last, num_slots, BLOCK_S: tl.constexpr):
    """Tell which entries of a tile of a map exist, [BLOCK_N, BLOCK_S]."""
    return (tokens < last)[:, None] & (tl.arange(0, BLOCK_S) < num_slots)[None, :]


@triton.jit
@no_type_check
def load_slots(vector, num_slots, other, BLOCK_S: tl.constexpr):
    """Load a vector over the slots as float32, [BLOCK_S]."""
    slots = tl.arange(0, BLOCK_S)
    return tl.load(vector + slots, mask=slots < num_slots, other=other).to(tl.float32)


@triton.jit
@no_type_check
def finite(largest):
    """Return largest logits to subtract; 0 for a set without valid tokens, which has -inf."""
    return tl.where(largest == float("-inf"), 0.0, largest)


@triton.jit
@no_type_check
def join_statistics(largest, total, other_largest, other_total):
    """Join the largest logit and the sum of exponentials of two sets of tokens.

    A set without valid tokens has -inf and 0, and changes nothing.
    """
    joined = tl.maximum(largest, other_largest)
    reference = finite(joined)
    total = total * exp(largest - reference) + other_total * exp(other_largest - reference)
    return joined, total


@triton.jit
@no_type_check
def tile_statistics(logits, valid, SHORT: tl.constexpr):
    """Return per slot the largest logit and the sum of exponentials of a tile, and those.

    The exponentials [BLOCK_N, BLOCK_S] are of what is left when the largest logit is taken away;
    SHORT ones have no more digits than bfloat16 needs.
    """
    logits = tl.where(valid[:, None], logits, float("-inf"))
    largest = tl.max(logits, axis=0)
    left = logits - finite(largest)[None, :]
    exponentials = short_exp(left) if SHORT else exp(left)
    return largest, tl.sum(exponentials, axis=0), exponentials


@triton.jit
@no_type_check
def finish_statistics(largest, total):
    """Give zeros to a pair without valid tokens; the sum of another is at least 1 already."""
    return finite(largest), tl.maximum(total, 1.0)


@triton.jit
@no_type_check
def store_statistics(statistics, largest, total, pair, num_pairs, num_slots, BLOCK_S: tl.constexpr):
    """Store the statistics of a pair in (2, num_pairs, S)."""
    slots = tl.arange(0, BLOCK_S)
    exists = slots < num_slots
    tl.store(statistics + pair * num_slots + slots, largest, mask=exists)
    tl.store(statistics + (num_pairs + pair) * num_slots + slots, total, mask=exists)


@triton.jit
@no_type_check
def combine_parts(
    partial,  # (2, B * H * num_splits, S)
    pair,
    num_pairs,
    num_slots,
    num_splits,
    BLOCK_S: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
):
    """Join the statistics of all parts of a pair, in the same order whoever does it."""
    slots = tl.arange(0, BLOCK_S)
    slot_exists = slots < num_slots
    partial_sums = partial + num_pairs * num_splits * num_slots
    largest = tl.full([BLOCK_S], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_S], dtype=tl.float32)
    for first in range(0, num_splits, BLOCK_SPLITS):
        splits = first + tl.arange(0, BLOCK_SPLITS)
        exists = (splits < num_splits)[:, None] & slot_exists[None, :]
        position = (pair * num_splits + splits[:, None]) * num_slots + slots[None, :]
        # written by other programs, maybe of this launch: not to be read from the cache of this one
        tile_largest = tl.load(
            partial + position, mask=exists, other=float("-inf"), cache_modifier=".cg"
        )
        tile_total = tl.load(partial_sums + position, mask=exists, other=0.0, cache_modifier=".cg")
        block_largest = tl.max(tile_largest, axis=0)
        exponentials = exp(tile_largest - finite(block_largest)[None, :])
        block_total = tl.sum(tile_total * exponentials, axis=0)
        largest, total = join_statistics(largest, total, block_largest, block_total)
    return finish_statistics(largest, total)


@triton.jit
@no_type_check
def add_part_to_pair(
    largest,
    total,
    partial,  # (2, B * H * num_splits, S)
    statistics,  # (2, B * H, S)
    parts_done,  # (B * H) or None
    pair,
    split,
    num_pairs,
    num_slots,
    num_splits,
    BLOCK_S: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
):
    """Store the statistics of a part; the program that is last of its pair joins its parts.

    Without ``parts_done`` they are left as they are.
    """
    store_statistics(
        partial, largest, total, pair * num_splits + split, num_pairs * num_splits, num_slots,
        BLOCK_S,
    )  # fmt: skip
    if parts_done is not None:
        # all threads have written before one of them says so
        tl.debug_barrier()
        if tl.atomic_add(parts_done + pair, 1, sem="acq_rel") == num_splits - 1:
            largest, total = combine_parts(
                partial, pair, num_pairs, num_slots, num_splits, BLOCK_S, BLOCK_SPLITS
            )
            store_statistics(statistics, largest, total, pair, num_pairs, num_slots, BLOCK_S)


@triton.jit
@no_type_check
def factors_of_tiles(
    largest_of_tiles,  # (B * H, num_tiles, S)
    largest,  # [BLOCK_S]
    sums,  # [BLOCK_S]
    pair,
    start,
    num_tokens,
    num_slots,
    BLOCK_S: tl.constexpr,
    TOKENS_OF_TILE: tl.constexpr,
    TILES: tl.constexpr,
):
    """Return what makes P of the exponentials that were kept by tiles, [TILES, BLOCK_S].

    A block that begins at token ``start`` is a part of one tile, or several tiles.
    """
    slots = tl.arange(0, BLOCK_S)
    num_tiles = tl.cdiv(num_tokens, TOKENS_OF_TILE)
    tiles = start // TOKENS_OF_TILE + tl.arange(0, TILES)
    tile_largest = tl.load(
        largest_of_tiles + (pair * num_tiles + tiles[:, None]) * num_slots + slots[None, :],
        mask=(tiles < num_tiles)[:, None] & (slots < num_slots)[None, :],
        other=float("-inf"),
    )
    return short_exp(tile_largest - largest[None, :]) / sums[None, :]


@triton.jit
@no_type_check
def normalize(
    logits,  # [BLOCK_N, BLOCK_S]
    valid,  # [BLOCK_N]
    key_bias,
    largest,  # [BLOCK_S]; read under DOUBLE alone, as sums
    sums,  # [BLOCK_S]
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
        # tokens that take no part may stand far above the others: 0 keeps their terms finite
        logits = tl.where(valid[:, None], logits - largest[None, :], 0.0)
    elif key_bias is not None:
        logits = logits + load_slots(key_bias, num_slots, 0.0, BLOCK_S)[None, :]
    logits = tl.where((slots < num_slots)[None, :], logits, float("-inf"))
    offset = tl.max(logits, axis=1)  # [BLOCK_N]
    if DOUBLE:
        offset = tl.maximum(offset, log_eps)
    weights = exp(logits - offset[:, None])
    if DOUBLE:
        weights /= sums[None, :]
    total = tl.sum(weights, axis=1)
    denominator = total
    if DOUBLE:
        total += exp(log_eps - offset)
        denominator = exp(offset) * total
    attention = tl.where(valid[:, None], weights / total[:, None], 0.0)
    return attention, denominator


@triton.jit
@no_type_check
def dropout_factors(seed, pair, tokens, dropout, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr):
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
