"""Mistakes get one clear line, exit code 2 and no traceback, and what was trained is kept."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import SHORT, Answer

Command = Callable[..., Answer]


def _said(answer: Answer) -> str:
    """Return the complaint after checking its form."""
    assert answer.code == 2, answer
    lines = [line for line in answer.err.splitlines() if line.startswith("eanet: error: ")]
    assert len(lines) == 1, answer.err
    assert "Traceback" not in answer.err + answer.out
    return lines[0]


def test_unknown_subcommand(eanet: Command) -> None:
    assert "did you mean 'train'" in _said(eanet("trian"))


def test_unknown_recipe(eanet: Command) -> None:
    said = _said(eanet("train", "classification_digits/eamlp_tinny"))
    assert "did you mean 'classification_digits/eamlp_tiny'" in said


def test_unknown_model(eanet: Command) -> None:
    assert "did you mean 'eamlp_7'" in _said(eanet("info", "eamlp7"))


def test_unknown_data_set(eanet: Command) -> None:
    assert "did you mean 'digits'" in _said(eanet("data", "check", "digit"))


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--optim.lrr", "1", "did you mean --optim.lr"),
        ("--optim.lr", "fast", 'field "optim.lr"'),
        ("--optim.lr", "-1", "optim.lr must be above 0"),
        ("--train.precision", "float8", "float32"),
        ("--model.name", "eamlp_tyni", "did you mean 'eamlp_tiny'"),
        ("--model.arguments.dept", "2", "dept"),
        ("--data.name", "digitz", "did you mean 'digits'"),
        ("--options.image_sise", "32", "did you mean 'image_size'"),
        ("--data.batch_size", "100000", "data.batch_size"),
        ("--model.init", "nowhere.safetensors", "nowhere.safetensors"),
    ],
)
def test_wrong_override(
    eanet: Command, tmp_path: Path, option: str, value: str, expected: str
) -> None:
    words = ["classification_digits/eamlp_tiny", "--device", "cpu"]
    assert expected in _said(eanet("train", *words, option, value, "--out", tmp_path / "run"))


def test_missing_data_folder(eanet: Command, tmp_path: Path) -> None:
    missing = tmp_path / "nowhere"
    said = _said(
        eanet(
            "train",
            "classification_digits/eamlp_tiny",
            *("--data.name", "image_folder", "--data.root", missing),
            *("--out", tmp_path / "run"),
        )
    )
    assert str(missing) in said


@pytest.mark.parametrize("command", ["evaluate", "predict"])
def test_a_folder_that_is_no_run(eanet: Command, tmp_path: Path, command: str) -> None:
    extra = (tmp_path, "--out", tmp_path / "out") if command == "predict" else ()
    assert "no recipe.yaml" in _said(eanet(command, tmp_path, *extra))


def test_a_used_folder_is_not_overwritten(eanet: Command, trained: Path) -> None:
    before = (trained / "metrics.json").read_bytes()
    assert "--resume" in _said(eanet("train", *SHORT, "--out", trained))
    assert (trained / "metrics.json").read_bytes() == before


def test_a_checkpoint_of_another_model(eanet: Command, trained: Path, tmp_path: Path) -> None:
    run = shutil.copytree(trained, tmp_path / "run")
    content = json.loads((run / "model.json").read_text())
    content["arguments"]["channels"] = 32
    (run / "model.json").write_text(json.dumps(content))
    said = _said(eanet("evaluate", run, "--device", "cpu"))
    assert "shape" in said
    assert str(run) in said


def test_resuming_with_another_model(eanet: Command, trained: Path, tmp_path: Path) -> None:
    run = shutil.copytree(trained, tmp_path / "run")
    words = [*SHORT, "--model.arguments.channels", "32", "--resume", "--out", run]
    said = _said(eanet("train", *words))
    assert "channels" in said
    # the stored run is as it was
    again = eanet("evaluate", run, "--device", "cpu", "--json")
    assert again.code == 0
    assert json.loads(again.out) == json.loads((trained / "metrics.json").read_text())["test"]


@pytest.mark.faults
def test_a_corrupt_checkpoint(eanet: Command, trained: Path, tmp_path: Path) -> None:
    run = shutil.copytree(trained, tmp_path / "run")
    for path in (run / "checkpoints").rglob("*.safetensors"):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 0x01
        path.write_bytes(bytes(content))
    said = _said(eanet("evaluate", run, "--device", "cpu"))
    assert "damaged" in said
    assert "safetensors" in said


@pytest.mark.parametrize("name", ["recipe.yaml", "facts.json", "model.json"])
def test_a_damaged_file_of_a_run(eanet: Command, trained: Path, tmp_path: Path, name: str) -> None:
    run = shutil.copytree(trained, tmp_path / "run")
    (run / name).write_text("{ this is: [neither")
    assert name in _said(eanet("evaluate", run, "--device", "cpu"))


def test_nothing_that_can_be_read(eanet: Command, trained: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"")
    said = _said(eanet("predict", trained, bad, "--out", tmp_path / "out", "--device", "cpu"))
    assert "bad.png" in said


def test_a_missing_file_to_predict_on(eanet: Command, trained: Path, tmp_path: Path) -> None:
    said = _said(eanet("predict", trained, tmp_path / "no.png", "--out", tmp_path / "out"))
    assert "no.png" in said


def test_an_unknown_device(eanet: Command, tmp_path: Path) -> None:
    words = ["classification_digits/eamlp_tiny", "--out", tmp_path / "run"]
    assert "device" in _said(eanet("train", *words, "--device", "tpu9"))


def test_an_unknown_table(eanet: Command) -> None:
    assert "99" in _said(eanet("recipes", "--table", "99"))


def test_a_recipe_from_outside_that_is_not_there(eanet: Command) -> None:
    assert "no_such_package" in _said(eanet("train", "no_such_package.recipes:X"))
