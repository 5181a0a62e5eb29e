"""PASCAL VOC 2012: the ablation of Table 1, and the two stages of Table 5 (arXiv 2105.02358).

    eanet train segmentation_voc/eanet_resnet50 --data.root path/to/VOC
    torchrun --nproc-per-node 4 -m eanet train segmentation_voc/trainaug --data.root path/to/VOC
    torchrun --nproc-per-node 4 -m eanet train segmentation_voc/finetune --data.root path/to/VOC

Published: mIoU 75.7 to 78.3 % on val (Table 1), 84.0 % on the test server after ``trainaug`` and
``finetune`` with several scales and mirrored images (Table 5). None of these was run here.

The paper gives batch, iterations and architecture; everything else is that of the authors' code,
whose loop runs one iteration more, at rate 0. Backbones start from ImageNet weights of timm, which
are downloaded; the authors' were trained by others on the same architecture. For the test server
predict with the twelve passes of the authors::

    eanet predict RUN JPEGImages --out predictions --options.mirror true
        --options.scales "[0.5, 0.75, 1.0, 1.25, 1.5, 1.75]"
"""

from dataclasses import replace
from typing import Any

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

_OPTIONS: dict[str, Any] = {
    "crop_size": [513, 513],
    "ratios": [0.5, 2.0],
    "ratio_step": 0.1,
    "convention": "authors",
    "reduction": "all_pixels",
}


def _recipe(
    model: str, *, output_stride: int, batch_size: int, iterations: int, init: str, **data: Any
) -> Recipe:
    """Return a recipe of the authors' code.

    Args:
        model: a registered name.
        output_stride: of that model.
        batch_size: over all processes.
        iterations: after which the rate is 0; the loop runs one more.
        init: what the weights start from.
        data: arguments of the data set.
    """
    return Recipe(
        task="segmentation",
        # over all processes, as the authors'; in one process it is plain batch norm
        model=ModelSpec(name=model, arguments={"batch_norm": "synchronized"}, init=init),
        data=DataSpec(name="voc2012", arguments=data, batch_size=batch_size, num_workers=8),
        options={**_OPTIONS, "size_modulus": output_stride},
        optim=OptimSpec(
            name="sgd",
            lr=9e-3,
            momentum=0.9,
            weight_decay=1e-4,
            # all biases, those of norms too, at twice the rate; scales of norms are not decayed
            groups=(ParameterGroup(match=r"bias$", lr_scale=2.0, weight_decay=0.0),),
        ),
        schedule=ScheduleSpec(name="poly", power=0.9, hold=10, cooldown=1),
        train=TrainSpec(steps=iterations + 1, seed=66, evaluate_every=5000),
    )


def _ablation(model: str, *, output_stride: int = 16, depth: int = 50) -> Recipe:
    return _recipe(
        model,
        output_stride=output_stride,
        batch_size=12,
        iterations=30_000,
        init=f"backbone:timm/resnet{depth}s.gluon_in1k",
    )


_TRAINAUG = _recipe(
    "eanet_resnet101_os8",
    output_stride=8,
    batch_size=16,
    iterations=45_000,
    init="backbone:timm/resnet101s.gluon_in1k",
)
# the authors' code base published what the paper leaves out: a tenth of the rate, a fresh schedule
_FINETUNE = _recipe(
    "eanet_resnet101_os8",
    output_stride=8,
    batch_size=16,
    iterations=15_000,
    init="runs/segmentation_voc-trainaug",
    train="trainval",
)

RECIPES = {
    "fcn_resnet50": _ablation("fcn_resnet50"),
    "fcn_sa_resnet50": _ablation("fcn_sa_resnet50"),
    "fcn_sa_resnet50_double": _ablation("fcn_sa_resnet50_double"),
    "eanet_resnet50_s8": _ablation("eanet_resnet50_s8"),
    "eanet_resnet50_s32": _ablation("eanet_resnet50_s32"),
    "eanet_resnet50_softmax": _ablation("eanet_resnet50_softmax"),
    "eanet_resnet50": _ablation("eanet_resnet50"),
    "eanet_resnet50_os8": _ablation("eanet_resnet50_os8", output_stride=8),
    "eanet_resnet50_s256": _ablation("eanet_resnet50_s256"),
    "eanet_resnet101": _ablation("eanet_resnet101", depth=101),
    "trainaug": _TRAINAUG,
    "finetune": replace(_FINETUNE, optim=replace(_FINETUNE.optim, lr=9e-4)),
}
