"""Real images with few objects' classes, on a CPU: blood cells and nuclei, from nothing.

    eanet train detection_small/bccd_faster_rcnn_ea --data.root path/to/BCCD
    eanet train detection_small/nuclei_mask_rcnn_ea --data.root path/to/nuclei

No table of the paper: networks small enough for a CPU, each with and without one external
attention at one budget. BCCD: boxes of three kinds of blood cells (PASCAL VOC's form, 640 x 480
pixels, seen at 256 x 192). Nuclei: masks in microscopy of the Data Science Bowl 2018 (COCO's form,
256 x 256 pixels); its val split is the test split here, and a tenth of train is set apart to choose
the best checkpoint by. Measured figures stand in ``eanet results``.
"""

from dataclasses import replace

from eanet.recipe import DataSpec, ModelSpec, OptimSpec, Recipe, ScheduleSpec, TrainSpec

__all__ = ["RECIPES"]

# Every number is our choice.
_BCCD = Recipe(
    task="detection",
    # platelets are 16 pixels across at this size
    model=ModelSpec(name="faster_rcnn_small", arguments={"anchor_scale": 4.0}),
    data=DataSpec(name="voc", batch_size=4),
    options={"image_size": 192, "max_size": 256, "vertical_flip": 0.5},
    optim=OptimSpec(name="adamw", lr=1e-3, weight_decay=0.05, clip_norm=10.0),
    schedule=ScheduleSpec(name="cosine", warmup=50, min_lr=0.01),
    train=TrainSpec(epochs=16, evaluate_every=8),
)
_NUCLEI = replace(
    _BCCD,
    # half of the nuclei are less than 15 pixels across, and there are up to 100 in an image
    model=ModelSpec(
        name="mask_rcnn_small",
        arguments={"anchor_scale": 4.0, "proposal_count": 256, "proposals_per_level": 512},
    ),
    data=DataSpec(name="coco", arguments={"val_as": "test"}, batch_size=4),
    options={"image_size": 256, "max_size": 256, "vertical_flip": 0.5},
    train=TrainSpec(epochs=10, evaluate_every=5),
)


def _with_attention(recipe: Recipe) -> Recipe:
    return replace(recipe, model=replace(recipe.model, name=f"{recipe.model.name}_ea"))


RECIPES = {
    "bccd_faster_rcnn": _BCCD,
    "bccd_faster_rcnn_ea": _with_attention(_BCCD),
    "nuclei_mask_rcnn": _NUCLEI,
    "nuclei_mask_rcnn_ea": _with_attention(_NUCLEI),
}
