"""Parts of a transformer: the pre-norm block, its perceptron, and stochastic depth."""

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from eanet.nn.batch_statistics import update_running_statistics, uses_batch_statistics
from eanet.nn.dropout import Dropout
from eanet.nn.linear import Linear
from eanet.ops.attention.block import BatchStatistics

__all__ = ["DropPath", "Mlp", "TokenBatchNorm", "TransformerBlock"]


class DropPath(nn.Module):
    """Stochastic depth: in training, drop the whole branch of a sample with some probability.

    Kept branches are divided by the probability to keep, so that the mean stays.

    Args:
        probability: to drop, within [0, 1).

    Raises:
        ValueError: the probability is outside [0, 1).
    """

    def __init__(self, probability: float = 0.0) -> None:
        super().__init__()
        if not 0 <= probability < 1:
            raise ValueError(f"probability must be within [0, 1), got {probability}")
        self.probability = probability

    def forward(self, x: Float[Tensor, "batch *rest"]) -> Float[Tensor, "batch *rest"]:
        """Return the branch with samples set to 0 at random."""
        if not self.training or self.probability == 0:
            return x
        keep = 1 - self.probability
        kept = x.new_empty((x.shape[0], *[1] * (x.ndim - 1))).bernoulli_(keep)
        return x * kept.div_(keep)

    def extra_repr(self) -> str:
        """Return the probability for ``print(model)``."""
        return f"probability={self.probability:g}"


class Mlp(nn.Module):
    """Two linear layers with an exact GELU between them, applied to each token.

    Args:
        channels: width of input and output.
        hidden_channels: width between the layers.
        dropout: probability to drop an entry after the second layer in training.

    >>> import torch
    >>> Mlp(8, 16)(torch.zeros(2, 5, 8)).shape
    torch.Size([2, 5, 8])
    """

    def __init__(self, channels: int, hidden_channels: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.expand = Linear(channels, hidden_channels)
        self.activation = nn.GELU()
        self.contract = Linear(hidden_channels, channels)
        self.dropout = Dropout(dropout)

    def forward(
        self, x: Float[Tensor, "batch tokens channels"]
    ) -> Float[Tensor, "batch tokens channels"]:
        """Return the result for each token."""
        return self.dropout(self.contract(self.activation(self.expand(x))))


class TokenBatchNorm(nn.BatchNorm1d):
    """Batch normalization of channels over all tokens of a batch, (batch, tokens, channels).

    ``nn.SyncBatchNorm.convert_sync_batchnorm`` replaces it by a layer that reads the second
    dimension as channels; :class:`TransformerBlock` knows that layer and calls it rightly.
    """

    def forward(
        self,
        input: Float[Tensor, "batch tokens channels"],
        mask: Bool[Tensor, "batch tokens"] | None = None,
    ) -> Float[Tensor, "batch tokens channels"]:
        """Normalize every token with statistics over batch and tokens.

        Args:
            input: tokens.
            mask: True for tokens that take part; the others are left out of the statistics.
        """
        if mask is None or not uses_batch_statistics(self):
            return super().forward(input.flatten(0, 1)).view_as(input)
        taking_part = mask.unsqueeze(-1)
        # half precision neither counts beyond a few hundred tokens nor adds them up
        wide = input.to(torch.promote_types(input.dtype, torch.float32))
        count = mask.sum().to(wide.dtype)
        divisor = count.clamp(min=1.0)
        mean = wide.masked_fill(~taking_part, 0.0).sum((0, 1)) / divisor
        centered = wide - mean
        variance = centered.masked_fill(~taking_part, 0.0).square().sum((0, 1)) / divisor
        update_running_statistics(self, BatchStatistics(mean.detach(), variance.detach(), count))
        scale = torch.rsqrt(variance + self.eps)
        out = centered * (scale * self.weight if self.affine else scale)
        return (out + self.bias if self.affine else out).to(input.dtype)


class TransformerBlock(nn.Module):
    """Attention and perceptron, each after a norm and with a residual.

    ``x = x + drop_path(attention(norm1(x)))``, then ``x = x + drop_path(mlp(norm2(x)))``.

    Args:
        channels: width of the tokens.
        attention: module from tokens to tokens; called with ``mask`` where one is given.
        hidden_channels: width inside the perceptron.
        drop_path: probability to drop a branch in training.
        dropout: of the perceptron.
        norm2: the norm before the perceptron: "layer", or "batch" over batch and tokens
            (EAMLP-BN, Table 2).

    Raises:
        ValueError: norm2 is unknown.

    >>> import torch
    >>> from eanet.nn.external_attention import MultiHeadExternalAttention
    >>> attention = MultiHeadExternalAttention(8, 4, num_heads=2)
    >>> TransformerBlock(8, attention, hidden_channels=16)(torch.zeros(2, 5, 8)).shape
    torch.Size([2, 5, 8])
    """

    def __init__(
        self,
        channels: int,
        attention: nn.Module,
        *,
        hidden_channels: int,
        drop_path: float = 0.0,
        dropout: float = 0.0,
        norm2: Literal["layer", "batch"] = "layer",
    ) -> None:
        super().__init__()
        if norm2 not in ("layer", "batch"):
            raise ValueError(f"norm2 must be 'layer' or 'batch', got {norm2!r}")
        self.norm1 = nn.LayerNorm(channels)
        self.attention = attention
        self.norm2 = nn.LayerNorm(channels) if norm2 == "layer" else TokenBatchNorm(channels)
        self.mlp = Mlp(channels, hidden_channels, dropout=dropout)
        self.drop_path = DropPath(drop_path)

    def forward(
        self,
        x: Float[Tensor, "batch tokens channels"],
        mask: Bool[Tensor, "batch tokens"] | None = None,
    ) -> Float[Tensor, "batch tokens channels"]:
        """Return the tokens after both branches.

        Args:
            x: tokens.
            mask: True for tokens that take part; handed to the attention, and to a batch norm.

        Raises:
            ValueError: a mask in training after the conversion to ``nn.SyncBatchNorm``.
        """
        normalized = self.norm1(x)
        masks = () if mask is None else (mask,)
        x = x + self.drop_path(self.attention(normalized, *masks))
        return x + self.drop_path(self.mlp(self._second_norm(x, mask)))

    def _second_norm(
        self,
        x: Float[Tensor, "batch tokens channels"],
        mask: Bool[Tensor, "batch tokens"] | None,
    ) -> Float[Tensor, "batch tokens channels"]:
        """Return the tokens normalized for the perceptron."""
        if isinstance(self.norm2, TokenBatchNorm):
            return self.norm2(x) if mask is None else self.norm2(x, mask)
        if isinstance(self.norm2, nn.SyncBatchNorm):
            if mask is not None and self.norm2.training:
                raise ValueError("SyncBatchNorm cannot leave masked tokens out; pass mask=None")
            return self.norm2(x.flatten(0, 1)).view_as(x)
        return self.norm2(x)
