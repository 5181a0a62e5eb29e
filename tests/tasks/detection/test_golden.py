"""Anchors, assignment, coding of boxes, levels, masks and the masked block equal the references."""

import pytest
import torch

from eanet.nn.insertion import insert_external_attention
from eanet.nn.padding import image_sizes
from eanet.tasks.detection.anchors import Anchors
from eanet.tasks.detection.assignment import IGNORED, Matcher
from eanet.tasks.detection.boxes import box_overlaps, decode_boxes, encode_boxes
from eanet.tasks.detection.instance_masks import mask_targets, paste_masks
from eanet.tasks.detection.region_features import region_levels


def anchors_of(settings):
    scales = settings.get("scales")
    if scales is None:
        base, octaves = settings["octave_base_scale"], settings["scales_per_octave"]
        scales = [base * 2 ** (octave / octaves) for octave in range(octaves)]
    return Anchors(settings["strides"], settings["ratios"], scales)


@pytest.mark.golden("detection.anchors")
def test_anchors(golden_case):
    tensors = golden_case.tensors()
    assert tensors
    for name, expected in tensors.items():
        family, what, level = name.split(".")
        anchors = anchors_of(golden_case.meta[family])
        level = int(level)
        if what == "base":
            actual = anchors.base(level)
        else:
            actual = anchors.grid(level, tuple(golden_case.meta["feature_sizes_hw"][level]))
        golden_case.assert_output(actual, expected, name)


@pytest.mark.golden("detection.box_coder")
def test_box_coder(golden_case):
    tensors = golden_case.tensors()
    boxes, deltas = tensors["in.proposals"], tensors["in.deltas"]
    many = tensors["in.deltas_5cls"]
    clip = tuple(golden_case.meta["max_shape_hw"])
    for number, stds in enumerate(golden_case.meta["stds"]):
        actual = {
            "encode": encode_boxes(boxes, tensors["in.gt"], stds),
            "decode": decode_boxes(boxes, deltas, stds, clip=clip),
            "decode_noclip": decode_boxes(boxes, deltas, stds),
            "decode_5cls": decode_boxes(
                boxes, many.reshape(len(boxes), -1, 4), stds, clip=clip
            ).flatten(1),
        }
        for name, value in actual.items():
            golden_case.assert_output(value, tensors[f"{name}.{number}"], f"{name}.{number}")


@pytest.mark.golden("detection.max_iou_assigner")
def test_assignment(golden_case):
    tensors = golden_case.tensors()
    candidates, objects = tensors["in.boxes"], tensors["in.gt"]
    for name, settings in golden_case.meta["configs"].items():
        low_quality = settings["match_low_quality"]
        matcher = Matcher(
            settings["pos_iou_thr"],
            settings["neg_iou_thr"],
            settings["min_pos_iou"] if low_quality else None,
        )
        assigned = matcher(candidates, objects)
        codes = (assigned + 1).where(assigned != IGNORED, -1)  # -1 ignored, 0 negative, k object
        assert torch.equal(codes, tensors[f"{name}.gt_inds"]), name
        labels = tensors["in.gt_labels"][assigned.clamp(min=0)].where(assigned >= 0, -1)
        assert torch.equal(labels, tensors[f"{name}.labels"]), name
        best = box_overlaps(objects, candidates).max(0).values
        golden_case.assert_output(best, tensors[f"{name}.max_overlaps"], name)


@pytest.mark.golden("detection.roi_levels")
def test_region_levels(golden_case):
    tensors = golden_case.tensors()
    rois = tensors["in.rois"]
    assert golden_case.meta["finest_scale"] == 56
    assert torch.equal(region_levels(rois, 4), tensors["level"])


@pytest.mark.golden("detection.mask_paste_and_target")
def test_masks(golden_case):
    tensors = golden_case.tensors()
    size = tuple(golden_case.meta["image_hw"])
    probabilities, boxes = tensors["in.mask_probs"][:, 0], tensors["in.boxes"]
    pasted = paste_masks(probabilities, boxes, size, threshold=None)
    golden_case.assert_output(pasted, tensors["pasted_probs"], "pasted_probs")
    # a pixel whose probability is 0.5 up to rounding may fall to either side
    sure = (tensors["pasted_probs"] - 0.5).abs() > 1e-5
    binary = paste_masks(probabilities, boxes, size)
    assert torch.equal(binary[sure], tensors["pasted_binary"].bool()[sure])
    assert sure.float().mean() > 0.999
    targets = mask_targets(tensors["in.gt_masks"], tensors["in.proposals"], tensors["in.gt_index"])
    assert torch.equal(targets.to(torch.uint8), tensors["target_binary"].to(torch.uint8))


@pytest.mark.golden("detection.ea_block_masked")
def test_masked_block(golden_case, dtype, device):
    weights = golden_case.tensors("weights")
    tensors = golden_case.tensors("io")
    meta = golden_case.meta
    channels = weights["affine_weight"].shape[0]
    network = torch.nn.Sequential(torch.nn.Identity())
    insert_external_attention(
        network,
        after="0",
        channels=channels,
        num_slots=meta["memory_units"],
        inner_channels=meta["inner_channels"],
        eps=meta["eps"],
        activation=meta["final_activation"].lower(),
    )
    block = network[0].external_attention
    block.load_state_dict(
        {
            "query.weight": weights["in_weight"][:, :, None, None],
            "query.bias": weights["in_bias"],
            "memory_key": weights["memory_key"],
            "memory_value": weights["memory_value"],
            "projection.weight": weights["out_weight"][:, :, None, None],
            "norm.weight": weights["affine_weight"],
            "norm.bias": weights["affine_bias"],
        }
    )
    network = network.to(device, dtype).eval()
    x = tensors["in.x"].to(device, dtype)
    golden_case.assert_output(network(x), tensors["out.unmasked"], "unmasked")
    valid = tensors["in.valid_mask"].bool()
    sizes = [tuple(size) for size in meta["image_sizes_hw"]]
    with image_sizes(network, sizes, tuple(meta["batch_shape"])):
        assert torch.equal(block.image_sizes.mask(x).cpu(), valid)
        out = network(x)
        maps = block.attention_map(x)
    # at masked cells the reference keeps the bias of the affine; here the branch is 0 there
    cells = valid[:, None].expand(out.shape)
    golden_case.assert_output(out[cells], tensors["out.masked"][cells], "masked")
    golden_case.assert_output(maps.flatten(2), tensors["attention.masked"], "attention")
    for index in range(len(x)):
        rows, columns = valid[index].any(1).sum(), valid[index].any(0).sum()
        cropped = network(x[index : index + 1, :, :rows, :columns])
        golden_case.assert_output(
            cropped[0], tensors["out.masked"][index, :, :rows, :columns], "cropped"
        )
