"""Aggregated co-occurrent features of CFNet (ACF)."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from eanet.nn.compared.feature_maps import check_feature_map
from eanet.nn.memories import check_positive

__all__ = ["AggregatedCooccurrentFeatures"]


class AggregatedCooccurrentFeatures(nn.Module):
    """Attend from each position to the positions of a map pooled to half the side.

    Zhang et al., "Co-occurrent Features in Semantic Segmentation", CVPR 2019. With X' the average
    of X over windows of 3 x 3 at stride 2 (padding not counted), M = ceil(H/2) * ceil(W/2)
    positions, and d the width of a head::

        Q = W_qk X + b,  K = W_qk X' + b,  V = W_v X' + c
        A = softmax over keys of Q^T K / sqrt(d)      (N x M)
        y = bn(W_o (V A^T)) + X

    Queries and keys share one convolution. With n mixtures the channels of a head are split into n
    parts, each with its softmax, and A is their sum weighted with ``softmax(w mean of Q)``, one
    weight for each image. 788,480 parameters at 512 channels with one mixture; multiply-adds
    2 C^2 (N + M) + 2 C N M.

    Args:
        channels: C, width of the input and of the result.
        num_heads: heads of ``channels / num_heads`` channels each.
        num_mixtures: softmaxes that are mixed within a head.
        attention_dropout: probability to drop an entry of a softmax in training.

    Raises:
        ValueError: a number is out of range, or heads and mixtures do not divide the channels.

    >>> AggregatedCooccurrentFeatures(16)(torch.zeros(2, 16, 5, 4)).shape
    torch.Size([2, 16, 5, 4])
    """

    def __init__(
        self,
        channels: int,
        *,
        num_heads: int = 1,
        num_mixtures: int = 1,
        attention_dropout: float = 0.1,
    ) -> None:
        super().__init__()
        check_positive(channels=channels, num_heads=num_heads, num_mixtures=num_mixtures)
        if channels % (num_heads * num_mixtures):
            raise ValueError(
                f"channels must be a multiple of num_heads times num_mixtures = "
                f"{num_heads * num_mixtures}, got {channels}"
            )
        if not 0 <= attention_dropout < 1:
            raise ValueError(f"attention_dropout must be within [0, 1), got {attention_dropout}")
        self.channels = self.out_channels = channels
        self.num_heads = num_heads
        self.num_mixtures = num_mixtures
        self.attention_dropout = attention_dropout
        self.query_and_key = nn.Conv2d(channels, channels, 1)
        self.value = nn.Conv2d(channels, channels, 1)
        self.projection = nn.Conv2d(channels, channels, 1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.mixture_weight = (
            nn.Parameter(torch.empty(num_mixtures, channels // num_heads))
            if num_mixtures > 1
            else None
        )
        if self.mixture_weight is not None:
            bound = num_mixtures**-0.5
            nn.init.uniform_(self.mixture_weight, -bound, bound)

    def forward(
        self, x: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch channels height width"]:
        """Attend from every position to the pooled positions."""
        check_feature_map(x, self.channels, type(self).__name__)
        # (size + 2 - 3) // 2 + 1 positions on each side, which is ceil(size / 2) for odd sizes too
        pooled = F.avg_pool2d(x, 3, stride=2, padding=1, count_include_pad=False)
        query = self._heads(self.query_and_key(x))
        key = self._heads(self.query_and_key(pooled))
        value = self._heads(self.value(pooled))
        attended = value @ self._attention(query, key).transpose(1, 2)
        attended = attended.reshape(x.shape[0], self.channels, *x.shape[2:])
        return self.norm(self.projection(attended)) + x

    def _heads(self, features: Tensor) -> Tensor:
        """Return (batch * heads, head channels, positions)."""
        return features.reshape(features.shape[0] * self.num_heads, -1, features[0, 0].numel())

    def _attention(self, query: Tensor, key: Tensor) -> Tensor:
        """Return A (batch * heads, positions, pooled positions)."""
        groups, head_channels, _ = query.shape
        parts = (groups * self.num_mixtures, head_channels // self.num_mixtures, -1)
        scaled = query.reshape(parts).transpose(1, 2) / math.sqrt(head_channels)
        attention = (scaled @ key.reshape(parts)).softmax(dim=-1)
        attention = F.dropout(attention, self.attention_dropout, self.training)
        if self.mixture_weight is None:
            return attention
        shares = (self.mixture_weight @ query.mean(dim=2, keepdim=True)).softmax(dim=1)
        attention = attention.reshape(groups, self.num_mixtures, *attention.shape[1:])
        return (attention * shares.unsqueeze(-1)).sum(dim=1)
