"""Tables 3 and 4: five detectors on COCO 2017, each with and without one external attention.

    eanet train detection_coco/mask_rcnn_ea --data.root COCO --model.init backbone:resnet50.pth

The folder holds ``train2017``, ``val2017`` and ``annotations``; the file holds torchvision's
ImageNet weights (V1), which all rows start from (``backbone:timm/resnet50.tv_in1k`` fetches them
from timm). Published box and mask AP stand in ``eanet recipes --table 3`` and ``--table 4``. None
of these runs was repeated here: one takes 8 GPUs for most of a day.

The paper names MMDetection and gives no schedule; its figures without attention are those that
MMDetection publishes for the 1x schedule, so that is what these recipes follow. Those ending in
``_2x`` train twice as long. ``<detector>_ea_tuned`` starts from a detector that was trained without
attention (``--model.init RUN``) and trains all of it, with the new block, for an epoch.

The last checkpoint is the one that is judged, as the only validation is at the end. The learning
rates are for 16 images a step; with another ``data.batch_size`` scale ``optim.lr`` alike.
"""

from dataclasses import replace
from typing import Any

from eanet.recipe import DataSpec, ModelSpec, OptimSpec, Recipe, ScheduleSpec, TrainSpec

__all__ = ["RECIPES"]

_DETECTORS = ("faster_rcnn", "mask_rcnn", "retinanet", "cascade_rcnn", "cascade_mask_rcnn")

#: MMDetection 2.x: short side 800 within 1333, mirrored half the time, and no other variation
_OPTIONS: dict[str, Any] = {"image_size": 800, "max_size": 1333}


def _recipe(detector: str, *, attention: bool, epochs: int = 12) -> Recipe:
    """Return the recipe of one row.

    Args:
        detector: which.
        attention: whether one block follows the last stage of the backbone.
        epochs: 12 for the 1x schedule, 24 for 2x; the rate falls at 2/3 and 11/12 of them.
    """
    return Recipe(
        task="detection",
        model=ModelSpec(name=f"{detector}_resnet50_fpn{'_ea' if attention else ''}"),
        data=DataSpec(name="coco", batch_size=16, num_workers=4),  # workers: our choice
        options=_OPTIONS,
        optim=OptimSpec(
            name="sgd",
            lr=0.01 if detector == "retinanet" else 0.02,
            momentum=0.9,
            weight_decay=1e-4,
            decay_vectors=True,
        ),
        schedule=ScheduleSpec(
            name="step",
            interval="epoch",
            milestones=(epochs * 2 // 3, epochs * 11 // 12),
            gamma=0.1,
            warmup=500,
            warmup_interval="step",
            warmup_lr=0.001,
        ),
        train=TrainSpec(epochs=epochs, evaluate_every=epochs),
    )


def _tuned(recipe: Recipe) -> Recipe:
    """Return a short run that lets a trained detector take up the block. Every number our choice.

    At a tenth of the rate, falling once.
    """
    return replace(
        recipe,
        optim=replace(recipe.optim, lr=recipe.optim.lr / 10),
        schedule=replace(recipe.schedule, name="cosine", interval="step", milestones=()),
        train=TrainSpec(epochs=1, evaluate_every=1),
    )


_ONCE = {
    f"{detector}{'_ea' if attention else ''}": _recipe(detector, attention=attention)
    for detector in _DETECTORS
    for attention in (False, True)
}
_TWICE = {
    f"{detector}{'_ea' if attention else ''}_2x": _recipe(detector, attention=attention, epochs=24)
    for detector in _DETECTORS
    for attention in (False, True)
}
#: shorter sides from 640 to 800, as is usual for longer schedules
_MULTI_SCALE = {
    f"{name}_multi_scale": replace(
        recipe, options={**_OPTIONS, "train_sizes": [640, 672, 704, 736, 768, 800]}
    )
    for name, recipe in _TWICE.items()
}
_TUNED = {f"{detector}_ea_tuned": _tuned(_ONCE[f"{detector}_ea"]) for detector in _DETECTORS}

RECIPES = {**_ONCE, **_TWICE, **_MULTI_SCALE, **_TUNED}
