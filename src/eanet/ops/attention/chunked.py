"""External attention over chunks of tokens: exact, in memory that no number of tokens enlarges.

Tokens meet one another only in the softmax of Eq. 10, and there only through two numbers for each
slot: its largest logit and the sum of its exponentials. So one pass over the tokens gathers these,
and a second one normalizes, mixes and forgets each chunk. The backward pass computes the attention
again, chunk by chunk; there, too, the tokens meet in one number for each slot. Where tokens are
spread over processes, an :class:`~eanet.ops.attention.chunks.Exchange` combines these numbers.

Letters in shape comments are those of :mod:`eanet.ops.attention.chunks`.
"""

from collections.abc import Iterator
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from eanet.ops.attention.block import BatchNormArguments, BatchStatistics
from eanet.ops.attention.chunks import (
    ChunkOptions,
    Memories,
    SlotStatistics,
    Tokens,
    accumulation_dtype,
    by_group,
    chunk_of,
    empty_result,
    normalize,
    product,
    without_autocast,
)
from eanet.ops.attention.moments import AttentionMoments, FoldedBatchNorm
from eanet.ops.attention.thin_products import is_token_major

__all__ = ["chunked_external_attention", "chunked_external_attention_block"]


@torch.no_grad()
def slot_statistics(
    tokens: Tokens, memories: Memories, options: ChunkOptions
) -> SlotStatistics | None:
    """Gather the statistics of all tokens: the first pass. The softmax over slots needs none."""
    if options.norm == "softmax":
        return None
    statistics = SlotStatistics(tokens.num_samples, memories.key.shape[0], memories.key)
    for part in tokens.slices():
        x, mask = tokens.chunk(part)
        statistics.add(memories.logits(x), mask)
    if options.exchange is not None:
        statistics.combine(options.exchange)
    return statistics


class _Chunked(torch.autograd.Function):
    """Keeps tokens, memories, two numbers for each slot and, for a ReLU, the result."""

    @staticmethod
    def forward(
        ctx: Any,
        options: ChunkOptions,
        x: Tensor,
        key: Tensor,
        value: Tensor,
        key_bias: Tensor | None,
        bias: Tensor | None,
        scale: Tensor | None,
        mask: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        tokens = Tokens(x, mask, options.chunk_tokens)
        memories = Memories.cast(key, value, key_bias, bias, tokens.dtype)
        statistics = slot_statistics(tokens, memories, options)
        batch_norm, mean, variance, count = None, x.new_empty(0), x.new_empty(0), x.new_empty(0)
        if options.batch_norm_eps is not None:
            moments = AttentionMoments(key.shape[0], memories.key)
            for part in tokens.slices():
                chunk, chunk_mask = tokens.chunk(part)
                attention, _ = normalize(memories.logits(chunk), statistics, options, chunk_mask)
                moments.add(attention, chunk_mask)
            batch_norm = FoldedBatchNorm(moments, options.batch_norm_eps)
            weight, folded_bias, mean, variance = batch_norm.fold(
                value.to(moments.mean.dtype), scale, bias
            )
            mean, variance = mean.to(tokens.dtype), variance.to(tokens.dtype)
            count = mean.new_full((), moments.count)
            memories = Memories.cast(key, weight, key_bias, folded_bias, tokens.dtype)
        out = empty_result(x, value.shape[0])
        for part in tokens.slices():
            chunk, chunk_mask = tokens.chunk(part)
            attention, _ = normalize(memories.logits(chunk), statistics, options, chunk_mask)
            result = memories.mix(attention, chunk_mask, is_token_major(out))
            if options.residual:
                result += chunk
            if options.relu:
                result.relu_()
            out[..., part] = result.unflatten(0, x.shape[:2])
        ctx.options, ctx.memories, ctx.batch_norm, ctx.statistics = (
            options, memories, batch_norm, statistics,
        )  # fmt: skip
        ctx.save_for_backward(
            x, key, value, key_bias, bias, scale, mask, out if options.relu else None
        )
        ctx.mark_non_differentiable(mean, variance, count)
        return out, mean, variance, count

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if torch.is_grad_enabled():
            raise ValueError(
                "attention in chunks of tokens has no second derivative (create_graph=True): "
                "compute it at once"
            )
        with without_autocast(grad_outputs[0].device):
            return _Backward(ctx, grad_outputs[0]).gradients()


class _Backward:
    """The passes over the chunks that give the gradients.

    With gA the gradient of the attention A and D the denominator of Eq. 11, those of the logits
    are ``q - A D sum over tokens of q`` with ``q = A (gA - sum over slots of A gA)``: the sum is
    the one number for each slot in which the tokens meet.
    """

    def __init__(self, ctx: Any, grad_out: Tensor) -> None:
        x, *self._parameters, mask, self._out = ctx.saved_tensors
        self._options: ChunkOptions = ctx.options
        self._memories: Memories = ctx.memories
        self._batch_norm: FoldedBatchNorm | None = ctx.batch_norm
        self._statistics: SlotStatistics | None = ctx.statistics
        self._tokens = Tokens(x, mask, self._options.chunk_tokens)
        self._grad_out = grad_out
        self._x_wanted: bool = ctx.needs_input_grad[1]
        self._parameters_wanted: tuple[bool, ...] = ctx.needs_input_grad[2:7]
        self._sums = x.new_zeros((), dtype=accumulation_dtype(x.device))
        #: what batch norm adds to the gradient of attention: a matrix times attention, an offset
        self._by_moments: tuple[Tensor, Tensor] | None = None

    def gradients(self) -> tuple[Tensor | None, ...]:
        """Return the gradients of the arguments of :class:`_Chunked`."""
        _, value, _, bias, scale = self._parameters
        grad_weight, grad_bias, slot_sums = self._first_pass()
        if self._batch_norm is None:
            grad_value, grad_scale = grad_weight, None
        else:
            (grad_value, grad_scale, grad_bias), matrix, offset = self._batch_norm.gradients(
                (value, scale, bias), grad_weight, grad_bias
            )
            dtype = self._tokens.dtype
            self._by_moments = matrix.to(dtype), offset.to(dtype)
            slot_sums = self._sum_pass()
        exchange = self._options.exchange
        if exchange is not None and self._statistics is not None:
            exchange.sum_(slot_sums)
        grad_x, grad_key, grad_key_bias = self._last_pass(slot_sums)
        found = [grad_key, grad_value, grad_key_bias, grad_bias, grad_scale]
        cast: list[Tensor | None] = []
        for tensor, gradient, wanted in zip(
            self._parameters, found, self._parameters_wanted, strict=True
        ):
            if tensor is None or gradient is None or not wanted:
                cast.append(None)
                continue
            if exchange is not None and exchange.sums_memory_gradients:
                exchange.sum_(gradient)
            cast.append(gradient.to(tensor.dtype))
        return None, grad_x, *cast, None

    def _chunks(self) -> Iterator[tuple[slice, Tensor, Tensor | None, Tensor, Tensor | None]]:
        """Yield slice, tokens, mask, attention and its denominator of each chunk."""
        for part in self._tokens.slices():
            x, mask = self._tokens.chunk(part)
            attention, denominator = normalize(
                self._memories.logits(x), self._statistics, self._options, mask
            )
            yield part, x, mask, attention, denominator

    def _grad(self, part: slice) -> Tensor:
        """Return the gradient of the result before the ReLU for a chunk (G, V, n)."""
        grad = chunk_of(self._grad_out, part, self._tokens.dtype)
        if self._out is None:
            return grad
        out = chunk_of(self._out, part, self._tokens.dtype)
        return torch.ops.aten.threshold_backward(grad, out, 0)

    def _weighted(self, attention: Tensor, grad: Tensor) -> Tensor:
        """Return q (G, S, n)."""
        transposed = self._memories.value.transpose(0, 1)
        grad_attention = torch.bmm(transposed.expand(grad.shape[0], *transposed.shape), grad)
        if self._by_moments is not None:
            matrix, offset = self._by_moments
            grad_attention.baddbmm_(matrix.expand(grad.shape[0], *matrix.shape), attention)
            grad_attention.add_(offset)
        num_groups = self._options.num_groups
        mean = by_group(attention * grad_attention, num_groups).sum(2, keepdim=True)
        by_group(grad_attention, num_groups).sub_(mean)
        return grad_attention.mul_(attention)

    def _first_pass(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return gradients of weight (V, S) and bias (V), and, without batch norm, the sums."""
        weight = self._memories.value
        grad_weight = self._sums.new_zeros(weight.shape)
        grad_bias = self._sums.new_zeros(weight.shape[0])
        slot_sums = self._sums.new_zeros((self._tokens.num_samples, weight.shape[1]))
        for part, _, mask, attention, _ in self._chunks():
            grad = self._grad(part)
            grad_weight += torch.bmm(grad, attention.transpose(1, 2)).sum(0, dtype=self._sums.dtype)
            if self._memories.bias is not None:
                valid = grad if mask is None else grad.masked_fill(~mask, 0.0)
                grad_bias += valid.sum((0, 2), dtype=self._sums.dtype)
            if self._batch_norm is None and self._statistics is not None:
                slot_sums += self._weighted(attention, grad).sum(-1)
        return grad_weight, grad_bias, slot_sums

    def _sum_pass(self) -> Tensor:
        """Return the sum over tokens of q (G, S)."""
        slot_sums = self._sums.new_zeros((self._tokens.num_samples, self._memories.key.shape[0]))
        if self._statistics is not None:
            for part, _, _, attention, _ in self._chunks():
                slot_sums += self._weighted(attention, self._grad(part)).sum(-1)
        return slot_sums

    def _last_pass(self, slot_sums: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return gradients of x, of the keys and of their bias."""
        key, x = self._memories.key, self._tokens.x
        grad_x = torch.empty_like(x) if self._x_wanted else None
        grad_key = self._sums.new_zeros(key.shape) if self._parameters_wanted[0] else None
        grad_key_bias = self._sums.new_zeros(key.shape[0])
        if grad_x is None and grad_key is None and self._memories.key_bias is None:
            return None, None, None
        sums = slot_sums.to(key.dtype).unsqueeze(-1)
        for part, chunk, _, attention, denominator in self._chunks():
            grad = self._grad(part)
            grad_logits = self._weighted(attention, grad)
            if denominator is not None:
                by_group(attention, self._options.num_groups).mul_(denominator)
                grad_logits.addcmul_(attention, sums, value=-1)
            if self._memories.key_bias is not None:
                grad_key_bias += grad_logits.sum((0, 2), dtype=self._sums.dtype)
            if grad_key is not None:
                by_sample = torch.bmm(grad_logits, chunk.transpose(1, 2))
                grad_key += by_sample.sum(0, dtype=self._sums.dtype)
            if grad_x is not None:
                result = product(key.transpose(0, 1), grad_logits, is_token_major(grad_x))
                if self._options.residual:
                    result += grad
                grad_x[..., part] = result.unflatten(0, x.shape[:2])
        return grad_x, grad_key, grad_key_bias


def chunked_external_attention(
    x: Float[Tensor, "batch tokens width"],
    memory_key: Float[Tensor, "slots channels"],
    memory_value: Float[Tensor, "slots value_channels"],
    *,
    options: ChunkOptions,
    num_heads: int = 1,
    memory_key_bias: Float[Tensor, " slots"] | None = None,
    memory_value_bias: Float[Tensor, " value_channels"] | None = None,
    mask: Bool[Tensor, "batch tokens"] | None = None,
) -> Float[Tensor, "batch tokens value_width"]:
    """Compute external attention of tokens in memory, with gradients, chunk by chunk.

    Arguments are those of :func:`eanet.ops.attention.multi_head_external_attention` and are taken
    as checked.
    """
    heads = x.reshape(*x.shape[:2], num_heads, memory_key.shape[1]).permute(0, 2, 3, 1)
    with without_autocast(x.device):
        out, _, _, _ = _Chunked.apply(
            options,
            heads,
            memory_key,
            memory_value.transpose(0, 1),
            memory_key_bias,
            memory_value_bias,
            None,
            mask,
        )
    return out.permute(0, 3, 1, 2).flatten(2)


def chunked_external_attention_block(
    x: Float[Tensor, "batch channels tokens"],
    key: Float[Tensor, "slots channels"],
    value: Float[Tensor, "out_channels slots"],
    *,
    chunk_tokens: int,
    num_groups: int = 1,
    key_bias: Float[Tensor, " slots"] | None = None,
    bias: Float[Tensor, " out_channels"] | None = None,
    batch_norm: BatchNormArguments | None = None,
    norm: Literal["double", "softmax"] = "double",
    eps: float = 1e-9,
    mask: Bool[Tensor, "batch tokens"] | None = None,
    residual: bool = True,
    relu: bool = True,
) -> tuple[Float[Tensor, "batch out_channels tokens"], BatchStatistics | None]:
    """Compute :func:`eanet.ops.attention.block.external_attention_block` chunk by chunk.

    Besides x, the result and, in the backward pass, the gradient of x, memory is needed for one
    chunk of attention alone. The attention is computed twice (three times with ``batch_norm``) in
    the forward pass and as often in the backward pass.

    Args:
        x: see there, like all arguments that are not listed.
        key: see there; with ``num_groups``, the keys of one group after the other.
        value: see there.
        chunk_tokens: tokens whose attention is in memory at a time.
        num_groups: groups of slots that are normalized on their own: the heads of
            multi-head attention, folded into key and value.
        key_bias: see there.
        bias: see there.
        batch_norm: see there.
        norm: see there.
        eps: see there.
        mask: see there.
        residual: see there.
        relu: see there.

    Raises:
        ValueError: as there; or ``chunk_tokens`` is below 1, or the groups do not divide the slots.
    """
    if batch_norm is not None and bias is not None:
        raise ValueError("bias and batch_norm exclude each other: batch norm removes a bias")
    if residual and value.shape[0] != x.shape[1]:
        raise ValueError(f"a residual needs {x.shape[1]} output channels, got {value.shape[0]}")
    if num_groups < 1 or key.shape[0] % num_groups:
        raise ValueError(f"num_groups {num_groups} does not divide {key.shape[0]} slots")
    options = ChunkOptions(
        chunk_tokens=chunk_tokens,
        norm=norm,
        eps=eps,
        num_groups=num_groups,
        batch_norm_eps=None if batch_norm is None else batch_norm.eps,
        residual=residual,
        relu=relu,
    )
    shift, scale = (bias, None) if batch_norm is None else (batch_norm.bias, batch_norm.weight)
    with without_autocast(x.device):
        out, mean, variance, count = _Chunked.apply(
            options, x.unsqueeze(1), key, value, key_bias, shift, scale, mask
        )
    return out.squeeze(1), None if batch_norm is None else BatchStatistics(mean, variance, count)
