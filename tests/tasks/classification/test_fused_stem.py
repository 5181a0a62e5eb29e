"""The stem without patches, and networks folded whole: the same results as patch by patch."""

import copy

import pytest
import torch
from torch import nn

from eanet.bench.cost import count_cost
from eanet.nn.capture import capture_attention
from eanet.nn.fusion import fuse
from eanet.registry import create_model
from eanet.tasks.classification.fused_stem import FusedTokenBlock
from eanet.tasks.classification.soft_split import (
    SoftSplit,
    centered_weight,
    project_centered,
    project_patches,
)
from eanet.tasks.classification.t2t_vit import T2TViT

STEMS = ("ea", "performer", "transformer", "mlp")
SPLITS = {"first": (3, 7, 4), "gray": (1, 7, 4), "inner": (16, 3, 2), "apart": (2, 4, 4)}


def _layers(channels, kernel, dtype):
    norm = nn.LayerNorm(channels * kernel**2, dtype=dtype)
    nn.init.normal_(norm.weight, mean=1.0, std=0.3)
    nn.init.normal_(norm.bias)
    return norm, nn.Linear(channels * kernel**2, 6, dtype=dtype)


def _patch_by_patch(picture, split, norm, linear):
    return linear(norm(split(picture)))


def _without_patches(picture, split, norm, linear):
    weight, bias = centered_weight(norm, linear)
    return project_centered(picture, split, weight, bias, eps=norm.eps)


def _network(stem="ea", **arguments):
    """A small network whose attention is far from uniform."""
    network = T2TViT(
        arguments.pop("num_classes", 5),
        stem=stem,
        image_size=32,
        channels=16,
        depth=2,
        num_heads=4,
        num_slots=4,
        expansion=2,
        stem_channels=8,
        stem_num_slots=6,
        # a class token would hardly feel what the stem does
        pool="avg",
        **arguments,
    )
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, mean=float("norm" in name and "weight" in name), std=0.3)
    return network


def _hooked(network):
    """Make every block of the stem form its patches, as attention maps need them."""
    for block in network.stem.blocks:
        block.norm1.register_forward_pre_hook(lambda *_: None)
    network.stem.projection.register_forward_pre_hook(lambda *_: None)
    return network


@pytest.mark.parametrize("sizes", SPLITS.values(), ids=SPLITS)
def test_values_and_gradients_are_those_of_patches(sizes):
    channels, kernel, stride = sizes
    split = SoftSplit(kernel, stride)
    norm, linear = _layers(channels, kernel, torch.float64)
    picture = torch.randn(2, channels, 21, 30, dtype=torch.float64, requires_grad=True)
    tensors = [picture, *norm.parameters(), *linear.parameters()]
    expected = _patch_by_patch(picture, split, norm, linear)
    actual = _without_patches(picture, split, norm, linear)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    cotangent = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad(actual, tensors, cotangent),
        torch.autograd.grad(expected, tensors, cotangent),
        rtol=0,
        atol=1e-11,
    )


def test_gradcheck_of_a_small_picture():
    split = SoftSplit(3, 2)
    norm, linear = _layers(2, 3, torch.float64)
    picture = torch.randn(1, 2, 5, 4, dtype=torch.float64, requires_grad=True)

    def function(picture, scale, weight):
        scaled = weight * scale
        centered = scaled - scaled.mean(1, keepdim=True)
        return project_centered(picture, split, centered, linear.bias, eps=norm.eps)

    assert torch.autograd.gradcheck(function, (picture, norm.weight, linear.weight))


def _pictures(channels):
    """Pictures that lose digits in careless formulas: far from 0, even, even but for a pixel."""
    even = torch.full((1, channels, 24, 24), 0.8)
    dotted = even.clone()
    dotted[0, 0, 10, 11] += 1 / 58  # a step of 8 bits
    return {
        "usual": torch.randn(2, channels, 24, 24),
        "far": torch.randn(2, channels, 24, 24) + 100,
        "even": even,
        "dotted": dotted,
    }


@pytest.mark.parametrize("kind", ["usual", "far", "even", "dotted"])
@pytest.mark.parametrize("sizes", SPLITS.values(), ids=SPLITS)
def test_float32_is_as_exact_as_patches_are(sizes, kind):
    channels, kernel, stride = sizes
    split = SoftSplit(kernel, stride)
    norm, linear = _layers(channels, kernel, torch.float32)
    picture = _pictures(channels)[kind]
    exact = _patch_by_patch(
        picture.double(), split, copy.deepcopy(norm).double(), copy.deepcopy(linear).double()
    )
    error = (_without_patches(picture, split, norm, linear) - exact).abs().max()
    usual = (_patch_by_patch(picture, split, norm, linear) - exact).abs().max()
    # careless formulas are not off by a factor: in a nearly even patch, the mean of squares
    # minus the square of the mean is off by percents
    ulp = exact.abs().max() * torch.finfo(torch.float32).eps
    assert error <= 4 * usual + 8 * ulp
    assert error < 1e-4


def test_last_split_is_a_convolution():
    split, linear = SoftSplit(3, 2), nn.Linear(36, 5, dtype=torch.float64)
    picture = torch.randn(2, 4, 9, 6, dtype=torch.float64)
    torch.testing.assert_close(
        project_patches(picture, split, linear), linear(split(picture)), rtol=0, atol=1e-13
    )


@pytest.mark.parametrize("in_channels", [1, 3, 4])
@pytest.mark.parametrize("stem", STEMS)
def test_networks_agree_in_every_form(stem, in_channels):
    network = _network(stem, in_channels=in_channels).double().eval()
    images = torch.randn(2, in_channels, 37, 50, dtype=torch.float64)
    expected = _hooked(copy.deepcopy(network))(images)
    folded = fuse(network)
    assert all(isinstance(block, FusedTokenBlock) for block in folded.stem.blocks)
    torch.testing.assert_close(network(images), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(folded(images), expected, rtol=0, atol=1e-12)
    single = copy.deepcopy(network).float()
    torch.testing.assert_close(
        fuse(single)(images.float()).double(), expected, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("stem", STEMS)
def test_training_gradients_agree(stem):
    network = _network(stem, drop_path=0.0).double().train()
    for module in network.modules():
        for name in ("attention_dropout", "projection_dropout"):
            if hasattr(module, name):
                setattr(module, name, 0.0)
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    images = torch.randn(2, 3, 32, 40, dtype=torch.float64)
    gradients = []
    for form in (network, _hooked(copy.deepcopy(network))):
        form(images).square().sum().backward()
        gradients.append({name: weight.grad for name, weight in form.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[1].items():
        if expected is not None:
            assert gradients[0][name] is not None, name
            torch.testing.assert_close(gradients[0][name], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("stem", STEMS)
def test_a_padded_image_gives_what_it_gives_by_itself(stem):
    network = _network(stem).double().eval()
    small = torch.randn(1, 3, 32, 48, dtype=torch.float64)
    padded = torch.randn(1, 3, 48, 64, dtype=torch.float64)
    padded[..., :32, :48] = small
    mask = torch.zeros(1, 48, 64, dtype=torch.bool)
    mask[:, :32, :48] = True
    expected = network(small)
    for form in (network, fuse(network)):
        torch.testing.assert_close(form(padded, mask), expected, rtol=0, atol=1e-11)


def test_a_folded_block_leaves_masked_tokens_without_a_branch():
    block = _network().double().eval().stem.blocks[0]
    split = SoftSplit(7, 4)
    picture = torch.randn(2, 3, 16, 24, dtype=torch.float64)
    mask = torch.rand(2, 24) > 0.4
    assert block.attention.memory_value_bias.abs().max() > 0.01
    for arguments in ((picture, mask, split), (split(picture), mask)):
        torch.testing.assert_close(
            fuse(block)(*arguments), block(split(picture), mask), rtol=0, atol=1e-12
        )


def test_maps_of_the_stem_are_captured_in_every_form():
    network = _network().double().eval()
    images = torch.randn(1, 3, 32, 40, dtype=torch.float64)
    folded = fuse(network)
    plain = network(images)
    with capture_attention(network) as maps, capture_attention(folded) as folded_maps:
        torch.testing.assert_close(network(images), plain, rtol=0, atol=1e-12)
        folded(images)
    assert {"stem.blocks.0.attention", "stem.blocks.1.attention"} < maps.keys()
    assert maps.keys() == folded_maps.keys()
    assert maps["stem.blocks.0.attention"].shape == (1, 80, 6)
    for name, attention in maps.items():
        torch.testing.assert_close(folded_maps[name], attention, rtol=0, atol=1e-12)


@pytest.mark.parametrize("in_half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stem", ["ea", "performer"])
def test_half_precision_stays_finite_and_close(stem, in_half):
    network = _network(stem).eval()
    images = torch.randn(2, 3, 32, 32) + 2
    expected = network(images)
    halved = fuse(network).to(in_half)
    out = halved(images.to(in_half))
    assert out.dtype == in_half
    assert out.isfinite().all()
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = [form(images) for form in (network, fuse(network))]
    scale = expected.abs().max()
    for result in (out, *under_autocast):
        assert (result.float() - expected).abs().max() < 0.05 * scale


def test_features_without_a_head():
    network = _network(num_classes=0).eval()
    images = torch.randn(2, 3, 32, 32)
    assert fuse(network)(images).shape == (2, 16)
    torch.testing.assert_close(fuse(network)(images), network(images), rtol=0, atol=1e-5)


def test_a_replaced_first_layer_is_called():
    class Rolled(nn.Linear):
        def forward(self, x):
            return super().forward(x).roll(1, -1)

    network = _network("performer").eval()
    images = torch.randn(1, 3, 32, 32)
    before = network(images)
    old = network.stem.blocks[0].attention.keys_queries_values
    new = Rolled(old.in_features, old.out_features)
    new.load_state_dict(old.state_dict())
    network.stem.blocks[0].attention.keys_queries_values = new
    assert (network(images) - before).abs().max() > 1e-3
    assert not isinstance(fuse(network).stem.blocks[0], FusedTokenBlock)


@pytest.mark.parametrize(
    ("name", "gigamacs"), [("eamlp_7", 1.268), ("eamlp_14", 5.892), ("eamlp_19", 10.723)]
)
def test_multiply_adds_of_folded_networks(name, gigamacs):
    with torch.device("meta"):
        network = create_model(name)
    assert round(count_cost(fuse(network), (1, 3, 224, 224)).macs / 1e9, 3) == gigamacs


def test_a_folded_network_exports(without_shape_checks):
    folded = fuse(_network())
    images = torch.randn(1, 3, 32, 40)
    exported = torch.export.export(folded, (images,))
    torch.testing.assert_close(exported.module()(images), folded(images), rtol=0, atol=1e-5)


def test_a_folded_network_compiles_whole(without_shape_checks):
    folded = fuse(_network())
    images = torch.randn(1, 3, 32, 40)
    compiled = torch.compile(folded, fullgraph=True, backend="aot_eager")
    with torch.inference_mode():
        torch.testing.assert_close(compiled(images), folded(images), rtol=0, atol=1e-5)
