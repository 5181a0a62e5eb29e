"""Residual networks with a deep stem and a chosen output stride.

The variant of PyTorch-Encoding that the authors of external attention use: three 3x3 convolutions
in place of the 7x7 one, the stride on the 3x3 convolution of a bottleneck, and late stages that
dilate instead of striding. State-dict names are those of timm's ``resnet*s``, whose weights load by
name. Architecture: He et al., arXiv 1512.03385; dilation: arXiv 1705.09914; the multi-grid: DeepLab
v3, arXiv 1706.05587.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from eanet.errors import UserError
from eanet.nn.initialization import initialize_fan_out_

__all__ = ["DEPTHS", "ResNet", "downsample_mask", "zero_outside"]

#: blocks of the four stages, and whether they are bottlenecks
DEPTHS: dict[int, tuple[tuple[int, int, int, int], bool]] = {
    18: ((2, 2, 2, 2), False),
    34: ((3, 4, 6, 3), False),
    50: ((3, 4, 6, 3), True),
    101: ((3, 4, 23, 3), True),
    152: ((3, 8, 36, 3), True),
}

_Norm = Callable[[int], nn.Module]


def zero_outside(x: Tensor, mask: Tensor | None) -> Tensor:
    """Return a feature map with zeros where the mask is false, as a convolution pads it."""
    return x if mask is None else x.masked_fill(~mask.unsqueeze(1), 0.0)


def downsample_mask(mask: Tensor | None, stride: int) -> Tensor | None:
    """Return the mask of what a convolution with a stride makes of the marked rectangle.

    A 3x3 convolution of stride 2 and padding 1 turns h rows into ceil(h / 2), centered on the even
    ones.
    """
    return mask if mask is None or stride == 1 else mask[:, ::stride, ::stride]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut.

    Args:
        in_channels: of the input.
        width: of both convolutions and of the result.
        stride: of the first convolution.
        first_dilation: of the first convolution.
        dilation: of the second.
        norm: builds a normalization for a number of channels.
    """

    expansion = 1

    def __init__(
        self,
        in_channels: int,
        width: int,
        *,
        stride: int,
        first_dilation: int,
        dilation: int,
        norm: _Norm,
    ) -> None:
        super().__init__()
        self.conv1 = _conv3x3(in_channels, width, stride=stride, dilation=first_dilation)
        self.bn1 = norm(width)
        self.conv2 = _conv3x3(width, width, dilation=dilation)
        self.bn2 = norm(width)
        self.downsample = _shortcut(in_channels, width, stride, norm)
        self.stride = stride

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Return the result and its mask; see :meth:`ResNet.forward`."""
        inner = downsample_mask(mask, self.stride)
        out = torch.relu(self.bn1(self.conv1(zero_outside(x, mask))))
        out = self.bn2(self.conv2(zero_outside(out, inner)))
        shortcut = x if self.downsample is None else self.downsample(x)
        return torch.relu(out + shortcut), inner


class Bottleneck(nn.Module):
    """A 3x3 convolution between two of 1x1, and a shortcut; the stride is on the 3x3.

    Args:
        in_channels: of the input.
        width: of the 3x3 convolution; the result has four times as many channels.
        stride: of the 3x3 convolution.
        first_dilation: of the 3x3 convolution.
        dilation: of the following block, unused here.
        norm: builds a normalization for a number of channels.
    """

    expansion = 4

    def __init__(
        self,
        in_channels: int,
        width: int,
        *,
        stride: int,
        first_dilation: int,
        dilation: int,
        norm: _Norm,
    ) -> None:
        del dilation
        super().__init__()
        channels = width * self.expansion
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = norm(width)
        self.conv2 = _conv3x3(width, width, stride=stride, dilation=first_dilation)
        self.bn2 = norm(width)
        self.conv3 = nn.Conv2d(width, channels, 1, bias=False)
        self.bn3 = norm(channels)
        self.downsample = _shortcut(in_channels, channels, stride, norm)
        self.stride = stride

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Return the result and its mask; see :meth:`ResNet.forward`."""
        out = torch.relu(self.bn1(self.conv1(x)))
        out = torch.relu(self.bn2(self.conv2(zero_outside(out, mask))))
        out = self.bn3(self.conv3(out))
        shortcut = x if self.downsample is None else self.downsample(x)
        return torch.relu(out + shortcut), downsample_mask(mask, self.stride)


def _conv3x3(in_channels: int, channels: int, *, stride: int = 1, dilation: int = 1) -> nn.Conv2d:
    return nn.Conv2d(
        in_channels, channels, 3, stride=stride, padding=dilation, dilation=dilation, bias=False
    )


def _shortcut(in_channels: int, channels: int, stride: int, norm: _Norm) -> nn.Sequential | None:
    """Return the projection of the first block of a stage, ``None`` where the input fits."""
    if stride == 1 and in_channels == channels:
        return None
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False), norm(channels)
    )


class ResNet(nn.Module):
    """A residual network that returns the feature maps of its four stages.

    ================  ==============  ==============  ==============================
    output stride     stage 3         stage 4         dilations of stage 4 (grid 1, 2, 4)
    ================  ==============  ==============  ==============================
    32                stride 2        stride 2        1, 1, 1
    16                stride 2        dilated         1, 4, 8
    8                 dilated         dilated         2, 8, 16
    ================  ==============  ==============  ==============================

    The first block of a dilated stage has half the dilation of its stage and is not multiplied by
    the grid, as in the authors' code. Without dilation there is no grid.

    Args:
        depth: 18 and 34 have basic blocks, 50, 101 and 152 bottlenecks.
        in_channels: of the image.
        output_stride: pixels between neighboring positions of the last map: 8, 16 or 32; half of
            these where ``stem_pool`` is false.
        multi_grid: factors on the dilations of the blocks of stage 4; (1, 1, 1) for none.
        stem_channels: of the three convolutions of the stem: (64, 64, 128) for the authors' and
            timm's ``resnet*s``, (32, 32, 64) for mmsegmentation's "v1c".
        stem_pool: whether the stem ends with a max pooling of stride 2; without it small images
            keep more positions.
        width: channels of the first stage; each following one has twice as many.
        norm: builds a normalization for a number of channels.

    Raises:
        ValueError: an argument is outside its range.

    >>> network = ResNet(18, width=8, stem_channels=(8, 8, 16), output_stride=8)
    >>> [tuple(stage.shape) for stage in network(torch.zeros(1, 3, 65, 33))]
    [(1, 8, 17, 9), (1, 16, 9, 5), (1, 32, 9, 5), (1, 64, 9, 5)]
    """

    def __init__(
        self,
        depth: int = 50,
        in_channels: int = 3,
        *,
        output_stride: Literal[4, 8, 16, 32] = 32,
        multi_grid: Sequence[int] = (1, 2, 4),
        stem_channels: tuple[int, int, int] = (64, 64, 128),
        stem_pool: bool = True,
        width: int = 64,
        norm: _Norm = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        if depth not in DEPTHS:
            raise ValueError(f"depth must be one of {', '.join(map(str, DEPTHS))}; got {depth}")
        strides = (8, 16, 32) if stem_pool else (4, 8, 16)
        if output_stride not in strides:
            raise ValueError(
                f"output_stride must be one of {strides} with stem_pool={stem_pool}, "
                f"got {output_stride}"
            )
        if len(multi_grid) != 3 or min(multi_grid) < 1:
            raise ValueError(f"multi_grid must be three positive factors, got {multi_grid}")
        if len(stem_channels) != 3 or min(*stem_channels, width, in_channels) < 1:
            raise ValueError(
                f"stem_channels must be three positive widths and width and in_channels "
                f"positive, got {stem_channels}, {width} and {in_channels}"
            )
        blocks, is_bottleneck = DEPTHS[depth]
        self.output_stride = output_stride
        self.stem_pool = stem_pool
        first, second, third = stem_channels
        self.conv1 = nn.Sequential(
            _conv3x3(in_channels, first, stride=2),
            norm(first),
            nn.ReLU(),
            _conv3x3(first, second),
            norm(second),
            nn.ReLU(),
            _conv3x3(second, third),
        )
        self.bn1 = norm(third)
        block = Bottleneck if is_bottleneck else BasicBlock
        channels = third
        dilation, stride_now = 1, 4 if stem_pool else 2
        self.stage_channels: list[int] = []
        for number, count in enumerate(blocks):
            stride, before = 1, dilation
            if number and stride_now < output_stride:
                stride, stride_now = 2, stride_now * 2
            elif number:
                dilation *= 2
            layers: list[nn.Module] = []
            for place in range(count):
                grid = multi_grid[place % 3] if number == 3 and dilation > 1 and place else 1
                layers.append(
                    block(
                        channels,
                        width * 2**number,
                        stride=stride if place == 0 else 1,
                        first_dilation=before if place == 0 else dilation * grid,
                        dilation=dilation * grid,
                        norm=norm,
                    )
                )
                channels = width * 2**number * block.expansion
            self.add_module(f"layer{number + 1}", nn.ModuleList(layers))
            self.stage_channels.append(channels)
        self.reset_parameters()

    @property
    def out_channels(self) -> int:
        """Channels of the last stage."""
        return self.stage_channels[-1]

    def reset_parameters(self) -> None:
        """Draw convolutions from Normal(0, sqrt(2 / fan_out)); normalizations start as identity."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                initialize_fan_out_(module.weight)
            elif isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm):
                module.reset_parameters()

    def forward(
        self,
        images: Float[Tensor, "batch channels height width"],
        mask: Bool[Tensor, "batch height width"] | None = None,
    ) -> list[Tensor]:
        """Return the maps of the four stages.

        Args:
            images: normalized.
            mask: true within a rectangle at the top left of each image. Positions beyond it come
                in no way into those within: what a convolution would see there is zero, as at the
                edge of an image of that size. In evaluation mode only.

        Raises:
            ValueError: a mask in training, whose batch statistics would count padding.
        """
        if mask is not None and self.training:
            raise ValueError("masked images need evaluation mode; train on images of one size")
        x = images
        for layer in self.conv1:
            if isinstance(layer, nn.Conv2d):
                x = layer(zero_outside(x, mask))
                mask = downsample_mask(mask, layer.stride[0])
            else:
                x = layer(x)
        x = torch.relu(self.bn1(x))
        if self.stem_pool:
            # the values are 0 or more, so zeros around them are no maximum, like the edge's -inf
            x = nn.functional.max_pool2d(zero_outside(x, mask), 3, stride=2, padding=1)
            mask = downsample_mask(mask, 2)
        stages: list[Tensor] = []
        for number in range(1, 5):
            for block in self.get_submodule(f"layer{number}").children():
                x, mask = block(x, mask)
            stages.append(x)
        return stages

    def load_imagenet_weights(self, tensors: Mapping[str, Tensor], *, source: str) -> None:
        """Fill the network with a classifier of the same architecture, by name.

        Args:
            tensors: of timm's ``resnet*s``, of PyTorch-Encoding or of mmsegmentation's "v1c"
                files, which share their names; the classifier ``fc`` is left out.
            source: what error messages call them.

        Raises:
            UserError: a tensor is missing, unknown, or of another shape.
        """
        own = self.state_dict()
        # mmsegmentation calls the stem by another name
        given = {
            name.replace("stem.7.", "bn1.").replace("stem.", "conv1."): tensor
            for name, tensor in tensors.items()
            if not name.startswith("fc.") and not name.endswith("num_batches_tracked")
        }
        counts = {name for name in own if name.endswith("num_batches_tracked")}
        missing, unknown = (
            sorted(own.keys() - given.keys() - counts),
            sorted(given.keys() - own.keys()),
        )
        if missing or unknown:
            what = f"lacks {missing[0]!r}" if missing else f"has the unknown {unknown[0]!r}"
            raise UserError(
                f"{source}: not the weights of this backbone: it {what} "
                f"({len(missing)} missing, {len(unknown)} unknown)"
            )
        for name, tensor in given.items():
            if tensor.shape != own[name].shape:
                raise UserError(
                    f"{source}: {name!r} has shape {tuple(tensor.shape)}, "
                    f"the backbone expects {tuple(own[name].shape)}"
                )
        self.load_state_dict({**{name: own[name] for name in counts}, **given})
