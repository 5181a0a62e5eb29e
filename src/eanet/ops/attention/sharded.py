"""External attention of tokens that are spread over processes.

Each process holds some of the tokens of every sample, all of them hold the memories. The tokens of
different processes meet only in the softmax statistics of the slots, so that is all that travels:
two numbers for each slot, head and sample forward, one backward, however many tokens there are.
"""

from typing import Literal

import torch.distributed as dist
from jaxtyping import Bool, Float
from torch import Tensor

from eanet.ops.attention import Norm, check_mask, check_norm
from eanet.ops.attention.chunked import chunked_external_attention
from eanet.ops.attention.chunks import ChunkOptions, Exchange
from eanet.ops.attention.streaming import DEFAULT_CHUNK_TOKENS, check_memories, check_tokens

__all__ = ["external_attention_sharded"]


class _GroupExchange(Exchange):
    """Reductions over a process group."""

    def __init__(self, group: dist.ProcessGroup | None, *, sums_memory_gradients: bool) -> None:
        self._group = group
        self.sums_memory_gradients = sums_memory_gradients

    def maximum_(self, tensor: Tensor) -> None:
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self._group)

    def sum_(self, tensor: Tensor) -> None:
        dist.all_reduce(tensor, dist.ReduceOp.SUM, group=self._group)


def external_attention_sharded(
    x: Float[Tensor, "batch tokens width"],
    memory_key: Float[Tensor, "slots channels"],
    memory_value: Float[Tensor, "slots value_channels"] | None = None,
    *,
    group: dist.ProcessGroup | None = None,
    memory_gradients: Literal["sum", "local"] = "sum",
    num_heads: int = 1,
    memory_key_bias: Float[Tensor, " slots"] | None = None,
    memory_value_bias: Float[Tensor, " value_channels"] | None = None,
    norm: Norm = "double",
    eps: float = 1e-9,
    mask: Bool[Tensor, "batch tokens"] | None = None,
    chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
) -> Float[Tensor, "batch tokens value_width"]:
    """Attend from this process's share of the tokens, with statistics of all tokens of the group.

    The shares together give what :func:`eanet.ops.attention.multi_head_external_attention` gives
    for all tokens in one process. Shares may differ in length and may be empty; batch size,
    memories and options must be the same everywhere.

    Gradients are those of the sum of all processes' losses. Every process of the group has to run
    the backward pass of its result, also one whose share is empty (add ``result.sum()`` to its
    loss), and the same tensors have to require gradients everywhere: otherwise the others wait.

    Args:
        x: this process's tokens, (batch, tokens, num_heads * channels).
        memory_key: M_k.
        memory_value: M_v; ``None`` uses M_k.
        group: the processes among which the tokens are spread; the default group for ``None``.
        memory_gradients: "sum" adds the gradients of memories and biases over the group, so that
            every process gets that of all tokens. "local" leaves each with the part of its own
            tokens: for DistributedDataParallel, which averages them itself (multiply the loss by
            the number of processes to get the sum).
        num_heads: number of heads H that share the memories.
        memory_key_bias: added to the logits of each slot.
        memory_value_bias: added to the result of each token.
        norm: "double" or "softmax" over the slots, which exchanges nothing forward.
        eps: of the double normalization; 0 is the exact form.
        mask: True for this process's tokens that take part; the others get 0.
        chunk_tokens: tokens whose logits are in memory at a time.

    Returns:
        The result for this process's tokens, (batch, tokens, num_heads * value channels).

    Raises:
        ValueError: shapes, types or options do not fit, or torch.distributed is not set up.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError(
            "external_attention_sharded needs torch.distributed: start the processes with "
            "torchrun and call torch.distributed.init_process_group first"
        )
    if memory_gradients not in ("sum", "local"):
        raise ValueError(f"memory_gradients must be 'sum' or 'local', got {memory_gradients!r}")
    check_memories(memory_key, memory_value, num_heads)
    check_tokens(x, memory_key, num_heads)
    check_norm(norm, eps)
    check_mask(mask, tuple(x.shape[:2]))
    exchange = _GroupExchange(group, sums_memory_gradients=memory_gradients == "sum")
    return chunked_external_attention(
        x,
        memory_key,
        memory_key if memory_value is None else memory_value,
        options=ChunkOptions(chunk_tokens=chunk_tokens, norm=norm, eps=eps, exchange=exchange),
        num_heads=num_heads,
        memory_key_bias=memory_key_bias,
        memory_value_bias=memory_value_bias,
        mask=mask,
    )
