"""Multi-head self-attention, the baseline that external attention is measured against."""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from eanet.nn.dropout import dropout
from eanet.nn.linear import Linear
from eanet.nn.memories import check_positive, check_tokens
from eanet.ops.attention import Norm, check_mask, check_norm, double_normalize, slot_softmax

__all__ = ["SelfAttention"]


class SelfAttention(nn.Module):
    """Attention among the tokens of a sample, (batch, tokens, channels); cost grows with N^2.

    Eq. 1-2, arXiv 2105.02358, with learned projections (``form="projected"``)::

        q, k, v = projections of x;  A = norm(scale * q k^T);  y = residual + projection(A v)

    or Eq. 3-4 without any parameter before the output projection (``form="simple"``)::

        A = norm(scale * x x^T);  y = residual + projection(A x)

    With ``norm="double"`` the softmax runs over the queries of each key and the sum over the keys
    of each query (row 3 of Table 1).

    Args:
        channels: width of the projections and of the result.
        in_channels: width of x, if it is not ``channels``.
        num_heads: number of heads; they share nothing.
        form: "projected" or "simple".
        qkv_bias: give the projections to q, k, v a bias.
        scale: factor of the logits; ``None`` for 1 / sqrt(width of a head), 1 for Eq. 1 as printed.
        projection: project the result with a linear layer.
        projection_bias: with a bias.
        residual: "none", or "value" to add v to the result, which may have another width than x.
        norm: "softmax" or "double".
        eps: of the double normalization.
        attention_dropout: probability to drop an entry of A in training.
        projection_dropout: probability to drop an entry of the result in training, before the
            residual.

    Raises:
        ValueError: an argument is outside its range, or sizes do not fit together.

    >>> SelfAttention(32, num_heads=4)(torch.zeros(2, 10, 32)).shape
    torch.Size([2, 10, 32])
    """

    def __init__(
        self,
        channels: int,
        *,
        in_channels: int | None = None,
        num_heads: int = 1,
        form: Literal["projected", "simple"] = "projected",
        qkv_bias: bool = False,
        scale: float | None = None,
        projection: bool = True,
        projection_bias: bool = True,
        residual: Literal["none", "value"] = "none",
        norm: Norm = "softmax",
        eps: float = 1e-9,
        attention_dropout: float = 0.0,
        projection_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        in_channels = channels if in_channels is None else in_channels
        check_positive(channels=channels, in_channels=in_channels, num_heads=num_heads)
        check_norm(norm, eps)
        if form not in ("projected", "simple"):
            raise ValueError(f"form must be 'projected' or 'simple', got {form!r}")
        if residual not in ("none", "value"):
            raise ValueError(f"residual must be 'none' or 'value', got {residual!r}")
        if channels % num_heads:
            raise ValueError(f"num_heads {num_heads} does not divide channels {channels}")
        if form == "simple" and in_channels != channels:
            raise ValueError(f"form='simple' needs in_channels equal to {channels}")
        self.channels = channels
        self.in_channels = in_channels
        self.num_heads = num_heads
        self.scale = (channels // num_heads) ** -0.5 if scale is None else scale
        self.residual = residual
        self.normalization: Norm = norm
        self.eps = eps
        self.attention_dropout = attention_dropout
        self.projection_dropout = projection_dropout
        self.qkv = Linear(in_channels, 3 * channels, bias=qkv_bias) if form == "projected" else None
        self.projection = Linear(channels, channels, bias=projection_bias) if projection else None

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values, each (batch, heads, tokens, channels per head)."""
        if self.qkv is None:
            heads = x.view(*x.shape[:2], self.num_heads, -1).transpose(1, 2)
            return heads, heads, heads
        return self._split_heads(self.qkv(x))

    def _split_heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values of their common projection."""
        heads = qkv.view(*qkv.shape[:2], 3, self.num_heads, -1)
        queries, keys, values = heads.permute(2, 0, 3, 1, 4).unbind(0)
        return queries, keys, values

    def _attention(self, queries: Tensor, keys: Tensor, mask: Tensor | None) -> Tensor:
        """Return A (batch, heads, queries, keys)."""
        # scaled before the product, which float16 might overflow
        logits = torch.matmul(queries * self.scale, keys.transpose(-1, -2))
        if self.normalization == "double":
            return double_normalize(logits, eps=self.eps, mask=mask, slot_mask=mask)
        return slot_softmax(logits, mask=mask, slot_mask=mask)

    def forward(
        self,
        x: Float[Tensor, "batch tokens in_channels"],
        mask: Bool[Tensor, "batch tokens"] | None = None,
    ) -> Float[Tensor, "batch tokens channels"]:
        """Attend from every token to every token.

        Args:
            x: tokens.
            mask: True for tokens that take part; from the others the branch is 0.
        """
        check_tokens(x, self.in_channels, type(self).__name__)
        check_mask(mask, tuple(x.shape[:2]))
        return self._attend(*self._project(x), mask)

    def attend(
        self,
        qkv: Float[Tensor, "batch tokens three_channels"],
        mask: Bool[Tensor, "batch tokens"] | None = None,
    ) -> Float[Tensor, "batch tokens channels"]:
        """Go on from ``qkv(x)``, for callers that compute it themselves.

        Args:
            qkv: queries, keys and values side by side, (batch, tokens, 3 * channels).
            mask: as in :meth:`forward`.
        """
        check_tokens(qkv, 3 * self.channels, type(self).__name__)
        check_mask(mask, tuple(qkv.shape[:2]))
        return self._attend(*self._split_heads(qkv), mask)

    def _attend(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """Return the result for queries, keys and values of each head."""
        share = self.attention_dropout if self.training else 0.0
        if self.normalization == "softmax" and mask is None:
            heads = F.scaled_dot_product_attention(
                queries, keys, values, dropout_p=share, scale=self.scale
            )
        else:
            attention = self._attention(queries, keys, mask)
            heads = torch.matmul(dropout(attention, share).to(values.dtype), values)
        out = heads.transpose(1, 2).flatten(2)
        if self.projection is not None:
            out = self.projection(out)
        out = dropout(out, self.projection_dropout, self.training)
        if mask is not None:
            out = out.masked_fill(~mask.unsqueeze(-1), 0.0)
        return out if self.residual == "none" else out + values.transpose(1, 2).flatten(2)

    def attention_map(
        self,
        x: Float[Tensor, "batch tokens in_channels"],
        mask: Bool[Tensor, "batch tokens"] | None = None,
    ) -> Float[Tensor, "batch heads tokens keys"]:
        """Return A (batch, heads, queries, keys) without dropout."""
        check_tokens(x, self.in_channels, type(self).__name__)
        check_mask(mask, tuple(x.shape[:2]))
        queries, keys, _ = self._project(x)
        return self._attention(queries, keys, mask)
