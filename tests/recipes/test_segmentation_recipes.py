"""Recipes of segmentation: their arguments fit, and each takes two steps in the small."""

import inspect
from dataclasses import replace

import pytest
import torch

from eanet import registry, run
from eanet.recipe import DataSpec, ModelSpec

RECIPES = {
    name: recipe for name, recipe in registry.recipes().items() if recipe.task == "segmentation"
}


def test_every_published_setting_is_there():
    modules = {name.partition("/")[0] for name in RECIPES}
    assert modules >= {
        f"segmentation_{data}" for data in ("voc", "ade20k", "cityscapes", "camvid", "scenes")
    }
    assert registry.demos()["segmentation"] == "segmentation_scenes/eanet_tiny"
    rows = [name for name, r in RECIPES.items() if name.startswith("segmentation_voc/")]
    assert len(rows) == 12


@pytest.mark.parametrize("name", RECIPES)
def test_arguments_bind(name):
    recipe = RECIPES[name]
    source = registry.dataset("segmentation", recipe.data.name)
    inspect.signature(source).bind(None, **recipe.data.arguments)
    with torch.device("meta"):
        # CamVid's weights of its 11 classes stand in its recipes; the data decides their number
        num_classes = len(recipe.options.get("class_weights") or []) or 21
        arguments = {"num_classes": num_classes} | recipe.model.arguments
        model = registry.create_model(recipe.model.name, **arguments)
    facts = {
        "class_names": [str(number) for number in range(model.num_classes)],
        "palette": [[0, 0, 0]] * model.num_classes,
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
    }
    task = registry.task("segmentation")(model, facts, **recipe.options)
    if "size_modulus" in recipe.options:
        assert recipe.options["size_modulus"] == model.output_stride
    height, width = recipe.options["crop_size"]
    if height % 8 == width % 8 == 1:
        assert model.align_corners
    assert task.protocol.convention == recipe.options.get("convention", "authors")


@pytest.mark.parametrize(
    "name",
    [
        "segmentation_voc/finetune",
        "segmentation_ade20k/eanet_resnet101",
        "segmentation_camvid/eanet_small",
    ],
)
def test_two_steps_in_the_small(name, tmp_path):
    room = registry.task("segmentation")
    few = {"num_train": 8, "num_validation": 1, "num_test": 1}
    recipe = RECIPES[name].smoke(
        model=ModelSpec(name=room.smoke_model, arguments={"backbone_width": 4, "channels": 8}),
        data=DataSpec(name=room.smoke_data, arguments=few, batch_size=4),
        options=room.smoke_options,
    )
    recipe = replace(recipe, train=replace(recipe.train, channels_last=False))
    result = run.train(recipe, tmp_path / "run", device="cpu")
    assert 0 <= result.metrics["test"]["mean_iou"] <= 1
