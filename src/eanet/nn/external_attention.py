"""External attention as layers: for tokens, and by import for feature maps and several heads.

Mathematics, numerics and speed: ``ops/attention/README.md`` and ``docs/explanation/numerics.md``.
"""

import math
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from eanet.nn.dead_parameters import attach_zero_gradient
from eanet.nn.dropout import dropout
from eanet.nn.external_attention_2d import ExternalAttention2d
from eanet.nn.fused_attention import FusedExternalAttention
from eanet.nn.linear import Linear
from eanet.nn.memories import (
    MemoryInit,
    MemoryModule,
    autocast_input,
    bias_of,
    cast,
    check_positive,
    check_tokens,
    full_precision,
    project_values,
)
from eanet.nn.multi_head_external_attention import MultiHeadExternalAttention
from eanet.ops.attention import Norm, check_mask
from eanet.ops.attention.attention_rows import attention_rows
from eanet.ops.attention.linear import linear

__all__ = ["ExternalAttention", "ExternalAttention2d", "MultiHeadExternalAttention"]

Residual = Literal["none", "input", "query"]


class ExternalAttention(MemoryModule):
    """External attention for tokens, (batch, tokens, channels).

    Eq. 7-11 and Algorithm 1, arXiv 2105.02358::

        q = query(x);  A = norm(q M_k^T);  y = residual + projection(A M_v + value bias)

    Products of weights are formed first wherever that is cheaper: ``K = M_k W_query`` and
    ``V = W_projection M_v^T``, with the same result and the same gradients.

    Args:
        channels: d, width of memory rows and of the result.
        num_slots: S, number of memory rows; 64 in most of the paper.
        in_channels: width of x, if it is not ``channels``.
        query: project x to queries first (Algorithm 1; Eq. 7 has none).
        query_bias: with a bias; under "double" it cancels and gets a gradient of zeros, except
            with ``residual="query"``.
        projection: project the result with a linear layer.
        projection_bias: with a bias.
        value_bias: add a bias before the projection.
        residual: what is added to the result: nothing, x, or the query.
        norm: "double" (Eq. 10-11) or "softmax" over the slots (row 6 of Table 1).
        eps: of the double normalization; 0 is the exact form.
        attention_dropout: probability to drop an entry of A in training.
        projection_dropout: probability to drop an entry of the result in training, before the
            residual.
        memory_init: "shared" starts M_v as a copy of M_k, "independent" draws both.
        tie_memory: one memory for both roles (Eq. 5-6).

    Raises:
        ValueError: an argument is outside its range, or a residual has another width.

    >>> layer = ExternalAttention(32, 8)
    >>> layer(torch.zeros(2, 10, 32)).shape, layer.attention_map(torch.zeros(2, 10, 32)).shape
    (torch.Size([2, 10, 32]), torch.Size([2, 10, 8]))
    """

    def __init__(
        self,
        channels: int,
        num_slots: int = 64,
        *,
        in_channels: int | None = None,
        query: bool = True,
        query_bias: bool = True,
        projection: bool = True,
        projection_bias: bool = True,
        value_bias: bool = False,
        residual: Residual = "none",
        norm: Norm = "double",
        eps: float = 1e-9,
        attention_dropout: float = 0.0,
        projection_dropout: float = 0.0,
        memory_init: MemoryInit = "shared",
        tie_memory: bool = False,
    ) -> None:
        super().__init__(
            num_slots,
            channels,
            norm=norm,
            eps=eps,
            memory_init=memory_init,
            tie_memory=tie_memory,
            key_bias=False,
            value_bias=value_bias,
        )
        in_channels = channels if in_channels is None else in_channels
        check_positive(in_channels=in_channels)
        if residual not in ("none", "input", "query"):
            raise ValueError(f"residual must be 'none', 'input' or 'query', got {residual!r}")
        if in_channels != channels and (not query or residual == "input"):
            needed = "query=False" if not query else "residual='input'"
            raise ValueError(f"{needed} needs in_channels equal to {channels}, got {in_channels}")
        self.channels = channels
        self.in_channels = in_channels
        self.residual: Residual = "input" if residual == "query" and not query else residual
        self.query = Linear(in_channels, channels, bias=query_bias) if query else None
        self.projection = Linear(channels, channels, bias=projection_bias) if projection else None
        self.attention_dropout = attention_dropout
        self.projection_dropout = projection_dropout
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters: linear layers as PyTorch does, memories with std sqrt(2 / d)."""
        for layer in (self.query, self.projection):
            if layer is not None:
                layer.reset_parameters()
        self.initialize_memories_(math.sqrt(2 / self.channels))

    def _key_side(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return what is compared with keys, the keys, and their bias."""
        if self.query is None:
            return x, self.memory_key, None
        weight = self.query.weight
        bias = bias_of(self.query)
        folding_pays = self.num_slots * (self.in_channels - self.channels) <= (
            self.in_channels * self.channels
        )
        if self.residual == "query":
            return linear(x, weight.to(x.dtype), cast(bias, x.dtype)), self.memory_key, None
        key, key_bias = self.memory_key, None
        if self.normalization == "double":
            key = attach_zero_gradient(key, bias)
        elif bias is not None:
            key_bias = key @ bias
        if folding_pays:
            return x, key @ weight, key_bias
        return linear(x, weight.to(x.dtype)), key, key_bias

    def _value_side(self) -> tuple[Tensor, Tensor | None]:
        """Return V (channels, slots) and the bias of the result."""
        return project_values(self.values, self.memory_value_bias, self.projection)

    def forward(
        self,
        x: Float[Tensor, "batch tokens in_channels"],
        mask: Bool[Tensor, "batch tokens"] | None = None,
        *,
        out: Float[Tensor, "batch tokens channels"] | None = None,
    ) -> Float[Tensor, "batch tokens channels"]:
        """Attend from every token to the memories.

        Args:
            x: tokens.
            mask: True for tokens that take part; to others the branch adds 0.
            out: a buffer for the result where no gradients are recorded; it may be x itself.
        """
        check_tokens(x, self.in_channels, type(self).__name__)
        check_mask(mask, tuple(x.shape[:2]))
        x = autocast_input(x)
        with full_precision(x):
            return self._attend(*self._key_side(x), mask, out)

    def attend(
        self,
        queries: Float[Tensor, "batch tokens channels"],
        mask: Bool[Tensor, "batch tokens"] | None = None,
    ) -> Float[Tensor, "batch tokens channels"]:
        """Go on from ``query(x)``, for callers that compute it themselves.

        Args:
            queries: what the query layer returns; also what ``residual="query"`` adds.
            mask: as in :meth:`forward`.

        Raises:
            ValueError: another residual than the query, or queries or a mask of another shape.
        """
        if self.residual != "query":
            raise ValueError(f"attend() needs residual='query', this module has {self.residual!r}")
        check_tokens(queries, self.channels, type(self).__name__)
        check_mask(mask, tuple(queries.shape[:2]))
        queries = autocast_input(queries)
        with full_precision(queries):
            return self._attend(queries, self.memory_key, None, mask)

    def _attend(
        self,
        base: Tensor,
        key: Tensor,
        key_bias: Tensor | None,
        mask: Tensor | None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Return the result for what is compared with the keys."""
        self.refuse_dropout(
            attention_dropout=self.attention_dropout, projection_dropout=self.projection_dropout
        )
        value, bias = self._value_side()
        if self.training and (self.attention_dropout > 0 or self.projection_dropout > 0):
            if out is not None:
                raise ValueError("out is not for training with dropout")
            return self._forward_with_dropout(base, key, key_bias, value, bias, mask)
        result, _ = self.attention_block(
            base.transpose(1, 2),
            key,
            value,
            key_bias=key_bias,
            bias=bias,
            norm=self.normalization,
            eps=self.eps,
            mask=mask,
            residual=self.residual != "none",
            relu=False,
            out=None if out is None else out.transpose(1, 2),
        )
        return result.transpose(1, 2) if out is None else out

    def _forward_with_dropout(
        self,
        base: Tensor,
        key: Tensor,
        key_bias: Tensor | None,
        value: Tensor,
        bias: Tensor | None,
        mask: Tensor | None,
    ) -> Tensor:
        """Return the result with entries of the attention and of the branch dropped."""
        attention = attention_rows(
            base.transpose(1, 2),
            key,
            key_bias=key_bias,
            norm=self.normalization,
            eps=self.eps,
            mask=mask,
        )
        attention = dropout(attention, self.attention_dropout).to(base.dtype)
        branch = linear(attention.transpose(1, 2), value.to(base.dtype), cast(bias, base.dtype))
        branch = dropout(branch, self.projection_dropout)
        if mask is not None:
            branch = branch.masked_fill(~mask.unsqueeze(-1), 0.0)
        return branch if self.residual == "none" else base + branch

    def attention_map(
        self,
        x: Float[Tensor, "batch tokens in_channels"],
        mask: Bool[Tensor, "batch tokens"] | None = None,
    ) -> Float[Tensor, "batch tokens slots"]:
        """Return A, at least in float32, without dropout."""
        check_tokens(x, self.in_channels, type(self).__name__)
        x = autocast_input(x)
        with full_precision(x):
            base, key, key_bias = self._key_side(x)
            rows = attention_rows(
                base.transpose(1, 2),
                key,
                key_bias=key_bias,
                norm=self.normalization,
                eps=self.eps,
                mask=mask,
            )
        return rows.transpose(1, 2)

    @torch.no_grad()
    def fused(self) -> FusedExternalAttention:
        """Return an inference module that holds the products of the weights."""
        empty = self.memory_key.new_zeros(1, 1, self.in_channels)
        _, key, key_bias = self._key_side(empty)
        value, bias = self._value_side()
        keeps_query = key.shape[1] != self.in_channels or self.residual == "query"
        return FusedExternalAttention(
            key,
            value,
            key_bias=key_bias,
            bias=bias,
            query=self.query if keeps_query else None,
            norm=self.normalization,
            eps=self.eps,
            residual=self.residual != "none",
        )
