"""Networks, stems and tables equal those of the authors and of T2T-ViT."""

import zlib

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from eanet.tasks.classification import models
from eanet.tasks.classification.official_keys import from_official, official_keys, to_official
from eanet.tasks.classification.positions import resize_table, sinusoid_table
from eanet.tasks.classification.t2t_vit import T2TViT
from eanet.tasks.classification.tokens_to_token import PerformerAttention, TokenBlock, TokensToToken

FAMILIES = {
    "classification.eamlp_p": ("ea", "external", "performer_file"),
    "classification.eamlp_t": ("ea", "external", "transformer_file"),
    "classification.t2t_p": ("performer", "self", "performer_file"),
    "classification.t2t_t": ("transformer", "self", "performer_file"),
}


def network_of(case, **changes):
    """Build the network that a case describes by the original's constructor."""
    stem, mixer, naming = FAMILIES[case.kind]
    given = case.meta["kwargs"]
    heads = given["num_heads"]
    arguments = {
        "image_size": given["img_size"],
        "stem": stem,
        "mixer": mixer,
        "channels": given["embed_dim"],
        "depth": given["depth"],
        # the original multiplies the heads by 4 and has 256 / 4 slots
        "num_heads": 4 * heads if mixer == "external" else heads,
        "num_slots": 64,
        "expansion": 4,
        "mlp_ratio": given["mlp_ratio"],
        "stem_channels": given["token_dim"],
    }
    model = T2TViT(given["num_classes"], given["in_chans"], **(arguments | changes))
    return model, official_keys(model, naming=naming)


@pytest.mark.golden(
    "classification.eamlp_p",
    "classification.eamlp_t",
    "classification.t2t_p",
    "classification.t2t_t",
)
def test_network_equals_original(golden_case, dtype, device):
    model, keys = network_of(golden_case)
    parameters = golden_case.starting_with("param.", dtype)
    assert {key.name for key in keys.values()} == set(parameters)
    model.load_state_dict(from_official(parameters, keys), strict=True)
    model = model.to(device, dtype).eval()
    inputs = golden_case.starting_with("input.", dtype)
    image = inputs["image"].to(device).requires_grad_()
    expected = golden_case.starting_with("output64.", torch.float64)
    tokens, _, _ = model.stem(image)
    golden_case.assert_output(tokens, expected["tokens"], "tokens")
    features = model.forward_head(model.forward_features(image), pre_logits=True)
    golden_case.assert_output(features, expected["features"], "features")
    logits = model(image)
    golden_case.assert_output(logits, expected["logits"], "logits")

    gradients = golden_case.starting_with("grad64.", torch.float64)
    if golden_case.meta["has_grads"]:
        (logits * inputs["loss_weight"].to(device, dtype)).sum().backward()
        ours = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        theirs = to_official(ours, {name: keys[name] for name in ours})
        assert set(theirs) | {"image"} == set(gradients)
        for name, gradient in theirs.items():
            golden_case.assert_gradient(gradient, gradients[name], name)
        golden_case.assert_gradient(image.grad, gradients["image"], "image")


def swap_memories(model):
    for block in model.stem.blocks:
        block.attention.memory_value.data = block.attention.memory_key.data


def interleave_heads(model):
    for block in model.blocks:
        weight = block.attention.query.weight
        heads = block.attention.num_heads
        weight.data = weight.data.unflatten(0, (heads, -1)).transpose(0, 1).flatten(0, 1)


def no_eps_of_layer_norm(model):
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-3


def tanh_gelu(model):
    for module in model.modules():
        if isinstance(module, nn.GELU):
            module.approximate = "tanh"


def normalized_by(normalize):
    """Return a mutation: the backbone's attention written out with another normalization."""

    def mutate(model):
        for block in model.blocks:
            layer = block.attention

            def forward(x, mask=None, layer=layer):
                heads = layer.query(x).unflatten(2, (layer.num_heads, -1)).transpose(1, 2)
                logits = F.linear(heads, layer.memory_key, layer.memory_key_bias)
                values = F.linear(normalize(logits), layer.values.T, layer.memory_value_bias)
                return layer.projection(values.transpose(1, 2).flatten(2))

            layer.forward = forward

    return mutate


def double(logits):
    """Softmax over the tokens (next to last), then L1 over the slots: what is right."""
    attention = logits.softmax(dim=-2)
    return attention / (1e-9 + attention.sum(dim=-1, keepdim=True))


def axes_swapped(logits):
    return double(logits.transpose(-1, -2)).transpose(-1, -2)


def class_token_left_out(logits):
    return torch.cat([double(logits)[:, :, :1], double(logits[:, :, 1:])], dim=2)


MUTANTS = {
    "wrong axis": normalized_by(axes_swapped),
    "missing L1": normalized_by(lambda logits: logits.softmax(dim=-2)),
    "missing softmax over tokens": normalized_by(lambda logits: logits.softmax(dim=-1)),
    "class token left out of the softmax": normalized_by(class_token_left_out),
    "tied memories": swap_memories,
    "interleaved heads": interleave_heads,
    "layer norm eps": no_eps_of_layer_norm,
    "other gelu": tanh_gelu,
}


@pytest.mark.golden("classification.eamlp_p", "classification.eamlp_t")
@pytest.mark.parametrize("mutant", MUTANTS)
def test_reference_values_tell_mutants(golden_case, mutant):
    model, keys = network_of(golden_case)
    model.load_state_dict(from_official(golden_case.starting_with("param.", torch.float64), keys))
    model = model.double().eval()
    image = golden_case.starting_with("input.", torch.float64)["image"]
    expected = golden_case.starting_with("output64.", torch.float64)["logits"]
    golden_case.assert_output(model(image), expected)
    normalized_by(double)(model)  # the same written out: what the mutants change is all they change
    golden_case.assert_output(model(image), expected)
    MUTANTS[mutant](model)
    with pytest.raises(AssertionError):
        golden_case.assert_output(model(image), expected)


@pytest.mark.golden(
    "classification.ea_token_block",
    "classification.performer_block",
    "classification.token_transformer_block",
)
def test_token_block_equals_original(golden_case, dtype, device):
    given = golden_case.meta["kwargs"]
    stem = {"ea_token_block": "ea", "performer_block": "performer"}.get(
        golden_case.kind.partition(".")[2], "transformer"
    )
    # a stem of one-pixel patches holds exactly one such block
    network = T2TViT(
        0, given["dim"], image_size=1, depth=1, channels=16, stem=stem, mixer="self", num_heads=1,
        stem_channels=given["in_dim"], stem_kernels=(1, 1), stem_strides=(1, 1),
    )  # fmt: skip
    block = network.stem.blocks[0]
    assert isinstance(block, TokenBlock)
    prefix = "stem.blocks.0."
    keys = {
        name.removeprefix(prefix): key
        for name, key in official_keys(network).items()
        if name.startswith(prefix)
    }
    parameters = {
        f"tokens_to_token.attention1.{name}": tensor
        for name, tensor in golden_case.starting_with("param.", dtype).items()
    }
    assert {key.name for key in keys.values()} == set(parameters)
    block.load_state_dict(from_official(parameters, keys), strict=True)
    block = block.to(device, dtype).eval()
    inputs = golden_case.starting_with("input.", dtype)
    x = inputs["x"].to(device).requires_grad_()
    y = block(x)
    golden_case.assert_output(y, golden_case.starting_with("output64.", torch.float64)["y"])
    (y * inputs["loss_weight"].to(device)).sum().backward()
    gradients = golden_case.starting_with("grad64.", torch.float64)
    ours = {name: p.grad for name, p in block.named_parameters() if p.requires_grad}
    theirs = to_official(ours, {name: keys[name] for name in ours})
    for name, gradient in theirs.items():
        golden_case.assert_gradient(gradient, gradients[name.split(".", 2)[2]], name)
    assert len(theirs) + 1 == len(gradients)
    golden_case.assert_gradient(x.grad, gradients["x"], "x")


@pytest.mark.golden("classification.performer_block")
def test_performer_with_a_mask_equals_the_tokens_by_themselves(golden_case):
    x = golden_case.starting_with("input.", torch.float64)["x"]
    attention = PerformerAttention(x.shape[2], 16).double().eval()
    mask = torch.ones(x.shape[:2], dtype=torch.bool)
    mask[:, 10:] = False
    torch.testing.assert_close(attention(x, mask)[:, :10], attention(x[:, :10]))


# full-size networks from seeds


def seeded_parameters(case, keys, model, seed):
    """Draw every tensor by the rule of the reference values."""
    tensors = {}
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    for ours, key in keys.items():
        shape = shapes[ours][::-1] if key.transposed else shapes[ours]
        state = np.random.RandomState((zlib.crc32(key.name.encode()) + seed) % 2**32)
        z = state.standard_normal(tuple(shape))
        name = key.name
        if name == "pos_embed":
            values = model.positions.table.numpy()
        elif name.endswith(".w") or name == "cls_token":
            values = z
        elif "norm" in name and name.endswith("weight"):
            values = 1 + 0.1 * z
        elif len(shape) == 1:
            values = 0.1 * z
        else:
            gain = 1.0
            if name.endswith("kqv.weight"):
                gain = 0.35
            elif name.endswith("qkv.weight"):
                gain = 2.0
            elif name.endswith("linear_0.weight"):
                gain = 3.0
            elif name.endswith(("linear_1.weight", "linear_2.weight")):
                gain = 2.0
            values = gain * z / np.sqrt(shape[-1])
        tensors[name] = torch.from_numpy(np.asarray(values, dtype=np.float32))
    return from_official(tensors, keys)


#: the rows of Table 2 by number
ROWS = {
    2: models.t2t_vit_7, 4: models.t2t_vit_t_14, 6: models.t2t_vit_7_ea,
    10: models.t2t_vit_7_mea_h16_s64, 13: models.t2t_vit_7_mea_h32_s32,
    17: models.eamlp_7, 19: models.eamlp_7_384,
}  # fmt: skip


def full_size_logits(case, entry, dtype):
    model = ROWS[entry["table2_row"]]()
    assert model.input_shape[1] == entry["img_size"]
    assert sum(p.numel() for p in model.parameters()) == entry["params_total"]
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trainable == entry["params_trainable"]
    keys = official_keys(model)
    model.load_state_dict(seeded_parameters(case, keys, model, entry["seed"]), strict=True)
    state = np.random.RandomState(entry["input_seed"])
    image = torch.from_numpy(state.standard_normal((1, *model.input_shape)).astype(np.float32))
    with torch.no_grad():
        return model.to(dtype).eval()(image.to(dtype))


@pytest.mark.golden("classification.full_size_logits")
def test_all_full_size_logits(golden_case, dtype):
    entries = golden_case.meta["models"]
    assert {entry["table2_row"] for entry in entries.values()} <= set(ROWS)
    for name, entry in entries.items():
        expected = golden_case.starting_with(f"{name}.", torch.float64)["logits64"]
        golden_case.assert_output(full_size_logits(golden_case, entry, dtype), expected, name)


# tables


@pytest.mark.golden("classification.pos_embed")
def test_position_tables_equal_original(golden_case):
    tensors = golden_case.tensors()
    compared = 0
    for name, expected in tensors.items():
        parts = name.split("_")
        if name.startswith("sinusoid") and not name.endswith("index"):
            tokens, channels = int(parts[1][1:]), int(parts[2][1:])
            rows = sinusoid_table(tokens, channels)
            if name.endswith("rows"):
                rows = rows[tensors[f"{name.removesuffix('rows')}row_index"]]
            assert torch.equal(rows, expected.reshape(rows.shape))
            compared += 1
        elif name.startswith("resize") and name.endswith("out"):
            old, new = (int(number) for number in parts[1].split("to"))
            table = tensors[name.removesuffix("out") + "in"]
            got = resize_table(table, (old, old), (new, new))
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
            assert torch.equal(got[:, 0], table[:, 0])
            compared += 1
    assert compared >= 5


OFFICIAL = {
    "EAMLP T2t_vit_7": (models.eamlp_7, "performer_file"),
    "EAMLP T2t_vit_7 img384": (models.eamlp_7_384, "performer_file"),
    "EAMLP T2t_vit_14": (models.eamlp_14, "performer_file"),
    "EAMLP T2t_vit_19": (models.eamlp_19, "performer_file"),
    "EAMLP T2t_vit_t_14": (models.eamlp_14, "transformer_file"),
    "T2T-ViT t2t_vit_7": (models.t2t_vit_7, "performer_file"),
    "T2T-ViT t2t_vit_14": (models.t2t_vit_14, "performer_file"),
    "T2T-ViT t2t_vit_19": (models.t2t_vit_19, "performer_file"),
    "T2T-ViT t2t_vit_t_14": (models.t2t_vit_t_14, "performer_file"),
    "T2T-ViT t2t_vit_t_19": (
        lambda: models.t2t_vit_19(stem="transformer"),
        "performer_file",
    ),
}


@pytest.mark.golden("classification.state_dict_keys")
def test_keys_shapes_and_frozen_tensors_of_official_files(golden_case):
    import json

    (file,) = golden_case.files.values()
    listed = json.loads(file.read_text())["models"]
    assert set(listed) == set(OFFICIAL)
    for name, entry in listed.items():
        build, naming = OFFICIAL[name]
        with torch.device("meta"):
            model = build()
        keys = official_keys(model, naming=naming)
        ours = {}
        for parameter_name, parameter in model.named_parameters():
            key = keys[parameter_name]
            shape = list(parameter.shape)[::-1] if key.transposed else list(parameter.shape)
            ours[key.name] = [shape, "trainable" if parameter.requires_grad else "frozen"]
        assert ours == entry["keys"], name
        assert set(keys) == set(model.state_dict())


def test_official_keys_refuse_what_was_never_published():
    with pytest.raises(ValueError, match="class token"):
        official_keys(models.eamlp_tiny(pool="avg"))
    with pytest.raises(ValueError, match="class token"):
        official_keys(models.mlp_tiny())


def test_stem_of_a_single_split_is_a_patch_embedding():
    stem = TokensToToken(8, 3, kernels=(4,), strides=(4,))
    x = torch.randn(2, 3, 8, 12)
    convolved = torch.nn.functional.conv2d(
        x, stem.projection.weight.view(8, 3, 4, 4), stem.projection.bias, stride=4
    )
    tokens, grid, _ = stem(x)
    assert grid == (2, 3)
    torch.testing.assert_close(tokens, convolved.flatten(2).transpose(1, 2))
