"""Built-in solids of ten categories: EAT names them and finds their parts, in minutes on a CPU.

    eanet demo --task pointcloud
    eanet train pointcloud_solids/eat
    eanet train pointcloud_solids/eat_parts

No table of the paper; the smallest runs that show everything. ``eanet results`` lists what was
measured. Every number is our choice, made while looking at validation metrics.
"""

from eanet.recipe import DataSpec, ModelSpec, OptimSpec, Recipe, ScheduleSpec, TrainSpec

__all__ = ["DEMO", "RECIPES"]

#: what ``eanet demo`` runs for this room: a class for each cloud, and a part for each point
DEMO = ("eat", "eat_parts")

_OPTIM = OptimSpec(name="adamw", lr=2e-3, weight_decay=0.05, clip_norm=1.0)
_SCHEDULE = ScheduleSpec(name="cosine", warmup=30, min_lr=0.01)
_AUGMENT = {"rotation": "vertical", "scale": [0.8, 1.25], "shift": 0.1}

_EAT = Recipe(
    task="pointcloud",
    model=ModelSpec(name="eat_small_cls"),
    data=DataSpec(name="solids", batch_size=32),
    options={"num_points": 512, "point_choice": "random", "augment": _AUGMENT},
    optim=_OPTIM,
    schedule=_SCHEDULE,
    train=TrainSpec(epochs=10, evaluate_every=2),
)
_EAT_PARTS = Recipe(
    task="pointcloud_parts",
    model=ModelSpec(name="eat_small_parts"),
    data=DataSpec(name="solids", batch_size=16),
    options={"num_points": 512, "point_choice": "random", "augment": _AUGMENT},
    optim=_OPTIM,
    schedule=_SCHEDULE,
    train=TrainSpec(epochs=16, evaluate_every=4),
)

RECIPES = {"eat": _EAT, "eat_parts": _EAT_PARTS}
