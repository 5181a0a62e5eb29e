"""CamVid (SegNet's 11 classes): the ablation of Table 1 in miniature, at one budget for every row.

    eanet train segmentation_camvid/eanet_small --data.root path/to/CamVid
    eanet train segmentation_camvid/eanet_resnet50 --data.root path/to/CamVid

The ``*_small`` networks start from nothing, see images of 120 x 160 pixels and are judged at
360 x 480, the size of the labels: three rows within minutes on a CPU. The ``*resnet50*`` ones are
rows 1 to 7 and 9 of Table 1 at full size from ImageNet weights, for a GPU; those were not run here.
Every number is our choice, the same for all rows of a kind, and none was chosen on test images.

Measured with one seed (averaged weights, mean IoU over the 11 classes; four fifths of CamVid: 294
training, 81 validation and 187 test images): FCN 43.0, with self-attention 41.4, EANet 42.5 % on
test. The paper's order, external above self-attention above none, does not hold in these runs: FCN
comes first, and on the validation images EANet (43.1) is far behind FCN (54.3) and self-attention
(51.2). One seed cannot tell a difference of a point from chance. ``eanet results`` lists the runs;
their times were taken while other work shared the two cores.
"""

from dataclasses import replace

from eanet.recipe import (
    DataSpec,
    ModelSpec,
    OptimSpec,
    ParameterGroup,
    Recipe,
    ScheduleSpec,
    TrainSpec,
)

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
        # of a class: its share of the labeled pixels (of every third training image) to the
        # power -1/2, of mean 1
        "class_weights": [0.32, 0.28, 1.45, 0.24, 0.66, 0.44, 1.31, 1.32, 0.55, 1.85, 2.59],
    },
    optim=OptimSpec(name="adamw", lr=2e-3, weight_decay=0.05, clip_norm=5.0),
    schedule=ScheduleSpec(name="cosine", warmup=40, min_lr=0.01),
    train=TrainSpec(steps=900, channels_last=True, ema_decay=0.99, evaluate_every=300),
)

_FULL = replace(
    _SMALL,
    model=ModelSpec(name="eanet_resnet50", init="backbone:timm/resnet50s.gluon_in1k"),
    data=replace(_SMALL.data, num_workers=8),
    options={**_SMALL.options, "crop_size": [361, 481], "scale": None, "size_modulus": 16},
    optim=OptimSpec(
        name="sgd",
        lr=9e-3,
        momentum=0.9,
        weight_decay=1e-4,
        groups=(ParameterGroup(match=r"bias$", lr_scale=2.0, weight_decay=0.0),),
    ),
    schedule=ScheduleSpec(name="poly", power=0.9),
    train=TrainSpec(steps=4000, channels_last=True, evaluate_every=500),
)

RECIPES = {
    name: replace(base, model=replace(base.model, name=name))
    for base, names in (
        (_SMALL, ("fcn_small", "fcn_sa_small", "eanet_small")),
        (
            _FULL,
            (
                "fcn_resnet50",
                "fcn_sa_resnet50",
                "fcn_sa_resnet50_double",
                "eanet_resnet50_s8",
                "eanet_resnet50_s32",
                "eanet_resnet50_softmax",
                "eanet_resnet50",
                "eanet_resnet50_s256",
            ),
        ),
    )
    for name in names
}
