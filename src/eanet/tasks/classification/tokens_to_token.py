"""The stem of T2T-ViT: an image becomes tokens by repeated soft splits.

A soft split cuts the picture into overlapping patches, each a token; a token block mixes and
narrows them; the tokens are laid out as a picture again and split anew. The block's attention is
external attention, a Performer, self-attention, or none but the same linear layers.

The patches themselves are not formed: :mod:`eanet.tasks.classification.soft_split` says how.
"""

import copy
import math
from collections.abc import Sequence
from typing import Literal, Protocol

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from eanet.nn.dropout import Dropout
from eanet.nn.external_attention import ExternalAttention
from eanet.nn.fused_attention import FusedExternalAttention
from eanet.nn.linear import Linear
from eanet.nn.memories import full_precision
from eanet.nn.self_attention import SelfAttention
from eanet.nn.transformer import Mlp
from eanet.tasks.classification.fused_stem import FusedTokenBlock
from eanet.tasks.classification.soft_split import (
    SoftSplit,
    centered_weight,
    project_centered,
    project_patches,
)

__all__ = [
    "PerformerAttention",
    "SoftSplit",
    "Stem",
    "TokenBlock",
    "TokenMemoryMLP",
    "TokensToToken",
]

Stem = Literal["ea", "performer", "transformer", "mlp"]


class PerformerAttention(nn.Module):
    """Attention in linear time by positive random features (arXiv 2009.14794), one head.

    With phi(u) = exp(W u - |u|^2 / 2) / sqrt(m), a token q gives
    phi(q) (sum_n phi(k_n)^T v_n) / (phi(q) . sum_n phi(k_n) + 1e-8); the output is the token's own
    value plus the projection of that.

    Args:
        in_channels: width of a token before.
        channels: width after, of queries, keys and values.
        num_features: m, half the width by default.
        dropout: after the projection.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        *,
        num_features: int | None = None,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        num_features = num_features or channels // 2
        self.keys_queries_values = Linear(in_channels, 3 * channels)
        self.projection = Linear(channels, channels)
        self.dropout = Dropout(dropout)
        # frozen, but stored and counted: another draw would be another network
        self.features = nn.Parameter(torch.empty(num_features, channels), requires_grad=False)
        nn.init.orthogonal_(self.features, gain=math.sqrt(num_features))

    def _positive_features(
        self, vectors: Float[Tensor, "batch tokens channels"]
    ) -> Float[Tensor, "batch tokens features"]:
        """Return phi of every token."""
        exponent = vectors @ self.features.to(vectors.dtype).T
        half_square = vectors.square().sum(dim=-1, keepdim=True) / 2
        return (exponent - half_square).exp() / math.sqrt(self.features.shape[0])

    def forward(
        self,
        x: Float[Tensor, "batch tokens in_channels"],
        mask: Bool[Tensor, "batch tokens"] | None = None,
    ) -> Float[Tensor, "batch tokens channels"]:
        """Return value plus attention; masked tokens are no keys."""
        return self.attend(self.keys_queries_values(x), mask)

    def attend(
        self,
        projected: Float[Tensor, "batch tokens three_channels"],
        mask: Bool[Tensor, "batch tokens"] | None = None,
    ) -> Float[Tensor, "batch tokens channels"]:
        """Return the result for keys, queries and values side by side."""
        keys, queries, values = projected.chunk(3, dim=-1)
        with full_precision(projected):
            # exponentials of squared lengths leave the range of half precision
            wide = torch.promote_types(keys.dtype, torch.float32)
            key_features = self._positive_features(keys.to(wide))
            query_features = self._positive_features(queries.to(wide))
            if mask is not None:
                key_features = key_features * mask[..., None]
            summary = key_features.transpose(1, 2) @ values.to(wide)
            norm = query_features @ key_features.sum(dim=1)[..., None]
            attended = (query_features @ summary) / (norm + 1e-8)
        return values + self.dropout(self.projection(attended.to(values.dtype)))


class TokenMemoryMLP(nn.Module):
    """The linear layers of external attention with GELU in the place of its normalizations.

    Deviation: the paper names its failing "MLP" row without describing it; this keeps every
    linear layer and takes away what mixes tokens.

    Args:
        in_channels: width of a token before.
        channels: width after.
        num_slots: rows S of the memories.
    """

    def __init__(self, in_channels: int, channels: int, *, num_slots: int) -> None:
        super().__init__()
        self.query = Linear(in_channels, channels)
        self.memory_key = Linear(channels, num_slots, bias=False)
        self.memory_value = Linear(num_slots, channels)
        self.projection = Linear(channels, channels)

    def forward(
        self,
        x: Float[Tensor, "batch tokens in_channels"],
        mask: Bool[Tensor, "batch tokens"] | None = None,
    ) -> Float[Tensor, "batch tokens channels"]:
        """Return the transformed tokens; a mask changes nothing, tokens do not meet."""
        return self.attend(self.query(x), mask)

    def attend(
        self,
        query: Float[Tensor, "batch tokens channels"],
        mask: Bool[Tensor, "batch tokens"] | None = None,
    ) -> Float[Tensor, "batch tokens channels"]:
        """Return the result for tokens that were narrowed already."""
        del mask
        return query + self.projection(self.memory_value(F.gelu(self.memory_key(query))))


class _ProjectedAttention(Protocol):
    """Attention that can go on from the result of the linear layer it begins with."""

    def attend(self, projected: Tensor, mask: Tensor | None = None, /) -> Tensor: ...


class TokenBlock(nn.Module):
    """Narrows tokens: attention with its own residual, then a small MLP.

    y = attention(LN(x)); y + MLP(LN(y)) with MLP = Linear, GELU, Linear of the same width.

    Args:
        attention: a module of widths ``in_channels`` to ``channels``, called with a mask.
        in_channels: width of a token before.
        channels: width after.
        dropout: at the end of the MLP.
    """

    def __init__(
        self, attention: nn.Module, in_channels: int, channels: int, *, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(in_channels)
        self.attention = attention
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = Mlp(channels, channels, dropout=dropout)

    def forward(
        self,
        x: Tensor,
        mask: Bool[Tensor, "batch tokens"] | None = None,
        split: SoftSplit | None = None,
    ) -> Float[Tensor, "batch tokens channels"]:
        """Return the narrowed tokens.

        Args:
            x: tokens (batch, tokens, in_channels), or with ``split`` the picture (batch, channels,
                height, width) whose patches they are; those are then not formed.
            mask: True for tokens that take part.
            split: cuts the picture into patches.
        """
        linear = self._first_layer()
        if split is None or linear is None or _is_watched(self.norm1, self.attention, linear):
            tokens = x if split is None else split(x)
            y = self.attention(self.norm1(tokens), mask)
        else:
            weight, bias = centered_weight(self.norm1, linear)
            projected = project_centered(x, split, weight, bias, eps=self.norm1.eps)
            attention: _ProjectedAttention = self.attention  # pyright: ignore[reportAssignmentType]
            y = attention.attend(projected, mask)
        return y + self.mlp(self.norm2(y))

    def _first_layer(self) -> nn.Linear | None:
        """Return the linear layer that the attention begins with, ``None`` for something else."""
        name = _FIRST_LAYERS.get(type(self.attention))
        layer = None if name is None else getattr(self.attention, name)
        # a layer that was replaced may do more than multiply
        plain = type(layer) in (Linear, nn.Linear) and type(self.norm1) is nn.LayerNorm
        return layer if plain else None

    @torch.no_grad()
    def fused(self) -> nn.Module:
        """Return an inference module with the first norm inside the attention's first layer.

        Attention of a kind that is not known here is kept, and so is this module.
        """
        linear = self._first_layer()
        if linear is None:
            return self
        rest, branch_bias = _after_first_layer(self.attention)
        return FusedTokenBlock(
            self.norm1, linear, rest, self.norm2, self.mlp, branch_bias=branch_bias
        )


#: the linear layer that each kind of attention begins with
_FIRST_LAYERS: dict[type[nn.Module], str] = {
    ExternalAttention: "query",
    PerformerAttention: "keys_queries_values",
    SelfAttention: "qkv",
    TokenMemoryMLP: "query",
}


def _is_watched(*modules: nn.Module) -> bool:
    """Tell whether a hook waits for what goes through a module, as attention maps need it."""
    return any(module._forward_hooks or module._forward_pre_hooks for module in modules)


def _after_first_layer(attention: nn.Module) -> tuple[nn.Module, Tensor | None]:
    """Return attention for inference that takes what its first layer would have returned.

    With it comes a bias that is to be added to that: where the normalization runs over tokens
    first, what is the same for all of them cancels in the map and only the residual shows it.
    """
    if isinstance(attention, ExternalAttention):
        folded = attention.fused()
        moves = folded.residual and folded.normalization == "double"
        rest = FusedExternalAttention(
            folded.key,
            folded.value,
            key_bias=folded.key_bias,
            bias=None if moves else folded.bias,
            query=None,
            norm=folded.normalization,
            eps=folded.eps,
            residual=folded.residual,
        )
        return rest.eval(), folded.bias if moves else None
    rest = copy.copy(attention)
    rest._modules = dict(attention._modules)
    name = _FIRST_LAYERS[type(attention)]
    if isinstance(rest, SelfAttention):
        rest.in_channels = getattr(rest, name).out_features
    setattr(rest, name, nn.Identity())
    return rest, None


class TokensToToken(nn.Module):
    """Image to tokens: as many soft splits as ``kernels``, a token block between any two.

    Args:
        channels: width D of the tokens that come out.
        in_channels: channels of the image.
        stem: what the token blocks attend with.
        width: channels within the stem.
        kernels: patch edges of the soft splits.
        strides: their distances; the product is how much smaller the grid of tokens is.
        num_slots: memory rows of the stems ``ea`` and ``mlp``.
        attention_dropout: on the attention of the stem ``ea``. The published networks drop here
            and after the projection even where all other dropout is off.
        projection_dropout: after the projection of the stem ``ea``.

    Raises:
        ValueError: the stem is unknown, or ``kernels`` and ``strides`` do not fit.
    """

    def __init__(
        self,
        channels: int,
        in_channels: int = 3,
        *,
        stem: Stem = "ea",
        width: int = 64,
        kernels: Sequence[int] = (7, 3, 3),
        strides: Sequence[int] = (4, 2, 2),
        num_slots: int = 128,
        attention_dropout: float = 0.1,
        projection_dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if not kernels or len(kernels) != len(strides):
            raise ValueError(f"stem_kernels {kernels} and stem_strides {strides} must be as many")
        self.splits = nn.ModuleList(
            SoftSplit(kernel, stride) for kernel, stride in zip(kernels, strides, strict=True)
        )
        patch_widths = [
            (in_channels if number == 0 else width) * kernel**2
            for number, kernel in enumerate(kernels)
        ]
        self.blocks = nn.ModuleList()
        for patch_width in patch_widths[:-1]:
            if stem == "ea":
                attention = ExternalAttention(
                    width,
                    num_slots,
                    in_channels=patch_width,
                    residual="query",
                    value_bias=True,
                    attention_dropout=attention_dropout,
                    projection_dropout=projection_dropout,
                )
            elif stem == "performer":
                attention = PerformerAttention(patch_width, width)
            elif stem == "transformer":
                # scaled by the width before, not that of the keys, as published
                attention = SelfAttention(
                    width, in_channels=patch_width, scale=patch_width**-0.5, residual="value"
                )
            elif stem == "mlp":
                attention = TokenMemoryMLP(patch_width, width, num_slots=num_slots)
            else:
                raise ValueError(
                    f"stem must be 'ea', 'performer', 'transformer' or 'mlp', got {stem!r}"
                )
            dropout = 0.1 if stem == "performer" else 0.0  # as published
            self.blocks.append(TokenBlock(attention, patch_width, width, dropout=dropout))
        self.projection = Linear(patch_widths[-1], channels)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Return rows and columns of tokens for an image of some size.

        Raises:
            ValueError: the image is too small to hold a token.
        """
        rows, columns = height, width
        for split in self.splits:
            assert isinstance(split, SoftSplit)
            rows, columns = split.grid(rows, columns)
        if rows < 1 or columns < 1:
            raise ValueError(f"an image of {height} x {width} pixels is too small for the stem")
        return rows, columns

    def forward(
        self,
        images: Float[Tensor, "batch channels height width"],
        mask: Bool[Tensor, "batch height width"] | None = None,
    ) -> tuple[
        Float[Tensor, "batch tokens channels"],
        tuple[int, int],
        Bool[Tensor, "batch tokens"] | None,
    ]:
        """Return tokens row by row, the rows and columns of their grid, and their mask.

        Args:
            images: normalized values.
            mask: True for pixels of the image, False for padding to its right and below.
        """
        self.grid(images.shape[2], images.shape[3])  # refuses an image that is too small
        picture, token_mask = images if mask is None else images * mask[:, None], mask
        for split, block in zip(self.splits, self.blocks, strict=False):
            assert isinstance(split, SoftSplit)
            grid = split.grid(picture.shape[2], picture.shape[3])
            if token_mask is not None:
                token_mask = split.mask_grid(token_mask)
            tokens = block(picture, None if token_mask is None else token_mask.flatten(1), split)
            picture = tokens.transpose(1, 2).unflatten(2, grid)
            if token_mask is not None:
                # the next split must see around the image the zeros it would see without padding
                picture = picture * token_mask[:, None]
        return self._project(picture, token_mask)

    def _project(
        self,
        picture: Float[Tensor, "batch channels height width"],
        mask: Bool[Tensor, "batch height width"] | None,
    ) -> tuple[
        Float[Tensor, "batch tokens channels"],
        tuple[int, int],
        Bool[Tensor, "batch tokens"] | None,
    ]:
        """Return the last patches at the width of the backbone, their grid and their mask."""
        split = self.splits[-1]
        assert isinstance(split, SoftSplit)
        grid = split.grid(picture.shape[2], picture.shape[3])
        if type(self.projection) in (Linear, nn.Linear) and not _is_watched(self.projection):
            tokens = project_patches(picture, split, self.projection)
        else:
            tokens = self.projection(split(picture))
        return tokens, grid, None if mask is None else split.mask_grid(mask).flatten(1)
