"""Recipes, and a room of two tasks."""

import pytest
import torch

from eanet import registry
from eanet.cli import main
from eanet.describe import check_data

RECIPES = {
    name: recipe for name, recipe in registry.recipes().items() if name.startswith("pointcloud")
}


def test_the_room_holds_two_tasks():
    tasks = registry.tasks()
    assert {name for name, entry in tasks.items() if entry.task == "pointcloud"} == {
        "pointcloud",
        "pointcloud_parts",
    }
    assert registry.room_of("pointcloud_parts") == "pointcloud"
    assert registry.datasets("pointcloud_parts") == registry.datasets("pointcloud")
    assert "solids" in registry.datasets("pointcloud")
    # data sets belong to the room: no question which of its tasks is meant
    assert "solids" in check_data("solids", samples=1).text


def test_the_demo_shows_both_tasks():
    demos = registry.demos()
    assert demos["pointcloud"] in RECIPES
    assert demos["pointcloud_parts"] in RECIPES


def test_the_demo_of_the_room_runs_every_task(monkeypatch, tmp_path, capsys):
    ran = []
    monkeypatch.setattr("eanet.run.train", lambda recipe, folder, device: ran.append(recipe.task))
    monkeypatch.setattr("eanet.cli._options.print_result", lambda result: None)
    assert main(["demo", "--task", "pointcloud", "--out", str(tmp_path)]) == 0
    assert ran == ["pointcloud", "pointcloud_parts"]
    ran.clear()
    assert main(["demo", "--task", "pointcloud_parts", "--out", str(tmp_path)]) == 0
    assert ran == ["pointcloud_parts"]
    capsys.readouterr()


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_bind(name):
    recipe = RECIPES[name]
    room = registry.task(recipe.task)
    facts = {
        "class_names": ["a", "b"],
        "num_classes": 2,
        "in_channels": 3,
        "part_names": ["x", "y", "z"],
        "num_parts": 3,
        "part_ranges": [[0, 1], [1, 3]],
    }
    with torch.device("meta"):
        model = registry.create_model(
            recipe.model.name, **{**room.model_arguments(facts), **recipe.model.arguments}
        )
    room(model, facts, **recipe.options)
    assert recipe.data.name in registry.datasets("pointcloud")
