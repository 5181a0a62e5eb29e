"""Parts compared at one budget on 304 real meshes of 19 categories (Labeled PSB), 94 parts.

    eanet train pointcloud_labeledpsb/eat --data.root path/to/labeledpsb_part_hdf5_2048

External attention (``eat``), offset attention (``pct``) and no attention (``none``) in the same
network, with the same samples, augmentation, schedule and steps; minutes on one CPU thread. The
data is in the layout of ShapeNetPart (``shapenet_part``), read here as well. No table of
the paper; every number is our choice, made on validation clouds, and the same for all three.
"""

from eanet.recipe import DataSpec, ModelSpec, OptimSpec, Recipe, ScheduleSpec, TrainSpec

__all__ = ["RECIPES"]

_MODELS = {"eat": "eat_small_parts", "pct": "pct_small_parts", "none": "none_small_parts"}


def _recipe(model: str) -> Recipe:
    return Recipe(
        task="pointcloud_parts",
        model=ModelSpec(name=model),
        data=DataSpec(name="shapenet_part", batch_size=16),
        options={
            "num_points": 512,
            "point_choice": "random",
            "augment": {"scale": [0.8, 1.25], "shift": 0.1, "rotation": "vertical"},
        },
        optim=OptimSpec(name="adamw", lr=3e-3, weight_decay=0.05, clip_norm=1.0),
        schedule=ScheduleSpec(name="cosine", warmup=50, min_lr=0.01),
        train=TrainSpec(epochs=32, ema_decay=0.99, evaluate_every=8),
    )


RECIPES = {name: _recipe(model) for name, model in _MODELS.items()}
