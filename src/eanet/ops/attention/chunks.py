"""What external attention does with one chunk of tokens, and the numbers that link the chunks.

Letters in shape comments: G samples times heads, S slots (of all groups), C and V channels in and
out, N tokens, n tokens of a chunk.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from eanet.ops.attention.thin_products import is_token_major, map_from_rows, rows_from_map

__all__ = [
    "ChunkOptions",
    "Exchange",
    "Memories",
    "SlotStatistics",
    "Tokens",
    "accumulation_dtype",
    "by_group",
    "chunk_of",
    "empty_result",
    "normalize",
    "product",
    "without_autocast",
    "working_dtype",
]


class Exchange(ABC):
    """Combines small tensors of all processes that hold a part of the tokens, in place."""

    #: whether gradients of memories and biases are summed over the processes too
    sums_memory_gradients: bool

    @abstractmethod
    def maximum_(self, tensor: Tensor) -> None:
        """Replace each entry by the largest of all processes."""

    @abstractmethod
    def sum_(self, tensor: Tensor) -> None:
        """Replace each entry by the sum over all processes."""


@dataclass(frozen=True, kw_only=True)
class ChunkOptions:
    """What is computed, apart from the tensors.

    Args:
        chunk_tokens: tokens in memory at a time.
        norm: "double" or "softmax".
        eps: of the double normalization.
        num_groups: groups of slots that are normalized on their own, as heads are whose query
            projection is folded into the keys.
        batch_norm_eps: normalize the branch with the statistics of this batch, with this eps.
        residual: add x.
        relu: rectify the result.
        exchange: how statistics are combined where tokens are spread over processes.
    """

    chunk_tokens: int
    norm: Literal["double", "softmax"] = "double"
    eps: float = 1e-9
    num_groups: int = 1
    batch_norm_eps: float | None = None
    residual: bool = False
    relu: bool = False
    exchange: Exchange | None = None

    def __post_init__(self) -> None:
        if self.chunk_tokens < 1:
            raise ValueError(f"chunk_tokens must be at least 1, got {self.chunk_tokens}")


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the type to compute a chunk in: at least float32."""
    return dtype if dtype == torch.float64 else torch.float32


def accumulation_dtype(device: torch.device) -> torch.dtype:
    """Return the type of sums over chunks: float64 wherever the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which products keep the type of their operands."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


@dataclass(frozen=True)
class Memories:
    """Keys (S, C) and values (V, S) with their biases, in the type to compute in."""

    key: Tensor
    value: Tensor
    key_bias: Tensor | None
    bias: Tensor | None

    @classmethod
    def cast(
        cls,
        key: Tensor,
        value: Tensor,
        key_bias: Tensor | None,
        bias: Tensor | None,
        dtype: torch.dtype,
    ) -> "Memories":
        """Return the memories in another type."""
        return cls(
            key.to(dtype),
            value.to(dtype),
            None if key_bias is None else key_bias.to(dtype),
            None if bias is None else bias.to(dtype),
        )

    def logits(self, x: Float[Tensor, "groups channels n"]) -> Float[Tensor, "groups slots n"]:
        """Compare tokens with keys (Eq. 9); the result is a fresh tensor."""
        logits = rows_from_map(self.key, x)
        return logits if self.key_bias is None else logits.add_(self.key_bias.unsqueeze(-1))

    def mix(
        self,
        attention: Float[Tensor, "groups slots n"],
        mask: Bool[Tensor, "groups 1 n"] | None,
        token_major: bool,
    ) -> Float[Tensor, "groups value_channels n"]:
        """Mix the values by attention (Eq. 8) and add the bias to tokens that take part."""
        out = product(self.value, attention, token_major)
        if self.bias is not None:
            bias = self.bias.unsqueeze(-1)
            out += bias if mask is None else bias * mask
        return out


class SlotStatistics:
    """The softmax over tokens of each slot so far: largest logit and sum of exponentials.

    Attributes:
        maximum: (G, S), the lowest finite number while no token took part.
        total: (G, S), sum over tokens of exp(logit - maximum), in float64: so the result does not
            depend on how many chunks there are.
    """

    def __init__(self, num_samples: int, num_slots: int, like: Tensor) -> None:
        self.maximum = like.new_full((num_samples, num_slots), torch.finfo(like.dtype).min)
        self.total = like.new_zeros((num_samples, num_slots), dtype=accumulation_dtype(like.device))

    def add(self, logits: Tensor, mask: Tensor | None) -> None:
        """Take in a chunk of logits (G, S, n), which are overwritten; mask is (G, 1, n)."""
        if logits.shape[-1] == 0:
            return
        if mask is not None:
            logits.masked_fill_(~mask, torch.finfo(logits.dtype).min)
        maximum = torch.maximum(self.maximum, logits.amax(-1))
        exponentials = logits.sub_(maximum.unsqueeze(-1)).exp_()
        if mask is not None:
            exponentials.masked_fill_(~mask, 0.0)
        self._rescale(maximum)
        self.total.add_(exponentials.sum(-1))

    def _rescale(self, maximum: Tensor) -> None:
        """Refer the totals to a larger maximum."""
        dtype = self.total.dtype
        self.total.mul_((self.maximum.to(dtype) - maximum.to(dtype)).exp_())
        self.maximum = maximum

    def combine(self, exchange: Exchange) -> None:
        """Combine the statistics of all processes: two numbers for each slot and sample."""
        maximum = self.maximum.clone()
        exchange.maximum_(maximum)
        self._rescale(maximum)
        exchange.sum_(self.total)


def normalize(
    logits: Float[Tensor, "groups slots n"],
    statistics: SlotStatistics | None,
    options: ChunkOptions,
    mask: Bool[Tensor, "groups 1 n"] | None,
) -> tuple[Float[Tensor, "groups slots n"], Float[Tensor, "groups num_groups 1 n"] | None]:
    """Turn a chunk of logits into attention, in place; also return the denominator of Eq. 11.

    Without statistics the norm is the softmax over slots, which has no such denominator.
    """
    groups = by_group(logits, options.num_groups)
    denominator = None
    if statistics is None:
        logits = torch.softmax(groups, dim=2).flatten(1, 2)
    elif options.eps >= torch.finfo(logits.dtype).tiny / torch.finfo(logits.dtype).eps:
        _center(logits, statistics, mask).exp_()
        if mask is not None:
            logits.masked_fill_(~mask, 0.0)
        logits.div_(_divisor(statistics, logits.dtype))
        denominator = groups.sum(2, keepdim=True).add_(options.eps)
        groups.div_(denominator)
    else:
        # probabilities too small for the type would not vanish beside eps: use their logarithms,
        # as a softmax over the slots with one more entry, log(eps), that is dropped
        _center(logits, statistics, mask).sub_(_divisor(statistics, logits.dtype, logarithm=True))
        largest = groups.amax(2, keepdim=True)
        if options.eps > 0:
            largest.clamp_(min=math.log(options.eps))
        groups.sub_(largest).exp_()
        denominator = groups.sum(2, keepdim=True)
        if options.eps > 0:
            denominator.add_(torch.exp(math.log(options.eps) - largest))
        groups.div_(denominator)
        denominator.mul_(largest.exp_())
    if mask is not None:
        logits.masked_fill_(~mask, 0.0)
    return logits, denominator


def _center(logits: Tensor, statistics: SlotStatistics, mask: Tensor | None) -> Tensor:
    """Subtract the largest logit of each slot in place; masked tokens get 0, a harmless number."""
    logits.sub_(statistics.maximum.unsqueeze(-1))
    return logits if mask is None else logits.masked_fill_(~mask, 0.0)


def _divisor(statistics: SlotStatistics, dtype: torch.dtype, *, logarithm: bool = False) -> Tensor:
    """Return the total of each slot (G, S, 1) or its logarithm."""
    # the largest exponential is 1, so the clamp changes only samples where no token takes part
    total = statistics.total.clamp(min=1.0)
    return (total.log_() if logarithm else total).to(dtype).unsqueeze(-1)


def by_group(rows: Tensor, num_groups: int) -> Tensor:
    """View rows (G, S, n) as (G, num_groups, S / num_groups, n)."""
    num_samples, num_slots, tokens = rows.shape
    return rows.view(num_samples, num_groups, num_slots // num_groups, tokens)


def product(weight: Tensor, rows: Tensor, token_major: bool) -> Tensor:
    """Return ``weight @ rows`` (G, V, n), laid out as the tensor it will be copied to."""
    if token_major == is_token_major(rows):
        return map_from_rows(weight.contiguous(), rows, like=rows, base=None)
    weight = weight.expand(rows.shape[0], *weight.shape)
    if token_major:
        return torch.bmm(rows.transpose(1, 2), weight.transpose(1, 2)).transpose(1, 2)
    return torch.bmm(weight, rows)


class Tokens:
    """A tensor (B, heads, C, N) and its mask (B, N), read chunk by chunk."""

    def __init__(self, x: Tensor, mask: Tensor | None, chunk_tokens: int) -> None:
        self.x = x
        self.mask = mask
        self.num_samples = x.shape[0] * x.shape[1]
        self.dtype = working_dtype(x.dtype)
        self._chunk_tokens = chunk_tokens

    def slices(self) -> Iterator[slice]:
        """Yield the chunks as slices of the tokens."""
        num_tokens = self.x.shape[-1]
        for start in range(0, num_tokens, self._chunk_tokens):
            yield slice(start, min(start + self._chunk_tokens, num_tokens))

    def chunk(self, part: slice) -> tuple[Tensor, Tensor | None]:
        """Return tokens (G, C, n), at least in float32, and their mask (G, 1, n)."""
        mask = None
        if self.mask is not None:
            mask = self.mask[:, part].repeat_interleave(self.x.shape[1], 0).unsqueeze(1)
        return chunk_of(self.x, part, self.dtype), mask


def chunk_of(tensor: Tensor, part: slice, dtype: torch.dtype) -> Tensor:
    """Return some tokens of (B, heads, C, N) as (G, C, n)."""
    return tensor[..., part].flatten(0, 1).to(dtype)


def empty_result(x: Tensor, channels: int) -> Tensor:
    """Return an empty (B, heads, channels, N) that lies as x does."""
    batch, heads, _, tokens = x.shape
    if is_token_major(x):
        return x.new_empty((batch, tokens, heads, channels)).permute(0, 2, 3, 1)
    return x.new_empty((batch, heads, channels, tokens))
