"""Self-attention among all positions of a feature map (SA)."""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from eanet.nn.compared.feature_maps import check_feature_map
from eanet.nn.memories import check_positive

__all__ = ["SelfAttention2d"]


class SelfAttention2d(nn.Module):
    """Let every position attend to every other (Vaswani et al. 2017; Eq. 1-2, arXiv 2105.02358).

    With X of C channels and N positions::

        Q, K, V = W_q X, W_k X, W_v X;  A = softmax over keys of scale * Q^T K;  y = W_o (V A^T)

    Parameters 4 C^2; multiply-adds 4 C^2 N + 2 C N^2. There is no residual in this form.

    With ``norm="double"`` (row 3 of Table 1) the softmax over keys gives way to the normalization
    of Eq. 10-11: a softmax over the queries for each key, then division by the sum over the keys.

    Args:
        channels: C, width of the input and of the result.
        scale: factor on the logits. 1 is Eq. 1; Vaswani et al. use ``channels ** -0.5``, which
            keeps the softmax soft for wide maps.
        implementation: "explicit" builds the N x N map A as the compared module does, "fused"
            gives the same result through ``scaled_dot_product_attention``, whose fast kernels
            never hold A; for ``norm="softmax"`` only.
        norm: "softmax" over keys, or "double".
        eps: added to the sum that "double" divides by.

    Raises:
        ValueError: ``channels`` is below 1, or an option is unknown or does not fit another.

    >>> import torch
    >>> SelfAttention2d(16)(torch.zeros(2, 16, 5, 4)).shape
    torch.Size([2, 16, 5, 4])
    """

    def __init__(
        self,
        channels: int,
        *,
        scale: float = 1.0,
        implementation: Literal["explicit", "fused"] = "explicit",
        norm: Literal["softmax", "double"] = "softmax",
        eps: float = 1e-9,
    ) -> None:
        super().__init__()
        check_positive(channels=channels)
        if implementation not in ("explicit", "fused"):
            raise ValueError(
                f"implementation must be 'explicit' or 'fused', got {implementation!r}"
            )
        if norm not in ("softmax", "double"):
            raise ValueError(f"norm must be 'softmax' or 'double', got {norm!r}")
        if norm == "double" and implementation == "fused":
            raise ValueError("norm='double' needs implementation='explicit'")
        if not eps > 0:
            raise ValueError(f"eps must be above 0, got {eps}")
        self.channels = self.out_channels = channels
        self.norm = norm
        self.eps = eps
        self.scale = scale
        self.implementation = implementation
        self.query = nn.Conv2d(channels, channels, 1, bias=False)
        self.key = nn.Conv2d(channels, channels, 1, bias=False)
        self.value = nn.Conv2d(channels, channels, 1, bias=False)
        self.projection = nn.Conv2d(channels, channels, 1, bias=False)

    def forward(
        self,
        x: Float[Tensor, "batch channels height width"],
        mask: Bool[Tensor, "batch height width"] | None = None,
    ) -> Float[Tensor, "batch channels height width"]:
        """Attend from every position to all positions.

        Args:
            x: a feature map.
            mask: true for positions that take part; others are neither keys nor, under "double",
                queries, and get 0.
        """
        check_feature_map(x, self.channels, type(self).__name__)
        query = self.query(x).flatten(2)
        key = self.key(x).flatten(2)
        value = self.value(x).flatten(2)
        valid = None if mask is None else mask.flatten(1)
        if self.implementation == "fused":
            attended = F.scaled_dot_product_attention(
                query.transpose(1, 2).unsqueeze(1),
                key.transpose(1, 2).unsqueeze(1),
                value.transpose(1, 2).unsqueeze(1),
                attn_mask=None if valid is None else valid[:, None, None],
                scale=self.scale,
            )
            attended = attended.squeeze(1).transpose(1, 2)
        else:
            # scaling the queries is C N products, scaling the logits would be N^2
            logits = (query * self.scale).transpose(1, 2) @ key
            attended = value @ self._normalize(logits, valid).to(value.dtype).transpose(1, 2)
        out = self.projection(attended.unflatten(2, x.shape[2:]))
        return out if mask is None else out.masked_fill(~mask.unsqueeze(1), 0.0)

    def _normalize(self, logits: Tensor, valid: Tensor | None) -> Tensor:
        """Return A (batch, queries, keys) of its logits."""
        if self.norm == "softmax":
            if valid is not None:
                logits = logits.masked_fill(~valid[:, None], -torch.inf)
            return logits.softmax(dim=-1)
        logits = logits.float() if logits.dtype != torch.float64 else logits
        if valid is not None:
            # finite, so that a column without any query stays free of NaN
            lowest = torch.finfo(logits.dtype).min
            logits = logits.masked_fill(~valid[:, :, None], lowest)
        # the division within the exponent: no sum of small exponentials underflows
        logs = logits - logits.logsumexp(dim=-2, keepdim=True)
        if valid is not None:
            logs = logs.masked_fill(~valid[:, None], -torch.inf)
        rest = logs.new_full((), self.eps).log().expand(*logs.shape[:-1], 1)
        total = torch.cat([logs, rest], dim=-1).logsumexp(dim=-1, keepdim=True)
        return (logs - total).exp()
