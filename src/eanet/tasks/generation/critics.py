"""Critics (discriminators): from images and classes to one number each, high for real ones."""

import itertools
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from eanet.tasks.generation.conditional_norm import batch_norm
from eanet.tasks.generation.generators import Attention, attention_layers
from eanet.tasks.generation.spectral_norm import Conv2d, Embedding, Linear

__all__ = [
    "ConvCritic",
    "ConvCriticBlock",
    "CriticBlock",
    "CriticInputBlock",
    "ResNetCritic",
]

#: for each image size the channels of every block's output, in widths, and which ones halve
_BLOCKS = {
    16: ((2, 2, 2), (True, True, False)),
    32: ((2, 2, 2, 2), (True, True, False, False)),
    64: ((1, 2, 4, 8, 16), (True, True, True, True, False)),
}


class CriticInputBlock(nn.Module):
    """The first residual block; it halves height and width.

    3x3 convolution, ReLU, 3x3 convolution, averaging, beside averaging and a 1x1 convolution.
    Without spectral norm there is a batch norm after the first and one before the 1x1 convolution.

    Args:
        in_channels: of the images.
        out_channels: of the output.
        spectral_norm: of the convolutions, in place of batch norms.
    """

    def __init__(self, in_channels: int, out_channels: int, *, spectral_norm: bool) -> None:
        super().__init__()
        self.conv1 = Conv2d(in_channels, out_channels, 3, padding=1, spectral_norm=spectral_norm)
        self.conv2 = Conv2d(out_channels, out_channels, 3, padding=1, spectral_norm=spectral_norm)
        self.shortcut = Conv2d(in_channels, out_channels, 1, spectral_norm=spectral_norm)
        self.norm1 = None if spectral_norm else batch_norm(out_channels)
        self.shortcut_norm = None if spectral_norm else batch_norm(in_channels)

    def forward(
        self, x: Float[Tensor, "batch in_channels height width"]
    ) -> Float[Tensor, "batch out_channels half_height half_width"]:
        """Take images in."""
        main = self.conv2(F.relu(_optional(self.norm1, self.conv1(x))))
        short = self.shortcut(_optional(self.shortcut_norm, F.avg_pool2d(x, 2)))
        return F.avg_pool2d(main, 2) + short


class CriticBlock(nn.Module):
    """A residual block: ReLU, 3x3 convolution, ReLU, 3x3 convolution, averaging where asked.

    The shortcut has a 1x1 convolution where the block halves or changes its channels. Without
    spectral norm there is a batch norm before each ReLU and before the 1x1 convolution.

    Args:
        in_channels: of the input.
        out_channels: of the output.
        downsample: halve height and width.
        spectral_norm: of the convolutions, in place of batch norms.
        shortcut_relu: with spectral norm, let the shortcut begin at the rectified input, as in
            the reference, where the first ReLU overwrites it. All published results have this;
            False is the textbook's block. The shortcut of blocks with batch norm sees x.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        downsample: bool,
        spectral_norm: bool,
        shortcut_relu: bool = True,
    ) -> None:
        super().__init__()
        self.downsample = downsample
        self.shortcut_relu = shortcut_relu and spectral_norm
        self.norm1 = None if spectral_norm else batch_norm(in_channels)
        self.conv1 = Conv2d(in_channels, out_channels, 3, padding=1, spectral_norm=spectral_norm)
        self.norm2 = None if spectral_norm else batch_norm(out_channels)
        self.conv2 = Conv2d(out_channels, out_channels, 3, padding=1, spectral_norm=spectral_norm)
        self.shortcut = self.shortcut_norm = None
        if downsample or in_channels != out_channels:
            self.shortcut = Conv2d(in_channels, out_channels, 1, spectral_norm=spectral_norm)
            self.shortcut_norm = None if spectral_norm else batch_norm(in_channels)

    def forward(
        self, x: Float[Tensor, "batch in_channels height width"]
    ) -> Float[Tensor, "batch out_channels out_height out_width"]:
        """Refine feature maps."""
        rectified = F.relu(_optional(self.norm1, x))
        short = rectified if self.shortcut_relu else x
        main = self.conv2(F.relu(_optional(self.norm2, self.conv1(rectified))))
        short = _optional(self.shortcut_norm, short)
        if self.downsample:
            # averaging and a 1x1 convolution can change places; this way it has less to do
            main, short = F.avg_pool2d(main, 2), F.avg_pool2d(short, 2)
        return main + _optional(self.shortcut, short)


class ResNetCritic(nn.Module):
    """The residual critic of SAGAN and its neighbors, for images of 16, 32 or 64 pixels.

    ``score = linear(h) + <embedding(label), h>`` with h the sum of the rectified features over all
    positions (arXiv 1802.05637); without classes the linear part alone.

    Args:
        image_size: edge of the images.
        in_channels: of the images.
        num_classes: for the projection; ``None`` makes it unconditional.
        width: channels that all others are multiples of; 64 in the paper.
        spectral_norm: of all weights, in place of batch norms.
        attention: which layer.
        attention_after: the block or blocks it follows, counted from 1.
        attention_arguments: further ones of external attention.
        shortcut_relu: see :class:`CriticBlock`.

    Raises:
        ValueError: an image size that is not offered, or an argument of the attention.
    """

    def __init__(
        self,
        image_size: int = 32,
        in_channels: int = 3,
        *,
        num_classes: int | None = None,
        width: int = 64,
        spectral_norm: bool = False,
        attention: Attention = "none",
        attention_after: int | Sequence[int] = 1,
        attention_arguments: dict[str, Any] | None = None,
        shortcut_relu: bool = True,
    ) -> None:
        super().__init__()
        if image_size not in _BLOCKS:
            raise ValueError(f"image_size must be one of {sorted(_BLOCKS)}, got {image_size}")
        factors, halves = _BLOCKS[image_size]
        channels = [factor * width for factor in factors]
        self.blocks = nn.ModuleList(
            [CriticInputBlock(in_channels, channels[0], spectral_norm=spectral_norm)]
        )
        for before, after, down in zip(channels, channels[1:], halves[1:], strict=False):
            self.blocks.append(
                CriticBlock(
                    before,
                    after,
                    downsample=down,
                    spectral_norm=spectral_norm,
                    shortcut_relu=shortcut_relu,
                )
            )
        self.attentions = attention_layers(
            attention,
            attention_after,
            channels,
            spectral_norm=spectral_norm,
            arguments=attention_arguments,
        )
        self.linear = Linear(channels[-1], 1, spectral_norm=spectral_norm)
        self.embedding = (
            None
            if num_classes is None
            else Embedding(num_classes, channels[-1], spectral_norm=spectral_norm)
        )

    def forward(
        self,
        images: Float[Tensor, "batch in_channels height width"],
        labels: Int[Tensor, "batch"] | None = None,
    ) -> Float[Tensor, "batch"]:
        """Score images within [-1, 1].

        Args:
            images: real or generated.
            labels: their classes; left out where the critic is unconditional.
        """
        x = images
        for number, block in enumerate(self.blocks, 1):
            x = block(x)
            if str(number) in self.attentions:
                x = self.attentions[str(number)](x)
        features = F.relu(x).sum(dim=(2, 3))
        score = self.linear(features).squeeze(1)
        if self.embedding is not None:
            score = score + (self.embedding(labels) * features).sum(dim=1)
        return score


class ConvCriticBlock(nn.Module):
    """Two convolutions, the second of which halves, each with batch norm and ReLU.

    Args:
        in_channels: of the input.
        out_channels: of the output.
        spectral_norm: of the convolutions, in place of batch norms.
    """

    def __init__(self, in_channels: int, out_channels: int, *, spectral_norm: bool = False) -> None:
        super().__init__()
        self.conv1 = Conv2d(in_channels, out_channels, 3, padding=1, spectral_norm=spectral_norm)
        self.norm1 = None if spectral_norm else batch_norm(out_channels)
        self.conv2 = Conv2d(
            out_channels, out_channels, 4, stride=2, padding=1, spectral_norm=spectral_norm
        )
        self.norm2 = None if spectral_norm else batch_norm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Refine and halve feature maps."""
        x = F.relu(_optional(self.norm1, self.conv1(x)))
        return F.relu(_optional(self.norm2, self.conv2(x)))


class ConvCritic(nn.Module):
    """The critic of DCGAN as in PyTorch-StudioGAN, for images of 32 pixels.

    Args:
        in_channels: of the images.
        width: channels of the first block; the others have 2 and 4 times as many, the last
            convolution 8 times.
    """

    def __init__(self, in_channels: int = 3, *, width: int = 64) -> None:
        super().__init__()
        channels = [in_channels, width, 2 * width, 4 * width]
        self.blocks = nn.ModuleList(
            ConvCriticBlock(before, after) for before, after in itertools.pairwise(channels)
        )
        self.conv = Conv2d(channels[-1], 8 * width, 3, padding=1)
        self.norm = batch_norm(8 * width)
        self.linear = Linear(8 * width, 1)

    def forward(
        self,
        images: Float[Tensor, "batch in_channels height width"],
        labels: Int[Tensor, "batch"] | None = None,
    ) -> Float[Tensor, "batch"]:
        """Score images within [-1, 1]; labels do not matter."""
        x = images
        for block in self.blocks:
            x = block(x)
        features = F.relu(self.norm(self.conv(x))).sum(dim=(2, 3))
        return self.linear(features).squeeze(1)


def _optional(layer: nn.Module | None, x: Tensor) -> Tensor:
    """Apply a layer where there is one."""
    return x if layer is None else layer(x)
