"""The classifiers inside timm, tested as timm tests its own."""

import importlib
import subprocess
import sys

import pytest
import torch

pytest.importorskip("timm")

import timm
from timm.data import resolve_data_config
from timm.optim import create_optimizer_v2

import eanet
import eanet.timm
from eanet import convert, registry
from eanet.errors import UserError

CLASSIFIERS = sorted(n for n, entry in registry.models().items() if entry.task == "classification")
TINY = [name for name in CLASSIFIERS if name.endswith("_tiny")]


def images(batch=2, channels=3, size=(32, 32)):
    return torch.randn(batch, channels, *size)


def run_alone(code):
    """Run code in a process of its own, and return what it prints."""
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# registration


def test_every_classifier_is_registered():
    assert eanet.timm.registered_names() == {name: name for name in CLASSIFIERS}
    assert set(CLASSIFIERS) <= set(timm.list_models())
    assert set(timm.list_models(module="timm")) == set(CLASSIFIERS)
    assert not set(CLASSIFIERS) & set(timm.list_models(pretrained=True))
    assert set(CLASSIFIERS) <= set(timm.list_models(name_matches_cfg=True))
    for name in CLASSIFIERS:
        assert getattr(eanet.timm, name) is timm.models.model_entrypoint(name)


def test_importing_again_changes_nothing():
    before = set(timm.list_models())
    module = importlib.reload(eanet.timm)  # a warning about a name taken twice would be an error
    assert set(timm.list_models()) == before
    assert module.registered_names() == {name: name for name in CLASSIFIERS}
    for name in CLASSIFIERS:
        assert getattr(module, name) is timm.models.model_entrypoint(name)


def test_models_of_timm_stay_as_they_are():
    code = """
import timm
before = {name: timm.models.model_entrypoint(name) for name in timm.list_models()}
import eanet.timm
assert all(timm.models.model_entrypoint(name) is found for name, found in before.items())
print(len(timm.list_models()) - len(before))
"""
    assert int(run_alone(code)) == len(CLASSIFIERS)


def test_a_name_that_timm_has_is_left_to_timm():
    code = """
import warnings
import timm
from timm.models import register_model
def eamlp_7(pretrained=False, **arguments):
    return "timm's"
register_model(eamlp_7)
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    import eanet.timm
(warning,) = seen
print(warning.message)
assert timm.models.model_entrypoint("eamlp_7") is eamlp_7
assert eanet.timm.registered_names()["eanet_eamlp_7"] == "eamlp_7"
model = timm.create_model("eanet_eamlp_7", channels=16, depth=1, num_classes=2)
assert model.config["name"] == "eamlp_7"
"""
    assert "'eamlp_7' of its own; ours is registered as 'eanet_eamlp_7'" in run_alone(code)


def test_sizes_that_timm_knows_are_those_of_the_models():
    for name in CLASSIFIERS:
        with torch.device("meta"):
            model = timm.create_model(name)
        assert tuple(model.pretrained_cfg["input_size"]) == model.input_shape, name
        assert model.default_cfg is model.pretrained_cfg
        assert model.num_classes == 1000
        parameters = dict(model.named_parameters())
        assert model.pretrained_cfg["classifier"] + ".weight" in parameters
        assert set(model.no_weight_decay()) <= {*parameters, "class_token"}


# as timm tests its own models


@pytest.mark.parametrize("name", TINY)
def test_forward_and_backward(name):
    model = timm.create_model(name, num_classes=42).train()
    logits = model(images())
    assert logits.shape == (2, 42)
    logits.square().mean().backward()
    for parameter_name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert torch.isfinite(parameter.grad).all(), parameter_name


@pytest.mark.parametrize("name", TINY)
def test_classifier_and_pool_can_be_replaced(name):
    model = timm.create_model(name).eval()
    x = images()
    width = model.num_features
    tokens = model.forward_features(x)
    assert tokens.shape == (2, 64 + model.num_prefix_tokens, width)
    assert torch.equal(model.forward_head(tokens), model(x))
    pooled = model.forward_head(tokens, pre_logits=True)
    assert pooled.shape == (2, width)
    model.reset_classifier(0)
    assert torch.equal(model(x), pooled)
    assert isinstance(model.get_classifier(), torch.nn.Identity)
    model.reset_classifier(0, "")
    assert torch.equal(model(x), tokens)
    model.reset_classifier(7, "avg")
    assert model.get_classifier().out_features == 7
    expected = model.get_classifier()(tokens[:, model.num_prefix_tokens :].mean(dim=1))
    torch.testing.assert_close(model(x), expected)
    for arguments in ({"num_classes": 0}, {"num_classes": 0, "global_pool": ""}):
        shape = timm.create_model(name, **arguments)(x).shape
        assert shape[-1] == width
        assert len(shape) == (3 if "global_pool" in arguments else 2)


def test_a_fresh_classifier_is_drawn_and_keeps_type():
    model = timm.create_model("eamlp_tiny").double()
    model.reset_classifier(1000)
    weight = model.get_classifier().weight
    assert weight.dtype == torch.float64
    assert weight.std().item() == pytest.approx(model.num_features**-0.5, rel=0.05)
    assert not model.get_classifier().bias.any()


def test_pools_and_numbers_that_do_not_exist_are_refused():
    model = timm.create_model("eamlp_tiny")
    with pytest.raises(ValueError, match="global_pool must be"):
        model.reset_classifier(3, "max")
    with pytest.raises(ValueError, match="this network has none"):
        model.reset_classifier(3, "token")
    with pytest.raises(ValueError, match="num_classes must be at least 0"):
        model.reset_classifier(-1)


@pytest.mark.parametrize("channels", [1, 4])
def test_other_input_channels(channels):
    model = timm.create_model("eamlp_tiny", in_chans=channels, num_classes=3)
    assert model(images(channels=channels)).shape == (2, 3)


def test_arguments_of_timm_are_ours():
    model = timm.create_model(
        "eamlp_7", img_size=(64, 32), in_chans=1, drop_rate=0.25, drop_path_rate=0.5, depth=3,
        channels=16, num_classes=2, global_pool="token",
    )  # fmt: skip
    assert model.input_shape == (1, 64, 32)
    assert model.dropout.p == 0.25
    assert [block.drop_path.probability for block in model.blocks] == [0, 0.25, 0.5]
    assert model.pool == "cls"
    assert model.config["arguments"]["image_size"] == [64, 32]
    with pytest.raises(UserError, match="patch_size"):
        timm.create_model("eamlp_7", patch_size=4)
    with pytest.raises(UserError, match="given twice"):
        timm.create_model("eamlp_7", img_size=32, image_size=32)


@pytest.mark.parametrize("name", TINY)
def test_features_only(name):
    model = timm.create_model(name, features_only=True).eval()
    reference = timm.create_model(name).eval()
    reference.load_state_dict(model.model.state_dict(), strict=False)
    x = images(size=(32, 48))
    maps = model(x)
    assert model.feature_info.channels() == [64, 64, 64]
    assert model.feature_info.reduction() == [4, 4, 4]
    for found, expected in zip(
        maps, reference.forward_intermediates(x, intermediates_only=True), strict=True
    ):
        assert found.shape == (2, 64, 8, 12)
        assert torch.equal(found, expected)
    last = timm.create_model(name, features_only=True, out_indices=(1,))
    assert len(last.model.blocks) == 2
    assert [found.shape for found in last(x)] == [(2, 64, 8, 12)]


@pytest.mark.parametrize("pool", ["cls", "avg"])
def test_intermediates_are_what_the_blocks_give(pool):
    model = timm.create_model("eamlp_tiny", pool=pool).eval()
    seen = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, given, out: seen.append(out))
    x = images(size=(32, 40))
    final, maps = model.forward_intermediates(x, indices=[0, -1])
    assert len(seen) == 3
    prefix = model.num_prefix_tokens
    assert prefix == (pool == "cls")
    assert torch.equal(final, model.norm(seen[2]))
    for found, tokens in zip(maps, (seen[0], seen[2]), strict=True):
        assert torch.equal(found.flatten(2).transpose(1, 2), tokens[:, prefix:])
        assert found.shape == (2, 64, 8, 10)
    seen.clear()
    ((rows, token),) = model.forward_intermediates(
        x, [1], return_prefix_tokens=True, norm=True, stop_early=True, output_fmt="NLC",
        intermediates_only=True,
    )  # fmt: skip
    assert len(seen) == 2
    assert torch.equal(torch.cat([token, rows], dim=1), model.norm(seen[1]))
    with pytest.raises(ValueError, match=r"blocks within 0\.\.2"):
        model.forward_intermediates(x, [3])
    with pytest.raises(ValueError, match="output_fmt"):
        model.forward_intermediates(x, output_fmt="NHWC")


def test_checkpointing_changes_no_gradient():
    x = images()
    gradients = []
    for enable in (False, True):
        torch.manual_seed(0)
        model = timm.create_model("eamlp_tiny", num_classes=3, drop_rate=0.1).train()
        model.set_grad_checkpointing(enable)
        calls = []
        model.blocks[1].mlp.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        model(x).square().sum().backward()
        assert len(calls) == 1 + enable
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name
    with pytest.raises(ValueError, match="batch norms"):
        timm.create_model("eamlp_tiny", norm2="batch").set_grad_checkpointing()


def test_optimizers_of_timm_group_the_parameters():
    model = timm.create_model("eamlp_tiny", pool="cls")
    optimizer = create_optimizer_v2(model, "adamw", lr=1.0, weight_decay=0.1, layer_decay=0.5)
    scale = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = next(n for n, p in model.named_parameters() if p is parameter)
            scale[name] = group["lr_scale"]
            decayed = parameter.ndim > 1 and name != "class_token"
            assert group["weight_decay"] == (0.1 if decayed else 0.0), name
    assert set(scale) == {n for n, p in model.named_parameters() if p.requires_grad}
    order = ["stem.projection.weight", "blocks.0.norm1.weight", "blocks.2.mlp.expand.weight"]
    assert [scale[name] for name in [*order, "head.weight"]] == [0.0625, 0.125, 0.5, 1.0]


def test_data_settings_are_those_of_the_published_networks():
    model = timm.create_model("eamlp_7_384", channels=16, depth=1)
    found = resolve_data_config(model=model)
    assert found["input_size"] == (3, 384, 384)
    assert (found["crop_pct"], found["interpolation"]) == (0.9, "bicubic")
    assert found["mean"] == (0.485, 0.456, 0.406)


# weights

SMALL = {"channels": 32, "depth": 2, "num_heads": 4, "num_slots": 8, "expansion": 2, "img_size": 64}


def test_weights_of_ours_and_published_ones_load(tmp_path):
    model = timm.create_model("eamlp_7", num_classes=1000, **SMALL)
    published = convert.export_published(model, tmp_path / "published.pth")
    torch.save(model.state_dict(), tmp_path / "ours.pth")
    for file in (published, tmp_path / "ours.pth"):
        found = timm.create_model(
            "eamlp_7", pretrained=True, pretrained_cfg_overlay={"file": str(file)}, **SMALL
        )
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, found.state_dict()[name]), name


@pytest.mark.parametrize("num_classes", [0, 7])
def test_a_published_file_starts_other_classes_and_sizes(num_classes, tmp_path):
    model = timm.create_model("eamlp_7", **SMALL)
    file = convert.export_published(model, tmp_path / "published.pth")
    found = timm.create_model(
        "eamlp_7", pretrained=True, pretrained_cfg_overlay={"file": str(file)},
        **{**SMALL, "img_size": (96, 64), "num_classes": num_classes},
    )  # fmt: skip
    assert found.positions.grid == (6, 4)
    assert torch.equal(found.blocks[1].mlp.expand.weight, model.blocks[1].mlp.expand.weight)
    x = torch.randn(1, 3, 96, 64)
    with torch.no_grad():
        torch.testing.assert_close(
            found.eval().forward_features(x), model.eval().forward_features(x)
        )


def test_a_file_of_another_network_is_refused(tmp_path):
    model = timm.create_model("eamlp_7", **SMALL)
    file = convert.export_published(model, tmp_path / "published.pth")
    with pytest.raises(UserError, match=r"is torch\.float32 of shape"):
        timm.create_model(
            "eamlp_7", pretrained=True, pretrained_cfg_overlay={"file": str(file)},
            **{**SMALL, "num_slots": 4},
        )  # fmt: skip


def test_there_are_no_weights_to_download():
    with pytest.raises(RuntimeError, match="No pretrained weights exist"):
        timm.create_model("eamlp_tiny", pretrained=True)


def test_a_model_of_timm_saves_and_loads_as_ours(tmp_path):
    from eanet import hub

    model = timm.create_model("eamlp_tiny", num_classes=4, in_chans=1).eval()
    found = eanet.load(hub.save_pretrained(model, tmp_path))
    x = images(channels=1)
    assert torch.equal(model(x), found(x))
