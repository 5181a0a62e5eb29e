"""Launch the Triton kernels: sizes of tiles, scratch memory, and the sums of partial results.

Importing this module imports Triton; ``custom_op.py`` does so when the backend is used.
"""

import math
from dataclasses import dataclass
from typing import Any, Final, cast

import torch
import triton  # pyright: ignore[reportMissingTypeStubs]
from torch import Tensor

from eanet.ops.attention import gradient_kernels as _gradient_kernels
from eanet.ops.attention import kernels as _kernels

__all__ = ["MAX_SLOTS", "Gradients", "Problem", "Tiling", "backward", "choose_tiling", "forward"]

# a kernel's signature is not the one it is launched with
kernels: Final[Any] = _kernels
gradient_kernels: Final[Any] = _gradient_kernels

#: more slots than this do not fit into the registers of a program
MAX_SLOTS: Final = 256


@dataclass(frozen=True)
class Problem:
    """What is computed, apart from tensors."""

    num_heads: int
    norm: str
    eps: float
    dropout: float
    residual: bool

    @property
    def double(self) -> bool:
        """Whether the norm is the double normalization."""
        return self.norm == "double"

    @property
    def log_eps(self) -> float:
        """The constant entry of the softmax over slots."""
        return math.log(self.eps) if self.eps > 0 else -math.inf


@dataclass(frozen=True)
class Tiling:
    """How work is cut into tiles and programs.

    Attributes:
        block_tokens: tokens of a tile; a power of two from 16.
        block_channels: channels of a tile; a power of two from 16.
        block_slots: slots of a tile, which holds them all; a power of two from 16.
        num_programs: about how many programs share a sum over tokens.
        num_warps: warps of a program.
    """

    block_tokens: int
    block_channels: int
    block_slots: int
    num_programs: int
    num_warps: int


def _power_of_two(number: int, smallest: int, largest: int) -> int:
    """Round up to a power of two within limits."""
    return max(smallest, min(largest, triton.next_power_of_2(max(number, 1))))


def choose_tiling(x: Tensor, num_slots: int, num_channels: int, *, backward: bool) -> Tiling:
    """Choose tiles that fit into registers, and enough programs to fill the device.

    Args:
        x: tokens (batch, tokens, channels).
        num_slots: S.
        num_channels: the wider of key and value channels of a head.
        backward: for the backward pass, which holds two tiles over tokens and slots.

    Raises:
        ValueError: more than 256 slots.
    """
    if num_slots > MAX_SLOTS:
        raise ValueError(
            f"backend 'triton' takes up to {MAX_SLOTS} slots, got {num_slots}; use backend='eager'"
        )
    block_slots = _power_of_two(num_slots, 16, MAX_SLOTS)
    tile_entries = 4096 if backward else 8192
    widest = 64
    if x.dtype == torch.float32:  # no tensor cores: tiles are held in registers
        tile_entries, widest = tile_entries // 2, 32
    if block_slots == MAX_SLOTS:
        widest //= 2
    block_tokens = _power_of_two(x.shape[1], 16, max(16, min(128, tile_entries // block_slots)))
    multiprocessors = 1
    if x.is_cuda:
        properties = cast("Any", torch.cuda.get_device_properties)(x.device)
        multiprocessors = int(properties.multi_processor_count)
    return Tiling(
        block_tokens=block_tokens,
        block_channels=_power_of_two(num_channels, 16, widest),
        block_slots=block_slots,
        num_programs=4 * multiprocessors,
        num_warps=8 if block_tokens * block_slots >= (2048 if backward else 8192) else 4,
    )


def _split_tokens(num_tokens: int, num_pairs: int, tiling: Tiling) -> tuple[int, int]:
    """Return into how many parts the tokens of each pair are cut, and the tokens of a part."""
    num_blocks = triton.cdiv(num_tokens, tiling.block_tokens)
    wanted = min(max(1, tiling.num_programs // num_pairs), num_blocks)
    blocks_per_split = triton.cdiv(num_blocks, wanted)
    num_splits = triton.cdiv(num_blocks, blocks_per_split)
    return num_splits, blocks_per_split * tiling.block_tokens


def _launch_options(tiling: Tiling) -> dict[str, Any]:
    """Return the compile-time arguments that all kernels over tokens take."""
    return {
        "BLOCK_N": tiling.block_tokens,
        "BLOCK_S": tiling.block_slots,
        "BLOCK_C": tiling.block_channels,
        "num_warps": tiling.num_warps,
    }


def _operand(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return a small tensor contiguous and in the type of the tokens."""
    return None if tensor is None else tensor.to(dtype).contiguous()


def _statistics(
    x: Tensor, memory_key: Tensor, mask: Tensor | None, num_heads: int, tiling: Tiling
) -> Tensor:
    """Return the largest logit and the sum of exponentials of each slot, (2, B * H, S)."""
    batch, num_tokens, _ = x.shape
    num_slots, num_channels = memory_key.shape
    num_pairs = batch * num_heads
    num_splits, tokens_per_split = _split_tokens(num_tokens, num_pairs, tiling)
    partial = x.new_empty((2, num_pairs, num_splits, num_slots), dtype=torch.float32)
    kernels.token_statistics[(num_pairs * num_splits,)](
        x, memory_key, mask, partial,
        num_pairs, num_heads, num_tokens, num_slots, num_channels, *x.stride(),
        num_splits, tokens_per_split, **_launch_options(tiling),
    )  # fmt: skip
    statistics = x.new_empty((2, num_pairs, num_slots), dtype=torch.float32)
    kernels.combine_statistics[(num_pairs,)](
        partial, statistics, num_pairs, num_slots, num_splits, BLOCK_S=tiling.block_slots,
        BLOCK_SPLITS=_power_of_two(num_splits, 1, 4096 // tiling.block_slots),
    )  # fmt: skip
    return statistics


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
    tiling: Tiling | None = None,
) -> Tensor | None:
    """Run the forward kernels, writing ``out`` and, where wanted, ``attention``.

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
        tiling: how to cut the work; chosen by :func:`choose_tiling` where not given.

    Returns:
        Statistics of the tokens (2, B * H, S) for the backward pass, ``None`` under "softmax".
    """
    batch, num_tokens, _ = x.shape
    num_slots, num_channels = memory_key.shape
    num_value_channels = memory_value.shape[1]
    if tiling is None:
        widest = max(num_channels, num_value_channels)
        tiling = choose_tiling(x, num_slots, widest, backward=False)
    memory_key, memory_value = (m.to(x.dtype).contiguous() for m in (memory_key, memory_value))
    mask = None if mask is None else mask.contiguous()
    num_pairs = batch * problem.num_heads
    num_blocks = triton.cdiv(num_tokens, tiling.block_tokens)
    with torch.cuda.device_of(x):
        statistics = None
        if problem.double:
            statistics = _statistics(x, memory_key, mask, problem.num_heads, tiling)
        kernels.mix[(num_pairs * num_blocks,)](
            x, memory_key, memory_value,
            _operand(key_bias, torch.float32), _operand(value_bias, torch.float32), mask, seed,
            statistics, out, attention,
            num_pairs, problem.num_heads, num_tokens, num_slots, num_channels, num_value_channels,
            *x.stride(), *out.stride(), num_blocks, problem.log_eps, problem.dropout,
            DOUBLE=problem.double, RESIDUAL=problem.residual, **_launch_options(tiling),
        )  # fmt: skip
    return statistics


@dataclass(frozen=True)
class Gradients:
    """Gradients of all operands; those of the memories and biases in float32."""

    x: Tensor
    memory_key: Tensor
    memory_value: Tensor
    key_bias: Tensor
    value_bias: Tensor


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
    grad_x: Tensor,
    tiling: Tiling | None = None,
) -> Gradients:
    """Run the backward kernels, writing ``grad_x``; arguments as for :func:`forward`.

    Scratch memory: two float32 tensors of (B, H, N, S), and partial memory gradients.
    """
    batch, num_tokens, _ = x.shape
    num_slots, num_channels = memory_key.shape
    num_value_channels = memory_value.shape[1]
    widest = max(num_channels, num_value_channels)
    if tiling is None:
        tiling = choose_tiling(x, num_slots, widest, backward=True)
    memory_key, memory_value = (m.to(x.dtype).contiguous() for m in (memory_key, memory_value))
    grad_out = grad_out.to(x.dtype)
    mask = None if mask is None else mask.contiguous()
    grad_attention = None if grad_attention is None else grad_attention.contiguous()
    num_pairs = batch * problem.num_heads
    num_splits, tokens_per_split = _split_tokens(num_tokens, num_pairs, tiling)
    sizes = (problem.num_heads, num_tokens, num_slots, num_channels, num_value_channels)
    scratch = x.new_empty((2, num_pairs, num_tokens, num_slots), dtype=torch.float32)
    denominator = x.new_empty((num_pairs, num_tokens), dtype=torch.float32)
    partial = x.new_empty((num_pairs, num_splits, num_slots), dtype=torch.float32)
    num_blocks = triton.cdiv(num_tokens, tiling.block_tokens)
    total_blocks = num_pairs * num_blocks
    num_slices = triton.cdiv(widest, tiling.block_channels)
    blocks_per_program = triton.cdiv(total_blocks, max(1, tiling.num_programs // num_slices))
    num_programs = triton.cdiv(total_blocks, blocks_per_program)
    partial_key = partial.new_empty((num_programs, num_slots, num_channels))
    partial_value = partial.new_empty((num_programs, num_slots, num_value_channels))
    partial_bias = partial.new_empty((num_programs, num_value_channels))
    with torch.cuda.device_of(x):
        gradient_kernels.attention_gradient[(num_pairs * num_splits,)](
            x, grad_out, grad_attention, memory_key, memory_value,
            _operand(key_bias, torch.float32), mask, seed, statistics,
            scratch[0], denominator, scratch[1], partial,
            num_pairs, *sizes, *x.stride(), *grad_out.stride(),
            num_splits, tokens_per_split, problem.log_eps, problem.dropout,
            DOUBLE=problem.double, **_launch_options(tiling),
        )  # fmt: skip
        weighted_sum = partial.sum(1)
        gradient_kernels.operand_gradient[(num_programs * num_slices,)](
            x, grad_out, memory_key, mask, seed,
            scratch[0], denominator, scratch[1], weighted_sum,
            grad_x, partial_key, partial_value, partial_bias,
            *sizes, *x.stride(), *grad_out.stride(), *grad_x.stride(),
            num_slices, num_blocks, total_blocks, blocks_per_program, problem.dropout,
            DOUBLE=problem.double, RESIDUAL=problem.residual, SCALED=x.dtype == torch.float16,
            **_launch_options(tiling),
        )  # fmt: skip
    return Gradients(
        x=grad_x,
        memory_key=partial_key.sum(0),
        memory_value=partial_value.sum(0),
        # under "double" the bias cancels: its gradient is zero, without rounding
        key_bias=torch.zeros_like(weighted_sum[0]) if problem.double else weighted_sum.sum(0),
        value_bias=partial_bias.sum(0),
    )
