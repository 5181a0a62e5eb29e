"""The networks of Table 2 (arXiv 2105.02358) by name, and small ones for images of 32 pixels."""

from typing import Any

from eanet.registry import register_model
from eanet.tasks.classification.t2t_vit import T2TViT

__all__ = [
    "eamlp_7",
    "eamlp_7_384",
    "eamlp_14",
    "eamlp_19",
    "eamlp_bn_7",
    "eamlp_bn_14",
    "eamlp_bn_19",
    "eamlp_tiny",
    "mlp_7",
    "mlp_tiny",
    "t2t_vit_7",
    "t2t_vit_7_ea",
    "t2t_vit_7_h1",
    "t2t_vit_7_mea_h1_s256",
    "t2t_vit_7_mea_h4_s256",
    "t2t_vit_7_mea_h16_s64",
    "t2t_vit_7_mea_h16_s64_384",
    "t2t_vit_7_mea_h16_s128",
    "t2t_vit_7_mea_h32_s32",
    "t2t_vit_14",
    "t2t_vit_14_ea",
    "t2t_vit_14_mea",
    "t2t_vit_19",
    "t2t_vit_19_mea",
    "t2t_vit_t_14",
    "t2t_vit_tiny",
]

# width, depth and MLP of the three sizes; the heads are those of self-attention
_SIZE_7: dict[str, Any] = {"channels": 256, "depth": 7, "num_heads": 4, "mlp_ratio": 2.0}
_SIZE_14: dict[str, Any] = {"channels": 384, "depth": 14, "num_heads": 6, "mlp_ratio": 3.0}
# the paper prints 6 heads, which 448 channels cannot have; the authors' code has 7
_SIZE_19: dict[str, Any] = {"channels": 448, "depth": 19, "num_heads": 7, "mlp_ratio": 3.0}
# For images of 32 pixels: the stem keeps a grid of 8 x 8 tokens. The head reads the mean of the
# tokens: a class token among external attention hears of the image only through the sums of a
# softmax, and learns several times slower on little data.
_TINY: dict[str, Any] = {
    "image_size": 32,
    "channels": 64,
    "depth": 3,
    "num_heads": 4,
    "mlp_ratio": 2.0,
    "pool": "avg",
    "stem_channels": 32,
    "stem_kernels": (3, 3),
    "stem_strides": (2, 2),
    "stem_num_slots": 16,
    "initialization": "fan_in",
}
_TINY_EXTERNAL = {"num_heads": 4, "num_slots": 16, "expansion": 2}


def _external(size: dict[str, Any], **arguments: Any) -> dict[str, Any]:
    """Return a size with external attention: 4 times the heads on 4 times the width."""
    usual = {"mixer": "external", "num_heads": 4 * size["num_heads"], "expansion": 4}
    return {**size, **usual, "num_slots": 64, **arguments}


def _build(num_classes: int, in_channels: int, preset: dict[str, Any], given: Any) -> T2TViT:
    """Build a preset with what the caller changes of it."""
    return T2TViT(num_classes, in_channels, **{**preset, **given})


@register_model
def t2t_vit_7_h1(num_classes: int = 1000, in_channels: int = 3, **arguments: Any) -> T2TViT:
    """T2T-ViT-7 with one head (Table 2, row 1: 67.4 %)."""
    return _build(
        num_classes,
        in_channels,
        {**_SIZE_7, "stem": "performer", "mixer": "self", "num_heads": 1},
        arguments,
    )


@register_model
def t2t_vit_7(num_classes: int = 1000, in_channels: int = 3, **arguments: Any) -> T2TViT:
    """T2T-ViT-7: Performer stem, self-attention (Table 2, row 2: 71.7 %)."""
    return _build(
        num_classes, in_channels, {**_SIZE_7, "stem": "performer", "mixer": "self"}, arguments
    )


@register_model
def t2t_vit_14(num_classes: int = 1000, in_channels: int = 3, **arguments: Any) -> T2TViT:
    """T2T-ViT-14: Performer stem, self-attention (Table 2, row 3: 81.5 %)."""
    return _build(
        num_classes, in_channels, {**_SIZE_14, "stem": "performer", "mixer": "self"}, arguments
    )


@register_model
def t2t_vit_t_14(num_classes: int = 1000, in_channels: int = 3, **arguments: Any) -> T2TViT:
    """T2T-ViT-t-14: Transformer stem, self-attention (Table 2, row 4: 81.7 %)."""
    return _build(
        num_classes, in_channels, {**_SIZE_14, "stem": "transformer", "mixer": "self"}, arguments
    )


@register_model
def t2t_vit_19(num_classes: int = 1000, in_channels: int = 3, **arguments: Any) -> T2TViT:
    """T2T-ViT-19: Performer stem, self-attention (Table 2, row 5: 81.9 %)."""
    return _build(
        num_classes, in_channels, {**_SIZE_19, "stem": "performer", "mixer": "self"}, arguments
    )


@register_model
def t2t_vit_7_ea(num_classes: int = 1000, in_channels: int = 3, **arguments: Any) -> T2TViT:
    """T2T-ViT-7 with external attention in the stem (Table 2, row 6: 71.7 %)."""
    return _build(num_classes, in_channels, {**_SIZE_7, "stem": "ea", "mixer": "self"}, arguments)


@register_model
def t2t_vit_14_ea(num_classes: int = 1000, in_channels: int = 3, **arguments: Any) -> T2TViT:
    """T2T-ViT-14 with external attention in the stem (Table 2, row 7: 81.7 %)."""
    return _build(num_classes, in_channels, {**_SIZE_14, "stem": "ea", "mixer": "self"}, arguments)


@register_model
def t2t_vit_7_mea_h1_s256(
    num_classes: int = 1000, in_channels: int = 3, **arguments: Any
) -> T2TViT:
    """T2T-ViT-7, external attention of 1 head and 256 slots (Table 2, row 8: 63.2 %)."""
    return _build(
        num_classes,
        in_channels,
        _external(_SIZE_7, stem="performer", num_heads=1, num_slots=256, expansion=1),
        arguments,
    )


@register_model
def t2t_vit_7_mea_h4_s256(
    num_classes: int = 1000, in_channels: int = 3, **arguments: Any
) -> T2TViT:
    """T2T-ViT-7, external attention of 4 heads and 256 slots (Table 2, row 9: 66.8 %).

    The width of 3 is inferred: it is the one whose parameters round to the published 5.9 M.
    """
    return _build(
        num_classes,
        in_channels,
        _external(_SIZE_7, stem="performer", num_heads=4, num_slots=256, expansion=3),
        arguments,
    )


@register_model
def t2t_vit_7_mea_h16_s64(
    num_classes: int = 1000, in_channels: int = 3, **arguments: Any
) -> T2TViT:
    """T2T-ViT-7, external attention of 16 heads and 64 slots (Table 2, row 10: 68.6 %)."""
    return _build(num_classes, in_channels, _external(_SIZE_7, stem="performer"), arguments)


@register_model
def t2t_vit_7_mea_h16_s64_384(
    num_classes: int = 1000, in_channels: int = 3, **arguments: Any
) -> T2TViT:
    """Row 10 for images of 384 pixels (Table 2, row 11: 70.9 %)."""
    return _build(
        num_classes, in_channels, _external(_SIZE_7, stem="performer", image_size=384), arguments
    )


@register_model
def t2t_vit_7_mea_h16_s128(
    num_classes: int = 1000, in_channels: int = 3, **arguments: Any
) -> T2TViT:
    """T2T-ViT-7, external attention of 16 heads and 128 slots (Table 2, row 12: 69.9 %)."""
    return _build(
        num_classes, in_channels, _external(_SIZE_7, stem="performer", num_slots=128), arguments
    )


@register_model
def t2t_vit_7_mea_h32_s32(
    num_classes: int = 1000, in_channels: int = 3, **arguments: Any
) -> T2TViT:
    """T2T-ViT-7, external attention of 32 heads and 32 slots (Table 2, row 13: 70.5 %)."""
    return _build(
        num_classes,
        in_channels,
        _external(_SIZE_7, stem="performer", num_heads=32, num_slots=32, expansion=8),
        arguments,
    )


@register_model
def t2t_vit_14_mea(num_classes: int = 1000, in_channels: int = 3, **arguments: Any) -> T2TViT:
    """T2T-ViT-14 with external attention in the backbone (Table 2, row 14: 78.7 %)."""
    return _build(num_classes, in_channels, _external(_SIZE_14, stem="performer"), arguments)


@register_model
def t2t_vit_19_mea(num_classes: int = 1000, in_channels: int = 3, **arguments: Any) -> T2TViT:
    """T2T-ViT-19 with external attention in the backbone (Table 2, row 15: 79.3 %)."""
    return _build(num_classes, in_channels, _external(_SIZE_19, stem="performer"), arguments)


@register_model
def mlp_7(num_classes: int = 1000, in_channels: int = 3, **arguments: Any) -> T2TViT:
    """The linear layers of EAMLP-7 without attention (Table 2, row 16: failed).

    Nothing mixes tokens after the stem, so the class token knows nothing of the image and the
    loss stays at ln(classes). ``pool="avg"`` makes it learn.
    """
    return _build(num_classes, in_channels, _external(_SIZE_7, stem="mlp", mixer="mlp"), arguments)


@register_model
def eamlp_7(num_classes: int = 1000, in_channels: int = 3, **arguments: Any) -> T2TViT:
    """EAMLP-7: external attention in stem and backbone (Table 2, row 17: 68.9 %)."""
    return _build(num_classes, in_channels, _external(_SIZE_7, stem="ea"), arguments)


@register_model
def eamlp_bn_7(num_classes: int = 1000, in_channels: int = 3, **arguments: Any) -> T2TViT:
    """EAMLP-BN-7: batch norm before the MLPs (Table 2, row 18: 70.0 %)."""
    return _build(num_classes, in_channels, _external(_SIZE_7, stem="ea", norm2="batch"), arguments)


@register_model
def eamlp_7_384(num_classes: int = 1000, in_channels: int = 3, **arguments: Any) -> T2TViT:
    """EAMLP-7 for images of 384 pixels (Table 2, row 19: 71.7 %)."""
    return _build(
        num_classes, in_channels, _external(_SIZE_7, stem="ea", image_size=384), arguments
    )


@register_model
def eamlp_14(num_classes: int = 1000, in_channels: int = 3, **arguments: Any) -> T2TViT:
    """EAMLP-14: external attention in stem and backbone (Table 2, row 20: 78.9 %)."""
    return _build(num_classes, in_channels, _external(_SIZE_14, stem="ea"), arguments)


@register_model
def eamlp_bn_14(num_classes: int = 1000, in_channels: int = 3, **arguments: Any) -> T2TViT:
    """EAMLP-BN-14: batch norm before the MLPs (Table 2, row 21: failed)."""
    return _build(
        num_classes, in_channels, _external(_SIZE_14, stem="ea", norm2="batch"), arguments
    )


@register_model
def eamlp_19(num_classes: int = 1000, in_channels: int = 3, **arguments: Any) -> T2TViT:
    """EAMLP-19: external attention in stem and backbone (Table 2, row 22: 79.4 %)."""
    return _build(num_classes, in_channels, _external(_SIZE_19, stem="ea"), arguments)


@register_model
def eamlp_bn_19(num_classes: int = 1000, in_channels: int = 3, **arguments: Any) -> T2TViT:
    """EAMLP-BN-19: batch norm before the MLPs (Table 2, row 23: failed)."""
    return _build(
        num_classes, in_channels, _external(_SIZE_19, stem="ea", norm2="batch"), arguments
    )


@register_model
def eamlp_tiny(num_classes: int = 1000, in_channels: int = 3, **arguments: Any) -> T2TViT:
    """EAMLP for images of 32 pixels, on a grid of 8 x 8 tokens."""
    return _build(
        num_classes, in_channels, _external(_TINY, **_TINY_EXTERNAL, stem="ea"), arguments
    )


@register_model
def t2t_vit_tiny(num_classes: int = 1000, in_channels: int = 3, **arguments: Any) -> T2TViT:
    """T2T-ViT for images of 32 pixels: external attention in the stem, self-attention."""
    return _build(num_classes, in_channels, {**_TINY, "stem": "ea", "mixer": "self"}, arguments)


@register_model
def mlp_tiny(num_classes: int = 1000, in_channels: int = 3, **arguments: Any) -> T2TViT:
    """The linear layers of ``eamlp_tiny`` without attention."""
    return _build(
        num_classes,
        in_channels,
        _external(_TINY, **_TINY_EXTERNAL, stem="mlp", mixer="mlp"),
        arguments,
    )
