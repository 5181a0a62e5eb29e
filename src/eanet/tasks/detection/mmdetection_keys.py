"""Names of parameters in MMDetection 2.x, whose published detectors these are layer by layer."""

import re
from collections.abc import Mapping

from torch import Tensor

from eanet.errors import UserError
from eanet.nn.insertion import BLOCK_NAME

__all__ = ["from_mmdetection", "mmdetection_name"]

#: ours to theirs, the first that fits; numbers are carried over
_RENAMES = (
    (r"backbone\.body\.", "backbone."),
    (r"backbone\.fpn\.inner_blocks\.(\d+)\.0\.", r"neck.lateral_convs.\1.conv."),
    (r"backbone\.fpn\.layer_blocks\.(\d+)\.0\.", r"neck.fpn_convs.\1.conv."),
    # of RetinaNet, whose pyramid has three levels before these
    (r"backbone\.fpn\.extra_blocks\.p6\.", "neck.fpn_convs.3.conv."),
    (r"backbone\.fpn\.extra_blocks\.p7\.", "neck.fpn_convs.4.conv."),
    (r"proposals\.convolution\.", "rpn_head.rpn_conv."),
    (r"proposals\.objectness\.", "rpn_head.rpn_cls."),
    (r"proposals\.offsets\.", "rpn_head.rpn_reg."),
    (r"heads\.box\.", "roi_head.bbox_head."),
    (r"heads\.boxes\.(\d+)\.", r"roi_head.bbox_head.\1."),
    (r"heads\.mask\.", "roi_head.mask_head."),
    (r"heads\.masks\.(\d+)\.", r"roi_head.mask_head.\1."),
    (r"classes\.", "bbox_head.retina_cls."),
    (r"offsets\.", "bbox_head.retina_reg."),
)
#: parts of the heads' names, after the above
_PARTS = (
    (r"\.layer1\.", ".shared_fcs.0."),
    (r"\.layer2\.", ".shared_fcs.1."),
    (r"\.classes\.", ".fc_cls."),
    (r"\.offsets\.", ".fc_reg."),
    (r"\.convolutions\.(\d+)\.", r".convs.\1.conv."),
    (r"\.deconvolution\.", ".upsample."),
    (r"\.logits\.", ".conv_logits."),
)
_TOWERS = {"class_tower": "cls_convs", "box_tower": "reg_convs"}


def mmdetection_name(name: str) -> str:
    """Return what MMDetection calls one of our parameters.

    >>> mmdetection_name("heads.masks.2.convolutions.0.weight")
    'roi_head.mask_head.2.convs.0.conv.weight'
    >>> mmdetection_name("class_tower.4.bias")
    'bbox_head.cls_convs.2.conv.bias'
    """
    tower, _, rest = name.partition(".")
    if tower in _TOWERS:
        place, _, kind = rest.partition(".")
        # every second layer of a tower is a ReLU
        return f"bbox_head.{_TOWERS[tower]}.{int(place) // 2}.conv.{kind}"
    for pattern, theirs in _RENAMES:
        renamed, count = re.subn(f"^{pattern}", theirs, name)
        if count:
            name = renamed
            break
    if name.startswith("roi_head."):
        for pattern, theirs in _PARTS:
            name = re.sub(pattern, theirs, name)
    return name


def from_mmdetection(
    own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], source: str
) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint under our names.

    Args:
        own: the state of our network; blocks of external attention are left out.
        tensors: those of the checkpoint.
        source: how messages call it.

    Raises:
        UserError: a tensor is missing, unknown or of another shape.
    """
    names = {name: mmdetection_name(name) for name in own if f".{BLOCK_NAME}." not in name}
    for name, theirs in names.items():
        if theirs not in tensors or tensors[theirs].shape != own[name].shape:
            what = f"has {tuple(tensors[theirs].shape)}" if theirs in tensors else "has nothing"
            raise UserError(
                f"{source}: not this detector of MMDetection: {theirs!r} should be "
                f"{tuple(own[name].shape)}, the file {what}"
            )
    unknown = sorted(tensors.keys() - set(names.values()))
    if unknown:
        raise UserError(f"{source}: not this detector of MMDetection: it has {unknown[0]!r}")
    return {name: tensors[theirs] for name, theirs in names.items()}
