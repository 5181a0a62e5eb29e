"""Launch the Triton kernels that hold a memory on chip, of both directions.

Where ``heuristics.py`` has no tilings for them, ``launch.py`` launches the general kernels.
"""

from typing import Any, Final

import torch
from torch import Tensor

from eanet.ops.attention import resident_gradient_kernels as _gradient_kernels
from eanet.ops.attention import resident_kernels as _kernels
from eanet.ops.attention.heuristics import (
    MOST_CHANNELS,
    MOST_TOKENS,
    RESIDENT_SLOTS,
    ResidentTilings,
)
from eanet.ops.attention.tiling import (
    Kept,
    Parts,
    Problem,
    Tiling,
    ceil_div,
    is_long,
    launch_options,
    split_rows,
    split_tokens,
)

__all__ = [
    "backward",
    "keep_exponentials",
    "mix",
    "takes_gradients",
    "takes_mix",
]

# a kernel's signature is not the one it is launched with
kernels: Final[Any] = _kernels
gradient_kernels: Final[Any] = _gradient_kernels

#: parts of the statistics of a pair that every program of the second pass can join for itself
MOST_PARTS: Final = 32


def takes_gradients(
    grad_out: Tensor, grad_x: Tensor, memory_key: Tensor, memory_value: Tensor, problem: Problem
) -> bool:
    """Tell whether :func:`backward` can be used where there are tilings for the tokens.

    Args:
        grad_out: gradient of the result.
        grad_x: to be written.
        memory_key: M_k (S, C).
        memory_value: M_v (S, V).
        problem: heads, norm.
    """
    return (
        problem.double
        and memory_key.shape == memory_value.shape
        and not is_long(MOST_TOKENS, MOST_CHANNELS, grad_out.stride(), grad_x.stride())
    )


def keep_exponentials(
    x: Tensor,
    memory_key: Tensor,
    mask: Tensor | None,
    num_heads: int,
    statistics: Tensor,
    parts: Parts,
    tiling: Tiling,
    *,
    followed: bool,
) -> Kept:
    """Find the statistics of the tokens, and keep the exponentials of their logits.

    Args:
        x: tokens (B, N, H * C), any strides.
        memory_key: M_k (S, C), contiguous.
        mask: boolean (B, N), contiguous.
        num_heads: H.
        statistics: to be written, if parts are joined.
        parts: to be written.
        tiling: of the kernel.
        followed: whether :func:`mix` comes next.
    """
    num_tokens = x.shape[1]
    num_slots, num_channels = memory_key.shape
    num_pairs = statistics.shape[1]
    kept = Kept.exponentials(x, num_pairs, num_slots, tiling)
    kernels.slot_exponentials[(num_pairs * parts.number,)](
        x, memory_key, mask, kept.values, kept.largest_of_tiles,
        parts.statistics, statistics, parts.done,
        num_pairs, num_heads, num_tokens, num_slots, num_channels, *x.stride(),
        parts.number, parts.tokens_of_part,
        BLOCK_SPLITS=split_rows(parts.number, RESIDENT_SLOTS), FOLLOWED=followed,
        **launch_options(tiling, RESIDENT_SLOTS),
    )  # fmt: skip
    return kept


def takes_mix(out: Tensor, seed: Tensor | None, num_heads: int, tilings: ResidentTilings) -> bool:
    """Tell whether :func:`mix` can follow where exponentials are kept, and pays.

    Args:
        out: to be written.
        seed: of dropout, which is left to the general kernel.
        num_heads: H.
        tilings: for the tokens.
    """
    num_tokens = out.shape[1]
    num_pairs = out.shape[0] * num_heads
    num_programs = num_pairs * _mix_splits(num_tokens, num_pairs, tilings)
    return (
        seed is None
        # a tile for each program, and few multiprocessors without one
        and num_pairs * num_tokens >= tilings.mix_programs * tilings.mix.block_tokens
        and 5 * num_programs >= 4 * tilings.mix_programs
        and not is_long(MOST_TOKENS, MOST_CHANNELS, out.stride())
    )


def _mix_splits(num_tokens: int, num_pairs: int, tilings: ResidentTilings) -> int:
    """Return how many programs of the second pass share a pair: as few as end at the same time."""
    return split_tokens(num_tokens, tilings.mix_programs // num_pairs, tilings.mix.block_tokens)[0]


def mix(
    x: Tensor,
    memory_value: Tensor,
    value_bias: Tensor | None,
    mask: Tensor | None,
    problem: Problem,
    *,
    kept: Kept,
    parts: Parts,
    statistics: Tensor,
    out: Tensor,
    attention: Tensor | None,
    denominator: Tensor | None,
    tilings: ResidentTilings,
) -> None:
    """Run the second pass forward, right after the first; arguments as for ``launch.forward``.

    ``kept`` are exponentials. Statistics are read, or where only parts of them are there, written.
    """
    num_tokens = x.shape[1]
    num_pairs = statistics.shape[1]
    num_slots, num_value_channels = memory_value.shape
    splits = _mix_splits(num_tokens, num_pairs, tilings)
    if parts.done is None:
        partial, num_parts, joined = parts.statistics, parts.number, statistics
    else:
        partial, num_parts, joined = statistics, 1, None
    kernels.mix_exponentials[(num_pairs * splits,)](
        x, memory_value, value_bias, mask, kept.values, kept.largest_of_tiles,
        partial, joined, out, attention, denominator,
        num_pairs, problem.num_heads, num_tokens, num_slots, num_value_channels,
        *x.stride(), *out.stride(), num_parts, splits, problem.log_eps,
        BLOCK_SPLITS=split_rows(num_parts, RESIDENT_SLOTS), TOKENS_OF_TILE=kept.tokens_of_tile,
        TOKENS_LAST=out.stride(1) < out.stride(2), RESIDUAL=problem.residual,
        launch_pdl=tilings.early, **launch_options(tilings.mix, RESIDENT_SLOTS),
    )  # fmt: skip


def backward(
    grad_out: Tensor,
    grad_attention: Tensor | None,
    x: Tensor,
    memory_key: Tensor,
    memory_value: Tensor,
    mask: Tensor | None,
    problem: Problem,
    *,
    attention: Tensor,
    denominator: Tensor,
    with_value_bias: bool,
    grad_x: Tensor,
    tilings: ResidentTilings,
) -> tuple[Tensor, Tensor]:
    """Run the backward kernels; arguments as for ``launch.backward``.

    Returns:
        In float32 for parts of the tokens (parts, ...): gradients of memory_key, and of
        memory_value and value_bias side by side.
    """
    num_tokens = x.shape[1]
    num_slots, num_channels = memory_key.shape
    num_pairs = x.shape[0] * problem.num_heads
    sizes = (problem.num_heads, num_tokens, num_slots, num_channels)
    parts = split_tokens(
        num_tokens, tilings.value_programs // num_pairs, tilings.value_side.block_tokens
    )
    num_slices = ceil_div(num_channels, tilings.key_side.block_channels)
    key_parts = split_tokens(
        num_tokens,
        tilings.key_programs // (num_pairs * num_slices),
        tilings.key_side.block_tokens,
    )
    lengths = [num_slots * num_channels, num_channels]
    partial_weighted = x.new_empty((num_pairs, parts[0], num_slots), dtype=torch.float32)
    partial_values = partial_weighted.new_empty((num_pairs * parts[0], sum(lengths)))
    partial_value, partial_bias = torch.split(partial_values, lengths, dim=1)
    partial_key = partial_weighted.new_empty((num_pairs * key_parts[0], lengths[0]))
    weighted = x.new_empty((num_pairs, num_tokens, num_slots))
    gradient_kernels.value_side[(num_pairs * parts[0],)](
        grad_out, grad_attention, memory_value, mask, attention,
        weighted, partial_weighted, partial_value, partial_bias, partial_values.stride(0),
        *sizes, *grad_out.stride(), *parts,
        WITH_BIAS=with_value_bias, **launch_options(tilings.value_side, RESIDENT_SLOTS),
    )  # fmt: skip
    gradient_kernels.key_side[(num_pairs * key_parts[0] * num_slices,)](
        x, grad_out, memory_key, mask, attention, denominator, weighted, partial_weighted,
        grad_x, partial_key, partial_key.stride(0),
        *sizes, *x.stride(), *grad_out.stride(), *grad_x.stride(),
        num_slices, *key_parts, parts[0],
        BLOCK_SPLITS=split_rows(parts[0], RESIDENT_SLOTS), RESIDUAL=problem.residual,
        **launch_options(tilings.key_side, RESIDENT_SLOTS),
    )  # fmt: skip
    return partial_key, partial_values
