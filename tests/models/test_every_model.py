"""What holds for every registered model, and for every small one in full."""

import copy

import pytest
import torch
from safetensors.torch import load, save

from eanet import registry
from eanet.nn.fusion import fuse

CLASSIFIERS = [name for name, entry in registry.models().items() if entry.task == "classification"]
TINY = [name for name in CLASSIFIERS if name.endswith("_tiny")]

#: all parameters, the frozen position table and random features among them (Table 2)
EXACT = {
    "t2t_vit_7_h1": 4_310_222,
    "t2t_vit_7": 4_310_222,
    "t2t_vit_14": 21_545_550,
    "t2t_vit_t_14": 21_541_070,
    "t2t_vit_19": 39_177_422,
    "t2t_vit_7_ea": 4_246_222,
    "t2t_vit_14_ea": 21_481_550,
    "t2t_vit_7_mea_h1_s256": 4_315_598,
    "t2t_vit_7_mea_h4_s256": 5_924_366,
    "t2t_vit_7_mea_h16_s64": 6_210_638,
    "t2t_vit_7_mea_h16_s64_384": 6_307_918,
    "t2t_vit_7_mea_h16_s128": 6_268_430,
    "t2t_vit_7_mea_h32_s32": 9_858_926,
    "t2t_vit_14_mea": 29_941_070,
    "t2t_vit_19_mea": 54_623_054,
    "mlp_7": 6_146_638,
    "eamlp_7": 6_146_638,
    "eamlp_bn_7": 6_146_638,
    "eamlp_7_384": 6_243_918,
    "eamlp_14": 29_877_070,
    "eamlp_bn_14": 29_877_070,
    "eamlp_19": 54_559_054,
    "eamlp_bn_19": 54_559_054,
}


def build(name, **arguments):
    return registry.create_model(name, **({"num_classes": 5, "in_channels": 3} | arguments))


def images(model, batch=2):
    return torch.randn(batch, *model.input_shape)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_builds_without_memory(name):
    with torch.device("meta"):
        model = registry.create_model(name)
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    assert model.config == {"name": name, "arguments": {}}
    assert registry.models()[name].summary.endswith(".")


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_runs_without_memory(name):
    with torch.device("meta"):
        model = registry.create_model(name).eval()
        assert model(images(model, 1)).shape == (1, 1000)


@pytest.mark.parametrize("name", EXACT)
def test_parameter_count_is_exact(name):
    with torch.device("meta"):
        model = registry.create_model(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == EXACT[name]


def test_every_full_size_model_is_counted():
    assert set(CLASSIFIERS) == set(EXACT) | set(TINY)
    assert len(TINY) >= 3


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("changes", [{}, {"norm2": "batch"}], ids=["layer", "batch"])
def test_every_parameter_gets_a_finite_gradient(name, changes):
    model = build(name, **changes).train()
    model(images(model, 4)).square().sum().backward()
    for parameter_name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, parameter_name
            assert torch.isfinite(parameter.grad).all(), parameter_name
        else:
            assert parameter.grad is None, parameter_name


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("size", [(32, 32), (33, 33), (40, 24), (65, 31)])
def test_odd_sizes(name, size):
    model = build(name).eval()
    assert model(torch.randn(2, 3, *size)).shape == (2, 5)


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("in_channels", [1, 3, 4])
def test_input_channels_and_features(name, in_channels):
    model = build(name, in_channels=in_channels, num_classes=0).eval()
    x = images(model)
    features = model(x)
    assert features.shape == (2, model.norm.normalized_shape[0])
    tokens = model.forward_features(x)
    assert torch.equal(features, model.forward_head(tokens, pre_logits=True))


@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_bfloat16_is_near(name):
    model = build(name).eval()
    x = images(model)
    exact = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = model(x)
    assert torch.isfinite(rounded).all()
    assert float((rounded - exact).abs().max()) < 0.05 * float(exact.abs().max()) + 0.02


@pytest.mark.parametrize("name", TINY)
def test_state_survives_files_and_copies(name):
    model, other = build(name).eval(), build(name).eval()
    x = images(model)
    expected = model(x)
    assert not torch.equal(other(x), expected)
    other.load_state_dict(load(save(model.state_dict())), strict=True)
    assert torch.equal(other(x), expected)
    assert torch.equal(copy.deepcopy(model)(x), expected)


@pytest.mark.parametrize("name", TINY)
def test_unknown_argument_is_answered(name):
    with pytest.raises(ValueError, match="stem_strid"):
        build(name, stem_strid=(2, 2))


@pytest.mark.parametrize("name", TINY)
def test_exported_program_takes_other_sizes(name, without_shape_checks):
    model = build(name).eval()
    height, width = torch.export.Dim("height", min=8, max=512), torch.export.Dim("width", min=8)
    program = torch.export.export(
        model, (images(model),), dynamic_shapes=({2: height, 3: width},)
    ).module()
    for size in ((32, 32), (40, 24), (33, 65)):
        x = torch.randn(2, 3, *size)
        torch.testing.assert_close(program(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", TINY)
def test_is_traced_as_one_graph(name, without_shape_checks):
    model = build(name).eval()
    traced = torch.compile(model, backend="eager", fullgraph=True)
    x = images(model)
    torch.testing.assert_close(traced(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", TINY)
def test_folded_copy_gives_the_same(name):
    model = build(name).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    x = images(model)
    torch.testing.assert_close(fuse(model)(x), model(x), rtol=1e-5, atol=1e-5)
