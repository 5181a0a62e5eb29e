"""``--model.init``: a network trained on some classes goes on with others."""

import numpy as np
import pytest
import torch
from PIL import Image

import eanet as package
from eanet import hub

SHORT = ("--train.epochs", 1, "--data.batch_size", 8, "--device", "cpu")


@pytest.fixture
def three_classes(tmp_path):
    """A folder of grey images of three classes."""
    generator = np.random.default_rng(0)
    for name in ("a", "b", "c"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for index in range(8):
            pixels = generator.integers(0, 256, (8, 8), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / name / f"{index}.png")
    return tmp_path / "data"


def words(folder, source, out, *more):
    recipe = ("classification_digits/eamlp_tiny", "--data.name", "image_folder")
    data = ("--data.root", folder, "--data.arguments.in_channels", 1)
    size = ("--model.arguments.depth", 1, "--model.arguments.channels", 16)
    return (*recipe, *data, *size, "--model.init", source, "--out", out, *SHORT, *more)


def test_all_but_the_head_goes_on(eanet, trained, three_classes, tmp_path):
    # a learning rate of almost nothing shows what the run started from
    done = eanet("train", *words(three_classes, trained, tmp_path / "run", "--optim.lr", 1e-12))
    assert done.code == 0, done.err
    assert f"start from {trained}, fresh: head.weight, head.bias" in done.err
    before = package.load(trained).state_dict()
    after = package.load(tmp_path / "run", weights="raw").state_dict()
    assert after["head.weight"].shape == (3, 16)
    assert before["head.weight"].shape == (10, 16)
    for name in before.keys() - {"head.weight", "head.bias"}:
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=1e-9)
    # of both weights, on each split
    assert "ema/accuracy" in done.out
    assert "\n  accuracy" in done.out


def test_a_saved_folder_and_a_file_are_sources_too(eanet, trained, three_classes, tmp_path):
    folder = hub.save_pretrained(package.load(trained), tmp_path / "saved")
    for source in (folder, folder / "model.safetensors"):
        done = eanet("train", *words(three_classes, source, tmp_path / f"run_{source.stem}"))
        assert done.code == 0, done.err
        assert "fresh: head.weight, head.bias" in done.err


def test_a_resumed_run_no_longer_needs_its_source(eanet, trained, three_classes, tmp_path):
    folder = hub.save_pretrained(package.load(trained), tmp_path / "saved")
    assert eanet("train", *words(three_classes, folder, tmp_path / "run")).code == 0
    (folder / "config.json").unlink()
    assert eanet("train", "--resume", "--out", tmp_path / "run").code == 0


def test_another_network_is_no_source(eanet, trained, three_classes, tmp_path):
    out = tmp_path / "run"
    wider = words(three_classes, trained, out, "--model.arguments.stem_channels", 16)
    done = eanet("train", *wider)
    assert done.code == 2
    assert "only a head may differ, in its outputs" in done.err
    done = eanet("train", *words(three_classes, trained, out, "--model.arguments.depth", 2))
    assert done.code == 2
    assert "lacks 'blocks.1." in done.err
    done = eanet("train", *words(three_classes, "best.pth", out))
    assert done.code == 2
    assert "eanet convert" in done.err
    # a refused run leaves its folder usable
    assert eanet("train", *words(three_classes, trained, out)).code == 0
