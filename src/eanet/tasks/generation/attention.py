"""The two attention layers that stand inside a generator or a critic.

Both add their branch times gamma, a number that starts at 0, so that a new network is the one
without attention. Neither has biases, a norm or an activation: the feature maps around them are
pre-activations.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from eanet.nn.external_attention import ExternalAttention2d
from eanet.tasks.generation.spectral_norm import Conv2d, SpectralNorm

__all__ = ["GatedExternalAttention2d", "GatedSelfAttention2d"]


class GatedSelfAttention2d(nn.Module):
    """The self-attention of SAGAN (arXiv 1805.08318) as in PyTorch-StudioGAN.

    ``y = x + gamma * W_o (softmax(theta^T phi) g)``: queries theta and keys phi have an eighth of
    the channels, values g a half; keys and values are max-pooled to a quarter of the positions.

    Args:
        channels: of the feature map, at least 8.
        spectral_norm: of the four convolutions.

    Raises:
        ValueError: fewer than 8 channels.
    """

    def __init__(self, channels: int, *, spectral_norm: bool = True) -> None:
        super().__init__()
        if channels < 8:
            raise ValueError(f"self-attention needs at least 8 channels, got {channels}")
        narrow, half = channels // 8, channels // 2
        self.channels = channels
        self.query = Conv2d(channels, narrow, 1, bias=False, spectral_norm=spectral_norm)
        self.key = Conv2d(channels, narrow, 1, bias=False, spectral_norm=spectral_norm)
        self.value = Conv2d(channels, half, 1, bias=False, spectral_norm=spectral_norm)
        self.projection = Conv2d(half, channels, 1, bias=False, spectral_norm=spectral_norm)
        self.gamma = nn.Parameter(torch.zeros(()))

    def forward(
        self, x: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch channels height width"]:
        """Attend from every position to a quarter of them.

        Raises:
            ValueError: height or width is odd.
        """
        batch, _, height, width = x.shape
        if height % 2 or width % 2:
            raise ValueError(f"self-attention needs an even height and width, got {tuple(x.shape)}")
        attention = _looks(self.query(x), self.key(x))
        value = F.max_pool2d(self.value(x), 2).flatten(2)
        mixed = torch.bmm(value, attention.transpose(1, 2).to(value.dtype))
        branch = self.projection(mixed.reshape(batch, -1, height, width))
        return x + self.gamma * branch

    def attention_map(
        self, x: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch positions pooled_positions"]:
        """Return where each position looks, a softmax over the pooled ones."""
        query, key = (
            F.conv2d(x, _apply(layer.spectral_norm, layer.weight))
            for layer in (self.query, self.key)
        )
        return _looks(query, key)


def _looks(query: Tensor, key: Tensor) -> Tensor:
    """Return the softmax over pooled keys (batch, positions, pooled positions)."""
    pooled = F.max_pool2d(key, 2).flatten(2)
    return torch.bmm(query.flatten(2).transpose(1, 2), pooled).softmax(dim=-1)


class GatedExternalAttention2d(ExternalAttention2d):
    """External attention in the place of SAGAN's self-attention.

    ``y = x + gamma * W_o M_v^T A`` with ``A = norm(M_k W_i x)`` of Eq. 10-11 over the positions
    (arXiv 2105.02358). The paper gives no details of this placement; what is open is our choice:
    half the channels inside, 64 slots, no batch norm and no rectifier, spectral norm on both
    projections and M_k. M_v starts from N(0, 1) and has none: it averages S rows, and rows of a
    matrix with largest singular value 1 average to nearly nothing.

    Args:
        channels: C, of the feature map.
        num_slots: S.
        inner_channels: d; ``None`` takes half the channels.
        spectral_norm: of the two projections.
        key_spectral_norm: of M_k; ``None`` as ``spectral_norm``.
        value_spectral_norm: of M_v, which is then multiplied by ``sqrt(S d)`` to keep its size.
        eps: of the double normalization.
    """

    def __init__(
        self,
        channels: int,
        num_slots: int = 64,
        *,
        inner_channels: int | None = None,
        spectral_norm: bool = True,
        key_spectral_norm: bool | None = None,
        value_spectral_norm: bool = False,
        eps: float = 1e-9,
    ) -> None:
        inner = max(channels // 2, 1) if inner_channels is None else inner_channels
        super().__init__(
            channels,
            num_slots,
            inner_channels=inner,
            query_bias=False,
            projection_bias=False,
            batch_norm=False,
            residual="input",
            activation="none",
            eps=eps,
            memory_init="independent",
        )
        assert self.query is not None
        assert self.projection is not None
        on_key = spectral_norm if key_spectral_norm is None else key_spectral_norm
        self.gamma = nn.Parameter(torch.zeros(()))
        self.query_norm = SpectralNorm(self.query.weight) if spectral_norm else None
        self.projection_norm = SpectralNorm(self.projection.weight) if spectral_norm else None
        self.key_norm = SpectralNorm(self.memory_key) if on_key else None
        self.value_norm = SpectralNorm(self.values) if value_spectral_norm else None

    def reset_parameters(self) -> None:
        """Draw all parameters: M_v from N(0, 1), the others orthogonal."""
        assert self.query is not None
        assert self.projection is not None
        for weight in (self.query.weight, self.projection.weight, self.memory_key):
            nn.init.orthogonal_(weight)
        nn.init.normal_(self.values)

    def forward(
        self, x: Float[Tensor, "batch channels height width"], mask: None = None
    ) -> Float[Tensor, "batch channels height width"]:
        """Attend from every position to the memories."""
        if self.training:
            for norm, weight in self._normalized():
                norm.iterate(weight)
        return super().forward(x, mask)

    def _normalized(self) -> list[tuple[SpectralNorm, Tensor]]:
        """Return the spectral norms with their weights."""
        assert self.query is not None
        assert self.projection is not None
        pairs = (
            (self.query_norm, self.query.weight),
            (self.key_norm, self.memory_key),
            (self.value_norm, self.values),
            (self.projection_norm, self.projection.weight),
        )
        return [(norm, weight) for norm, weight in pairs if norm is not None]

    def _key_side(self) -> tuple[Tensor, None]:
        """Return K = M_k W_i (slots, channels) of normalized weights."""
        assert self.query is not None
        query = _apply(self.query_norm, self.query.weight).flatten(1)
        return _apply(self.key_norm, self.memory_key) @ query, None

    def _value_side(self) -> tuple[Tensor, None]:
        """Return V = gamma W_o M_v^T (channels, slots) of normalized weights."""
        assert self.projection is not None
        value = _apply(self.value_norm, self.values)
        if self.value_norm is not None:
            value = value * math.sqrt(value.numel())
        projection = _apply(self.projection_norm, self.projection.weight).flatten(1)
        return self.gamma * (projection @ value.transpose(0, 1)), None


def _apply(norm: SpectralNorm | None, weight: Tensor) -> Tensor:
    """Return a weight over its largest singular value where that is asked for."""
    return weight if norm is None else norm(weight)
