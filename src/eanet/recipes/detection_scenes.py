"""Drawn scenes (textured shapes with exact masks), in minutes on a CPU.

    eanet demo --task detection
    eanet train detection_scenes/mask_rcnn_small_ea

No table of the paper: images of 96 pixels that need no download, and networks small enough for two
cores, trained from nothing.
"""

from dataclasses import replace

from eanet.recipe import DataSpec, ModelSpec, OptimSpec, Recipe, ScheduleSpec, TrainSpec

__all__ = ["DEMO", "RECIPES"]

#: what ``eanet demo`` runs for this task
DEMO = "mask_rcnn_small_ea"

# Every number is our choice, made while looking at the validation split.
_MASK_RCNN = Recipe(
    task="detection",
    model=ModelSpec(name="mask_rcnn_small_ea"),
    data=DataSpec(name="scenes", batch_size=8),
    options={"image_size": 96, "max_size": 96, "vertical_flip": 0.5},
    optim=OptimSpec(name="adamw", lr=1e-3, weight_decay=0.05, clip_norm=10.0),
    schedule=ScheduleSpec(name="cosine", warmup=50, min_lr=0.01),
    train=TrainSpec(epochs=3, evaluate_every=3),
)

RECIPES = {
    name: replace(_MASK_RCNN, model=ModelSpec(name=name))
    for name in (
        "mask_rcnn_small_ea",
        "mask_rcnn_small",
        "faster_rcnn_small_ea",
        "retinanet_small_ea",
        "cascade_rcnn_small_ea",
        "cascade_mask_rcnn_small_ea",
    )
}
