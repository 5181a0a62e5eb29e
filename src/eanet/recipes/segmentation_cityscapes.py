"""Cityscapes: Table 7 of arXiv 2105.02358, "as mmsegmentation, 80k iterations".

    torchrun --nproc-per-node 4 -m eanet train segmentation_cityscapes/eanet_resnet101_769

Published: 81.7 % mIoU on val. The figures of other methods in the table are those of mmsegmentation
for crops of 769 x 769, several scales and mirrored images; so is this one read. Not run here. The
second recipe is the other crop of mmsegmentation's. At several scales, as there::

    eanet evaluate RUN --split validation --options.mirror true --options.merge probabilities
        --options.scales "[0.5, 0.75, 1.0, 1.25, 1.5, 1.75]"
"""

from dataclasses import replace

from eanet.recipe import DataSpec, ModelSpec, Recipe
from eanet.recipes.segmentation_ade20k import RECIPES as _ADE20K

__all__ = ["RECIPES"]


def _recipe(crop: list[int], scale: list[int], *, sliding: bool) -> Recipe:
    """Return the recipe of one crop size.

    Args:
        crop: height and width.
        scale: long and short side before the random factor.
        sliding: evaluate in windows of the crop's size, with steps of two thirds of it.
    """
    base = _ADE20K["eanet_resnet101"]
    # sizes of 8 k + 1 go with aligned corners
    arguments = {**base.model.arguments, "align_corners": crop[0] % 8 == 1}
    options = {**base.options, "crop_size": crop, "scale": scale}
    if sliding:
        options |= {"window": crop, "window_stride": [513, 513]}
    return replace(
        base,
        model=ModelSpec(name="eanet_resnet101_v1c", arguments=arguments),
        data=DataSpec(name="cityscapes", batch_size=8, num_workers=8),
        options=options,
        train=replace(base.train, steps=80_000, evaluate_every=8_000),
    )


RECIPES = {
    "eanet_resnet101_769": _recipe([769, 769], [2049, 1025], sliding=True),
    "eanet_resnet101_512x1024": _recipe([512, 1024], [2048, 1024], sliding=False),
}
