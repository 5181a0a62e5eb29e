"""T2T-ViT (arXiv 2101.11986) and its relatives made of external attention: EAMLP and MLP.

One class, :class:`T2TViT`, with two choices: what the stem attends with and what mixes tokens in
the backbone. EAMLP is external attention in both (section 3.3, arXiv 2105.02358), so that nothing
but linear layers and normalizations is left. The models of Table 2 are built in
:mod:`eanet.tasks.classification.models`.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from eanet.nn.dropout import Dropout
from eanet.nn.memories import MemoryModule
from eanet.nn.multi_head_external_attention import MultiHeadExternalAttention
from eanet.nn.self_attention import SelfAttention
from eanet.nn.transformer import TransformerBlock
from eanet.tasks.classification.positions import SinusoidPositions
from eanet.tasks.classification.timm_interface import Pool, TimmInterface
from eanet.tasks.classification.tokens_to_token import Stem, TokensToToken

__all__ = ["Initialization", "MemoryMLP", "Mixer", "Pool", "T2TViT"]

Mixer = Literal["self", "external", "mlp"]
Initialization = Literal["published", "fan_in"]


class MemoryMLP(nn.Module):
    """The linear layers of multi-head external attention with GELU for its normalizations.

    Deviation: see :class:`~eanet.tasks.classification.tokens_to_token.TokenMemoryMLP`.

    Args:
        channels: width of a token.
        num_slots: rows S of the memories.
        num_heads: heads H that share the memories.
        expansion: width of all heads together over ``channels``.
    """

    def __init__(self, channels: int, num_slots: int, *, num_heads: int, expansion: int) -> None:
        super().__init__()
        width = expansion * channels
        if width % num_heads:
            raise ValueError(f"{width} channels do not divide among {num_heads} heads")
        self.num_heads = num_heads
        self.query = nn.Linear(channels, width)
        self.memory_key = nn.Linear(width // num_heads, num_slots)
        self.memory_value = nn.Linear(num_slots, width // num_heads)
        self.projection = nn.Linear(width, channels)

    def forward(
        self,
        x: Float[Tensor, "batch tokens channels"],
        mask: Bool[Tensor, "batch tokens"] | None = None,
    ) -> Float[Tensor, "batch tokens channels"]:
        """Return the transformed tokens; a mask changes nothing, tokens do not meet."""
        del mask
        heads = self.query(x).unflatten(2, (self.num_heads, -1))
        return self.projection(self.memory_value(F.gelu(self.memory_key(heads))).flatten(2))


class T2TViT(TimmInterface):
    """Image classifier: tokens-to-token stem, position table, blocks, a linear head.

    Images of any size and aspect are taken at call time.

    Args:
        num_classes: outputs of the head; 0 leaves it out and returns features.
        in_channels: channels of the image.
        image_size: height and width (or one number for both) the position table is stored for.
        stem: attention of the stem, see
            :class:`~eanet.tasks.classification.tokens_to_token.TokensToToken`.
        mixer: what mixes tokens in the backbone: ``"self"`` attention, ``"external"`` attention
            with memories, or ``"mlp"``: its linear layers alone, which mix nothing.
        norm2: normalization before the MLPs of the backbone.
        channels: width D of the backbone.
        depth: blocks.
        num_heads: heads H of the mixer; with external attention all H share its memories.
        num_slots: rows S of the memories.
        expansion: width of all heads of the mixer together over D, for ``external`` and ``mlp``.
        mlp_ratio: hidden width of the MLPs over D.
        pool: what the head reads: ``"cls"``, a class token that goes along as token 0, or
            ``"avg"``, the mean of the patch tokens; ``"none"`` every token.
        class_token: whether a class token goes along; ``None``: where ``pool`` is not ``"avg"``.
        stem_channels: width within the stem.
        stem_kernels: patch edges of the soft splits.
        stem_strides: distances of their patches.
        stem_num_slots: rows of the stem's memories.
        stem_dropout: in the stem's external attention, on the map and after the projection; the
            published networks have it whatever ``dropout`` says.
        dropout: after the position table and in the MLPs.
        drop_path: of the last block; it grows linearly from 0 in the first.
        other_grids: position rows of images of another size than ``image_size``, see
            :class:`~eanet.tasks.classification.positions.SinusoidPositions`.
        initialization: standard deviation of the linear layers and memories at the start:
            ``"published"`` 0.02 everywhere; ``"fan_in"`` 1 / sqrt(inputs). Narrow networks need
            the latter: with 0.02 the position table drowns what their stem says.

    Raises:
        ValueError: a choice is unknown or sizes do not fit.
    """

    #: name and arguments, where the network was built by name
    config: dict[str, Any]
    #: what its weights and their data say of themselves, where they were loaded
    facts: dict[str, Any]

    def __init__(
        self,
        num_classes: int = 1000,
        in_channels: int = 3,
        *,
        image_size: int | Sequence[int] = 224,
        stem: Stem = "ea",
        mixer: Mixer = "external",
        norm2: Literal["layer", "batch"] = "layer",
        channels: int = 256,
        depth: int = 7,
        num_heads: int = 16,
        num_slots: int = 64,
        expansion: int = 4,
        mlp_ratio: float = 2.0,
        pool: Pool = "cls",
        class_token: bool | None = None,
        stem_channels: int = 64,
        stem_kernels: Sequence[int] = (7, 3, 3),
        stem_strides: Sequence[int] = (4, 2, 2),
        stem_num_slots: int = 128,
        stem_dropout: float = 0.1,
        dropout: float = 0.0,
        drop_path: float = 0.1,
        other_grids: Literal["regenerate", "resize"] = "regenerate",
        initialization: Initialization = "published",
    ) -> None:
        super().__init__()
        if initialization not in ("published", "fan_in"):
            raise ValueError(
                f"initialization must be 'published' or 'fan_in', got {initialization!r}"
            )
        self.initialization: Initialization = initialization
        if pool not in ("cls", "avg", "none"):
            raise ValueError(f"pool must be 'cls', 'avg' or 'none', got {pool!r}")
        if pool == "cls" and class_token is False:
            raise ValueError("pool='cls' reads the class token; class_token must not be False")
        if num_classes < 0 or in_channels < 1 or depth < 1:
            raise ValueError(
                "num_classes must be at least 0, in_channels and depth at least 1; "
                f"got {num_classes}, {in_channels}, {depth}"
            )
        self.in_channels, self.num_classes = in_channels, num_classes
        self.pool: Pool = pool
        self.stem_kind, self.mixer = stem, mixer
        size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        if len(size) != 2:
            raise ValueError(f"image_size must be one number or two, got {image_size}")
        #: channels, height and width of the images the model is meant for
        self.input_shape = (in_channels, *size)
        self.stem = TokensToToken(
            channels,
            in_channels,
            stem=stem,
            width=stem_channels,
            kernels=stem_kernels,
            strides=stem_strides,
            num_slots=stem_num_slots,
            attention_dropout=stem_dropout,
            projection_dropout=stem_dropout,
        )
        num_prefix = int(pool != "avg" if class_token is None else class_token)
        self.positions = SinusoidPositions(
            self.stem.grid(size[0], size[1]),
            channels,
            num_prefix=num_prefix,
            other_grids=other_grids,
        )
        self.class_token = nn.Parameter(torch.zeros(1, 1, channels)) if num_prefix else None
        self.dropout = Dropout(dropout)
        self.blocks = nn.ModuleList(
            TransformerBlock(
                channels,
                _mixer(
                    mixer, channels, num_heads=num_heads, num_slots=num_slots, expansion=expansion
                ),
                hidden_channels=int(channels * mlp_ratio),
                norm2=norm2,
                dropout=dropout,
                drop_path=drop_path * number / max(depth - 1, 1),
            )
            for number in range(depth)
        )
        self.norm = nn.LayerNorm(channels)
        #: width of a token, of a feature vector, and tokens before those of patches, as timm asks
        self.embed_dim = self.num_features = self.head_hidden_size = channels
        self.num_prefix_tokens = num_prefix
        self.grad_checkpointing = False
        self.feature_info: list[dict[str, Any]] = [
            {
                "module": f"blocks.{number}",
                "num_chs": channels,
                "reduction": math.prod(stem_strides),
            }
            for number in range(depth)
        ]
        self.head = nn.Linear(channels, num_classes) if num_classes else nn.Identity()
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the parameters; biases start at 0, scales at 1.

        The two memories of the stem start equal, those of the backbone apart, as published.
        """
        by_inputs = self.initialization == "fan_in"
        for module in self.modules():
            if isinstance(module, nn.Linear):
                std = module.in_features**-0.5 if by_inputs else 0.02
                nn.init.trunc_normal_(module.weight, std=std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, MemoryModule):
                module.initialize_memories_(
                    module.memory_key.shape[1] ** -0.5 if by_inputs else 0.02
                )
        if self.class_token is not None:
            nn.init.trunc_normal_(self.class_token, std=0.02)

    def _embed(
        self,
        images: Float[Tensor, "batch channels height width"],
        mask: Bool[Tensor, "batch height width"] | None = None,
    ) -> tuple[
        Float[Tensor, "batch tokens width"],
        tuple[int, int],
        Bool[Tensor, "batch tokens"] | None,
    ]:
        """Return what the first block reads, the grid of patches, and which tokens take part."""
        if images.ndim != 4 or images.shape[1] != self.in_channels:
            raise ValueError(
                f"images must be (batch, {self.in_channels}, height, width), "
                f"got {tuple(images.shape)}"
            )
        tokens, grid, token_mask = self.stem(images, mask)
        if self.class_token is not None:
            tokens = torch.cat([self.class_token.expand(tokens.shape[0], -1, -1), tokens], dim=1)
            if token_mask is not None:
                token_mask = F.pad(token_mask, (1, 0), value=True)
        return self.dropout(self.positions(tokens, grid, token_mask)), grid, token_mask

    def _run(
        self,
        block: nn.Module,
        tokens: Float[Tensor, "batch tokens width"],
        mask: Bool[Tensor, "batch tokens"] | None = None,
    ) -> Float[Tensor, "batch tokens width"]:
        """Apply a block, keeping none of its activations where checkpointing is on."""
        if self.grad_checkpointing and self.training and torch.is_grad_enabled():
            recomputed: Tensor = checkpoint(block, tokens, mask, use_reentrant=False)  # pyright: ignore[reportAssignmentType]
            return recomputed
        return block(tokens, mask)

    def forward_tokens(
        self,
        images: Float[Tensor, "batch channels height width"],
        mask: Bool[Tensor, "batch height width"] | None = None,
    ) -> tuple[Float[Tensor, "batch tokens width"], Bool[Tensor, "batch tokens"] | None]:
        """Return the tokens after the last norm, the class token first, and their mask.

        Args:
            images: normalized values.
            mask: True for pixels of the image, False for padding to its right and below; an
                image that is padded then gives what it gives by itself.

        Raises:
            ValueError: the channels differ from ``in_channels``, or an image is too small.
        """
        tokens, _, token_mask = self._embed(images, mask)
        for block in self.blocks:
            tokens = self._run(block, tokens, token_mask)
        return self.norm(tokens), token_mask

    def forward_features(
        self,
        images: Float[Tensor, "batch channels height width"],
        mask: Bool[Tensor, "batch height width"] | None = None,
    ) -> Float[Tensor, "batch tokens width"]:
        """Return the tokens of :meth:`forward_tokens` without their mask, as timm's models do."""
        return self.forward_tokens(images, mask)[0]

    def forward_head(
        self,
        tokens: Float[Tensor, "batch tokens width"],
        mask: Bool[Tensor, "batch tokens"] | None = None,
        *,
        pre_logits: bool = False,
    ) -> Tensor:
        """Return logits of tokens, or what the classifier reads.

        Args:
            tokens: as :meth:`forward_features` gives them.
            mask: True for tokens that take part.
            pre_logits: return the pooled features (batch, width) instead; with ``pool="none"``
                the tokens.
        """
        features = self._pool(tokens, mask)
        return features if pre_logits else self.head(features)

    def _pool(
        self,
        tokens: Float[Tensor, "batch tokens width"],
        mask: Bool[Tensor, "batch tokens"] | None,
    ) -> Tensor:
        """Return what the classifier reads of the tokens."""
        if self.pool == "none":
            return tokens
        if self.pool == "cls":
            return tokens[:, 0]
        patches = tokens[:, self.num_prefix_tokens :]
        if mask is None:
            return patches.mean(dim=1)
        weight = mask[:, self.num_prefix_tokens :, None].to(patches.dtype)
        return (patches * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1)

    def forward(
        self,
        images: Float[Tensor, "batch channels height width"],
        mask: Bool[Tensor, "batch height width"] | None = None,
    ) -> Tensor:
        """Return logits (batch, classes), or features where ``num_classes`` is 0.

        Args:
            images: normalized values.
            mask: see :meth:`forward_tokens`.
        """
        tokens, token_mask = self.forward_tokens(images, mask)
        return self.forward_head(tokens, token_mask)


def _mixer(
    mixer: str, channels: int, *, num_heads: int, num_slots: int, expansion: int
) -> nn.Module:
    """Build what mixes the tokens of one block."""
    if mixer == "self":
        return SelfAttention(channels, num_heads=num_heads)
    if mixer == "external":
        return MultiHeadExternalAttention(
            channels,
            num_slots,
            num_heads=num_heads,
            expansion=expansion,
            memory_bias=True,
            memory_init="independent",
        )
    if mixer == "mlp":
        return MemoryMLP(channels, num_slots, num_heads=num_heads, expansion=expansion)
    raise ValueError(f"mixer must be 'self', 'external' or 'mlp', got {mixer!r}")
