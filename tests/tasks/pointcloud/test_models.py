"""Every point cloud network: counts, gradients, masks, layouts, tracing, import of files."""

import copy

import pytest
import torch
from safetensors.torch import load, save

from eanet import capture_attention, convert, create_model, registry
from eanet.cli import main
from eanet.errors import UserError
from eanet.hub import from_pretrained
from eanet.nn.fusion import fuse
from eanet.tasks.pointcloud import pct
from eanet.tasks.pointcloud.aggregation import (
    NormArguments,
    aggregate_neighbors,
    compose_neighbors,
)
from eanet.tasks.pointcloud.pct import pad_clouds
from eanet.tasks.pointcloud.published_keys import published_keys

MODELS = [name for name, entry in registry.models().items() if entry.task == "pointcloud"]
TINY = [name for name in MODELS if name.endswith("_tiny")]
TINY_CLS = [name for name in TINY if "_cls" in name]
TINY_PARTS = [name for name in TINY if "_parts" in name]

EXACT = {
    "pct_cls": 2_876_136,
    "pct_position_cls": 2_811_112,
    "spct_cls": 1_360_552,
    "npct_cls": 1_360_552,
    "eat_cls": 2_941_672,
    "eat_no_query_cls": 2_678_504,
    "eat_simple_cls": 1_409_704,
    "eat_simple_no_query_cls": 1_343_656,
    "spct_parts": 2_446_130,
    "pct_parts": 3_961_714,
    "eat_parts": 4_027_250,
    "eat_no_query_parts": 3_764_082,
    "eat_simple_parts": 2_495_282,
    "eat_simple_no_query_parts": 2_429_234,
}


def build(name, **arguments):
    sizes = {"num_parts": 6, "num_categories": 3} if "_parts" in name else {"num_classes": 5}
    return create_model(name, **(sizes | arguments))


def inputs(name, batch=3, points=48, dtype=torch.float32):
    clouds = torch.rand(batch, points, 3, dtype=dtype) * (0.3 + torch.rand(batch, 1, 3))
    return (clouds.to(dtype), torch.arange(batch) % 3) if "_parts" in name else (clouds.to(dtype),)


@pytest.mark.parametrize("name", MODELS)
def test_builds_and_runs_without_memory(name):
    with torch.device("meta"):
        model = create_model(name).eval()
        assert model.config == {"name": name, "arguments": {}}
        points = torch.rand(2, 1024, 3)
        if "_parts" in name:
            categories = torch.zeros(2, dtype=torch.int64)
            assert model(points, categories).shape == (2, 1024, 50)
        else:
            assert model(points).shape == (2, 40)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == EXACT.get(name, count)
    assert registry.models()[name].summary.endswith(".")


def test_every_full_size_model_is_counted():
    others = {name for name in MODELS if "small" in name or "tiny" in name}
    assert set(MODELS) - others == set(EXACT)


def test_without_middle_layers_it_is_the_third_published_variant():
    with torch.device("meta"):
        model = create_model("pct_cls", middle_layers=0)
    assert sum(parameter.numel() for parameter in model.parameters()) == 2_744_040


def test_small_networks_compared_differ_in_attention_alone():
    counts = {}
    for end in ("cls", "parts"):
        for kind in ("eat", "pct", "none"):
            model = create_model(f"{kind}_small_{end}")
            counts[kind] = sum(parameter.numel() for parameter in model.parameters())
        assert counts["none"] < counts["pct"] < 1.25 * counts["none"]
        assert counts["none"] < counts["eat"] < 1.3 * counts["none"]


@pytest.mark.parametrize("form", ["offset", "residual", "block"])
@pytest.mark.parametrize("query", [True, False])
def test_forms_of_external_attention(form, query):
    model = build("eat_cls_tiny", form=form, query=query).train()
    model(*inputs("eat_cls_tiny")).square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("name", TINY)
def test_every_parameter_gets_a_finite_gradient(name):
    model = build(name, dropout=0.0).train()
    model(*inputs(name)).square().sum().backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert torch.isfinite(parameter.grad).all(), parameter_name


@pytest.mark.parametrize("training", [True, False])
def test_aggregation_in_tiles_equals_ordinary_operations(training, monkeypatch):
    monkeypatch.setattr("eanet.tasks.pointcloud.aggregation._TILE_ON_CPU", 8 * 4 * 7 * 5)
    double = {"dtype": torch.float64}
    near, own = torch.randn(2, 30, 7, **double), torch.randn(2, 11, 7, **double)
    neighbors = torch.randint(0, 30, (2, 11, 4))
    neighbors[0, 3] = neighbors[0, 3, 0]  # the same point four times
    weight = torch.randn(6, 7, **double)
    vectors = [torch.randn(size, **double) for size in (7, 7, 6, 6)]  # scales of either sign
    leaves = [x.requires_grad_() for x in (near, own, weight, *vectors)]
    moments = [torch.rand(size, **double) + 0.3 for size in (7, 7, 6, 6)]
    statistics = [[], []] if training else [moments[:2], moments[2:]]
    first = NormArguments(vectors[0], vectors[1], 1e-5, *statistics[0])
    second = NormArguments(vectors[2], vectors[3], 1e-5, *statistics[1])
    cotangent = torch.randn(2, 11, 6, **double)
    found = []
    for run in (aggregate_neighbors, compose_neighbors):
        out, *seen = run(near, own, neighbors, weight, first, second)
        gradients = torch.autograd.grad(out, leaves, cotangent)
        found.append([out, *seen[0], *seen[1], *gradients])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


def test_aggregation_keeps_nothing_of_the_grouped_size():
    near = torch.randn(1, 200, 16, requires_grad=True)
    neighbors = torch.randint(0, 200, (1, 200, 32))
    norms = [NormArguments(torch.ones(16), torch.zeros(16), 1e-5) for _ in range(2)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor.numel()) or tensor, lambda tensor: tensor
    ):
        aggregate_neighbors(near, near, neighbors, torch.eye(16), *norms)
    assert max(kept) <= 200 * 32  # the indices; features of all pairs would be 16 times that


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("training", [False, True])
def test_padding_changes_nothing(name, training):
    model = build(name, dropout=0.0).double().train(training)
    clouds = [torch.randn(size, 3, dtype=torch.float64) for size in (48, 60, 48)]
    points, mask = pad_clouds(clouds)
    more, more_mask = pad_clouds([*clouds, torch.zeros(70, 3, dtype=torch.float64)])
    more, more_mask = more[:3], more_mask[:3]
    more = more.masked_fill(~more_mask.unsqueeze(2), torch.nan)  # whatever stands there
    categories = (torch.tensor([0, 2, 1]),) if "_parts" in name else ()
    state = copy.deepcopy(model.state_dict())
    found = model(points, *categories, mask=mask)
    after = copy.deepcopy(model.state_dict())
    model.load_state_dict(state)
    padded = model(more.nan_to_num(7.0), *categories, mask=more_mask)
    if "_parts" in name:
        found, padded = found[mask], padded[more_mask]
    torch.testing.assert_close(padded, found, rtol=1e-9, atol=1e-9)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, after[key], rtol=1e-9, atol=1e-9, msg=key)
    if not training:  # and every cloud by itself gives what it gives in the batch
        for number, cloud in enumerate(clouds):
            alone = model(cloud[None], *(part[number : number + 1] for part in categories))
            if "_parts" in name:
                start = sum(map(len, clouds[:number]))
                torch.testing.assert_close(alone[0], found[start : start + len(cloud)])
            else:
                torch.testing.assert_close(alone[0], found[number])


@pytest.mark.parametrize("name", TINY_PARTS)
@torch.no_grad()
def test_segmentation_follows_the_order_of_the_points(name):
    model = build(name).double().eval()
    points, categories = inputs(name, dtype=torch.float64)
    order = torch.randperm(points.shape[1])
    torch.testing.assert_close(
        model(points[:, order], categories), model(points, categories)[:, order]
    )


@pytest.mark.parametrize("name", TINY_CLS)
@torch.no_grad()
def test_classes_depend_on_the_first_point_alone(name):
    model = build(name).double().eval()
    (points,) = inputs(name, dtype=torch.float64)
    order = torch.cat([torch.zeros(1, dtype=torch.int64), 1 + torch.randperm(points.shape[1] - 1)])
    torch.testing.assert_close(model(points[:, order]), model(points))


@pytest.mark.parametrize("name", TINY_PARTS)
@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_large_clouds_in_parts_give_the_same(name, masked, monkeypatch):
    model = build(name).double().eval()
    points, categories = inputs(name, dtype=torch.float64)
    mask = torch.rand(points.shape[:2]) < 0.8 if masked else None
    whole = model(points, categories, mask)
    monkeypatch.setattr(pct, "_MAX_POINTS_AT_ONCE", 20)
    parts = model(points, categories, mask)
    kept = slice(None) if mask is None else mask
    torch.testing.assert_close(parts[kept], whole[kept])


@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_bfloat16_is_near(name):
    model = build(name).eval()
    given = inputs(name)
    exact = model(*given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = model(*given)
    assert torch.isfinite(rounded).all()
    assert float((rounded - exact).abs().max()) < 0.1 * float(exact.abs().max()) + 0.02


@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_state_survives_files_and_copies(name):
    model, other = build(name).eval(), build(name).eval()
    given = inputs(name)
    expected = model(*given)
    assert not torch.equal(other(*given), expected)
    other.load_state_dict(load(save(model.state_dict())), strict=True)
    assert torch.equal(other(*given), expected)
    assert torch.equal(copy.deepcopy(model)(*given), expected)


@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_folded_copy_gives_the_same(name):
    model = build(name).eval()
    given = inputs(name)
    torch.testing.assert_close(fuse(model)(*given), model(*given), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_is_traced_as_one_graph(name, without_shape_checks):
    model = build(name).eval()
    given = inputs(name)
    traced = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(traced(*given), model(*given), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", TINY_CLS)
@torch.no_grad()
def test_exported_program_gives_the_same(name, without_shape_checks):
    model = build(name).eval()
    given = inputs(name)
    program = torch.export.export(model, given).module()
    torch.testing.assert_close(program(*given), model(*given), rtol=1e-4, atol=1e-5)


def test_maps_of_slots_are_captured():
    model = build("eat_parts_tiny").eval()
    with torch.no_grad(), capture_attention(model) as maps:
        model(*inputs("eat_parts_tiny"))
    assert {name: tuple(x.shape) for name, x in maps.items()} == {
        f"encoder.layers.{number}.attention": (3, 48, 16) for number in range(2)
    }


@pytest.mark.parametrize(
    ("points", "message"),
    [
        (torch.rand(2, 3, 48), r"transpose\(1, 2\)"),
        (torch.rand(48, 3), "needs a batch dimension"),
        (torch.rand(2, 48, 4), r"\(batch, points, 3\)"),
        (torch.rand(2, 20, 3), "at least 32 points, got 20"),
        (torch.rand(2, 1, 3), "at least 32 points, got 1"),
        (torch.ones(2, 48, 3, dtype=torch.int64), "floating point, got torch.int64"),
        (torch.full((2, 48, 3), torch.nan), "NaN"),
        (torch.rand(0, 48, 3), "no cloud"),
    ],
)
def test_unusable_points_are_answered(points, message, without_shape_checks):
    with pytest.raises(ValueError, match=message):
        build("eat_cls_tiny").eval()(points)


def test_equal_points_give_finite_results():
    for name in TINY:
        model = build(name).eval()
        given = (torch.ones(2, 48, 3), *inputs(name, 2)[1:])
        assert torch.isfinite(model(*given)).all()


def test_one_cloud_cannot_be_trained_on():
    with pytest.raises(ValueError, match="more than one cloud"):
        build("eat_cls_tiny").train()(torch.rand(1, 48, 3))


@pytest.mark.parametrize(
    ("categories", "message"),
    [(None, "category of each cloud"), (torch.tensor([0, 3]), r"within 0..2, got 3")],
)
def test_unusable_categories_are_answered(categories, message):
    with pytest.raises(ValueError, match=message):
        build("eat_parts_tiny").eval()(torch.rand(2, 48, 3), categories)


def published(model):
    state = model.state_dict()
    found = {}
    for ours, theirs in published_keys(model).items():
        tensor = state[ours]
        convolution = theirs.endswith("weight") and tensor.ndim == 2 and "linear" not in theirs
        tensor = tensor.t() if ours.endswith("memory_value") else tensor
        found[theirs] = (tensor.unsqueeze(2) if convolution else tensor).contiguous()
        if "k_conv" in theirs:
            found[theirs.replace("k_conv", "q_conv")] = found[theirs]
    return found


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("pct_cls", {"num_classes": 7}),
        ("pct_position_cls", {"num_classes": 7}),
        ("eat_cls", {"num_classes": 7, "query": False, "num_slots": 32}),
        ("spct_parts", {"num_parts": 9, "num_categories": 4}),
    ],
)
@pytest.mark.parametrize("prefix", ["", "module."])
def test_published_files_become_networks(name, arguments, prefix, tmp_path, capsys):
    model = create_model(name, **arguments).eval()
    file = tmp_path / "best_model.t7"
    torch.save({prefix + key: value for key, value in published(model).items()}, file)
    assert main(["convert", str(file), "--out", str(tmp_path / "out")]) == 0
    assert name in capsys.readouterr().out
    found = from_pretrained(tmp_path / "out")
    for key, value in model.state_dict().items():
        assert torch.equal(found.state_dict()[key], value), key


def test_other_files_are_refused(tmp_path):
    tensors = published(create_model("pct_cls"))
    for change, message in (
        ({"surplus": torch.zeros(2)}, "unknown 'surplus'"),
        ({"linear1.weight": torch.zeros(3, 3)}, "'linear1.weight' has shape"),
        ({"pt_last.sa1.q_conv.weight": torch.zeros(64, 256, 1)}, "not tied"),
    ):
        file = tmp_path / "model.pth"
        torch.save(tensors | change, file)
        with pytest.raises(UserError, match=message):
            convert.load_published(file)
    torch.save(tensors, file)
    with pytest.raises(UserError, match="num_heads has no meaning"):
        convert.load_published(file, num_heads=4)
