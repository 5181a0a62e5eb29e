"""ADE20K: Table 6 of arXiv 2105.02358, "as mmsegmentation, 160k iterations".

    torchrun --nproc-per-node 4 -m eanet train segmentation_ade20k/eanet_resnet101 --data.root ADE

Published: 45.33 % mIoU on val; whether at several scales is not stated, and figures of other
methods in the table are. Not run here. No configuration was released; the numbers are those of
mmsegmentation's ResNet-101 recipes of that time. At several scales, as there::

    eanet evaluate RUN --split validation --options.mirror true --options.merge probabilities
        --options.scales "[0.5, 0.75, 1.0, 1.25, 1.5, 1.75]"
"""

from eanet.recipe import DataSpec, ModelSpec, OptimSpec, Recipe, ScheduleSpec, TrainSpec

__all__ = ["RECIPES"]

RECIPES = {
    "eanet_resnet101": Recipe(
        task="segmentation",
        # weights of a "v1c" backbone have to be fetched: --model.init backbone:FILE
        model=ModelSpec(name="eanet_resnet101_v1c", arguments={"batch_norm": "synchronized"}),
        data=DataSpec(name="ade20k", batch_size=16, num_workers=8),
        options={
            "crop_size": [512, 512],
            "scale": [2048, 512],
            "ratios": [0.5, 2.0],
            "max_class_share": 0.75,
            "distort_colors": True,
            "convention": "mmsegmentation",
            "reduction": "all_pixels",
            "auxiliary_weight": 0.4,
            "merge": "probabilities",
        },
        optim=OptimSpec(name="sgd", lr=0.01, momentum=0.9, weight_decay=5e-4, decay_vectors=True),
        schedule=ScheduleSpec(name="poly", power=0.9, min_lr=0.01),
        train=TrainSpec(steps=160_000, evaluate_every=16_000),
    )
}
