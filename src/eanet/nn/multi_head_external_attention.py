"""External attention with several heads that share the memories."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from eanet.nn.dead_parameters import attach_zero_gradient
from eanet.nn.dropout import dropout
from eanet.nn.fused_attention import FusedMultiHeadExternalAttention, attend_heads
from eanet.nn.linear import Linear
from eanet.nn.memories import (
    MemoryInit,
    MemoryModule,
    autocast_input,
    cast,
    check_positive,
    check_tokens,
    full_precision,
)
from eanet.ops.attention import Norm, check_mask, custom_op
from eanet.ops.attention.attention_rows import normalize_tokens, token_logits
from eanet.ops.attention.linear import linear

__all__ = ["MultiHeadExternalAttention"]


class MultiHeadExternalAttention(MemoryModule):
    """External attention with several heads that share the memories, (batch, tokens, channels).

    Eq. 12-14, arXiv 2105.02358, with the widening of the authors' code::

        u = query(x), split into H heads of width d = expansion * channels / H
        y = projection(concat over heads of norm(u_h M_k^T + key bias) M_v + value bias)

    Deviation: the paper's equations have no widening and no memory biases; ``expansion=1`` and
    ``memory_bias=False`` give them.

    Args:
        channels: D, width of tokens and result.
        num_slots: S, number of memory rows.
        num_heads: H, the total number of heads (16 for EAMLP-7).
        expansion: c, how much wider than D all heads are together.
        memory_bias: biases on both memories. The key bias cancels under "double".
        norm: "double" (Eq. 10-11) or "softmax" over the slots.
        eps: of the double normalization; 0 is the exact form.
        attention_dropout: probability to drop an entry of A in training.
        projection_dropout: probability to drop an entry of the result in training.
        memory_init: "shared" starts M_v as a copy of M_k, "independent" draws both.
        tie_memory: one memory for both roles.

    Raises:
        ValueError: an argument is outside its range, or the heads do not divide the width.

    >>> layer = MultiHeadExternalAttention(32, 8, num_heads=4, expansion=2)
    >>> layer(torch.zeros(2, 10, 32)).shape, layer.attention_map(torch.zeros(2, 10, 32)).shape
    (torch.Size([2, 10, 32]), torch.Size([2, 4, 10, 8]))
    """

    def __init__(
        self,
        channels: int,
        num_slots: int = 64,
        *,
        num_heads: int,
        expansion: int = 4,
        memory_bias: bool = True,
        norm: Norm = "double",
        eps: float = 1e-9,
        attention_dropout: float = 0.0,
        projection_dropout: float = 0.0,
        memory_init: MemoryInit = "independent",
        tie_memory: bool = False,
    ) -> None:
        check_positive(channels=channels, num_heads=num_heads, expansion=expansion)
        if expansion * channels % num_heads:
            raise ValueError(
                f"num_heads {num_heads} does not divide {expansion * channels} "
                f"(expansion {expansion} times channels {channels})"
            )
        super().__init__(
            num_slots,
            expansion * channels // num_heads,
            norm=norm,
            eps=eps,
            memory_init=memory_init,
            tie_memory=tie_memory,
            key_bias=memory_bias,
            value_bias=memory_bias,
        )
        self.channels = channels
        self.num_heads = num_heads
        self.query = Linear(channels, expansion * channels)
        self.projection = Linear(expansion * channels, channels)
        self.attention_dropout = attention_dropout
        self.projection_dropout = projection_dropout
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters as EAMLP does: weights truncated normal, std 0.02, biases 0."""
        for layer in (self.query, self.projection):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        self.initialize_memories_(0.02)

    def attention_map(
        self,
        x: Float[Tensor, "batch tokens channels"],
        mask: Bool[Tensor, "batch tokens"] | None = None,
    ) -> Float[Tensor, "batch heads tokens slots"]:
        """Return A, at least in float32, without dropout (Figure 5)."""
        self._check(x, mask)
        x = autocast_input(x)
        with full_precision(x):
            return self._attention(x, mask).transpose(1, 2)

    def forward(
        self,
        x: Float[Tensor, "batch tokens channels"],
        mask: Bool[Tensor, "batch tokens"] | None = None,
    ) -> Float[Tensor, "batch tokens channels"]:
        """Attend from every token to the memories, head by head.

        Args:
            x: tokens.
            mask: True for tokens that take part; the others get 0.
        """
        self._check(x, mask)
        x = autocast_input(x)
        batch, tokens, _ = x.shape
        with full_precision(x):
            if self.chunk_tokens is not None:
                return self._forward_streamed(x, mask)
            if self.uses_kernels(x, self.num_slots):
                return self._forward_by_kernels(x, mask)
            thin = self._thin_is_cheaper(batch * tokens)
            out = self._forward_thin(x, mask) if thin else self._forward_by_head(x, mask)
            if self.training and self.projection_dropout > 0:
                out = dropout(out, self.projection_dropout)
            return out if mask is None else out.masked_fill(~mask.unsqueeze(-1), 0.0)

    def _thin_is_cheaper(self, num_tokens: int) -> bool:
        """Tell whether two thin matrices for all heads multiply less than the steps one by one.

        With T tokens in the batch and W = c D the width of all heads, the steps cost
        2 T W (D + S) multiply-adds and the thin matrices 2 T D H S, but they must be formed anew
        at every step of a training: 2 D W S. Backward is twice that for both.
        """
        width, slots = self.query.out_features, self.num_heads * self.num_slots
        saved = width * (self.channels + self.num_slots) - self.channels * slots
        if torch.compiler.is_compiling():  # where the number of tokens may be left open
            return saved > 0
        return num_tokens * saved > self.channels * width * self.num_slots

    def _forward_thin(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Return the result by one product of all tokens with each of two thin matrices."""
        key, value, key_bias, bias = self._thin_matrices()
        return attend_heads(
            x,
            key,
            value,
            num_heads=self.num_heads,
            key_bias=key_bias,
            bias=bias,
            norm=self.normalization,
            eps=self.eps,
            mask=mask,
            dropout=self.attention_dropout if self.training else 0.0,
        )

    def _forward_by_head(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Return the result step by step: queries, attention, values, projection."""
        attention = self._attention(x, mask)
        if self.training and self.attention_dropout > 0:
            attention = dropout(attention, self.attention_dropout)
        heads = linear(attention.to(x.dtype), self.values.to(x.dtype).transpose(0, 1))
        # both biases follow a linear map of all heads and are added as one
        weight, bias = self.projection.weight, self.projection.bias
        if self.memory_value_bias is not None:
            bias = bias + weight @ self.memory_value_bias.repeat(self.num_heads)
        return linear(heads.flatten(2), weight.to(x.dtype), bias.to(x.dtype))

    def _forward_by_kernels(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Return the result of the Triton kernels between the two projections."""
        key, key_bias, query_bias = self.memory_key, self.memory_key_bias, self.query.bias
        if self.normalization == "double":
            key = attach_zero_gradient(key, key_bias, query_bias)
            key_bias = query_bias = None
        queries = F.linear(x, self.query.weight.to(x.dtype), cast(query_bias, x.dtype))
        heads, _ = custom_op.fused_external_attention(
            queries,
            key,
            self.values,
            num_heads=self.num_heads,
            memory_key_bias=key_bias,
            memory_value_bias=self.memory_value_bias,
            norm=self.normalization,
            eps=self.eps,
            mask=mask,
            attention_dropout=self.attention_dropout if self.training else 0.0,
        )
        weight, bias = self.projection.weight.to(x.dtype), cast(self.projection.bias, x.dtype)
        out = F.linear(heads, weight, bias)
        if self.training and self.projection_dropout > 0:
            out = dropout(out, self.projection_dropout)
        return out if mask is None else out.masked_fill(~mask.unsqueeze(-1), 0.0)

    def _forward_streamed(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Return the result chunk by chunk, each head as two thin matrices."""
        self.refuse_dropout(
            attention_dropout=self.attention_dropout, projection_dropout=self.projection_dropout
        )
        key, value, key_bias, bias = self._thin_matrices()
        out, _ = self.attention_block(
            x.transpose(1, 2),
            key,
            value,
            num_groups=self.num_heads,
            key_bias=key_bias,
            bias=bias,
            norm=self.normalization,
            eps=self.eps,
            mask=mask,
            residual=False,
            relu=False,
        )
        return out.transpose(1, 2)

    def _attention(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Return A (batch, tokens, heads, slots), at least in float32."""
        key, key_bias, query_bias = self.memory_key, self.memory_key_bias, self.query.bias
        if self.normalization == "double":
            key = attach_zero_gradient(key, key_bias, query_bias)
            key_bias = query_bias = None
        queries = linear(x, self.query.weight.to(x.dtype), cast(query_bias, x.dtype))
        queries = queries.view(*x.shape[:2], self.num_heads, -1)
        logits = token_logits(queries, key, key_bias)
        return normalize_tokens(logits, norm=self.normalization, eps=self.eps, mask=mask)

    def _check(self, x: Tensor, mask: Tensor | None) -> None:
        """Refuse inputs and masks of another shape."""
        check_tokens(x, self.channels, type(self).__name__)
        check_mask(mask, tuple(x.shape[:2]))

    def _thin_matrices(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """Return keys (H S, D) and values (D, H S) with the projections inside, and their biases.

        The bias of the keys is ``None`` under "double", where it cancels.
        """
        heads, width = self.num_heads, self.memory_key.shape[1]
        query = self.query.weight.view(heads, width, -1)  # (H, d, D)
        memory_key, key_bias = self.memory_key, None
        if self.normalization == "double":
            memory_key = attach_zero_gradient(memory_key, self.memory_key_bias, self.query.bias)
        key = torch.matmul(memory_key, query).flatten(0, 1)  # (H S, D)
        projection = self.projection.weight.view(-1, heads, width)  # (D, H, d)
        value = torch.matmul(projection, self.values.transpose(0, 1)).flatten(1)  # (D, H S)
        bias = self.projection.bias
        if self.memory_value_bias is not None:
            bias = bias + self.projection.weight @ self.memory_value_bias.repeat(heads)
        if self.normalization == "softmax":
            key_bias = (self.query.bias.view(heads, width) @ self.memory_key.T).flatten()
            if self.memory_key_bias is not None:
                key_bias = key_bias + self.memory_key_bias.repeat(heads)
        return key, value, key_bias, bias

    @torch.no_grad()
    def fused(self) -> FusedMultiHeadExternalAttention:
        """Return an inference module in which each head is two thin matrices.

        It multiplies less than this module where S <= D d / (D - d), with d the width of a head.
        """
        key, value, key_bias, bias = self._thin_matrices()
        return FusedMultiHeadExternalAttention(
            key,
            value,
            num_heads=self.num_heads,
            key_bias=key_bias,
            bias=bias,
            norm=self.normalization,
            eps=self.eps,
        )
