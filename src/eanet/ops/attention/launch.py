"""Launch the Triton kernels: which of them, scratch memory, and the sums of partial results.

Importing this module imports Triton; ``operators.py`` does so when the backend is used.
"""

from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from eanet.ops.attention import gradient_kernels as _gradient_kernels
from eanet.ops.attention import kernels as _kernels
from eanet.ops.attention import resident
from eanet.ops.attention.heuristics import Tilings, block_slots, choose_tilings
from eanet.ops.attention.tiling import (
    MANY_TOKENS,
    Kept,
    Parts,
    Problem,
    Tiling,
    ceil_div,
    is_long,
    launch_options,
    next_power_of_two,
    split_rows,
    split_tokens,
)

__all__ = ["backward", "forward"]

# a kernel's signature is not the one it is launched with
kernels: Final[Any] = _kernels
gradient_kernels: Final[Any] = _gradient_kernels

#: below this eps, an exponential that bfloat16 cannot hold (1e-38) could still count beside it
LEAST_EPS: Final = 1e-30


@dataclass(frozen=True)
class _TokenBlocks:
    """Token blocks of all pairs, of which a program does a run, and slices of channels.

    Attributes:
        num_slices: slices of channels.
        per_pair: blocks of one pair.
        total: blocks of all pairs.
    """

    num_slices: int
    per_pair: int
    total: int

    @classmethod
    def of(
        cls, tiling: Tiling, num_tokens: int, num_pairs: int, num_channels: int
    ) -> "_TokenBlocks":
        """Count the blocks of a tiling."""
        per_pair = ceil_div(num_tokens, tiling.block_tokens)
        num_slices = ceil_div(num_channels, tiling.block_channels)
        return cls(num_slices, per_pair, per_pair * num_pairs)

    def arguments(self, num_runs: int) -> tuple[int, int, int, int]:
        """Return what a kernel is told, the blocks of a run last; the last runs may be empty."""
        return self.num_slices, self.per_pair, self.total, ceil_div(self.total, num_runs)


def _launch_options(tiling: Tiling, num_slots: int, *tensors: Tensor) -> dict[str, Any]:
    """Return the compile-time arguments that all kernels over tokens take.

    Args:
        tiling: of the kernel.
        num_slots: S.
        tensors: with tokens that the kernel reads or writes.
    """
    strides = (tensor.stride() for tensor in tensors)
    long = tensors[0].shape[1] >= MANY_TOKENS or is_long(
        tiling.block_tokens, tiling.block_channels, *strides
    )
    return {"LONG": long, **launch_options(tiling, block_slots(num_slots))}


def _operand(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return a small tensor contiguous and in the type of the tokens."""
    return None if tensor is None else tensor.to(dtype).contiguous()


def forward(
    x: Tensor,
    memory_key: Tensor,
    memory_value: Tensor,
    key_bias: Tensor | None,
    value_bias: Tensor | None,
    mask: Tensor | None,
    seed: Tensor | None,
    problem: Problem,
    *,
    out: Tensor,
    attention: Tensor | None,
    denominator: Tensor | None = None,
    tilings: Tilings | None = None,
) -> Tensor | None:
    """Run the forward kernels, writing ``out`` and, where wanted, what the backward pass reads.

    Args:
        x: tokens (B, N, H * C), any strides.
        memory_key: M_k (S, C).
        memory_value: M_v (S, V).
        key_bias: (S); read under the norm "softmax" alone, as "double" cancels it.
        value_bias: (V).
        mask: boolean (B, N), True for tokens that take part.
        seed: int64 tensor of one element; without it nothing is dropped.
        problem: heads, norm, eps, dropout, residual.
        out: (B, N, H * V), any strides.
        attention: (B, H, N, S), contiguous.
        denominator: float32 (B, H, N), contiguous; written under "double" where given.
        tilings: how to cut the work; chosen by :func:`choose_tilings` where not given.

    Returns:
        Statistics of the tokens (2, B * H, S) for the backward pass, ``None`` under "softmax".
    """
    batch, num_tokens, _ = x.shape
    num_slots, num_channels = memory_key.shape
    num_value_channels = memory_value.shape[1]
    memory_key, memory_value = (m.to(x.dtype).contiguous() for m in (memory_key, memory_value))
    mask = None if mask is None else mask.contiguous()
    tilings = tilings or choose_tilings(
        x, num_slots, max(num_channels, num_value_channels), problem.num_heads
    )
    num_pairs = batch * problem.num_heads
    num_blocks = ceil_div(num_tokens, tilings.mix.block_tokens)
    alone = problem.double and num_blocks == 1
    sizes = (num_pairs, problem.num_heads, num_tokens, num_slots, num_channels)
    value_bias = _operand(value_bias, torch.float32)
    statistics = kept = None
    if problem.double:
        statistics = x.new_empty((2, num_pairs, num_slots), dtype=torch.float32)
    with torch.cuda.device_of(x):
        if statistics is not None and not alone:
            holding = tilings.resident
            if holding is not None and not (
                _keeps_exponentials(x, memory_key, problem)
                and resident.takes_mix(out, seed, problem.num_heads, holding)
            ):
                holding = None
            kept, parts = _first_pass(
                x, memory_key, mask, problem, statistics, tilings, followed=holding is not None
            )
            if holding is not None:
                assert kept is not None
                resident.mix(
                    x, memory_value, value_bias, mask, problem, kept=kept, parts=parts,
                    statistics=statistics, out=out, attention=attention, denominator=denominator,
                    tilings=holding,
                )  # fmt: skip
                return statistics
        options = _launch_options(tilings.mix, num_slots, x, out)
        kernels.mix[(num_pairs * num_blocks,)](
            x, memory_key, memory_value, _operand(key_bias, torch.float32), value_bias, mask, seed,
            kept and kept.values, kept and kept.largest_of_tiles, statistics,
            out, attention, denominator,
            *sizes, num_value_channels, *x.stride(), *out.stride(),
            num_blocks, problem.log_eps, problem.dropout,
            DOUBLE=problem.double, ALONE=alone, RESIDUAL=problem.residual,
            IN_PARTS=x.dtype == torch.float32 and options["BLOCK_S"] >= 64,
            TOKENS_OF_TILE=kept.tokens_of_tile if kept else 1, **options,
        )  # fmt: skip
    return statistics


def _keeps_exponentials(x: Tensor, memory_key: Tensor, problem: Problem) -> bool:
    """Tell whether exponentials are kept between the passes; they have fewer bytes than x."""
    num_slots, num_channels = memory_key.shape
    return (
        x.dtype == torch.bfloat16
        and problem.eps >= LEAST_EPS
        and 4 * num_slots < num_channels * x.itemsize
    )


def _first_pass(
    x: Tensor,
    memory_key: Tensor,
    mask: Tensor | None,
    problem: Problem,
    statistics: Tensor,
    tilings: Tilings,
    *,
    followed: bool,
) -> tuple[Kept | None, Parts]:
    """Find the statistics of the tokens; keep for the second pass what spares it to read them.

    Kept is what is written and read once with fewer bytes than x is read once more. Few parts of
    the statistics are left to ``resident.mix`` where that follows.
    """
    num_tokens = x.shape[1]
    num_slots, num_channels = memory_key.shape
    num_pairs = statistics.shape[1]
    tiling = tilings.statistics
    most_left = resident.MOST_PARTS if followed else 0
    kept = None
    if _keeps_exponentials(x, memory_key, problem):
        holding = tilings.resident
        if holding is not None and holding.exponentials is not None:
            parts = Parts.of(
                statistics, num_tokens, holding.exponentials_programs,
                holding.exponentials.block_tokens, most_left=most_left,
            )  # fmt: skip
            kept = resident.keep_exponentials(
                x, memory_key, mask, problem.num_heads, statistics, parts, holding.exponentials,
                followed=followed,
            )  # fmt: skip
            return kept, parts
        kept = Kept.exponentials(x, num_pairs, num_slots, tiling)
    elif 8 * num_slots < num_channels * x.itemsize:
        kept = Kept(statistics.new_empty((num_pairs, num_tokens, num_slots)))
    parts = Parts.of(
        statistics, num_tokens, tilings.statistics_programs, tiling.block_tokens,
        most_left=most_left,
    )  # fmt: skip
    options = _launch_options(tiling, num_slots, x)
    kernels.token_statistics[(num_pairs * parts.number,)](
        x, memory_key, mask, kept and kept.values, kept and kept.largest_of_tiles,
        parts.statistics, statistics, parts.done,
        num_pairs, problem.num_heads, num_tokens, num_slots, num_channels, *x.stride(),
        parts.number, parts.tokens_of_part,
        BLOCK_SPLITS=split_rows(parts.number, options["BLOCK_S"]), FOLLOWED=followed,
        FLAT=tilings.flat, **options,
    )  # fmt: skip
    return kept, parts


def backward(
    grad_out: Tensor,
    grad_attention: Tensor | None,
    x: Tensor,
    memory_key: Tensor,
    memory_value: Tensor,
    key_bias: Tensor | None,
    mask: Tensor | None,
    seed: Tensor | None,
    statistics: Tensor | None,
    problem: Problem,
    *,
    kept: tuple[Tensor, Tensor] | None = None,
    with_value_bias: bool = True,
    grad_x: Tensor,
    grad_memories: Tensor,
    grad_key_bias: Tensor | None = None,
    tilings: Tilings | None = None,
) -> None:
    """Run the backward kernels; arguments as for :func:`forward`.

    Written are ``grad_x``; ``grad_memories``, which holds the gradients of memory_key, memory_value
    and value_bias side by side; and ``grad_key_bias``. That of value_bias counts only
    ``with_value_bias``: kernels may leave it out.

    With ``kept``, the attention and denominator that the forward pass wrote, x is read once, else
    twice. Scratch memory is one map (B, H, N, S), without ``kept`` two in float32, and a gradient
    of the memories for each of the programs that share the sums.
    """
    num_slots, num_channels = memory_key.shape
    num_value_channels = memory_value.shape[1]
    memory_key, memory_value = (m.to(x.dtype).contiguous() for m in (memory_key, memory_value))
    grad_out = grad_out.to(x.dtype)
    mask = None if mask is None else mask.contiguous()
    grad_attention = None if grad_attention is None else grad_attention.contiguous()
    tilings = tilings or choose_tilings(
        x, num_slots, max(num_channels, num_value_channels), problem.num_heads
    )
    holding = tilings.resident
    tensors = (grad_out, grad_attention, x, memory_key, memory_value)
    with torch.cuda.device_of(x):
        if (
            holding is not None
            and kept is not None
            and seed is None
            and resident.takes_gradients(grad_out, grad_x, memory_key, memory_value, problem)
        ):
            partials = resident.backward(
                *tensors, mask, problem, attention=kept[0], denominator=kept[1],
                with_value_bias=with_value_bias, grad_x=grad_x, tilings=holding,
            )  # fmt: skip
            weighted_sum = None
        else:
            partial_sums, weighted_sum = _general_backward(
                *tensors, key_bias, mask, seed, statistics, problem,
                kept=kept, grad_x=grad_x, tilings=tilings,
            )  # fmt: skip
            partials = (partial_sums,)
        _add_parts(partials, grad_memories)
    if grad_key_bias is not None:
        # under "double" the bias cancels: its gradient is zero, without rounding
        if weighted_sum is None or problem.double:
            grad_key_bias.zero_()
        else:
            torch.sum(weighted_sum, 0, out=grad_key_bias)


def _general_backward(
    grad_out: Tensor,
    grad_attention: Tensor | None,
    x: Tensor,
    memory_key: Tensor,
    memory_value: Tensor,
    key_bias: Tensor | None,
    mask: Tensor | None,
    seed: Tensor | None,
    statistics: Tensor | None,
    problem: Problem,
    *,
    kept: tuple[Tensor, Tensor] | None,
    grad_x: Tensor,
    tilings: Tilings,
) -> tuple[Tensor, Tensor]:
    """Run the kernels that take tokens of any kind; arguments as for :func:`backward`.

    Returns:
        In float32: gradients of both memories and of value_bias side by side, for parts of the
        tokens (parts, numbers); and w summed over the tokens (B * H, S).
    """
    batch, num_tokens, _ = x.shape
    num_slots, num_channels = memory_key.shape
    num_value_channels = memory_value.shape[1]
    tiling = tilings.attention_gradient
    num_pairs = batch * problem.num_heads
    num_splits, tokens_per_split = split_tokens(
        num_tokens, tilings.num_programs // num_pairs, tiling.block_tokens
    )
    sizes = (problem.num_heads, num_tokens, num_slots, num_channels, num_value_channels)
    weighted = x.new_empty((num_pairs, num_tokens, num_slots), dtype=torch.float32)
    if kept is None:
        attention = torch.empty_like(weighted)
        denominator = x.new_empty((num_pairs, num_tokens), dtype=torch.float32)
    else:
        attention, denominator = kept
    partial = x.new_empty((num_pairs, num_splits, num_slots), dtype=torch.float32)
    key_blocks = _TokenBlocks.of(tilings.key_gradient, num_tokens, num_pairs, num_channels)
    value_blocks = _TokenBlocks.of(
        tilings.value_gradient, num_tokens, num_pairs, num_value_channels
    )
    num_runs = max(
        1,
        min(
            tilings.num_programs // max(key_blocks.num_slices, value_blocks.num_slices),
            key_blocks.total,
        ),
    )
    # gradients of both memories and of the bias in one row, so that one sum over programs does
    lengths = [num_slots * num_channels, num_slots * num_value_channels, num_value_channels]
    partial_sums = partial.new_empty((num_runs, sum(lengths)))
    partial_key, *partial_values = torch.split(partial_sums, lengths, dim=1)
    options = _launch_options(tiling, num_slots, x, grad_out)
    gradient_kernels.attention_gradient[(num_pairs * num_splits,)](
        x, grad_out, grad_attention, memory_key, memory_value,
        _operand(key_bias, torch.float32), mask, seed, statistics,
        attention, denominator, weighted, partial,
        num_pairs, *sizes, *x.stride(), *grad_out.stride(),
        num_splits, tokens_per_split, problem.log_eps, problem.dropout,
        DOUBLE=problem.double, KEPT=kept is not None, **options,
    )  # fmt: skip
    weighted_sum = partial.sum(1)
    gradient_kernels.value_gradient[(num_runs * value_blocks.num_slices,)](
        grad_out, mask, seed, attention, *partial_values, partial_sums.stride(0),
        problem.num_heads, num_tokens, num_slots, num_value_channels, *grad_out.stride(),
        *value_blocks.arguments(num_runs), problem.dropout,
        **_launch_options(tilings.value_gradient, num_slots, grad_out),
    )  # fmt: skip
    gradient_kernels.key_gradient[(num_runs * key_blocks.num_slices,)](
        x, grad_out, memory_key, mask, attention, denominator, weighted, weighted_sum,
        grad_x, partial_key, partial_sums.stride(0),
        problem.num_heads, num_tokens, num_slots, num_channels,
        *x.stride(), *grad_out.stride(), *grad_x.stride(), *key_blocks.arguments(num_runs),
        DOUBLE=problem.double, RESIDUAL=problem.residual, SCALED=x.dtype == torch.float16,
        **_launch_options(tilings.key_gradient, num_slots, x, grad_out, grad_x),
    )  # fmt: skip
    return partial_sums, weighted_sum


def _add_parts(partials: tuple[Tensor, ...], sums: Tensor) -> None:
    """Add the rows of one or two tensors (parts, length), in a fixed order.

    Args:
        partials: what to add.
        sums: for their sums, side by side.
    """
    block = 64
    arguments: list[Any] = []
    for partial, part_of_sums in zip(
        partials, torch.split(sums, [partial.shape[1] for partial in partials]), strict=True
    ):
        arguments += (partial, part_of_sums, *partial.shape)
    arguments += [None] * (8 - len(arguments))
    gradient_kernels.add_parts[(sum(ceil_div(partial.shape[1], block) for partial in partials),)](
        *arguments,
        BLOCK_PARTS=min(128, next_power_of_two(max(len(partial) for partial in partials))),
        BLOCK=block, num_warps=4,
    )  # fmt: skip
