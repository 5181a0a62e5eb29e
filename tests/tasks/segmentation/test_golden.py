"""Networks, loss, metrics, preprocessing, test protocol and schedule of the authors' code."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from eanet.data.labeled_images import normalize
from eanet.engine.optim import parameter_groups
from eanet.engine.schedule import Timetable, learning_rate_factor
from eanet.nn.fusion import fuse
from eanet.recipe import ParameterGroup
from eanet.recipes.segmentation_voc import RECIPES
from eanet.tasks.segmentation.eanet import Segmenter
from eanet.tasks.segmentation.inference import Protocol, segment
from eanet.tasks.segmentation.losses import pixel_loss
from eanet.tasks.segmentation.metrics import SegmentationMetrics, class_iou, scores
from eanet.tasks.segmentation.official_keys import load_official, to_official
from eanet.tasks.segmentation.transforms import (
    next_size,
    pad,
    resize_image,
    resize_labels,
)

pytestmark = pytest.mark.golden

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


# the whole network


def hashed(count, place):
    """Return r of the formula in meta.json: numbers within [0, 1) from integers alone."""
    with np.errstate(over="ignore"):
        s = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        s += np.uint64(place + 1) * np.uint64(0xBF58476D1CE4E5B9)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            s ^= s >> np.uint64(shift)
            s *= np.uint64(factor)
        s ^= s >> np.uint64(31)
    return (s >> np.uint64(11)).astype(np.float64) * 2.0**-53


def value_of(name, shape, place):
    """Return the tensor that the formula gives for a name of the authors' state dict."""
    r = hashed(math.prod(shape), place)
    if name.endswith("running_var"):
        values = 0.6 + 0.8 * r
    elif len(shape) >= 3:
        values = (2 * r - 1) * math.sqrt(6 / math.prod(shape[1:]))
        if name.endswith(("linear_0.weight", "linear_1.weight")):
            values = 4 * values
    elif name.endswith("bn3.weight"):
        values = 0.2 + 0.2 * r
    elif name.endswith(".weight"):
        values = 0.8 + 0.4 * r
    else:
        values = 0.1 * (2 * r - 1)
    return torch.from_numpy(values.astype(np.float32)).reshape(shape)


def official_tensors(model):
    """Return weights by the formula, under the authors' names, and the number of names."""
    shapes = {name: tuple(t.shape) for name, t in to_official(model.state_dict()).items()}
    names = sorted(name for name in shapes if not name.endswith("num_batches_tracked"))
    return {name: value_of(name, shapes[name], h) for h, name in enumerate(names)}, len(names)


@pytest.fixture(scope="module")
def built(request):
    """Networks of golden cases, built once for each case."""
    return {}


def network_of(case, built):
    """Return the network of a case with the formula's weights, its input and its labels."""
    if case.name not in built:
        arguments = case.arguments
        model = Segmenter(
            arguments["n_classes"],
            backbone=f"resnet{arguments['n_layers']}",
            output_stride=arguments["output_stride"],
            dropout=0.0,
        )
        tensors, count = official_tensors(model)
        assert count == case.meta["n_keys"]
        load_official(model, tensors, source=case.name)
        shape = case.meta["input_shape"]
        x = (2 * hashed(math.prod(shape), count) - 1) * math.sqrt(3)
        x = torch.from_numpy(x.astype(np.float32)).reshape(shape)
        size = (shape[0], *shape[2:])
        limit = arguments["n_classes"] + 2
        labels = np.floor(hashed(math.prod(size), count + 1) * limit).astype(np.uint8)
        labels[labels >= arguments["n_classes"]] = 255
        built[case.name] = model, x, torch.from_numpy(labels.reshape(size))
    model, x, labels = built[case.name]
    io = case.tensors("io")
    torch.testing.assert_close(x.flatten()[:16], io["in.x_head"], rtol=0, atol=0)
    assert torch.equal(labels, io["in.label"])
    return model, x, labels, io


@pytest.mark.golden("segmentation.eanet")
def test_network_has_the_names_and_shapes_of_the_original(golden_case):
    with torch.device("meta"):
        model = Segmenter(
            golden_case.arguments["n_classes"],
            backbone=f"resnet{golden_case.arguments['n_layers']}",
            output_stride=golden_case.arguments["output_stride"],
        )
    import json

    shapes = json.loads(golden_case.files["state_dict_shapes"].read_text())
    ours = {name: list(tensor.shape) for name, tensor in to_official(model.state_dict()).items()}
    assert ours == shapes
    assert sum(p.numel() for p in model.parameters()) == golden_case.meta["n_params"]
    parts = {"backbone": "backbone", "fc0": "reduce", "linu": "attention", "fc1": "refine"}
    for theirs, name in parts.items():
        count = sum(p.numel() for p in model.get_submodule(name).parameters())
        assert count == golden_case.meta["n_params_by_part"][theirs]


@pytest.mark.golden("segmentation.eanet")
@torch.no_grad()
def test_network_equals_the_original_in_evaluation(golden_case, built, dtype):
    model, x, _, io = network_of(golden_case, built)
    model.to(dtype).eval()
    x = x.to(dtype)
    features = model.backbone(x)[-1]
    reduced = model.reduce(features)
    golden_case.assert_output(features.mean(dim=(0, 2, 3)), io["eval.bb_channel_mean"], "backbone")
    golden_case.assert_output(reduced.mean(dim=(0, 2, 3)), io["eval.fc0_channel_mean"], "fc0")
    attention = model.attention.attention_map(reduced).flatten(2)
    golden_case.assert_output(attention, io["eval.attn"], "attention")
    attended = model.attention(reduced).mean(dim=(0, 2, 3))
    golden_case.assert_output(attended, io["eval.ea_channel_mean"], "block")
    low = model.classify(features)
    golden_case.assert_output(low, io["eval.logits_low"], "logits")
    full = F.interpolate(low, x.shape[2:], mode="bilinear", align_corners=True)
    expected = io["eval.logits_f32"].double()
    torch.testing.assert_close(full.double(), expected, rtol=5e-3, atol=5e-3)
    folded = fuse(model.attention)(reduced).mean(dim=(0, 2, 3))
    golden_case.assert_output(folded, io["eval.ea_channel_mean"], "folded block")


@pytest.mark.golden("segmentation.eanet")
def test_network_equals_the_original_in_training(golden_case, built, dtype):
    model, x, labels, io = network_of(golden_case, built)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.to(dtype).train()
    model.zero_grad()
    logits = model(x.to(dtype))
    loss = pixel_loss(logits, labels)
    loss.backward()
    golden_case.assert_output(loss, io["train.loss"][0], "loss")
    for name in ("running_mean", "running_var"):
        golden_case.assert_output(
            getattr(model.attention.norm, name), io[f"train_state.linu.conv2.1.{name}"], name
        )
    gradients = to_official({name: p.grad for name, p in model.named_parameters()})
    # the note of the case states these
    rtol = 1e-6 if dtype == torch.float64 else 2e-2
    names = sorted(gradients)
    assert len(names) == len(io["gradnorm"])
    for name, expected in zip(names, io["gradnorm"].tolist(), strict=True):
        if name == "linu.conv1.bias":
            assert float(gradients[name].norm()) == 0
            continue
        found = float(gradients[name].double().norm())
        assert found == pytest.approx(expected, rel=rtol, abs=1e-8), name
    model.load_state_dict(state)


@pytest.mark.golden("segmentation.eanet")
def test_parameter_groups_are_those_of_the_original(golden_case):
    with torch.device("meta"):
        model = Segmenter(
            golden_case.arguments["n_classes"],
            backbone=f"resnet{golden_case.arguments['n_layers']}",
        )
    found = {}
    for group in parameter_groups(model, RECIPES["eanet_resnet50"].optim):
        key = (group["lr_scale"], group["weight_decay"])
        count, elements = found.get(key, (0, 0))
        found[key] = (
            count + len(group["params"]),
            elements + sum(p.numel() for p in group["params"]),
        )
    stated = golden_case.meta["param_groups"]
    for words, key in (("lr1x_wd", (1.0, 1e-4)), ("lr1x_nowd", (1.0, 0.0)), ("lr2x", (2.0, 0.0))):
        (entry,) = [value for name, value in stated.items() if name.startswith(words)]
        assert found.pop(key) == (entry["tensors"], entry["elements"])
    assert not found


# loss, metrics


@pytest.mark.golden("segmentation.loss")
def test_loss_equals_the_original(golden_case, dtype):
    io = golden_case.tensors("io")
    logits = io["in.logits"].to(dtype).requires_grad_()
    labels = io["in.label"]
    loss = pixel_loss(logits, labels)
    loss.backward()
    golden_case.assert_output(loss, io["loss"][0])
    golden_case.assert_gradient(logits.grad, io["grad.logits"], "logits")
    singles = [pixel_loss(logits[i : i + 1], labels[i : i + 1]) for i in range(len(labels))]
    golden_case.assert_output(torch.stack(singles), io["loss_per_sample"], "each sample")
    valid = pixel_loss(logits, labels, reduction="valid_pixels")
    golden_case.assert_output(valid, io["valid_mean"][0], "over valid pixels")


@pytest.mark.golden("segmentation.metrics")
def test_metrics_equal_the_original(golden_case):
    io = golden_case.tensors("io")
    count = len(golden_case.meta["class_iou"])
    metrics = SegmentationMetrics([f"class {number}" for number in range(count)])
    for predicted, labels in zip(io["in.pred"], io["in.label"], strict=True):
        metrics.update(predicted, labels)
    confusion = metrics.confusion_matrix()
    assert torch.equal(confusion, io["hist"])
    found = scores(confusion)
    names = {
        "pAcc": "pixel_accuracy",
        "mAcc": "mean_accuracy",
        "fIoU": "frequency_weighted_iou",
        "mIoU": "mean_iou",
    }
    for theirs, ours in names.items():
        assert found[ours] == pytest.approx(golden_case.meta["scores"][theirs], rel=1e-12), theirs
    for expected, value in zip(
        golden_case.meta["class_iou"], class_iou(confusion).tolist(), strict=True
    ):
        assert math.isnan(value) if expected is None else value == pytest.approx(expected)


# preprocessing, test protocol, schedule


@pytest.mark.golden("segmentation.preprocess")
def test_preprocessing_equals_the_original(golden_case):
    io = golden_case.tensors("io")
    image = normalize(io["in.image_u8_hwc"].permute(2, 0, 1), MEAN, STD)
    labels = io["in.label_u8"]
    golden_case.assert_output(image, io["fetch.image"], "normalized")
    golden_case.assert_output(image.flip(-1), io["flip.image"], "mirrored")
    crop = golden_case.meta["crop_size"]
    golden_case.assert_output(pad(image, (crop, crop), 0), io["pad.image"], "padded")
    assert torch.equal(pad(labels, (crop, crop), 255), io["pad.label"])
    for text, stated in golden_case.meta["scaled_sizes"].items():
        ratio = float(text)
        height, width = image.shape[1:]
        size = math.floor(height * ratio), math.floor(width * ratio)
        assert list(size) == stated
        resized = resize_image(image, size, "authors")
        golden_case.assert_output(resized, io[f"scale_{text}.image"], f"scaled by {text}")
        found = resize_labels(labels, size, "authors", ratio=ratio)
        assert torch.equal(found, io[f"scale_{text}.label"]), text
    for side, stated in golden_case.meta["scaled_length_table"].items():
        assert {t: math.floor(int(side) * float(t)) for t in stated} == stated
    strides = [name.split("os")[1].split(".")[0] for name in io if name.startswith("pad_inf")]
    assert strides
    for stride in sorted(set(strides)):
        size = tuple(next_size(side, int(stride)) for side in image.shape[1:])
        golden_case.assert_output(pad(image, size, 0), io[f"pad_inf_os{stride}.image"], "padded")
        assert torch.equal(pad(labels, size, 255), io[f"pad_inf_os{stride}.label"])


@pytest.mark.golden("segmentation.multiscale_flip")
def test_test_protocol_equals_the_original(golden_case):
    io = golden_case.tensors("io")
    stride = golden_case.meta["os"]
    seen = []

    def stand_in(images):
        seen.append(list(images.shape[2:]))
        low = F.conv2d(images, io["in.weight"], io["in.bias"], stride=stride, padding=2)
        return F.interpolate(low, images.shape[2:], mode="bilinear", align_corners=True)

    protocol = Protocol(scales=golden_case.meta["scales"], mirror=True, size_modulus=stride)
    images = io["in.image"].unsqueeze(0)
    (found,) = segment(stand_in, images, [tuple(images.shape[2:])], protocol)
    assert sorted(seen) == sorted(golden_case.meta["network_input_sizes"])
    golden_case.assert_output(found, io["sum_logits"])
    assert torch.equal(found.argmax(dim=0).to(torch.uint8), io["pred"])


@pytest.mark.golden("segmentation.schedule")
def test_schedule_equals_the_original(golden_case):
    spec = RECIPES["eanet_resnet50"]
    bias = spec.optim.groups[0]
    assert bias == ParameterGroup(match=r"bias$", lr_scale=2.0, weight_decay=0.0)
    for row in golden_case.meta["rows"]:
        table = Timetable(row["max_iter"] + 1, 100, 1, 10**9, counts_epochs=False)
        rate = spec.optim.lr * learning_rate_factor(spec.schedule, table)(row["iter"])
        assert [rate, rate, bias.lr_scale * rate] == pytest.approx(row["lr"], rel=1e-9, abs=1e-15)


@pytest.mark.golden("segmentation.schedule")
def test_schedule_with_a_floor_equals_that_of_mmsegmentation(golden_case):
    from eanet.recipes.segmentation_ade20k import RECIPES as ADE20K

    recipe = ADE20K["eanet_resnet101"]
    for row in golden_case.meta["mmseg_style_rows"]:
        table = Timetable(row["max_iter"], 100, 1, 10**9, counts_epochs=False)
        rate = recipe.optim.lr * learning_rate_factor(recipe.schedule, table)(row["iter"])
        assert rate == pytest.approx(row["lr"], rel=1e-9)
