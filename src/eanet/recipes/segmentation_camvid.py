"""CamVid (SegNet's 11 classes): the ablation of Table 1 in miniature, at one budget for every row.

    eanet train segmentation_camvid/eanet_small --data.root path/to/CamVid

The ``*_small`` networks see images of 120 x 160 pixels and are judged at 360 x 480, the size of the
labels. No table of the paper; every number is our choice, made on the validation images, and the
same for all rows.
"""

from dataclasses import replace

from eanet.recipe import DataSpec, ModelSpec, OptimSpec, Recipe, ScheduleSpec, TrainSpec

__all__ = ["RECIPES"]

_SMALL = Recipe(
    task="segmentation",
    model=ModelSpec(name="eanet_small"),
    data=DataSpec(name="camvid", batch_size=8),
    options={
        "crop_size": [120, 160],
        "scale": [160, 120],
        "ratios": [0.75, 1.5],
        "convention": "smooth",
        "reduction": "valid_pixels",
        # of a class: its share of the labeled training pixels to the power -1/2, of mean 1
        "class_weights": [0.32, 0.28, 1.45, 0.24, 0.66, 0.44, 1.31, 1.32, 0.55, 1.85, 2.59],
    },
    optim=OptimSpec(name="adamw", lr=2e-3, weight_decay=0.05, clip_norm=5.0),
    schedule=ScheduleSpec(name="cosine", warmup=40, min_lr=0.01),
    train=TrainSpec(steps=900, channels_last=True, ema_decay=0.99, evaluate_every=300),
)

RECIPES = {
    name: replace(_SMALL, model=ModelSpec(name=name))
    for name in ("fcn_small", "fcn_sa_small", "eanet_small")
}
