"""Layers, networks, metrics and augmentation equal those of PCT."""

import math

import pytest
import torch
from torch.nn import functional as F

from eanet import create_model
from eanet.tasks.pointcloud.attention import attention_layer
from eanet.tasks.pointcloud.embedding import LocalAggregation
from eanet.tasks.pointcloud.metrics import ClassMetrics, PartMetrics, restrict_to_category
from eanet.tasks.pointcloud.point_task import spread_smoothing
from eanet.tasks.pointcloud.published_keys import attention_keys, from_published
from eanet.tasks.pointcloud.transforms import drop_points, scale_and_shift

#: of output and input gradient, of parameter gradients; as the files state in words
TOLERANCE = {
    torch.float64: ({"rtol": 1e-9, "atol": 1e-10}, {"rtol": 1e-9, "atol": 1e-10}),
    torch.float32: ({"rtol": 1e-4, "atol": 1e-5}, {"rtol": 1e-3, "atol": 1e-4}),
}


def close(found, expected, tolerance, what):
    torch.testing.assert_close(
        found.detach().double(), expected.double(), **tolerance, msg=lambda text: f"{what}: {text}"
    )


def part(tensors, prefix, dtype=None):
    return {
        name.removeprefix(prefix): tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


def layer_of(state, kind):
    """Build the attention layer that a case's state and description are of, and its names."""
    if "linear_0.weight" in state:
        num_slots, channels = state["linear_0.weight"].shape[:2]
        layer = attention_layer("external", channels, num_slots=num_slots, form="block")
        keys = {
            "query.weight": "conv1.weight",
            "query.bias": "conv1.bias",
            "memory_key": "linear_0.weight",
            "memory_value": "linear_1.weight",
            "projection.weight": "conv2.0.weight",
            **{f"norm.{x}": f"conv2.1.{x}" for x in layer.norm.state_dict()},
        }
        return layer, keys
    if "mk.weight" in state:
        num_slots, channels = state["mk.weight"].shape[:2]
        layer = attention_layer(
            "external", channels, num_slots=num_slots, query="query.weight" in state
        )
    else:
        channels = len(state["v_conv.bias"])
        layer = attention_layer("plain" if "plain" in kind else "offset", channels)
    return layer, attention_keys(layer)


def ours(theirs, name, like):
    """Bring a published tensor to the layout of ours."""
    tensor = theirs.flatten(1) if theirs.ndim > 2 and like.ndim == 2 else theirs
    return tensor.t() if name.endswith("memory_value") else tensor


def gradients_of(layer, keys, theirs):
    """Yield name, our gradient and the published one."""
    for name, parameter in layer.named_parameters():
        their_name = keys[name].replace("k_conv", "q_conv")
        if their_name in theirs:
            yield name, parameter.grad, ours(theirs[their_name], name, parameter)


@pytest.mark.golden("pointcloud.attention_layers")
def test_attention_layers(golden_case, dtype, device):
    tensors = golden_case.tensors()
    for name, meta in golden_case.meta["cases"].items():
        found = part(tensors, f"{name}.", dtype)
        state, expected = part(found, "state."), part(tensors, f"{name}.")
        layer, keys = layer_of(state, meta["args"]["kind"])
        layer = layer.to(device, dtype).train(meta["mode"] == "train")
        layer.load_state_dict(
            {own: ours(state[their], own, layer.state_dict()[own]) for own, their in keys.items()},
        )
        inputs = [
            found[f"input{number}"].to(device).requires_grad_()
            for number in range(2)
            if f"input{number}" in found
        ]
        x = sum(inputs)
        x = x.flatten(2).transpose(1, 2)
        result = layer(x).transpose(1, 2).reshape(found["output"].shape)
        result.backward(found["grad_output"].to(device))
        exact, loose = TOLERANCE[dtype]
        close(result.cpu(), expected["output"], exact, f"{name} output")
        for number, given in enumerate(inputs):
            close(
                given.grad.cpu(), expected[f"grad_input{number}"], exact, f"{name} input {number}"
            )
        compared = list(gradients_of(layer, keys, part(expected, "grad.")))
        assert len(compared) >= 5
        for parameter, gradient, theirs in compared:
            close(gradient.cpu(), theirs, loose, f"{name} gradient of {parameter}")
        for their, value in part(expected, "after.").items():
            (own,) = [own for own, other in keys.items() if other == their]
            close(layer.state_dict()[own].cpu(), value, exact, f"{name} {own}")


@pytest.mark.golden("pointcloud.local_op")
def test_local_aggregation(golden_case, dtype, device):
    """The published module takes grouped features, of any kind: each pair is a point here."""
    tensors = golden_case.tensors()
    for name, meta in golden_case.meta["cases"].items():
        found, expected = part(tensors, f"{name}.", dtype), part(tensors, f"{name}.")
        grouped = found["input0"].to(device)
        batch, num_centers, k, channels = grouped.shape
        half = channels // 2
        layer = LocalAggregation(half, meta["args"]["out_channels"]).to(device, dtype)
        layer.train(meta["mode"] == "train")
        layer.load_state_dict(
            {
                key.replace("conv", "linear").replace("bn", "norm"): value.squeeze(-1)
                if value.ndim == 3
                else value
                for key, value in part(found, "state.").items()
            }
        )
        inputs = grouped.clone().requires_grad_()
        points = layer.linear1(inputs).flatten(1, 2)
        neighbors = torch.arange(num_centers * k, device=device).view(1, num_centers, k)
        result = aggregate(layer, points, neighbors.expand(batch, -1, -1))
        result.backward(found["grad_output"].to(device).transpose(1, 2))
        exact, loose = TOLERANCE[dtype]
        close(result.transpose(1, 2).cpu(), expected["output"], exact, f"{name} output")
        close(inputs.grad.cpu(), expected["grad_input0"], exact, f"{name} input")
        for their, gradient in part(expected, "grad.").items():
            own_name = their.replace("conv", "linear").replace("bn", "norm")
            parameter = layer.get_parameter(own_name)
            close(parameter.grad.cpu(), gradient.view(parameter.shape), loose, f"{name} {their}")
        for their, value in part(expected, "after.").items():
            own_name = their.replace("bn", "norm")
            close(layer.state_dict()[own_name].cpu(), value, exact, f"{name} {own_name}")


def aggregate(layer, points, neighbors):
    """Run a layer on points that its first linear map was applied to already."""
    from eanet.tasks.pointcloud import embedding

    arguments = [embedding._arguments_of(norm) for norm in (layer.norm1, layer.norm2)]
    zeros = points.new_zeros(points.shape[0], neighbors.shape[1], points.shape[2])
    result, *found = embedding.aggregate_neighbors(
        points, zeros, neighbors, layer.linear2.weight, *arguments
    )
    for norm, statistics in zip((layer.norm1, layer.norm2), found, strict=True):
        embedding._update(norm, statistics, neighbors.numel())
    return result


def loaded(model, golden_case, dtype):
    weights = part(golden_case.tensors(), "weights.", dtype)
    model.load_state_dict(from_published(model, weights, source=golden_case.name))
    return model.to(dtype)


@pytest.mark.golden("pointcloud.pct_classifier")
def test_classifier_evaluates_as_published(golden_case, dtype, device):
    arguments = golden_case.meta["args"]
    model = create_model("pct_cls", num_classes=arguments["num_classes"], dropout=0.0)
    assert sum(p.numel() for p in model.parameters()) == arguments["parameters"]
    model = loaded(model, golden_case, dtype).to(device).eval()
    expected = part(golden_case.tensors(), "eval.")
    xyz = expected["xyz"].to(device, dtype)
    seen = {}
    handles = [
        module.register_forward_hook(lambda _, __, out, name=name: seen.update({name: out}))
        for name, module in model.named_modules()
        if name.startswith(("encoder.embedding.stages.", "encoder.layers.", "encoder.fuse"))
    ]
    with torch.no_grad():
        logits = model(xyz)
    for handle in handles:
        handle.remove()
    tolerance = {"rtol": 0, "atol": 1e-8 if dtype == torch.float64 else 1e-3}
    close(logits.cpu(), expected["logits"], tolerance, "logits")
    for number in range(2):
        features = seen[f"encoder.embedding.stages.{number}"]
        close(
            features.mean(1).cpu(), expected[f"feature_{number}_mean"], tolerance, f"stage {number}"
        )
    first = seen["encoder.embedding.stages.1"][0].t()[:, :16].cpu()
    single = {"rtol": 1e-5, "atol": 1e-3 if dtype == torch.float32 else 1e-5}  # stored in float32
    close(first, expected["feature_1_cloud0_first16"], single, "features of the first cloud")
    attended = torch.cat([seen[f"encoder.layers.{number}"] for number in range(4)], dim=2)
    close(attended.mean(1).cpu(), expected["attn_concat_mean"], tolerance, "attention layers")
    close(seen["encoder.fuse"].amax(1).cpu(), expected["pooled"], single, "pooled")


@pytest.mark.golden("pointcloud.pct_classifier")
def test_classifier_trains_as_published(golden_case, dtype, device):
    arguments = golden_case.meta["args"]
    model = create_model("pct_cls", num_classes=arguments["num_classes"], dropout=0.0)
    model = loaded(model, golden_case, dtype).to(device).train()
    expected = part(golden_case.tensors(), "train.")
    labels = expected["label"].to(device)
    logits = model(expected["xyz"].to(device, dtype))
    loss = F.cross_entropy(
        logits, labels, label_smoothing=spread_smoothing(0.2, arguments["num_classes"])
    )
    plain = F.cross_entropy(logits, labels)
    loss.backward()
    double = dtype == torch.float64
    tolerance = {"rtol": 0, "atol": 1e-8 if double else 1e-3}
    close(logits.cpu(), expected["logits"], tolerance, "logits")
    close(loss.cpu(), expected["loss_smooth"], tolerance, "smoothed loss")
    close(plain.cpu(), expected["loss_plain"], tolerance, "loss")
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    from eanet.tasks.pointcloud.published_keys import published_keys

    named = {
        theirs.replace("k_conv", "q_conv"): gradients[own]
        for own, theirs in published_keys(model).items()
        if own in gradients
    }
    names = golden_case.meta["grad_names"]
    assert set(names) == set(named)
    norms = torch.stack([named[name].double().norm().cpu() for name in names])
    large = expected["grad_l2"] > 1e-6 * expected["grad_l2"].max()
    relative = {"rtol": 1e-8, "atol": 1e-8} if double else {"rtol": 1e-2, "atol": 0}
    close(norms[large], expected["grad_l2"][large], relative, "norms of gradients")
    assert float(norms[~large].max()) < 1e-4 * float(expected["grad_l2"].max())
    if double:
        sums = torch.stack([named[name].double().sum().cpu() for name in names])
        close(sums, expected["grad_sum"], {"rtol": 1e-8, "atol": 1e-8}, "sums of gradients")
    for name, value in part(expected, "grad.").items():
        found = named[name].cpu().double()
        error = (found.view(value.shape) - value).abs().max()
        assert error <= (1e-8 if double else 0.05 * value.abs().max()), name
    keys = {theirs: own for own, theirs in published_keys(model).items()}
    for name, value in part(expected, "after.").items():
        close(model.state_dict()[keys[name]].cpu(), value, tolerance, name)


@pytest.mark.golden("pointcloud.spct_partseg")
def test_part_segmentation_evaluates_as_published(golden_case, dtype, device):
    arguments = golden_case.meta["args"]
    model = create_model("spct_parts", num_parts=arguments["num_parts"])
    assert sum(p.numel() for p in model.parameters()) == arguments["parameters"]
    model = loaded(model, golden_case, dtype).to(device).eval()
    expected = part(golden_case.tensors(), "eval.")
    with torch.no_grad():
        logits = model(expected["xyz"].to(device, dtype), expected["category"].to(device))
    tolerance = {"rtol": 1e-3, "atol": 1e-3}
    if dtype == torch.float64:
        tolerance = {"rtol": 1e-5, "atol": 1e-5}
    close(logits.transpose(1, 2).cpu(), expected["logits"], tolerance, "logits")


#: the 16 categories of ShapeNetPart in their order
PARTS = (4, 2, 2, 4, 4, 3, 3, 2, 4, 2, 6, 2, 3, 3, 3, 3)


@pytest.mark.golden("pointcloud.metrics")
def test_metrics(golden_case, device):
    tensors, values = golden_case.tensors(), golden_case.meta["values"]
    starts = [sum(PARTS[:number]) for number in range(len(PARTS))]
    ranges = [[start, start + count] for start, count in zip(starts, PARTS, strict=True)]
    logits, target, category = (
        tensors[f"seg.{name}"].to(device) for name in ("logits", "target", "category")
    )
    masked = restrict_to_category(logits, category, ranges).argmax(2)
    assert torch.equal(masked.cpu(), tensors["seg.masked_pred"])
    metrics = PartMetrics(ranges, device)
    for first in range(0, len(logits), 7):  # in batches of uneven size
        rows = slice(first, first + 7)
        metrics.update(logits[rows], target[rows], category[rows])
    found = metrics.compute()
    for kind, prefix in (("masked", ""), ("unmasked", "unmasked_")):
        for name, ours_name in (
            ("instance_miou", "instance_miou"),
            ("class_miou", "class_miou"),
            ("point_accuracy", "point_accuracy"),
        ):
            expected = values[f"{kind}.{name}"]
            assert found[prefix + ours_name] == pytest.approx(expected, abs=1e-9), name
        shapes = metrics.shape_iou(masked=kind == "masked").cpu()
        close(shapes, tensors[f"seg.{kind}_shape_iou"], {"rtol": 0, "atol": 1e-9}, kind)
        categories = metrics.category_iou(masked=kind == "masked").cpu()
        torch.testing.assert_close(
            categories, tensors[f"seg.{kind}_category_iou"], rtol=0, atol=1e-9, equal_nan=True
        )
    wanted = values["masked.mean_part_accuracy_present_parts"]
    assert found["mean_part_accuracy"] == pytest.approx(wanted, abs=1e-9)

    predicted, true = tensors["cls.pred"], tensors["cls.true"]
    classes = ClassMetrics(int(max(predicted.max(), true.max())) + 1)
    classes.update(F.one_hot(predicted).double(), true)
    found = classes.compute()
    for name, wanted in (
        ("accuracy", "cls.overall_accuracy"),
        ("mean_class_accuracy", "cls.mean_class_accuracy"),
    ):
        assert found[name] == pytest.approx(values[wanted], abs=1e-7), name

    logits = tensors["loss.logits"].double().requires_grad_()
    loss = F.cross_entropy(
        logits,
        tensors["loss.target"],
        label_smoothing=spread_smoothing(0.2, logits.shape[1]),
    )
    loss.backward()
    assert float(loss.detach()) == pytest.approx(values["loss_smooth"], abs=1e-6)
    close(logits.grad, tensors["loss.grad_smooth"], {"rtol": 0, "atol": 1e-6}, "gradient")


@pytest.mark.golden("pointcloud.augment")
def test_augmentation(golden_case):
    tensors = golden_case.tensors()
    points = tensors["points"]
    before = points.clone()
    scaled = scale_and_shift(points, tensors["scale"], tensors["shift"])
    close(scaled, tensors["scaled_shifted"], {"rtol": 0, "atol": 1e-6}, "scaled")
    dropped = drop_points(points, tensors["drop_mask"])
    close(dropped, tensors["dropped"], {"rtol": 0, "atol": 1e-6}, "dropped")
    assert torch.equal(points, before), "augmentation copies first"
    ratio = golden_case.meta["values"]["drop_ratio"]
    assert math.isclose(float(tensors["drop_mask"].float().mean()), ratio, abs_tol=0.2)
