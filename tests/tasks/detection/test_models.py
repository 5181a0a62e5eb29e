"""The five detectors: exact counts, gradients, identity at first, padding, copies, folding."""

import copy
import math
import pickle

import pytest
import torch
import torchvision
from tasks.detection.networks import KINDS, detector, images, targets
from torch import nn

from eanet import registry
from eanet.bench.cost import count_cost
from eanet.errors import UserError
from eanet.nn.external_attention_2d import ExternalAttention2d
from eanet.nn.fusion import fuse
from eanet.nn.padding import image_sizes
from eanet.tasks.detection.backbone import Backbone, FixedStatisticsBatchNorm2d
from eanet.tasks.detection.detector import pad_images
from eanet.tasks.detection.mmdetection_keys import mmdetection_name

DETECTORS = [name for name, entry in registry.models().items() if entry.task == "detection"]
#: with 80 classes, affine parameters of batch norms included, those frozen too
EXACT = {
    "faster_rcnn": 41_753_056,
    "mask_rcnn": 44_396_336,
    "retinanet": 37_968_692,
    "cascade_rcnn": 69_394_766,
    "cascade_mask_rcnn": 77_324_606,
}


def count(model, **arguments):
    with torch.device("meta"):
        model = registry.create_model(model, **arguments)
    parameters = list(model.parameters())
    frozen = sum(p.numel() for p in parameters if not p.requires_grad)
    return sum(p.numel() for p in parameters), frozen


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_are_counted_exactly(kind):
    assert count(f"{kind}_resnet50_fpn") == (EXACT[kind], 225_344)
    assert count(f"{kind}_resnet50_fpn_ea") == (EXACT[kind] + 2_167_296, 225_344)
    wide, _ = count(f"{kind}_resnet50_fpn_ea", inner_channels=None)
    assert wide == EXACT[kind] + 8_656_896


def test_every_detector_builds_and_is_described():
    assert len(DETECTORS) == 5 * 5
    for name in DETECTORS:
        with torch.device("meta"):
            model = registry.create_model(name, num_classes=2)
        assert model.config == {"name": name, "arguments": {"num_classes": 2}}
        assert registry.models()[name].summary.endswith(".")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("empty", [False, True])
def test_every_parameter_gets_a_finite_gradient(kind, empty):
    model = detector(kind)
    losses = model(images(), targets(empty=empty))
    assert all(loss.ndim == 0 and torch.isfinite(loss) for loss in losses.values())
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_without_any_object_is_learned_from(kind):
    model = detector(kind)
    nothing = [targets(empty=True)[1], targets(empty=True)[1]]
    losses = model([torch.zeros(3, 70, 50)] * 2, nothing)
    sum(losses.values()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_detections_are_as_promised(kind):
    model = detector(kind, min_score=0.0, max_detections=7).eval()
    found = model(images())
    for detections, (height, width) in zip(found, ((64, 96), (70, 50)), strict=True):
        boxes, scores = detections["boxes"], detections["scores"]
        assert boxes.shape == (7, 4)
        assert (boxes >= 0).all()
        assert (boxes <= torch.tensor([width, height, width, height])).all()
        assert (scores.diff() <= 0).all()
        assert set(detections["labels"].tolist()) <= {0, 1, 2}
        if "mask" in kind:
            masks = detections["mask_probabilities"]
            assert masks.shape == (7, 28, 28)
            assert ((masks >= 0) & (masks <= 1)).all()


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_nothing_found_is_an_empty_result(kind):
    found = detector(kind, min_score=1.1).eval()(images())
    for detections in found:
        assert detections["boxes"].shape == (0, 4)
        assert detections["labels"].shape == detections["scores"].shape == (0,)
        if "mask" in kind:
            assert detections["mask_probabilities"].shape == (0, 28, 28)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_attention_changes_nothing_at_first(kind):
    plain = detector(kind, attention="none", min_score=0.0).eval()
    with_attention = detector(kind, min_score=0.0).eval()
    missing, unexpected = with_attention.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected
    assert missing
    assert all(".layer4.external_attention." in name for name in missing)
    for found, expected in zip(with_attention(images()), plain(images()), strict=True):
        assert all(torch.equal(found[key], expected[key]) for key in expected)
    with_attention.train()
    plain.train()
    torch.manual_seed(0)
    losses = with_attention(images(), targets())
    torch.manual_seed(0)
    for name, loss in plain(images(), targets()).items():
        assert torch.equal(losses[name], loss), name


def excited(model):
    """Give the block after layer4 weights that matter."""
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if ".external_attention." in name:
            nn.init.normal_(parameter, std=0.5)
    return model.eval()


@torch.no_grad()
def test_batched_equals_one_by_one_as_closely_with_attention_as_without():
    batch, sizes = pad_images(images())
    differences = {}
    for attention in ("none", "external"):
        model = excited(detector("faster_rcnn", attention=attention, min_score=0.0)).double()
        x = batch.double()
        together = model(x, None, sizes)
        alone = [
            model(x[i : i + 1, :, : -(-h // 32) * 32, : -(-w // 32) * 32], None, [(h, w)])[0]
            for i, (h, w) in enumerate(sizes)
        ]
        seen = [
            (one["scores"][:5] - other["scores"][:5]).abs().max()
            for one, other in zip(together, alone, strict=True)
        ]
        differences[attention] = float(max(seen))
    # convolutions at the border see padding of the batch; the block adds nothing to that
    assert differences["external"] <= 2 * differences["none"] + 1e-9


def without_what_lies_beyond(canvases, padded):
    """Return a hook that clears, in each image of a batch, what a canvas of its own lacks."""

    def clear(_module, _inputs, out):
        stride = 2 ** round(math.log2(padded[0] / out.shape[2]))
        out = out.clone()
        for features, (height, width) in zip(out, canvases, strict=True):
            features[:, -(-height // stride) :] = 0
            features[:, :, -(-width // stride) :] = 0
        return out

    return clear


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("attention", ["none", "external"])
@torch.no_grad()
def test_features_in_a_batch_are_those_of_the_image_alone(kind, attention):
    model = excited(detector(kind, attention=attention)).double()
    batch, sizes = pad_images([image.double() for image in images()])
    canvases = [(-(-height // 32) * 32, -(-width // 32) * 32) for height, width in sizes]
    alone = []
    for number, (height, width) in enumerate(canvases):
        with image_sizes(model, sizes[number : number + 1], (height, width)):
            alone.append(model.backbone(batch[number : number + 1, :, :height, :width]))
    # a convolution at the border sees what the batch has there, with and without attention; the
    # block sees the whole map
    clear = without_what_lies_beyond(canvases, batch.shape[2:])
    for module in model.backbone.modules():
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d | nn.MaxPool2d):
            module.register_forward_hook(clear)
    with image_sizes(model, sizes, tuple(batch.shape[2:])):
        together = model.backbone(batch)
    for number, levels in enumerate(alone):
        for level, (whole, own) in enumerate(zip(together, levels, strict=True)):
            rows, columns = own.shape[2:]
            found = whole[number : number + 1, :, :rows, :columns]
            torch.testing.assert_close(found, own, rtol=1e-10, atol=1e-10, msg=f"level {level}")


@torch.no_grad()
def test_the_block_leaves_padding_out():
    model = excited(detector("faster_rcnn"))
    body = model.backbone.body
    seen = []
    body.layer4.external_attention.register_forward_hook(lambda _, args, out: seen.append(out))
    features = []
    body.layer4[0].register_forward_hook(lambda _, args, out: features.append(out))
    model(images())
    rows, columns = 3, 2  # of the second image, 70 x 50, at stride 32
    alone = body.layer4.external_attention(features[0][1:, :, :rows, :columns])
    torch.testing.assert_close(seen[0][1:, :, :rows, :columns], alone, rtol=1e-5, atol=1e-6)
    assert torch.equal(seen[0][1, :, :, columns:], features[0][1, :, :, columns:])


def test_statistics_stay_and_affine_weights_learn():
    model = detector("faster_rcnn", norm="fixed", frozen_stages=1)
    before = {k: v.clone() for k, v in model.state_dict().items() if "running" in k}
    assert before
    losses = model(images(), targets())
    sum(losses.values()).backward()
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    body = model.backbone.body
    assert body.layer2[0].bn1.weight.grad is not None
    assert body.layer1[0].bn1.weight.grad is None
    assert body.conv1.weight.grad is None
    assert not body.layer2[0].bn1.training


def test_the_norm_of_the_block_is_not_frozen_with_the_others():
    model = detector("faster_rcnn", norm="fixed", attention_norm="batch")
    norm = model.backbone.body.layer4.external_attention.norm
    assert type(norm) is nn.BatchNorm2d
    model.train()
    assert norm.training
    before = norm.running_mean.clone()
    model(images(), targets())
    assert not torch.equal(norm.running_mean, before)
    fixed = [m for m in model.modules() if isinstance(m, FixedStatisticsBatchNorm2d)]
    assert fixed
    assert not any(module.training for module in fixed)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_copies_and_folded_copies_detect_the_same(kind):
    model = excited(detector(kind, min_score=0.0, norm="group"))
    expected = model(images())
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for found, wanted in zip(copied(images()), expected, strict=True):
            assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    folded = fuse(model)
    assert not any(isinstance(module, ExternalAttention2d) for module in folded.modules())
    for found, wanted in zip(folded(images()), expected, strict=True):
        assert torch.equal(found["labels"], wanted["labels"])
        for key in wanted.keys() - {"labels"}:
            torch.testing.assert_close(found[key], wanted[key], rtol=1e-4, atol=1e-5)


def backbone(body="resnet18"):
    return Backbone(
        body,
        channels=8,
        first_stage=1,
        further_levels="pool",
        norm="fixed",
        frozen_stages=1,
        attention=True,
        inner_channels=8,
        num_slots=4,
    )


@torch.no_grad()
def test_backbone_starts_from_a_classifier_of_torchvision():
    classifier = torchvision.models.resnet18(num_classes=3).eval()
    for buffer in classifier.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5)
    ours = backbone()
    ours.load_imagenet_weights(classifier.state_dict(), source="resnet18.pth")
    x = torch.randn(1, 3, 64, 64)
    expected = classifier.maxpool(classifier.relu(classifier.bn1(classifier.conv1(x))))
    for stage in range(1, 5):
        expected = classifier.get_submodule(f"layer{stage}")(expected)
        assert torch.equal(ours.body(x)[stage - 1], expected)
    with pytest.raises(UserError, match=r"resnet34\.pth.*'layer1\.2"):
        ours.load_imagenet_weights(
            torchvision.models.resnet34().state_dict(), source="resnet34.pth"
        )
    with pytest.raises(UserError, match="nothing"):
        ours.load_imagenet_weights({}, source="empty.pth")


@torch.no_grad()
def test_pyramid_has_the_levels_it_says():
    features = backbone()(torch.zeros(1, 3, 100, 70))
    sizes = [tuple(feature.shape[1:]) for feature in features]
    assert sizes == [(8, 25, 18), (8, 13, 9), (8, 7, 5), (8, 4, 3), (8, 2, 2)]
    assert backbone().strides == [4, 8, 16, 32, 64]


@torch.no_grad()
def test_backbone_compiles_and_the_block_exports(without_shape_checks):
    network = backbone("resnet10_narrow").eval()
    x = torch.randn(1, 3, 64, 96)
    traced = torch.compile(network, backend="eager")
    for found, expected in zip(traced(x), network(x), strict=True):
        torch.testing.assert_close(found, expected)
    block = network.body.layer4.external_attention
    features = torch.randn(1, 128, 3, 4)
    program = torch.export.export(block, (features,)).module()
    torch.testing.assert_close(program(features), block(features))


def test_wrong_use_is_named():
    with pytest.raises(ValueError, match="targets of all 2 images"):
        detector("retinanet")(images())
    for arguments, word in (
        ({"backbone": "resnet9"}, "resnet50"),
        ({"norm": "layer"}, "fixed"),
        ({"frozen_stages": 7}, "frozen_stages"),
        ({"attention": "self"}, "external"),
        ({"attention_after": "layer9"}, "layer1"),
        ({"num_classes": 0}, "num_classes"),
    ):
        with pytest.raises(UserError, match=word):
            detector("faster_rcnn", **arguments)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_fixed_batch_is_learned(kind):
    few = {} if kind == "retinanet" else {"samples": 32, "proposal_count": 64}
    model = detector(kind, size="small", attention="external", **few)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    history = []
    for _ in range(50):
        losses = model(images(), targets())
        loss = sum(losses.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert sum(history[-5:]) < 0.5 * sum(history[:5])


def test_costs_can_be_counted():
    # as counted for MMDetection's network at 800 x 1344: backbone with pyramid, proposals, head
    with torch.device("meta"):
        model = registry.create_model("faster_rcnn_resnet50_fpn")
        with_attention = registry.create_model("faster_rcnn_resnet50_fpn_ea")
    cost = count_cost(model, (1, 3, 800, 1344))
    parts = {module.name: module.macs / 1e9 for module in cost.modules}
    assert parts["backbone"] == pytest.approx(148.5, abs=0.3)
    assert parts["proposals"] == pytest.approx(53.2, abs=0.3)
    assert parts["heads"] == pytest.approx(14.3, abs=0.3)
    assert count_cost(with_attention, (1, 3, 800, 1344)).macs > cost.macs
    for kind in KINDS:
        assert count_cost(detector(kind), (1, 3, 64, 96)).macs > 0


#: the layers of MMDetection's detectors beside the ResNet, as its configurations and modules say
NECK = [f"neck.{part}.{n}.conv" for part in ("lateral_convs", "fpn_convs") for n in range(4)]
RPN = ["rpn_head.rpn_conv", "rpn_head.rpn_cls", "rpn_head.rpn_reg"]
BOX = ["shared_fcs.0", "shared_fcs.1", "fc_cls", "fc_reg"]
MASK = [*(f"convs.{n}.conv" for n in range(4)), "upsample", "conv_logits"]
BOX_HEADS = [f"roi_head.bbox_head.{layer}" for layer in BOX]
PUBLISHED = {
    "faster_rcnn": [*NECK, *RPN, *BOX_HEADS],
    "mask_rcnn": [*NECK, *RPN, *BOX_HEADS, *(f"roi_head.mask_head.{layer}" for layer in MASK)],
    "retinanet": [
        *(f"neck.lateral_convs.{n}.conv" for n in range(3)),
        *(f"neck.fpn_convs.{n}.conv" for n in range(5)),
        *(f"bbox_head.{tower}.{n}.conv" for tower in ("cls_convs", "reg_convs") for n in range(4)),
        "bbox_head.retina_cls",
        "bbox_head.retina_reg",
    ],
    "cascade_mask_rcnn": [
        *NECK,
        *RPN,
        *(f"roi_head.bbox_head.{stage}.{layer}" for stage in range(3) for layer in BOX),
        *(f"roi_head.mask_head.{stage}.{layer}" for stage in range(3) for layer in MASK),
    ],
}


@pytest.mark.parametrize("kind", PUBLISHED)
def test_names_are_those_of_mmdetection(kind):
    with torch.device("meta"):
        state = registry.create_model(f"{kind}_resnet50_fpn").state_dict()
    theirs = {mmdetection_name(name) for name in state}
    assert len(theirs) == len(state)
    beside = {name for name in theirs if not name.startswith("backbone.")}
    assert beside == {f"{layer}.{p}" for layer in PUBLISHED[kind] for p in ("weight", "bias")}


def test_published_weights_are_taken_and_others_refused():
    source, model = detector("mask_rcnn", attention="none"), detector("mask_rcnn")
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(1)
    tensors = {mmdetection_name(name): x for name, x in source.state_dict().items()}
    model.load_published_weights(tensors, source="mask_rcnn.pth")
    for name, tensor in source.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    lacking = {name: x for name, x in tensors.items() if "rpn_cls" not in name}
    with pytest.raises(UserError, match=r"mask_rcnn\.pth.*rpn_cls.*nothing"):
        model.load_published_weights(lacking, source="mask_rcnn.pth")
    with pytest.raises(UserError, match=r"it has 'roi_head\.mask_head"):
        detector("faster_rcnn").load_published_weights(tensors, source="mask_rcnn.pth")
    with pytest.raises(UserError, match="fc_cls"):
        detector("mask_rcnn", num_classes=4).load_published_weights(tensors, source="a")
