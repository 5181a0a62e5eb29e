"""The detectors of tables 3 and 4 by name, with and without external attention, and small ones.

All arguments are JSON values. Those of the full-size networks:

- ``num_classes``: without a background class; 80 for COCO
- ``backbone``: resnet50, resnet101, resnet34, resnet18, resnet10, resnet10_narrow
- ``norm``: "fixed" keeps the statistics of the ResNet's batch norms, "batch" and "group" are for
  training from scratch
- ``frozen_stages``: 1 freezes the stem and the first stage; ``None`` (null) trains all
- ``attention``: "external" puts one block after ``attention_after``, "none" does not
- ``num_slots``, ``inner_channels``, ``attention_norm``: of that block; ``inner_channels=None``
  (null) takes the width of the stage
- ``pyramid_channels``, ``hidden``, ``mask_width``, ``mask_depth``: widths and depth of the heads
- ``anchor_scale``: edge of the anchors in strides: 8 starts at 32 pixels
- ``samples``, ``anchor_samples``: regions and anchors of an image that are learned from
- ``proposals_per_level``, ``proposal_count``: before and after suppression; ``None`` (null) for the
  published numbers
- ``min_score``, ``max_detections``: of what is reported
"""

from typing import Any, Literal

from eanet.nn.insertion import BranchNorm
from eanet.registry import register_model
from eanet.tasks.detection.anchors import Anchors
from eanet.tasks.detection.backbone import Backbone, Norm
from eanet.tasks.detection.cascade_heads import CascadeHeads
from eanet.tasks.detection.detector import Detector, TwoStageDetector
from eanet.tasks.detection.region_heads import HeadSettings, RegionHeads
from eanet.tasks.detection.region_proposals import ProposalSettings, RegionProposals
from eanet.tasks.detection.retinanet import RetinaNet

Attention = Literal["none", "external"]

#: networks for a CPU and images of some hundred pixels, trained from scratch. Our choice.
_SMALL: dict[str, Any] = {
    "backbone": "resnet10",
    "norm": "batch",
    "frozen_stages": None,
    "pyramid_channels": 64,
    "inner_channels": 128,
}
_SMALL_BOXES: dict[str, Any] = {
    **_SMALL,
    "hidden": 256,
    "samples": 64,
    "proposal_count": 128,
    "anchor_samples": 128,
    "proposals_per_level": 256,
}
_SMALL_MASKS: dict[str, Any] = {**_SMALL_BOXES, "mask_width": 64, "mask_depth": 2}
#: networks for tests
_TINY: dict[str, Any] = {
    **_SMALL,
    "backbone": "resnet10_narrow",
    "pyramid_channels": 16,
    "inner_channels": 16,
    "num_slots": 8,
    "attention": "external",
}
_TINY_BOXES: dict[str, Any] = {
    **_TINY,
    "hidden": 32,
    "samples": 16,
    "proposal_count": 32,
    "anchor_samples": 32,
    "proposals_per_level": 64,
}
_TINY_MASKS: dict[str, Any] = {**_TINY_BOXES, "mask_width": 16, "mask_depth": 1}
_WITH: dict[str, Any] = {"attention": "external"}


def _backbone(
    *,
    first_stage: int,
    further_levels: Literal["pool", "convolutions"],
    backbone: str = "resnet50",
    norm: Norm = "fixed",
    frozen_stages: int | None = 1,
    attention: Attention = "none",
    attention_after: str = "layer4",
    num_slots: int = 64,
    inner_channels: int | None = 512,
    attention_norm: BranchNorm = "affine",
    pyramid_channels: int = 256,
) -> Backbone:
    if attention not in ("none", "external"):
        raise ValueError(f"attention must be 'none' or 'external', got {attention!r}")
    return Backbone(
        backbone,
        channels=pyramid_channels,
        first_stage=first_stage,
        further_levels=further_levels,
        norm=norm,
        frozen_stages=frozen_stages,
        attention=attention == "external",
        attention_after=attention_after,
        num_slots=num_slots,
        inner_channels=inner_channels,
        attention_norm=attention_norm,
    )


def _two_stage(
    kind: Literal["once", "cascade"],
    num_classes: int,
    *,
    masks: bool,
    hidden: int = 1024,
    mask_width: int = 256,
    mask_depth: int = 4,
    samples: int = 512,
    proposal_count: int | None = None,
    proposals_per_level: int | None = None,
    anchor_samples: int = 256,
    anchor_scale: float = 8.0,
    min_score: float = 0.05,
    max_detections: int = 100,
    **backbone_arguments: Any,
) -> TwoStageDetector:
    """Build Faster, Mask, Cascade or Cascade Mask R-CNN with the settings of MMDetection 2.x."""
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, got {num_classes}")
    backbone = _backbone(first_stage=1, further_levels="pool", **backbone_arguments)
    once = kind == "once"
    settings = ProposalSettings(
        loss="l1" if once else "smooth_l1",
        inside_only=not once,
        train_count=proposal_count or (1000 if once else 2000),
        test_count=proposal_count or 1000,
        train_per_level=proposals_per_level or 2000,
        test_per_level=proposals_per_level or 1000,
        samples=anchor_samples,
    )
    heads = HeadSettings(
        num_classes,
        backbone.channels,
        tuple(backbone.strides[:-1]),
        masks,
        hidden=hidden,
        mask_width=mask_width,
        mask_depth=mask_depth,
        samples=samples,
        min_score=min_score,
        max_detections=max_detections,
    )
    if anchor_scale <= 0:
        raise ValueError(f"anchor_scale must be above 0, got {anchor_scale}")
    anchors = Anchors(tuple(backbone.strides), scales=(anchor_scale,))
    return TwoStageDetector(
        backbone,
        num_classes,
        proposals=RegionProposals(backbone.channels, anchors, settings),
        heads=RegionHeads(heads) if once else CascadeHeads(heads),
    )


def _retinanet(num_classes: int, **arguments: Any) -> RetinaNet:
    own = {"depth", "min_score", "max_detections"}
    backbone = _backbone(
        first_stage=2,
        further_levels="convolutions",
        **{name: value for name, value in arguments.items() if name not in own},
    )
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, got {num_classes}")
    return RetinaNet(
        backbone, num_classes, **{name: x for name, x in arguments.items() if name in own}
    )


@register_model
def faster_rcnn_resnet50_fpn(num_classes: int = 80, **arguments: Any) -> Detector:
    """Faster R-CNN, ResNet-50 with a feature pyramid."""
    return _two_stage("once", num_classes, masks=False, **arguments)


@register_model
def faster_rcnn_resnet50_fpn_ea(num_classes: int = 80, **arguments: Any) -> Detector:
    """Faster R-CNN, ResNet-50 with a feature pyramid, external attention."""
    return _two_stage("once", num_classes, masks=False, **(_WITH | arguments))


@register_model
def faster_rcnn_small(num_classes: int = 80, **arguments: Any) -> Detector:
    """Faster R-CNN for images of some hundred pixels."""
    return _two_stage("once", num_classes, masks=False, **(_SMALL_BOXES | arguments))


@register_model
def faster_rcnn_small_ea(num_classes: int = 80, **arguments: Any) -> Detector:
    """Faster R-CNN for images of some hundred pixels, external attention."""
    return _two_stage("once", num_classes, masks=False, **(_SMALL_BOXES | _WITH | arguments))


@register_model
def faster_rcnn_tiny(num_classes: int = 80, **arguments: Any) -> Detector:
    """Faster R-CNN for tests, external attention."""
    return _two_stage("once", num_classes, masks=False, **(_TINY_BOXES | arguments))


@register_model
def mask_rcnn_resnet50_fpn(num_classes: int = 80, **arguments: Any) -> Detector:
    """Mask R-CNN, ResNet-50 with a feature pyramid."""
    return _two_stage("once", num_classes, masks=True, **arguments)


@register_model
def mask_rcnn_resnet50_fpn_ea(num_classes: int = 80, **arguments: Any) -> Detector:
    """Mask R-CNN, ResNet-50 with a feature pyramid, external attention."""
    return _two_stage("once", num_classes, masks=True, **(_WITH | arguments))


@register_model
def mask_rcnn_small(num_classes: int = 80, **arguments: Any) -> Detector:
    """Mask R-CNN for images of some hundred pixels."""
    return _two_stage("once", num_classes, masks=True, **(_SMALL_MASKS | arguments))


@register_model
def mask_rcnn_small_ea(num_classes: int = 80, **arguments: Any) -> Detector:
    """Mask R-CNN for images of some hundred pixels, external attention."""
    return _two_stage("once", num_classes, masks=True, **(_SMALL_MASKS | _WITH | arguments))


@register_model
def mask_rcnn_tiny(num_classes: int = 80, **arguments: Any) -> Detector:
    """Mask R-CNN for tests, external attention."""
    return _two_stage("once", num_classes, masks=True, **(_TINY_MASKS | arguments))


@register_model
def retinanet_resnet50_fpn(num_classes: int = 80, **arguments: Any) -> Detector:
    """RetinaNet, ResNet-50 with a feature pyramid."""
    return _retinanet(num_classes, **arguments)


@register_model
def retinanet_resnet50_fpn_ea(num_classes: int = 80, **arguments: Any) -> Detector:
    """RetinaNet, ResNet-50 with a feature pyramid, external attention."""
    return _retinanet(num_classes, **(_WITH | arguments))


@register_model
def retinanet_small(num_classes: int = 80, **arguments: Any) -> Detector:
    """RetinaNet for images of some hundred pixels."""
    return _retinanet(num_classes, **(_SMALL | {"depth": 2} | arguments))


@register_model
def retinanet_small_ea(num_classes: int = 80, **arguments: Any) -> Detector:
    """RetinaNet for images of some hundred pixels, external attention."""
    return _retinanet(num_classes, **(_SMALL | {"depth": 2} | _WITH | arguments))


@register_model
def retinanet_tiny(num_classes: int = 80, **arguments: Any) -> Detector:
    """RetinaNet for tests, external attention."""
    return _retinanet(num_classes, **(_TINY | {"depth": 1} | arguments))


@register_model
def cascade_rcnn_resnet50_fpn(num_classes: int = 80, **arguments: Any) -> Detector:
    """Cascade R-CNN, ResNet-50 with a feature pyramid."""
    return _two_stage("cascade", num_classes, masks=False, **arguments)


@register_model
def cascade_rcnn_resnet50_fpn_ea(num_classes: int = 80, **arguments: Any) -> Detector:
    """Cascade R-CNN, ResNet-50 with a feature pyramid, external attention."""
    return _two_stage("cascade", num_classes, masks=False, **(_WITH | arguments))


@register_model
def cascade_rcnn_small(num_classes: int = 80, **arguments: Any) -> Detector:
    """Cascade R-CNN for images of some hundred pixels."""
    return _two_stage("cascade", num_classes, masks=False, **(_SMALL_BOXES | arguments))


@register_model
def cascade_rcnn_small_ea(num_classes: int = 80, **arguments: Any) -> Detector:
    """Cascade R-CNN for images of some hundred pixels, external attention."""
    return _two_stage("cascade", num_classes, masks=False, **(_SMALL_BOXES | _WITH | arguments))


@register_model
def cascade_rcnn_tiny(num_classes: int = 80, **arguments: Any) -> Detector:
    """Cascade R-CNN for tests, external attention."""
    return _two_stage("cascade", num_classes, masks=False, **(_TINY_BOXES | arguments))


@register_model
def cascade_mask_rcnn_resnet50_fpn(num_classes: int = 80, **arguments: Any) -> Detector:
    """Cascade Mask R-CNN, ResNet-50 with a feature pyramid."""
    return _two_stage("cascade", num_classes, masks=True, **arguments)


@register_model
def cascade_mask_rcnn_resnet50_fpn_ea(num_classes: int = 80, **arguments: Any) -> Detector:
    """Cascade Mask R-CNN, ResNet-50 with a feature pyramid, external attention."""
    return _two_stage("cascade", num_classes, masks=True, **(_WITH | arguments))


@register_model
def cascade_mask_rcnn_small(num_classes: int = 80, **arguments: Any) -> Detector:
    """Cascade Mask R-CNN for images of some hundred pixels."""
    return _two_stage("cascade", num_classes, masks=True, **(_SMALL_MASKS | arguments))


@register_model
def cascade_mask_rcnn_small_ea(num_classes: int = 80, **arguments: Any) -> Detector:
    """Cascade Mask R-CNN for images of some hundred pixels, external attention."""
    return _two_stage("cascade", num_classes, masks=True, **(_SMALL_MASKS | _WITH | arguments))


@register_model
def cascade_mask_rcnn_tiny(num_classes: int = 80, **arguments: Any) -> Detector:
    """Cascade Mask R-CNN for tests, external attention."""
    return _two_stage("cascade", num_classes, masks=True, **(_TINY_MASKS | arguments))
