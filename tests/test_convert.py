"""Published checkpoints: read without running them, recognized by their tensors, written back."""

import argparse
import os
import pickle
import random
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

import eanet
from eanet import convert, hub, registry
from eanet.cli import main
from eanet.errors import UserError
from eanet.published_file import read_checkpoint
from eanet.tasks.classification.positions import resize_table, sinusoid_table

NETWORKS = pytest.mark.golden(
    "classification.eamlp_p",
    "classification.eamlp_t",
    "classification.t2t_p",
    "classification.t2t_t",
)


def golden_file(case, path):
    """Write a case's parameters as the authors' training script does."""
    tensors = case.starting_with("param.", torch.float32)
    content = {
        "epoch": 309,
        "arch": "T2t_vit_7",
        "state_dict": OrderedDict((f"module.{name}", value + 1) for name, value in tensors.items()),
        "optimizer": {"state": {0: {"step": 3}}, "param_groups": [{"lr": 1e-3, "params": [0]}]},
        "version": 2,
        "args": argparse.Namespace(lr=1e-3, data="/data", betas=(0.9, 0.999), opt_eps=None),
        "amp_scaler": {"scale": 65536.0},
        "state_dict_ema": OrderedDict(tensors),
        "metric": np.float64(71.658),
    }
    torch.save(content, path)
    return tensors


def heads_of(case):
    """Return the one number that no tensor tells, for networks of self-attention."""
    return case.arguments["num_heads"] if case.kind.rpartition(".")[2].startswith("t2t") else None


def tiny_published(**arguments):
    """Build a small network with the published stem."""
    sizes = {"channels": 32, "depth": 2, "num_heads": 4, "stem_channels": 16, "image_size": 64}
    sizes |= {"num_classes": 5, "num_slots": 8, "stem_num_slots": 12, "expansion": 2}
    return registry.create_model("eamlp_7", **(sizes | arguments))


@pytest.fixture
def published(tmp_path):
    """A file of a small network, and that network."""
    model = tiny_published()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    return convert.export_published(model, tmp_path / "small.pth.tar"), model


# values


@NETWORKS
def test_logits_of_a_published_file(golden_case, tmp_path, dtype):
    path = tmp_path / "model_best.pth.tar"
    golden_file(golden_case, path)
    model = convert.load_published(path, num_heads=heads_of(golden_case)).to(dtype)
    assert not model.training
    image = golden_case.starting_with("input.", dtype)["image"]
    with torch.no_grad():
        logits = model(image)
    expected = golden_case.starting_with("output64.", torch.float64)["logits"]
    golden_case.assert_output(logits, expected, "logits")
    published = model.facts["published"]
    assert published["weights"] == "ema"
    assert published["metric"] == 71.658
    assert (published["arch"], published["epoch"]) == ("T2t_vit_7", 309)


@NETWORKS
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_round_trip_keeps_every_bit(golden_case, tmp_path, suffix):
    path = tmp_path / "model_best.pth.tar"
    tensors = golden_file(golden_case, path)
    model = convert.load_published(path, num_heads=heads_of(golden_case))
    folder = hub.save_pretrained(model, tmp_path / "folder")
    again = eanet.load(folder)
    exported = convert.export_published(again, tmp_path / f"back{suffix}")
    written = read_checkpoint(exported).tensors
    assert written.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(written[name], tensor), name
        assert written[name].dtype == tensor.dtype


@pytest.mark.golden("classification.state_dict_keys")
def test_configuration_of_every_published_network(golden_case):
    import json

    (file,) = golden_case.files.values()
    listed = json.loads(file.read_text())["models"]
    for name, entry in listed.items():
        tensors = {
            key: torch.empty(shape, device="meta") for key, (shape, _) in entry["keys"].items()
        }
        arguments, naming = convert.published_arguments(tensors, source=name)
        rows = entry["keys"]["pos_embed"][0][1] - 1
        with torch.device("meta"):
            model = registry.create_model("eamlp_7", **arguments, image_size=16 * round(rows**0.5))
        assert sum(p.numel() for p in model.parameters()) == entry["params_total"], name
        assert convert.published_tensors(model, naming).keys() == tensors.keys(), name
        for block in model.blocks:
            heads = arguments["channels"] // 64 * (4 if arguments["mixer"] == "external" else 1)
            assert block.attention.num_heads == heads, name


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("eamlp_7", {}),
        ("eamlp_7", {"image_size": 384, "num_classes": 10}),
        ("t2t_vit_7", {"in_channels": 1}),
        ("t2t_vit_7_h1", {}),
        ("t2t_vit_7_ea", {"num_classes": 0}),
        ("t2t_vit_7_mea_h16_s128", {}),
    ],
)
def test_registered_models_are_recognized(name, arguments, tmp_path):
    model = registry.create_model(name, **arguments)
    path = convert.export_published(model, tmp_path / "file.pth")
    heads = 1 if name.endswith("h1") else None
    found = convert.load_published(path, num_heads=heads)
    assert found.config["name"] == name
    defaults = {"num_classes": 1000, "in_channels": 3, "image_size": 224}
    assert {**defaults, **found.config["arguments"]} == {**defaults, **arguments}
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, found.state_dict()[key]), key


def test_number_types_are_kept(tmp_path):
    model = tiny_published().double()
    found = convert.load_published(convert.export_published(model, tmp_path / "wide.pth"))
    assert found.head.weight.dtype == torch.float64
    assert torch.equal(found.head.weight, model.head.weight)


# which weights


def test_raw_weights_on_request_and_the_prefix_removed(published, tmp_path):
    path, model = published
    tensors = read_checkpoint(path).tensors
    both = tmp_path / "both.pth"
    averaged = {name: tensor * 0.5 for name, tensor in tensors.items()}
    averaged["pos_embed"] = tensors["pos_embed"]
    raw = {f"module.{name}": tensor for name, tensor in tensors.items()}
    torch.save({"state_dict": raw, "state_dict_ema": averaged}, both)
    assert torch.equal(convert.load_published(both).norm.weight, model.norm.weight * 0.5)
    assert torch.equal(convert.load_published(both, weights="raw").norm.weight, model.norm.weight)


def test_weights_that_are_not_there_are_refused(published, tmp_path):
    path, _ = published
    with pytest.raises(UserError, match=r"'ema' weights were asked for, the file has 'raw'"):
        convert.load_published(path, weights="ema")
    bare = tmp_path / "bare.pth"
    torch.save(read_checkpoint(path).tensors, bare)
    assert convert.load_published(bare).facts["published"]["weights"] is None
    with pytest.raises(UserError, match="bare tensors"):
        convert.load_published(bare, weights="raw")


# position tables


def test_another_image_size_regenerates_the_sinusoid(published):
    path, model = published
    found = convert.load_published(path, image_size=(96, 48))
    assert found.positions.grid == (6, 3)
    assert found.positions.other_grids == "regenerate"
    assert torch.equal(found.positions.table[0], sinusoid_table(19, 32))
    image = torch.randn(1, 3, 96, 48)
    with torch.no_grad():
        torch.testing.assert_close(found(image), model.eval()(image))


def test_a_table_of_its_own_is_kept_and_resized(published, tmp_path):
    path, _ = published
    tensors = dict(read_checkpoint(path).tensors)
    tensors["pos_embed"] = torch.randn_like(tensors["pos_embed"])
    own = tmp_path / "own.pth"
    torch.save({"state_dict": tensors}, own)
    kept = convert.load_published(own)
    assert torch.equal(kept.positions.table, tensors["pos_embed"])
    assert kept.positions.other_grids == "resize"
    resized = convert.load_published(own, image_size=96)
    expected = resize_table(tensors["pos_embed"], (4, 4), (6, 6))
    assert torch.equal(resized.positions.table, expected)
    fresh = convert.load_published(own, image_size=96, positions="regenerate")
    assert torch.equal(fresh.positions.table[0], sinusoid_table(37, 32))


def test_a_table_of_another_shape_needs_the_image_size(tmp_path):
    model = tiny_published(image_size=[32, 64])
    path = convert.export_published(model, tmp_path / "wide.pth")
    with pytest.raises(UserError, match="no square grid; give the image_size"):
        convert.load_published(path)
    found = convert.load_published(path, image_size=(32, 64))
    assert torch.equal(found.positions.table, model.positions.table)


# refusals: files that are not what they should be


class Payload:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def payloads(marker):
    command = f"touch {marker}"
    return {
        "posix.system": Payload(os.system, command),
        "eval": Payload(eval, f"__import__('os').system({command!r})"),
        "exec": Payload(exec, f"import os; os.system({command!r})"),
        "subprocess.Popen": Payload(__import__("subprocess").Popen, ["touch", str(marker)]),
        "pathlib.Path": Payload(Path, str(marker)),
        "numpy.ndarray": np.zeros(2),
    }


@pytest.mark.parametrize("name", list(payloads(Path("x"))))
@pytest.mark.parametrize("place", ["value", "namespace", "state"])
def test_nothing_in_a_file_is_run(name, place, published, tmp_path):
    path, _ = published
    marker = tmp_path / "executed"
    bad = payloads(marker)[name]
    content = {"state_dict": dict(read_checkpoint(path).tensors)}
    if place == "value":
        content["extra"] = bad
    elif place == "namespace":
        content["args"] = argparse.Namespace(inner=bad)
    else:
        content["state_dict"]["cls_token"] = bad
    file = tmp_path / "bad.pth.tar"
    torch.save(content, file)
    with pytest.raises(UserError, match=r"bad\.pth\.tar: refused, nothing of it was run") as caught:
        convert.load_published(file)
    assert "\n" not in str(caught.value)
    if name != "numpy.ndarray":  # it is rebuilt by a function of numpy's
        assert name.rpartition(".")[2] in str(caught.value)
    assert not marker.exists()


def test_the_payload_would_have_run(tmp_path):
    marker = tmp_path / "executed"
    file = tmp_path / "bad.pkl"
    file.write_bytes(pickle.dumps(payloads(marker)["posix.system"], protocol=2))
    with pytest.raises(UserError, match="refused"):
        convert.load_published(file)
    assert not marker.exists()
    pickle.loads(file.read_bytes())
    assert marker.exists()


def test_what_the_process_allows_elsewhere_changes_nothing(published, tmp_path):
    marker = tmp_path / "executed"
    file = tmp_path / "bad.pth"
    torch.save({"state_dict": {}, "extra": payloads(marker)["posix.system"]}, file)
    with torch.serialization.safe_globals([os.system, argparse.Namespace]):
        with pytest.raises(UserError, match=r"refused, nothing of it was run.*posix\.system"):
            read_checkpoint(file)
        read_checkpoint(published[0])
        assert set(torch.serialization.get_safe_globals()) >= {os.system, argparse.Namespace}
    assert not marker.exists()


def test_only_plain_numbers_of_numpy_are_read(published, tmp_path):
    path, _ = published
    tensors = read_checkpoint(path).tensors
    file = tmp_path / "file.pth"
    for value in (np.float64(1.5), np.float32(1.5), np.int64(3), np.uint8(3), np.bool_(True)):
        torch.save({"state_dict": tensors, "metric": value}, file)
        read = read_checkpoint(file).facts["metric"]
        assert read == value
        assert type(read) is type(value.item())
    for value in (np.datetime64("2020-01-01"), np.str_("x"), np.complex64(1j)):
        torch.save({"state_dict": tensors, "metric": value}, file)
        with pytest.raises(UserError, match=r"file\.pth"):
            read_checkpoint(file)


def test_facts_that_are_no_numbers_are_left_out(published, tmp_path):
    path, _ = published
    file = tmp_path / "file.pth"
    torch.save({"state_dict": read_checkpoint(path).tensors, "metric": float("nan")}, file)
    assert read_checkpoint(file).facts == {}


@pytest.mark.faults
def test_damaged_files_are_refused_by_name(published, tmp_path):
    whole = published[0].read_bytes()
    file = tmp_path / "damaged.pth"
    for length in [0, 1, 100, len(whole) // 2, len(whole) - 1]:
        file.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"damaged\.pth"):
            convert.load_published(file)
    chosen = random.Random(0)
    refusals = []
    for _ in range(150):  # the first part is the pickled structure
        bytes_ = bytearray(whole)
        bytes_[chosen.randrange(6000)] ^= 1 << chosen.randrange(8)
        file.write_bytes(bytes_)
        try:
            convert.load_published(file)
        except UserError as error:
            refusals.append(str(error))
    assert len(refusals) > 20
    assert all("damaged.pth" in text and "\n" not in text for text in refusals)


@pytest.mark.parametrize(
    "content", [b"<html><body>404</body></html>", b"\x89PNG\r\n", b"{}", b"\x80\x02N."]
)
def test_other_files_are_refused(content, tmp_path):
    file = tmp_path / "other.pth"
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"other\.pth"):
        convert.load_published(file)


def test_a_compressed_archive_is_refused(published, tmp_path):
    squeezed = tmp_path / "squeezed.pth"
    with (
        zipfile.ZipFile(published[0]) as source,
        zipfile.ZipFile(squeezed, "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry))
    with pytest.raises(UserError, match="compressed archive"):
        convert.load_published(squeezed)


def test_sizes_that_are_not_stored_are_refused(published, tmp_path):
    tensors = dict(read_checkpoint(published[0]).tensors)
    file = tmp_path / "bomb.pth"
    for bomb in (torch.zeros(1).expand(1, 1, 10**9), torch.empty(1, 1, 10**9, device="meta")):
        torch.save({"state_dict": {**tensors, "cls_token": bomb}}, file)
        with pytest.raises(UserError, match=r"bomb\.pth: .*'cls_token'.*not stored in the file"):
            convert.load_published(file)


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(UserError, match="there is no such file"):
        convert.load_published(tmp_path / "none.pth")
    with pytest.raises(UserError, match="is a folder"):
        convert.load_published(tmp_path)


# refusals: tensors of another network


def changed(published, tmp_path, **changes):
    tensors = dict(read_checkpoint(published[0]).tensors)
    for name, value in changes.items():
        tensors.pop(name) if value is None else tensors.update({name: value})
    file = tmp_path / "changed.pth"
    torch.save({"state_dict": tensors}, file)
    return file


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm.bias": None}, r"lacks 'norm.bias' \(1 tensors missing, 0 unknown\)"),
        ({"blocks.0.attn.extra": torch.ones(1)}, "has the unknown 'blocks.0.attn.extra'"),
        ({"blocks.7.norm1.bias": torch.ones(1)}, "depth|lacks|unknown"),
        ({"norm.bias": torch.ones(3)}, r"'norm.bias' is torch.float32 of shape \(3,\), expected"),
        ({"norm.bias": torch.ones(32, dtype=torch.int64)}, "'norm.bias' is torch.int64"),
        ({"cls_token": torch.ones(32)}, r"'cls_token' has the unexpected shape \(32,\)"),
        ({"cls_token": None}, "not an EAMLP or T2T-ViT: it has no 'cls_token'"),
        ({"blocks.0.attn.trans_dims.weight": None}, "no attention in the first block"),
        ({"blocks.0.attn.trans_dims.weight": torch.ones(63, 32)}, "no multiple"),
        ({"tokens_to_token.attention1.norm1.weight": torch.ones(50)}, "not 7 x 7 pixels"),
        ({"norm.bias": "text"}, "'norm.bias' is str, expected a tensor"),
    ],
)
def test_tensors_that_do_not_fit_are_named(changes, message, published, tmp_path):
    file = changed(published, tmp_path, **changes)
    with pytest.raises(UserError, match=rf"changed\.pth: .*({message})"):
        convert.load_published(file)


def test_another_network_is_refused(tmp_path):
    import torchvision

    file = tmp_path / "resnet.pth"
    torch.save(torchvision.models.resnet18().state_dict(), file)
    with pytest.raises(UserError, match=r"not an EAMLP or T2T-ViT.*'conv1.weight'"):
        convert.load_published(file)
    torch.save({"weights": [1, 2]}, file)
    with pytest.raises(UserError, match=r"has no 'state_dict' \(it holds 'weights'\)"):
        convert.load_published(file)


def test_heads_that_are_not_known_are_asked_for(tmp_path):
    model = tiny_published(mixer="self", num_heads=4)
    path = convert.export_published(model, tmp_path / "self.pth")
    with pytest.raises(UserError, match=r"give num_heads \(--num-heads\)"):
        convert.load_published(path)
    image = torch.randn(1, 3, 64, 64)
    found = convert.load_published(path, num_heads=4)
    with torch.no_grad():
        assert torch.equal(found(image), model.eval()(image))
        assert not torch.equal(convert.load_published(path, num_heads=2)(image), found(image))
    with pytest.raises(UserError, match="num_heads"):
        convert.load_published(path, num_heads=5)


def test_heads_that_contradict_the_file_are_refused(published):
    with pytest.raises(UserError, match="has 4 heads, num_heads=8 was given"):
        convert.load_published(published[0], num_heads=8)


# export


@pytest.mark.parametrize("naming", ["performer_file", "transformer_file"])
def test_both_ways_of_naming(naming, published, tmp_path):
    model = published[1]
    path = convert.export_published(model, tmp_path / "named.pth", naming=naming)
    names = read_checkpoint(path).tensors.keys()
    second = "tokens_to_token.attention1.attn.linear_2.weight"
    assert (second in names) == (naming == "transformer_file")
    found = convert.load_published(path)
    assert found.facts["published"]["naming"] == naming
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, found.state_dict()[key]), key
    dropout = found.stem.blocks[0].attention.projection_dropout
    rate = dropout.p if isinstance(dropout, torch.nn.Module) else dropout
    assert rate == (0.1 if naming == "performer_file" else 0.0)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: registry.create_model("eamlp_tiny"), "soft splits"),
        (lambda: tiny_published(pool="avg"), "class token"),
        (lambda: tiny_published(norm2="batch"), "no name for 'blocks.0.norm2"),
        (lambda: torch.nn.Linear(1, 1), "not Linear"),
    ],
)
def test_what_was_never_published_is_not_exported(model, message, tmp_path):
    with pytest.raises(UserError, match=message):
        convert.export_published(model(), tmp_path / "file.pth")
    assert list(tmp_path.iterdir()) == []


def test_other_endings_are_refused(published, tmp_path):
    with pytest.raises(UserError, match=r"must end in one of \.safetensors"):
        convert.export_published(published[1], tmp_path / "file.onnx")


# command


def test_command_both_ways(published, tmp_path, capsys):
    path, model = published
    folder, back = tmp_path / "folder", tmp_path / "back.pth"
    assert main(["convert", str(path), "--out", str(folder), "--image-size", "64"]) == 0
    assert "raw" in capsys.readouterr().out
    assert (folder / "README.md").is_file()
    assert torch.equal(eanet.load(folder).head.weight, model.head.weight)
    assert main(["convert", str(folder), "--export", str(back)]) == 0
    written, tensors = read_checkpoint(back).tensors, read_checkpoint(path).tensors
    assert all(torch.equal(written[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["none.pth", "--out", "x"], "no such file"),
        (["none.pth"], "--out --export"),
        (["none.pth", "--out", "."], "not empty"),
        (["none.pth", "--out", "x", "--image-size", "12x"], "--image-size"),
        (["none.pth", "--out", "x", "--naming", "performer_file"], "--naming has no effect"),
        (["none", "--export", "x.pth", "--num-heads", "2"], "--num-heads has no effect"),
    ],
)
def test_command_refuses_in_one_line(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "occupied").touch()
    assert main(["convert", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
