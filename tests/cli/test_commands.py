"""What each subcommand does when all is well."""

import csv
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eanet import registry
from eanet.cli import split_overrides
from eanet.recipe_file import load_recipe
from tests.cli.conftest import SHORT, Answer

Command = Callable[..., Answer]
SUBCOMMANDS = [
    "convert",
    "results",
    "bench",
    "data",
    "demo",
    "evaluate",
    "info",
    "models",
    "predict",
    "recipes",
    "train",
]


def test_help_lists_every_subcommand_with_a_summary(eanet: Command) -> None:
    answer = eanet("--help")
    assert answer.code == 0
    for name in SUBCOMMANDS:
        assert f"  {name} " in answer.out


@pytest.mark.parametrize("name", SUBCOMMANDS)
def test_help_of_a_subcommand_shows_examples(eanet: Command, name: str) -> None:
    answer = eanet(name, "--help")
    assert answer.code == 0
    assert "examples:" in answer.out
    assert f"  eanet {name}" in answer.out


def test_help_answers_in_half_a_second() -> None:
    times: list[float] = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "eanet", "--help"], check=True, capture_output=True)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.5


def test_models(eanet: Command) -> None:
    assert "eamlp_tiny" in eanet("models").out
    listed = json.loads(eanet("models", "eamlp*", "--json").out)
    assert [row["name"] for row in listed] == registry.list_models("eamlp*")


def test_recipes(eanet: Command) -> None:
    listed = eanet("recipes").out
    assert all(name in listed for name in registry.recipes())
    assert "lr: " in eanet("recipes", "classification_digits/eamlp_tiny").out
    assert "EAMLP-7" in eanet("recipes", "--table", "2").out


def test_info_counts_parameters(eanet: Command) -> None:
    answer = eanet("info", "eamlp_7")
    assert "6,146,638" in answer.out


def test_info_of_a_fused_model_costs_less(eanet: Command) -> None:
    def macs(*words: str) -> int:
        lines = eanet("info", "eamlp_7", *words).out.splitlines()
        line = next(line for line in lines if line.startswith("multiply-adds"))
        return int(line.split()[1].replace(",", ""))

    assert macs("--fused") < macs()


def test_data_check(eanet: Command) -> None:
    answer = eanet("data", "check", "digits")
    assert answer.code == 0
    assert "0 unreadable" in answer.out


def test_dry_run_writes_nothing(eanet: Command, tmp_path: Path) -> None:
    answer = eanet("train", *SHORT, "--out", tmp_path / "run", "--dry-run")
    assert answer.code == 0
    assert "parameters" in answer.out
    assert not list(tmp_path.iterdir())


def test_a_run_folder_holds_what_it_promises(trained: Path) -> None:
    names = {path.name for path in trained.iterdir()}
    assert names >= {
        "recipe.yaml",
        "model.json",
        "facts.json",
        "environment.json",
        "metrics.jsonl",
        "metrics.json",
        "checkpoints",
        "report.html",
    }
    metrics = json.loads((trained / "metrics.json").read_text())
    assert 0 <= metrics["test"]["accuracy"] <= 1
    assert 0 <= metrics["test"]["ema/accuracy"] <= 1
    assert metrics["baselines"]
    recipe = load_recipe(trained / "recipe.yaml")
    assert recipe.train.steps == 2
    assert recipe.train.epochs is None
    assert recipe.model.arguments["depth"] == 1


def test_evaluate_repeats_the_result_of_training(eanet: Command, trained: Path) -> None:
    answer = eanet("evaluate", trained, "--json", "--device", "cpu")
    assert answer.code == 0
    stored = json.loads((trained / "metrics.json").read_text())["test"]
    assert json.loads(answer.out) == stored


def test_the_stored_recipe_repeats_the_run(eanet: Command, trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "again"
    answer = eanet("train", "--config", trained / "recipe.yaml", "--out", out, "--device", "cpu")
    assert answer.code == 0
    again = json.loads((out / "metrics.json").read_text())
    first = json.loads((trained / "metrics.json").read_text())
    assert again["test"] == first["test"]


def test_resuming_a_finished_run_changes_nothing(eanet: Command, trained: Path) -> None:
    before = (trained / "metrics.json").read_text()
    answer = eanet("train", "--resume", "--out", trained, "--device", "cpu")
    assert answer.code == 0
    assert "finished" in answer.err
    after = json.loads((trained / "metrics.json").read_text())
    assert after["test"] == json.loads(before)["test"]


def test_predict_writes_tables_and_pictures(eanet: Command, trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    (folder / "inner").mkdir(parents=True)
    generator = np.random.default_rng(0)
    for name in ("one.png", "inner/one.png", "two.png"):
        pixels = generator.integers(0, 256, (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    (folder / "page.png").write_text("<html>not an image</html>")
    out = tmp_path / "out"
    answer = eanet("predict", trained, folder, "--out", out, "--device", "cpu")
    assert answer.code == 2
    assert "page.png" in answer.out
    records = json.loads((out / "predictions.json").read_text())
    assert [Path(record["file"]).name for record in records] == ["one.png", "one.png", "two.png"]
    with (out / "predictions.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 3
    assert len(list((out / "pictures").glob("*.png"))) == 3


def test_overrides_are_told_by_their_dots() -> None:
    words = ["x", "--optim.lr=1", "--resume", "--data.root", "a b", "--train.epochs", "3", "y"]
    assert split_overrides(words) == (
        ["x", "--resume", "y"],
        ["--optim.lr=1", "--data.root", "a b", "--train.epochs", "3"],
    )


def test_a_function_gives_what_the_command_gives(trained: Path) -> None:
    import eanet

    stored = json.loads((trained / "metrics.json").read_text())["test"]
    assert eanet.evaluate(trained, device="cpu") == stored
    model = eanet.load(trained)
    assert not model.training
