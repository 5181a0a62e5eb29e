"""ResNet and feature pyramid, built of torchvision's parts, with norms that suit detection."""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock

from eanet.errors import UserError
from eanet.nn.insertion import BranchNorm, insert_external_attention
from eanet.tasks.detection.weights import draw_weights, kaiming_fan_out_

__all__ = ["BODIES", "Backbone", "FixedStatisticsBatchNorm2d", "Norm", "ResNetBody"]

Norm = Literal["fixed", "batch", "group"]

#: block, number of blocks in each stage, width of the first stage
BODIES: dict[str, tuple[type[BasicBlock | Bottleneck], tuple[int, ...], int]] = {
    "resnet50": (Bottleneck, (3, 4, 6, 3), 64),
    "resnet101": (Bottleneck, (3, 4, 23, 3), 64),
    "resnet34": (BasicBlock, (3, 4, 6, 3), 64),
    "resnet18": (BasicBlock, (2, 2, 2, 2), 64),
    "resnet10": (BasicBlock, (1, 1, 1, 1), 64),
    "resnet10_narrow": (BasicBlock, (1, 1, 1, 1), 16),
}


class FixedStatisticsBatchNorm2d(nn.BatchNorm2d):
    """Batch norm that keeps its statistics for ever and learns its weight and bias.

    For networks that start from weights trained with large batches. Its statistics stay what they
    are even in training mode; an ordinary batch norm elsewhere in the network is not touched.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.training = False

    def train(self, mode: bool = True) -> "FixedStatisticsBatchNorm2d":
        """Stay in evaluation mode."""
        del mode
        return super().train(False)


def _group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(min(32, channels // 4), channels)


_NORMS: dict[str, Callable[[int], nn.Module]] = {
    "fixed": FixedStatisticsBatchNorm2d,
    "batch": nn.BatchNorm2d,
    "group": _group_norm,
}


class ResNetBody(nn.Module):
    """The four stages of a ResNet, under torchvision's names of parameters.

    Args:
        name: one of :data:`BODIES`.
        norm: "fixed" for :class:`FixedStatisticsBatchNorm2d`, "batch", or "group".
        frozen_stages: 1 keeps the stem and the first stage as they are, 0 the stem alone; ``None``
            trains all.

    Raises:
        ValueError: an argument is unknown or outside its range.
    """

    def __init__(self, name: str, *, norm: Norm, frozen_stages: int | None) -> None:
        super().__init__()
        if name not in BODIES:
            raise ValueError(f"backbone must be one of {', '.join(BODIES)}, got {name!r}")
        if norm not in _NORMS:
            raise ValueError(f"norm must be one of {', '.join(_NORMS)}, got {norm!r}")
        if frozen_stages is not None and frozen_stages not in range(5):
            raise ValueError(f"frozen_stages must be within 0..4, or null, got {frozen_stages}")
        block, depths, width = BODIES[name]
        make_norm = _NORMS[norm]
        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = make_norm(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        channels, self.channels = width, []
        for stage, depth in enumerate(depths):
            blocks = []
            for place in range(depth):
                stride = 2 if stage and not place else 1
                planes = width * 2**stage
                wide = planes * block.expansion
                shortcut = None
                if stride != 1 or channels != wide:
                    shortcut = nn.Sequential(
                        nn.Conv2d(channels, wide, 1, stride=stride, bias=False), make_norm(wide)
                    )
                blocks.append(block(channels, planes, stride, shortcut, norm_layer=make_norm))
                channels = wide
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
            self.channels.append(channels)
        draw_weights(self, kaiming_fan_out_)
        frozen = [] if frozen_stages is None else [self.conv1, self.bn1]
        frozen += [self.get_submodule(f"layer{n + 1}") for n in range(frozen_stages or 0)]
        for module in frozen:
            module.requires_grad_(False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the results of the four stages, at strides 4, 8, 16 and 32."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        found = []
        for stage in range(1, 5):
            x = self.get_submodule(f"layer{stage}")(x)
            found.append(x)
        return found


class _MaxPooledLevel(ExtraFPNBlock):
    """P6 of two-stage detectors: every second cell of P5."""

    def forward(
        self, results: list[Tensor], x: list[Tensor], names: list[str]
    ) -> tuple[list[Tensor], list[str]]:
        return [*results, F.max_pool2d(results[-1], 1, 2)], [*names, "pool"]


class _ConvolvedLevels(ExtraFPNBlock):
    """P6 and P7 of RetinaNet: convolutions on C5, without an activation in between."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.p6 = nn.Conv2d(in_channels, channels, 3, stride=2, padding=1)
        self.p7 = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(
        self, results: list[Tensor], x: list[Tensor], names: list[str]
    ) -> tuple[list[Tensor], list[str]]:
        p6 = self.p6(x[-1])
        return [*results, p6, self.p7(p6)], [*names, "p6", "p7"]


class Backbone(nn.Module):
    """Images to a pyramid of feature maps of one width.

    Args:
        body: name of the ResNet.
        channels: width of the pyramid.
        first_stage: 1 starts the pyramid at stride 4, 2 at stride 8.
        further_levels: "pool" adds one level, "convolutions" two.
        norm: of the ResNet.
        frozen_stages: of the ResNet.
        attention: one block of external attention after the last stage, before the pyramid.
        attention_after: the stage it follows.
        num_slots: of the block.
        inner_channels: width of its queries and memories; ``None`` for that of the stage.
        attention_norm: what follows its branch.

    Raises:
        ValueError: an argument is unknown or outside its range.
    """

    def __init__(
        self,
        body: str,
        *,
        channels: int,
        first_stage: int,
        further_levels: Literal["pool", "convolutions"],
        norm: Norm,
        frozen_stages: int | None,
        attention: bool,
        attention_after: str = "layer4",
        num_slots: int = 64,
        inner_channels: int | None = 512,
        attention_norm: BranchNorm = "affine",
    ) -> None:
        super().__init__()
        self.body = ResNetBody(body, norm=norm, frozen_stages=frozen_stages)
        self.first_stage = first_stage
        widths = self.body.channels[first_stage - 1 :]
        extra: ExtraFPNBlock = _MaxPooledLevel()
        if further_levels == "convolutions":
            extra = _ConvolvedLevels(widths[-1], channels)
        self.fpn = FeaturePyramidNetwork(widths, channels, extra_blocks=extra)
        self.channels = channels
        last = len(widths) + first_stage + (1 if further_levels == "pool" else 2)
        self.strides = [2 ** (level + 1) for level in range(first_stage, last)]
        draw_weights(self.fpn, nn.init.xavier_uniform_)
        if attention:
            stage = {f"layer{n}": n for n in range(1, 5)}.get(attention_after)
            if stage is None:
                raise ValueError(f"attention_after must be layer1..layer4, got {attention_after!r}")
            width = self.body.channels[stage - 1]
            insert_external_attention(
                self.body,
                after=attention_after,
                channels=width,
                num_slots=num_slots,
                inner_channels=inner_channels,
                branch_norm=attention_norm,
                # a stage ends in a ReLU, so another one changes nothing at first
                activation="relu",
            )

    @torch.no_grad()
    def load_imagenet_weights(self, tensors: Mapping[str, Tensor], *, source: str) -> None:
        """Start the ResNet from those of a classifier of torchvision or timm.

        Its classifier is left out; a block of external attention keeps its own weights.

        Args:
            tensors: the state of the classifier, such as torchvision's ResNet-50 (V1).
            source: how messages call it.

        Raises:
            UserError: it is another network.
        """
        own = {
            name: tensor
            for name, tensor in self.body.state_dict().items()
            if ".external_attention." not in name
        }
        given = {name: x for name, x in tensors.items() if not name.startswith("fc.")}
        # files from before PyTorch 0.4 do not count batches
        given = {name: x for name, x in own.items() if name.endswith("_tracked")} | given
        for name, tensor in own.items():
            if name not in given or given[name].shape != tensor.shape:
                what = f"{tuple(given[name].shape)}" if name in given else "nothing"
                raise UserError(
                    f"{source}: not the weights of this ResNet: {name!r} should be "
                    f"{tuple(tensor.shape)}, the file has {what}"
                )
        unknown = sorted(given.keys() - own.keys())
        if unknown:
            raise UserError(f"{source}: not the weights of this ResNet: it has {unknown[0]!r}")
        self.body.load_state_dict(given, strict=False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the feature maps, finest first.

        Args:
            images: (batch, 3, height, width), normalized.
        """
        stages = self.body(images)[self.first_stage - 1 :]
        named = OrderedDict((str(number), stage) for number, stage in enumerate(stages))
        return list(self.fpn(named).values())
