"""The segmentation network of Figure 3 (arXiv 2105.02358), with any block in its middle.

    image -> backbone -> reduce (3x3) -> attention -> refine (3x3), dropout -> classifier (1x1)
          -> bilinear to the size of the image

FCN, FCN + SA and the seven compared modules are the same network with another block. The names of
the authors' file are in :mod:`eanet.tasks.segmentation.official_keys`.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import FrozenBatchNorm2d

from eanet.backbones.resnet import DEPTHS, ResNet, downsample_mask, zero_outside
from eanet.nn.compared import COMPARED_MODULES, SelfAttention2d
from eanet.nn.external_attention import ExternalAttention2d
from eanet.ops.attention import Norm

__all__ = ["BLOCKS", "ConvNormRelu", "Segmenter", "SelfAttentionBlock"]

#: what can stand between `reduce` and `refine`: external attention, nothing, self-attention with
#: residual, or a module of Table 12 as that table counts it
BLOCKS = ("ea", "none", "sa", *(name.lower() for name in COMPARED_MODULES if name != "SA"))

BatchNorm = Literal["plain", "frozen", "synchronized"]


class ConvNormRelu(nn.Module):
    """A 3x3 convolution without bias, batch norm, ReLU."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of the same height and width."""
        return torch.relu(self.norm(self.conv(x)))


class SelfAttentionBlock(nn.Module):
    """``relu(x + batch_norm(self_attention(x)))``, the block of rows 2 and 3 of Table 1.

    Deviation: the authors did not publish theirs; this one has the parameters that Table 12 counts
    for self-attention, and the batch norm and residual of the external one.

    Args:
        channels: of input and result.
        norm: "softmax" over keys (row 2) or "double" (row 3).
    """

    def __init__(self, channels: int, *, norm: Norm = "softmax") -> None:
        super().__init__()
        # the fused kernels never hold the map among all pairs of positions; the result is the same
        implementation = "fused" if norm == "softmax" else "explicit"
        self.attention = SelfAttention2d(channels, norm=norm, implementation=implementation)
        self.norm = nn.BatchNorm2d(channels)
        self.out_channels = channels

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend among all positions, those of the mask where there is one."""
        branch = self.norm(self.attention(x, mask))
        return torch.relu(x + zero_outside(branch, mask))


def _build_block(
    kind: str, channels: int, num_slots: int, norm: Norm, options: dict[str, Any]
) -> nn.Module:
    """Return the block between the two 3x3 convolutions."""
    if kind not in BLOCKS:
        raise ValueError(f"block must be one of {', '.join(BLOCKS)}; got {kind!r}")
    if kind == "ea":
        return ExternalAttention2d(channels, num_slots, norm=norm, **options)
    if options:
        raise ValueError(f"block {kind!r} does not take {', '.join(options)}")
    if kind == "none":
        return nn.Identity()
    if kind == "sa":
        return SelfAttentionBlock(channels, norm=norm)
    build = next(build for name, build in COMPARED_MODULES.items() if name.lower() == kind)
    return build(channels)


class Segmenter(nn.Module):
    """A dilated residual network and a head with one block; the classes of every pixel.

    Args:
        num_classes: K.
        in_channels: of the image.
        backbone: "resnet18", "resnet34", "resnet50", "resnet101" or "resnet152".
        output_stride: pixels between neighboring positions of the map that is classified.
        multi_grid: see :class:`eanet.backbones.resnet.ResNet`, as the next three.
        stem_channels: of the backbone.
        stem_pool: of the backbone.
        backbone_width: of the backbone.
        block: "ea" (external attention), "none" (FCN), "sa" (self-attention) or a module of
            Table 12: "da", "a2", "apc", "dm", "acf", "ham".
        num_slots: S of external attention.
        norm: "double" or "softmax", of "ea" (over the slots) and "sa" (over the keys).
        block_options: further arguments of
            :class:`eanet.nn.external_attention.ExternalAttention2d`, such as ``tie_memory``.
        channels: C, width of the block.
        refine_channels: width before the classifier.
        dropout: probability to drop a whole channel before the classifiers in training.
        concat: classify the refined map together with the reduced one, through a further 3x3
            convolution, as heads of mmsegmentation do.
        auxiliary: a second, plain head on stage 3, for training alone.
        auxiliary_channels: width of that head.
        align_corners: of the final bilinear resize: true suits sizes of 8 k + 1.
        classifier_std: standard deviation the classifiers start with; ``None`` for PyTorch's way.
        batch_norm: "plain", "synchronized" over the processes of a run, or "frozen" in the
            backbone (running statistics, weights and biases of its norms stay as they are).

    Raises:
        ValueError: an argument is outside its range.
    """

    def __init__(
        self,
        num_classes: int = 21,
        in_channels: int = 3,
        *,
        backbone: str = "resnet50",
        output_stride: Literal[4, 8, 16, 32] = 16,
        multi_grid: Sequence[int] = (1, 2, 4),
        stem_channels: Sequence[int] = (64, 64, 128),
        stem_pool: bool = True,
        backbone_width: int = 64,
        block: str = "ea",
        num_slots: int = 64,
        norm: Norm = "double",
        block_options: dict[str, Any] | None = None,
        channels: int = 512,
        refine_channels: int = 256,
        dropout: float = 0.1,
        concat: bool = False,
        auxiliary: bool = False,
        auxiliary_channels: int = 256,
        align_corners: bool = True,
        classifier_std: float | None = None,
        batch_norm: BatchNorm = "plain",
    ) -> None:
        super().__init__()
        depth = _depth(backbone)
        if batch_norm not in ("plain", "frozen", "synchronized"):
            raise ValueError(
                f"batch_norm must be 'plain', 'frozen' or 'synchronized', got {batch_norm!r}"
            )
        if min(num_classes, channels, refine_channels, auxiliary_channels) < 1:
            raise ValueError(
                "num_classes, channels, refine_channels and auxiliary_channels must be 1 or more"
            )
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be within [0, 1), got {dropout}")
        self.num_classes = num_classes
        self.in_channels = in_channels
        self.align_corners = align_corners
        self.output_stride = output_stride
        #: what benchmarks and summaries feed it
        self.input_shape = (in_channels, 513, 513)
        self.backbone = ResNet(
            depth,
            in_channels,
            output_stride=output_stride,
            multi_grid=multi_grid,
            stem_channels=cast(tuple[int, int, int], tuple(stem_channels)),
            stem_pool=stem_pool,
            width=backbone_width,
            norm=FrozenBatchNorm2d if batch_norm == "frozen" else nn.BatchNorm2d,
        )
        self.reduce = ConvNormRelu(self.backbone.out_channels, channels)
        self.attention = _build_block(block, channels, num_slots, norm, block_options or {})
        #: whether batches of masked images give what each image gives alone
        self.takes_masks = block in ("ea", "sa", "none")
        attended = getattr(self.attention, "out_channels", channels)
        self.refine = ConvNormRelu(attended, refine_channels)
        self.combine = ConvNormRelu(channels + refine_channels, refine_channels) if concat else None
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(refine_channels, num_classes, 1)
        self.auxiliary = (
            nn.ModuleDict(
                {
                    "reduce": ConvNormRelu(self.backbone.stage_channels[2], auxiliary_channels),
                    "classifier": nn.Conv2d(auxiliary_channels, num_classes, 1),
                }
            )
            if auxiliary
            else None
        )
        if classifier_std is not None:
            for name, module in self.named_modules():
                if name.endswith("classifier"):
                    nn.init.normal_(cast(nn.Conv2d, module).weight, std=classifier_std)
                    nn.init.zeros_(cast(Tensor, module.bias))
        if batch_norm == "synchronized":
            nn.SyncBatchNorm.convert_sync_batchnorm(self)

    def forward(
        self,
        images: Float[Tensor, "batch channels height width"],
        mask: Bool[Tensor, "batch height width"] | None = None,
        *,
        with_auxiliary: bool = False,
    ) -> Any:
        """Return logits (batch, classes, height, width) at the size of the images.

        Args:
            images: normalized.
            mask: true within a rectangle at the top left of each image, false on padding. The
                logits within are those of the image alone, without padding; beyond they are 0.
                In evaluation mode, and where :attr:`takes_masks`.
            with_auxiliary: return a pair: these logits, and those of the auxiliary head.

        Raises:
            ValueError: a mask where none can be taken, or there is no auxiliary head.
        """
        if mask is not None and not self.takes_masks:
            raise ValueError(f"{type(self.attention).__name__} takes no mask; group images by size")
        stages = self.backbone(images, mask)
        logits = self._resized(self.classify(stages[-1], mask), images, mask)
        if not with_auxiliary:
            return logits
        if self.auxiliary is None:
            raise ValueError("with_auxiliary=True needs a network built with auxiliary=True")
        x = self.auxiliary["reduce"](zero_outside(stages[2], self._map_mask(mask)))
        x = self.auxiliary["classifier"](self.dropout(x))
        return logits, self._resized(x, images, mask)

    def classify(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return logits at the resolution of the backbone's last map.

        Args:
            features: the last map of :attr:`backbone`.
            mask: of the images, as in :meth:`forward`.
        """
        valid = self._map_mask(mask)
        reduced = self.reduce(zero_outside(features, valid))
        attended = self.attention(reduced) if valid is None else self._attend(reduced, valid)
        x = self.refine(zero_outside(attended, valid))
        if self.combine is not None:
            x = self.combine(zero_outside(torch.cat([reduced, x], dim=1), valid))
        return self.classifier(self.dropout(x))

    def _attend(self, x: Tensor, valid: Tensor) -> Tensor:
        if isinstance(self.attention, nn.Identity):
            return x
        return self.attention(x, valid)

    def _map_mask(self, mask: Tensor | None) -> Tensor | None:
        """Return the mask at the resolution of the backbone's last map."""
        return downsample_mask(mask, self.output_stride)

    def _resized(self, logits: Tensor, images: Tensor, mask: Tensor | None) -> Tensor:
        """Return logits at the size of the images, each stretched over its own valid part."""
        resize = partial(F.interpolate, mode="bilinear", align_corners=self.align_corners)
        if mask is None:
            return resize(logits, images.shape[2:])
        out = logits.new_zeros(*logits.shape[:2], *images.shape[2:])
        heights, widths = mask.any(dim=2).sum(dim=1), mask.any(dim=1).sum(dim=1)
        for number, (height, width) in enumerate(
            zip(heights.tolist(), widths.tolist(), strict=True)
        ):
            rows, columns = (-(-side // self.output_stride) for side in (height, width))
            own = logits[number : number + 1, :, :rows, :columns]
            out[number, :, :height, :width] = resize(own, (height, width))[0]
        return out


def _depth(backbone: str) -> int:
    """Return the number in ``resnet<number>``."""
    depths = {f"resnet{depth}": depth for depth in DEPTHS}
    if backbone not in depths:
        raise ValueError(f"backbone must be one of {', '.join(depths)}; got {backbone!r}")
    return depths[backbone]
