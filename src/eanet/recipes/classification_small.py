"""Attention compared at equal size and budget on small real images, read as the mean of tokens.

    eanet train classification_small/fashion_mnist_eamlp --data.root path/to/fashion_mnist
    eanet train classification_small/cifar10_eamlp --data.root path/to/cifar10

External attention (``eamlp``), self-attention (``self_attention``) and no attention at all
(``mlp``) in the backbone; the stem has external attention in the first two and none in the third.
The three have 165 (grey images) or 169 (color) thousand parameters to within 0.1 %, the same
samples, augmentation, schedule and number of steps, and the head reads the mean of the tokens. No
table of the paper; every number is our choice and the same for all three. Augmentation, patches of
the stem and length were chosen by the validation accuracy of EAMLP with seed 0 on Fashion-MNIST.
Of all runs that were recorded ``eanet results`` lists mean, spread, time and hardware.
"""

from typing import Any

from eanet.recipe import DataSpec, ModelSpec, OptimSpec, Recipe, ScheduleSpec, TrainSpec

__all__ = ["RECIPES"]

#: wider patches than those of the tiny networks elsewhere: without attention, or where attention
#: passes little between tokens, patches are what tells a token of its neighbors
_STEM: dict[str, Any] = {"stem_kernels": [7, 5]}

_MODELS: dict[str, ModelSpec] = {
    "eamlp": ModelSpec(name="eamlp_tiny", arguments=_STEM),
    # wider MLPs make up for the parameters that self-attention lacks
    "self_attention": ModelSpec(name="t2t_vit_tiny", arguments={**_STEM, "mlp_ratio": 2.15}),
    "mlp": ModelSpec(name="mlp_tiny", arguments=_STEM),
}

#: edge of the images and augmentation of each data set
_DATA: dict[str, dict[str, Any]] = {
    "fashion_mnist": {"image_size": 28, "augment": "nudge_flip"},
    "cifar10": {"image_size": 32, "augment": "crop_flip"},
}


def _recipe(data: str, model: ModelSpec) -> Recipe:
    return Recipe(
        task="classification",
        model=model,
        data=DataSpec(name=data, batch_size=64),
        options={"label_smoothing": 0.1, **_DATA[data]},
        optim=OptimSpec(name="adamw", lr=2e-3, weight_decay=0.05, clip_norm=1.0),
        schedule=ScheduleSpec(name="cosine", warmup=140, min_lr=0.01),
        train=TrainSpec(epochs=16, ema_decay=0.995, evaluate_every=2),
    )


RECIPES = {
    f"{data}_{name}": _recipe(data, model) for data in _DATA for name, model in _MODELS.items()
}
