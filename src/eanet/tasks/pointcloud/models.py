"""The point cloud networks by name.

Names end in what they give, ``_cls`` a class for a cloud and ``_parts`` a part for each point. EAT
is PCT with external attention. ``simple`` networks have no neighbor embedding (SPCT of arXiv
2012.09688); ``small`` ones are sized for minutes on a CPU.
"""

from collections.abc import Mapping
from typing import Any

from eanet.registry import register_model
from eanet.tasks.pointcloud.pct import PartSegmenter, PointClassifier

__all__ = ["eat_cls", "eat_parts", "pct_cls", "pct_parts"]

_SIMPLE = {"embedding": "pointwise", "width": 128, "middle_layers": 0}
#: about a fiftieth of the products of the full size
_SMALL = {
    "width": 32,
    "stage_channels": (64, 128),
    "num_centers": (128, 64),
    "num_neighbors": (16, 16),
    "middle_layers": 1,
    "num_layers": 2,
    "out_channels": 256,
    "num_slots": 32,
    "head_channels": (128, 128),
}
_SMALL_PARTS = {
    "width": 32,
    "stage_channels": (64,),
    "num_neighbors": (16,),
    "middle_layers": 1,
    "num_layers": 2,
    "out_channels": 256,
    "num_slots": 32,
    "label_channels": 32,
    "head_channels": (128, 64),
}
_TINY = {**_SMALL, "width": 16, "stage_channels": (32, 32), "num_centers": (32, 16),
         "num_neighbors": (8, 8), "out_channels": 64, "num_slots": 16,
         "head_channels": (32, 32)}  # fmt: skip
_TINY_PARTS = {**_SMALL_PARTS, "width": 16, "stage_channels": (32,), "num_neighbors": (8,),
               "out_channels": 64, "num_slots": 16, "label_channels": 16,
               "head_channels": (32, 32)}  # fmt: skip


def _classifier(
    num_classes: int, in_channels: int, defaults: Mapping[str, Any], arguments: Mapping[str, Any]
) -> PointClassifier:
    return PointClassifier(num_classes, in_channels, **{**defaults, **arguments})


def _segmenter(
    num_parts: int,
    num_categories: int,
    in_channels: int,
    defaults: Mapping[str, Any],
    arguments: Mapping[str, Any],
) -> PartSegmenter:
    return PartSegmenter(num_parts, num_categories, in_channels, **{**defaults, **arguments})


@register_model
def pct_cls(num_classes: int = 40, in_channels: int = 3, **arguments: Any) -> PointClassifier:
    """PCT: offset attention (Table 11: 93.2 %)."""
    return _classifier(num_classes, in_channels, {"attention": "offset"}, arguments)


@register_model
def pct_position_cls(
    num_classes: int = 40, in_channels: int = 3, **arguments: Any
) -> PointClassifier:
    """PCT with an embedding of the coordinates before every attention layer."""
    return _classifier(
        num_classes,
        in_channels,
        {"attention": "offset", "middle_layers": 1, "position": True},
        arguments,
    )


@register_model
def spct_cls(num_classes: int = 40, in_channels: int = 3, **arguments: Any) -> PointClassifier:
    """The simple PCT: offset attention, no neighbor embedding."""
    return _classifier(num_classes, in_channels, {"attention": "offset", **_SIMPLE}, arguments)


@register_model
def npct_cls(num_classes: int = 40, in_channels: int = 3, **arguments: Any) -> PointClassifier:
    """The naive PCT: self-attention, no neighbor embedding."""
    return _classifier(num_classes, in_channels, {"attention": "plain", **_SIMPLE}, arguments)


@register_model
def eat_cls(num_classes: int = 40, in_channels: int = 3, **arguments: Any) -> PointClassifier:
    """EAT: external attention in PCT (Table 11: 93.4 %)."""
    return _classifier(num_classes, in_channels, {}, arguments)


@register_model
def eat_no_query_cls(
    num_classes: int = 40, in_channels: int = 3, **arguments: Any
) -> PointClassifier:
    """EAT whose points are compared with the memories as they are."""
    return _classifier(num_classes, in_channels, {"query": False}, arguments)


@register_model
def eat_simple_cls(
    num_classes: int = 40, in_channels: int = 3, **arguments: Any
) -> PointClassifier:
    """EAT without neighbor embedding."""
    return _classifier(num_classes, in_channels, _SIMPLE, arguments)


@register_model
def eat_simple_no_query_cls(
    num_classes: int = 40, in_channels: int = 3, **arguments: Any
) -> PointClassifier:
    """EAT without neighbor embedding and without query map."""
    return _classifier(num_classes, in_channels, {"query": False, **_SIMPLE}, arguments)


@register_model
def eat_small_cls(num_classes: int = 40, in_channels: int = 3, **arguments: Any) -> PointClassifier:
    """EAT for minutes on a CPU."""
    return _classifier(num_classes, in_channels, _SMALL, arguments)


@register_model
def pct_small_cls(num_classes: int = 40, in_channels: int = 3, **arguments: Any) -> PointClassifier:
    """PCT for minutes on a CPU."""
    return _classifier(num_classes, in_channels, {"attention": "offset", **_SMALL}, arguments)


@register_model
def none_small_cls(
    num_classes: int = 40, in_channels: int = 3, **arguments: Any
) -> PointClassifier:
    """The network of ``eat_small_cls`` without attention."""
    return _classifier(num_classes, in_channels, {"attention": "none", **_SMALL}, arguments)


@register_model
def eat_cls_tiny(num_classes: int = 40, in_channels: int = 3, **arguments: Any) -> PointClassifier:
    """EAT for tests."""
    return _classifier(num_classes, in_channels, _TINY, arguments)


@register_model
def pct_cls_tiny(num_classes: int = 40, in_channels: int = 3, **arguments: Any) -> PointClassifier:
    """PCT for tests."""
    return _classifier(num_classes, in_channels, {"attention": "offset", **_TINY}, arguments)


@register_model
def pct_parts(
    num_parts: int = 50, num_categories: int = 16, in_channels: int = 3, **arguments: Any
) -> PartSegmenter:
    """PCT: offset attention, neighbor embedding without sampling (Table 10: 86.4 %)."""
    return _segmenter(num_parts, num_categories, in_channels, {"attention": "offset"}, arguments)


@register_model
def spct_parts(
    num_parts: int = 50, num_categories: int = 16, in_channels: int = 3, **arguments: Any
) -> PartSegmenter:
    """The simple PCT, the form whose code was released."""
    return _segmenter(
        num_parts, num_categories, in_channels, {"attention": "offset", **_SIMPLE}, arguments
    )


@register_model
def eat_parts(
    num_parts: int = 50, num_categories: int = 16, in_channels: int = 3, **arguments: Any
) -> PartSegmenter:
    """EAT: external attention in PCT (Table 10: 86.5 %)."""
    return _segmenter(num_parts, num_categories, in_channels, {}, arguments)


@register_model
def eat_no_query_parts(
    num_parts: int = 50, num_categories: int = 16, in_channels: int = 3, **arguments: Any
) -> PartSegmenter:
    """EAT whose points are compared with the memories as they are."""
    return _segmenter(num_parts, num_categories, in_channels, {"query": False}, arguments)


@register_model
def eat_simple_parts(
    num_parts: int = 50, num_categories: int = 16, in_channels: int = 3, **arguments: Any
) -> PartSegmenter:
    """EAT without neighbor embedding."""
    return _segmenter(num_parts, num_categories, in_channels, _SIMPLE, arguments)


@register_model
def eat_simple_no_query_parts(
    num_parts: int = 50, num_categories: int = 16, in_channels: int = 3, **arguments: Any
) -> PartSegmenter:
    """EAT without neighbor embedding and without query map."""
    return _segmenter(
        num_parts, num_categories, in_channels, {"query": False, **_SIMPLE}, arguments
    )


@register_model
def eat_small_parts(
    num_parts: int = 50, num_categories: int = 16, in_channels: int = 3, **arguments: Any
) -> PartSegmenter:
    """EAT for minutes on a CPU."""
    return _segmenter(num_parts, num_categories, in_channels, _SMALL_PARTS, arguments)


@register_model
def pct_small_parts(
    num_parts: int = 50, num_categories: int = 16, in_channels: int = 3, **arguments: Any
) -> PartSegmenter:
    """PCT for minutes on a CPU."""
    return _segmenter(
        num_parts, num_categories, in_channels, {"attention": "offset", **_SMALL_PARTS}, arguments
    )


@register_model
def none_small_parts(
    num_parts: int = 50, num_categories: int = 16, in_channels: int = 3, **arguments: Any
) -> PartSegmenter:
    """The network of ``eat_small_parts`` without attention."""
    return _segmenter(
        num_parts, num_categories, in_channels, {"attention": "none", **_SMALL_PARTS}, arguments
    )


@register_model
def eat_parts_tiny(
    num_parts: int = 50, num_categories: int = 16, in_channels: int = 3, **arguments: Any
) -> PartSegmenter:
    """EAT for tests."""
    return _segmenter(num_parts, num_categories, in_channels, _TINY_PARTS, arguments)


@register_model
def pct_parts_tiny(
    num_parts: int = 50, num_categories: int = 16, in_channels: int = 3, **arguments: Any
) -> PartSegmenter:
    """PCT for tests."""
    return _segmenter(
        num_parts, num_categories, in_channels, {"attention": "offset", **_TINY_PARTS}, arguments
    )
