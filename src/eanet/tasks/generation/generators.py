"""Generators: from latent vectors and classes to images within [-1, 1]."""

import itertools
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from eanet.tasks.generation.attention import GatedExternalAttention2d, GatedSelfAttention2d
from eanet.tasks.generation.conditional_norm import ConditionalBatchNorm2d, batch_norm
from eanet.tasks.generation.spectral_norm import Conv2d, ConvTranspose2d, Linear

__all__ = [
    "Attention",
    "ConvGenerator",
    "ConvGeneratorBlock",
    "GeneratorBlock",
    "ResNetGenerator",
    "attention_layers",
]

Attention = Literal["none", "self", "external"]

#: edge of the first feature map
_START = 4
#: for each image size the channels of the first map and of every block's output, in widths
_CHANNELS = {16: (4, (4, 4)), 32: (4, (4, 4, 4)), 64: (16, (8, 4, 2, 1))}


def attention_layers(
    kind: Attention,
    after: int | Sequence[int],
    channels: Sequence[int],
    *,
    spectral_norm: bool,
    arguments: dict[str, Any] | None = None,
) -> nn.ModuleDict:
    """Build the attention layers of a network, by the number of the block they follow.

    Args:
        kind: which; "none" gives no layer.
        after: number of a block, or several, counted from 1.
        channels: of every block's output.
        spectral_norm: of their weights.
        arguments: further ones of external attention: ``num_slots``, ``inner_channels``, ...

    Raises:
        ValueError: an unknown kind, or a number that is none of a block.
    """
    if kind not in ("none", "self", "external"):
        raise ValueError(f"attention must be 'none', 'self' or 'external', got {kind!r}")
    places = sorted({after} if isinstance(after, int) else set(after))
    layers = nn.ModuleDict()
    if kind == "none":
        return layers
    if not places or places[0] < 1 or places[-1] > len(channels):
        raise ValueError(f"attention_after must be within 1..{len(channels)}, got {after}")
    if kind == "self" and arguments:
        raise ValueError(f"self-attention takes no {', '.join(arguments)}")
    for place in places:
        width = channels[place - 1]
        layers[str(place)] = (
            GatedSelfAttention2d(width, spectral_norm=spectral_norm)
            if kind == "self"
            else GatedExternalAttention2d(width, spectral_norm=spectral_norm, **(arguments or {}))
        )
    return layers


def _norm(channels: int, num_classes: int | None, *, spectral_norm: bool) -> nn.Module:
    """Return a batch norm, conditional where there are classes."""
    if num_classes is None:
        return batch_norm(channels)
    return ConditionalBatchNorm2d(channels, num_classes, spectral_norm=spectral_norm)


def _normalized(norm: nn.Module, x: Tensor, labels: Tensor | None) -> Tensor:
    """Apply a batch norm of either kind."""
    return norm(x, labels) if isinstance(norm, ConditionalBatchNorm2d) else norm(x)


class GeneratorBlock(nn.Module):
    """A residual block that doubles height and width.

    Norm, ReLU, nearest-neighbor enlargement, 3x3 convolution, norm, ReLU, 3x3 convolution, beside a
    1x1 convolution and the enlargement. The two are exchanged against the reference, which
    convolves four times as many positions to the same result.

    Args:
        in_channels: of the input.
        out_channels: of the output.
        num_classes: for conditional norms; ``None`` for plain ones.
        spectral_norm: of convolutions and tables.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        num_classes: int | None = None,
        spectral_norm: bool = False,
    ) -> None:
        super().__init__()
        self.norm1 = _norm(in_channels, num_classes, spectral_norm=spectral_norm)
        self.conv1 = Conv2d(in_channels, out_channels, 3, padding=1, spectral_norm=spectral_norm)
        self.norm2 = _norm(out_channels, num_classes, spectral_norm=spectral_norm)
        self.conv2 = Conv2d(out_channels, out_channels, 3, padding=1, spectral_norm=spectral_norm)
        self.shortcut = Conv2d(in_channels, out_channels, 1, spectral_norm=spectral_norm)

    def forward(
        self,
        x: Float[Tensor, "batch in_channels height width"],
        labels: Int[Tensor, "batch"] | None = None,
    ) -> Float[Tensor, "batch out_channels double_height double_width"]:
        """Refine and enlarge feature maps."""
        main = F.relu(_normalized(self.norm1, x, labels))
        main = self.conv1(F.interpolate(main, scale_factor=2, mode="nearest"))
        main = self.conv2(F.relu(_normalized(self.norm2, main, labels)))
        return main + F.interpolate(self.shortcut(x), scale_factor=2, mode="nearest")


class ResNetGenerator(nn.Module):
    """The residual generator of SAGAN and its neighbors, for images of 16, 32 or 64 pixels.

    Args:
        image_size: edge of the images.
        in_channels: of the images: 1 or 3.
        num_classes: for conditional norms; ``None`` makes it unconditional.
        latent_size: length of a latent vector.
        width: channels that all others are multiples of; 64 in the paper.
        spectral_norm: of all weights.
        attention: which layer.
        attention_after: the block or blocks it follows, counted from 1.
        attention_arguments: further ones of external attention.

    Raises:
        ValueError: an image size that is not offered, or an argument of the attention.
    """

    def __init__(
        self,
        image_size: int = 32,
        in_channels: int = 3,
        *,
        num_classes: int | None = None,
        latent_size: int = 128,
        width: int = 64,
        spectral_norm: bool = False,
        attention: Attention = "none",
        attention_after: int | Sequence[int] = 2,
        attention_arguments: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if image_size not in _CHANNELS:
            raise ValueError(f"image_size must be one of {sorted(_CHANNELS)}, got {image_size}")
        first, blocks = _CHANNELS[image_size]
        channels = [first * width, *(factor * width for factor in blocks)]
        self.latent_size, self.num_classes = latent_size, num_classes
        self.linear = Linear(latent_size, _START**2 * channels[0], spectral_norm=spectral_norm)
        self.blocks = nn.ModuleList(
            GeneratorBlock(before, after, num_classes=num_classes, spectral_norm=spectral_norm)
            for before, after in itertools.pairwise(channels)
        )
        self.attentions = attention_layers(
            attention,
            attention_after,
            channels[1:],
            spectral_norm=spectral_norm,
            arguments=attention_arguments,
        )
        self.norm = batch_norm(channels[-1])
        self.conv = Conv2d(channels[-1], in_channels, 3, padding=1, spectral_norm=spectral_norm)

    def forward(
        self,
        latents: Float[Tensor, "batch latent_size"],
        labels: Int[Tensor, "batch"] | None = None,
    ) -> Float[Tensor, "batch in_channels image_size image_size"]:
        """Return images within [-1, 1].

        Args:
            latents: drawn from N(0, I).
            labels: of the classes to draw; left out where the generator is unconditional.
        """
        x = self.linear(latents).unflatten(1, (-1, _START, _START))
        for number, block in enumerate(self.blocks, 1):
            x = block(x, labels)
            if str(number) in self.attentions:
                x = self.attentions[str(number)](x)
        return torch.tanh(self.conv(F.relu(self.norm(x))))


class ConvGeneratorBlock(nn.Module):
    """A transposed convolution that doubles height and width, then batch norm and ReLU."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        num_classes: int | None = None,
        spectral_norm: bool = False,
    ) -> None:
        super().__init__()
        self.conv = ConvTranspose2d(
            in_channels, out_channels, 4, stride=2, padding=1, spectral_norm=spectral_norm
        )
        self.norm = _norm(out_channels, num_classes, spectral_norm=spectral_norm)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """Enlarge feature maps."""
        return F.relu(_normalized(self.norm, self.conv(x), labels))


class ConvGenerator(nn.Module):
    """The generator of DCGAN (arXiv 1511.06434) for images of 32 pixels.

    Args:
        in_channels: of the images.
        latent_size: length of a latent vector.
        width: channels of the last block; the others have 2 and 4 times as many.
    """

    def __init__(self, in_channels: int = 3, *, latent_size: int = 128, width: int = 64) -> None:
        super().__init__()
        channels = [8 * width, 4 * width, 2 * width, width]
        self.latent_size, self.num_classes = latent_size, None
        self.linear = Linear(latent_size, _START**2 * channels[0])
        self.blocks = nn.ModuleList(
            ConvGeneratorBlock(before, after) for before, after in itertools.pairwise(channels)
        )
        self.conv = Conv2d(channels[-1], in_channels, 3, padding=1)

    def forward(
        self,
        latents: Float[Tensor, "batch latent_size"],
        labels: Int[Tensor, "batch"] | None = None,
    ) -> Float[Tensor, "batch in_channels height width"]:
        """Return images within [-1, 1]; labels do not matter."""
        x = self.linear(latents).unflatten(1, (-1, _START, _START))
        for block in self.blocks:
            x = block(x)
        return torch.tanh(self.conv(x))
