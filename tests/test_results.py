"""Measured runs become files, and files a table."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from eanet import registry
from eanet.errors import UserError
from eanet.recipe_file import dump_recipe, load_recipe
from eanet.results import format_results, recipe_id, record_run

NAME = "classification_digits/eamlp_tiny"


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """Return a run folder with what a finished run leaves that is read here."""
    folder = tmp_path / "run"
    folder.mkdir()
    recipe = registry.recipe(NAME)
    recipe = replace(recipe, train=replace(recipe.train, seed=7))
    (folder / "recipe.yaml").write_text(dump_recipe(recipe))
    metrics = {
        "validation": {"accuracy": 0.5, "ema/accuracy": 0.6},
        "test": {"accuracy": 0.7, "ema/accuracy": 0.8},
        "training": {"seconds": 12.5},
    }
    (folder / "metrics.json").write_text(json.dumps(metrics))
    environment = {
        "commit": "abc",
        "gpus": [],
        "processor": "a processor",
        "threads": 2,
        "libraries": {},
    }
    (folder / "environment.json").write_text(json.dumps(environment))
    return folder


def test_a_run_is_recorded_with_its_origin(finished: Path, tmp_path: Path) -> None:
    path = record_run(finished, tmp_path / "results")
    result = json.loads(path.read_text())
    assert path.name == "classification_digits-eamlp_tiny-seed7.json"
    assert result["recipe"] == NAME
    assert result["value"] == pytest.approx(80.0)
    assert result["metric"] == "top-1 accuracy (%)"
    assert (result["seed"], result["commit"], result["seconds"]) == (7, "abc", 12.5)


def test_an_overridden_recipe_is_not_recorded(finished: Path, tmp_path: Path) -> None:
    recipe = load_recipe(finished / "recipe.yaml")
    changed = replace(recipe, optim=replace(recipe.optim, lr=0.5))
    (finished / "recipe.yaml").write_text(dump_recipe(changed))
    with pytest.raises(UserError, match="overridden"):
        record_run(finished, tmp_path / "results")
    assert not (tmp_path / "results").exists()


def test_an_unfinished_run_is_not_recorded(finished: Path, tmp_path: Path) -> None:
    (finished / "metrics.json").unlink()
    with pytest.raises(UserError, match=r"metrics\.json"):
        record_run(finished, tmp_path / "results")


@pytest.mark.parametrize("name", sorted(registry.recipes()))
def test_every_recipe_is_recognized_after_a_round_trip(name: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(registry.recipe(name)))
    assert recipe_id(load_recipe(path)) == name


def test_the_table_gives_mean_and_spread(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "results"
    result = json.loads(record_run(finished, out).read_text())
    (out / "other.json").write_text(json.dumps({**result, "seed": 8, "value": 90.0}))
    row = next(line for line in format_results(out).splitlines() if NAME in line)
    assert "| 85.00 | 7.07 | 2 |" in row


def test_a_pattern_chooses_recipes(finished: Path, tmp_path: Path) -> None:
    record_run(finished, tmp_path)
    assert NAME in format_results(tmp_path, f"{NAME[:8]}*")
    assert NAME not in format_results(tmp_path, "segmentation*")


def test_a_file_that_is_no_result_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(UserError, match=r"broken\.json.*recipe"):
        format_results(tmp_path)
