"""Every registered network of the room: counts, sizes, types, files, export."""

import copy

import pytest
import torch
from safetensors.torch import load, save

from eanet import hub, registry
from eanet.nn.fusion import fuse

MODELS = [name for name, entry in registry.models().items() if entry.task == "segmentation"]
TINY = [name for name in MODELS if name.endswith("_tiny")]
SMALL = [*TINY, *(name for name in MODELS if name.endswith("_small"))]

#: parameters with 21 classes; 150 for v1c
EXACT = {
    "fcn_resnet50": 34_255_573,
    "fcn_sa_resnet50": 35_305_173,
    "fcn_sa_resnet50_double": 35_305_173,
    "eanet_resnet50_s8": 34_789_589,
    "eanet_resnet50_s32": 34_814_165,
    "eanet_resnet50_softmax": 34_846_933,
    "eanet_resnet50": 34_846_933,
    "eanet_resnet50_os8": 34_846_933,
    "eanet_resnet50_s256": 35_043_541,
    "eanet_resnet101": 53_839_061,
    "eanet_resnet101_os8": 53_839_061,
    "eanet_resnet152_os8": 69_482_709,
    "eanet_resnet18": 15_462_229,
    "eanet_resnet34": 25_570_389,
    # 53,839,061 less 129 x 257 for the classes and less 104,544 for the stem, plus the
    # auxiliary head: 9 x 1024 x 256 + 512 + 257 x 150
    "eanet_resnet101_v1c": 53_839_061 + 129 * 257 - 104_544 + 9 * 1024 * 256 + 512 + 257 * 150,
}


def build(name, **arguments):
    return registry.create_model(name, **({"num_classes": 5} | arguments))


@pytest.mark.parametrize("name", MODELS)
def test_builds_and_runs_without_memory(name):
    with torch.device("meta"):
        model = registry.create_model(name).eval()
        classes = model.num_classes
        assert model(torch.zeros(1, 3, 65, 97)).shape == (1, classes, 65, 97)
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    if name in EXACT:
        assert sum(parameter.numel() for parameter in model.parameters()) == EXACT[name]
    assert set(MODELS) == set(EXACT) | set(SMALL)


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("size", [(64, 64), (33, 47), (20, 65)])
def test_odd_sizes_and_channels(name, size):
    model = build(name, in_channels=1).eval()
    assert model(torch.randn(2, 1, *size)).shape == (2, 5, *size)


@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_bfloat16_is_near(name):
    model = build(name).eval()
    x = torch.randn(2, 3, 32, 40)
    exact = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = model(x)
    assert torch.isfinite(rounded).all()
    assert float((rounded - exact).abs().max()) < 0.05 * float(exact.abs().max()) + 0.02


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", TINY)
def test_half_precision_gives_no_nan(name, dtype):
    model = build(name).to(dtype)
    model.eval()
    x = (20 * torch.randn(1, 3, 32, 40)).to(dtype)
    with torch.no_grad():
        assert torch.isfinite(model(x)).all()


@pytest.mark.parametrize("name", TINY)
def test_state_survives_files_and_copies(name):
    model, other = build(name).eval(), build(name).eval()
    x = torch.randn(1, 3, 32, 32)
    expected = model(x)
    other.load_state_dict(load(save(model.state_dict())), strict=True)
    assert torch.equal(other(x), expected)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    torch.testing.assert_close(fuse(model)(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", TINY)
def test_is_traced_as_one_graph(name, without_shape_checks):
    model = build(name).eval()
    traced = torch.compile(model, backend="eager", fullgraph=True)
    x = torch.randn(1, 3, 32, 40)
    torch.testing.assert_close(traced(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", TINY)
def test_exported_program_takes_other_sizes(name, without_shape_checks):
    model = build(name).eval()
    height, width = (torch.export.Dim(name, min=16, max=256) for name in ("height", "width"))
    program = torch.export.export(
        model, (torch.randn(1, 3, 40, 48),), dynamic_shapes=({2: height, 3: width},)
    ).module()
    for size in ((40, 48), (33, 65)):
        x = torch.randn(1, 3, *size)
        torch.testing.assert_close(program(x), model(x), rtol=1e-4, atol=1e-5)


def test_memories_may_be_tied_or_start_apart():
    tied = build("eanet_tiny", block_options={"tie_memory": True})
    plain = build("eanet_tiny")
    apart = build("eanet_tiny", block_options={"memory_init": "independent"})
    assert "attention.memory_value" not in tied.state_dict()
    assert torch.equal(plain.attention.memory_value, plain.attention.memory_key)
    assert not torch.equal(apart.attention.memory_value, apart.attention.memory_key)


def test_saved_folder_gives_the_network_back(tmp_path):
    model = build("eanet_tiny", block_options={"eps": 1e-6}, output_stride=8).eval()
    hub.save_pretrained(model, tmp_path / "saved")
    again = hub.from_pretrained(tmp_path / "saved").eval()
    x = torch.randn(1, 3, 40, 33)
    assert torch.equal(again(x), model(x))
    assert again.attention.eps == 1e-6
