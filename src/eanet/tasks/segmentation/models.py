"""The networks of Tables 1 and 5 to 7 (arXiv 2105.02358) by name, and small ones."""

from typing import Any

from eanet.registry import register_model
from eanet.tasks.segmentation.eanet import Segmenter

__all__ = [
    "eanet_resnet18",
    "eanet_resnet34",
    "eanet_resnet50",
    "eanet_resnet50_os8",
    "eanet_resnet50_s8",
    "eanet_resnet50_s32",
    "eanet_resnet50_s256",
    "eanet_resnet50_softmax",
    "eanet_resnet101",
    "eanet_resnet101_os8",
    "eanet_resnet101_v1c",
    "eanet_resnet152_os8",
    "eanet_small",
    "eanet_tiny",
    "fcn_resnet50",
    "fcn_sa_resnet50",
    "fcn_sa_resnet50_double",
    "fcn_sa_small",
    "fcn_sa_tiny",
    "fcn_small",
    "fcn_tiny",
]

#: what mmsegmentation's recipes for ADE20K and Cityscapes differ in
_V1C: dict[str, Any] = {
    "output_stride": 8,
    "stem_channels": (32, 32, 64),
    "multi_grid": (1, 1, 1),
    "auxiliary": True,
    "align_corners": False,
    "classifier_std": 0.01,
}
#: for images of some 120 x 160 pixels
_SMALL: dict[str, Any] = {
    "backbone": "resnet18",
    "stem_channels": (16, 16, 32),
    "stem_pool": False,
    "backbone_width": 16,
    # what is a few pixels wide, a pole or a sign, would be lost at 8
    "output_stride": 4,
    "channels": 128,
    "refine_channels": 64,
    "multi_grid": (1, 1, 1),
}
#: for images of 64 pixels
_TINY: dict[str, Any] = {
    "backbone": "resnet18",
    "stem_channels": (16, 16, 16),
    "stem_pool": False,
    "backbone_width": 16,
    "output_stride": 4,
    "multi_grid": (1, 1, 1),
    "channels": 64,
    "refine_channels": 64,
    "num_slots": 32,
    "dropout": 0.0,
}


def _build(
    num_classes: int, in_channels: int, preset: dict[str, Any], given: dict[str, Any]
) -> Segmenter:
    """Build a preset with what the caller changes of it."""
    return Segmenter(num_classes, in_channels, **{**preset, **given})


@register_model
def fcn_resnet50(num_classes: int = 21, in_channels: int = 3, **arguments: Any) -> Segmenter:
    """FCN: ResNet-50, output stride 16, no attention (Table 1, row 1: 75.7 %)."""
    return _build(num_classes, in_channels, {"block": "none"}, arguments)


@register_model
def fcn_sa_resnet50(num_classes: int = 21, in_channels: int = 3, **arguments: Any) -> Segmenter:
    """FCN with self-attention, softmax (Table 1, row 2: 76.2 %)."""
    return _build(num_classes, in_channels, {"block": "sa", "norm": "softmax"}, arguments)


@register_model
def fcn_sa_resnet50_double(
    num_classes: int = 21, in_channels: int = 3, **arguments: Any
) -> Segmenter:
    """FCN with self-attention, double normalization (Table 1, row 3: 76.6 %)."""
    return _build(num_classes, in_channels, {"block": "sa", "norm": "double"}, arguments)


@register_model
def eanet_resnet50_s8(num_classes: int = 21, in_channels: int = 3, **arguments: Any) -> Segmenter:
    """EANet with 8 slots (Table 1, row 4: 77.1 %)."""
    return _build(num_classes, in_channels, {"num_slots": 8}, arguments)


@register_model
def eanet_resnet50_s32(num_classes: int = 21, in_channels: int = 3, **arguments: Any) -> Segmenter:
    """EANet with 32 slots (Table 1, row 5: 77.2 %)."""
    return _build(num_classes, in_channels, {"num_slots": 32}, arguments)


@register_model
def eanet_resnet50_softmax(
    num_classes: int = 21, in_channels: int = 3, **arguments: Any
) -> Segmenter:
    """EANet with a softmax over the slots alone (Table 1, row 6: 75.3 %)."""
    return _build(num_classes, in_channels, {"norm": "softmax"}, arguments)


@register_model
def eanet_resnet50(num_classes: int = 21, in_channels: int = 3, **arguments: Any) -> Segmenter:
    """EANet: ResNet-50, output stride 16, 64 slots (Table 1, row 7: 77.4 %)."""
    return _build(num_classes, in_channels, {}, arguments)


@register_model
def eanet_resnet50_os8(num_classes: int = 21, in_channels: int = 3, **arguments: Any) -> Segmenter:
    """EANet at output stride 8 (Table 1, row 8: 77.8 %)."""
    return _build(num_classes, in_channels, {"output_stride": 8}, arguments)


@register_model
def eanet_resnet50_s256(num_classes: int = 21, in_channels: int = 3, **arguments: Any) -> Segmenter:
    """EANet with 256 slots (Table 1, row 9: 77.0 %)."""
    return _build(num_classes, in_channels, {"num_slots": 256}, arguments)


@register_model
def eanet_resnet101(num_classes: int = 21, in_channels: int = 3, **arguments: Any) -> Segmenter:
    """EANet: ResNet-101, output stride 16 (Table 1, row 10: 78.3 %)."""
    return _build(num_classes, in_channels, {"backbone": "resnet101"}, arguments)


@register_model
def eanet_resnet101_os8(num_classes: int = 21, in_channels: int = 3, **arguments: Any) -> Segmenter:
    """EANet: ResNet-101, output stride 8 (Table 5: 84.0 % on the VOC test server)."""
    return _build(
        num_classes, in_channels, {"backbone": "resnet101", "output_stride": 8}, arguments
    )


@register_model
def eanet_resnet101_v1c(
    num_classes: int = 150, in_channels: int = 3, **arguments: Any
) -> Segmenter:
    """EANet on mmsegmentation's ResNet-101 "v1c" with an auxiliary head (Tables 6 and 7)."""
    return _build(num_classes, in_channels, {"backbone": "resnet101", **_V1C}, arguments)


@register_model
def eanet_resnet152_os8(num_classes: int = 21, in_channels: int = 3, **arguments: Any) -> Segmenter:
    """EANet: ResNet-152, output stride 8; in the authors' code, in no table."""
    return _build(
        num_classes, in_channels, {"backbone": "resnet152", "output_stride": 8}, arguments
    )


@register_model
def eanet_resnet18(num_classes: int = 21, in_channels: int = 3, **arguments: Any) -> Segmenter:
    """EANet: ResNet-18, output stride 16; in no table."""
    return _build(num_classes, in_channels, {"backbone": "resnet18"}, arguments)


@register_model
def eanet_resnet34(num_classes: int = 21, in_channels: int = 3, **arguments: Any) -> Segmenter:
    """EANet: ResNet-34, output stride 16; in no table."""
    return _build(num_classes, in_channels, {"backbone": "resnet34"}, arguments)


@register_model
def eanet_small(num_classes: int = 11, in_channels: int = 3, **arguments: Any) -> Segmenter:
    """EANet on a ResNet-18 of a quarter of the width, for images of some 120 x 160 pixels."""
    return _build(num_classes, in_channels, _SMALL, arguments)


@register_model
def fcn_small(num_classes: int = 11, in_channels: int = 3, **arguments: Any) -> Segmenter:
    """The network of ``eanet_small`` without attention."""
    return _build(num_classes, in_channels, {**_SMALL, "block": "none"}, arguments)


@register_model
def fcn_sa_small(num_classes: int = 11, in_channels: int = 3, **arguments: Any) -> Segmenter:
    """The network of ``eanet_small`` with self-attention in place of external attention."""
    preset = {**_SMALL, "block": "sa", "norm": "softmax"}
    return _build(num_classes, in_channels, preset, arguments)


@register_model
def eanet_tiny(num_classes: int = 7, in_channels: int = 3, **arguments: Any) -> Segmenter:
    """EANet on a ResNet-18 of a quarter of the width, for images of 64 pixels."""
    return _build(num_classes, in_channels, _TINY, arguments)


@register_model
def fcn_tiny(num_classes: int = 7, in_channels: int = 3, **arguments: Any) -> Segmenter:
    """The network of ``eanet_tiny`` without attention."""
    return _build(num_classes, in_channels, {**_TINY, "block": "none"}, arguments)


@register_model
def fcn_sa_tiny(num_classes: int = 7, in_channels: int = 3, **arguments: Any) -> Segmenter:
    """The network of ``eanet_tiny`` with self-attention in place of external attention."""
    preset = {**_TINY, "block": "sa", "norm": "softmax"}
    return _build(num_classes, in_channels, preset, arguments)
