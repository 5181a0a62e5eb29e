"""Self-attention among all positions of a feature map (SA)."""

from typing import Literal

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from eanet.nn.compared.feature_maps import check_feature_map
from eanet.nn.memories import check_positive

__all__ = ["SelfAttention2d"]


class SelfAttention2d(nn.Module):
    """Let every position attend to every other (Vaswani et al. 2017; Eq. 1-2, arXiv 2105.02358).

    With X of C channels and N positions::

        Q, K, V = W_q X, W_k X, W_v X;  A = softmax over keys of scale * Q^T K;  y = W_o (V A^T)

    Parameters 4 C^2; multiply-adds 4 C^2 N + 2 C N^2. There is no residual in this form.

    Args:
        channels: C, width of the input and of the result.
        scale: factor on the logits. 1 is Eq. 1; Vaswani et al. use ``channels ** -0.5``, which
            keeps the softmax soft for wide maps.
        implementation: "explicit" builds the N x N map A as the compared module does, "fused"
            gives the same result through ``scaled_dot_product_attention``, whose fast kernels
            never hold A.

    Raises:
        ValueError: ``channels`` is below 1 or ``implementation`` unknown.

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
    ) -> None:
        super().__init__()
        check_positive(channels=channels)
        if implementation not in ("explicit", "fused"):
            raise ValueError(
                f"implementation must be 'explicit' or 'fused', got {implementation!r}"
            )
        self.channels = self.out_channels = channels
        self.scale = scale
        self.implementation = implementation
        self.query = nn.Conv2d(channels, channels, 1, bias=False)
        self.key = nn.Conv2d(channels, channels, 1, bias=False)
        self.value = nn.Conv2d(channels, channels, 1, bias=False)
        self.projection = nn.Conv2d(channels, channels, 1, bias=False)

    def forward(
        self, x: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch channels height width"]:
        """Attend from every position to all positions."""
        check_feature_map(x, self.channels, type(self).__name__)
        query = self.query(x).flatten(2)
        key = self.key(x).flatten(2)
        value = self.value(x).flatten(2)
        if self.implementation == "fused":
            attended = F.scaled_dot_product_attention(
                query.transpose(1, 2).unsqueeze(1),
                key.transpose(1, 2).unsqueeze(1),
                value.transpose(1, 2).unsqueeze(1),
                scale=self.scale,
            )
            attended = attended.squeeze(1).transpose(1, 2)
        else:
            # scaling the queries is C N products, scaling the logits would be N^2
            attention = ((query * self.scale).transpose(1, 2) @ key).softmax(dim=-1)
            attended = value @ attention.transpose(1, 2)
        return self.projection(attended.unflatten(2, x.shape[2:]))
