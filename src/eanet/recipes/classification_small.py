"""Attention compared at equal size and budget on small real images, read as the mean of tokens.

    eanet train classification_small/fashion_mnist_eamlp --data.root path/to/fashion_mnist
    eanet train classification_small/cifar10_eamlp --data.root path/to/cifar10

External attention (``eamlp``), self-attention (``self_attention``) and no attention at all
(``mlp``), each with the stem of its family, 128 to 132 thousand parameters, the same samples,
augmentation, schedule and number of steps. No table of the paper; every number is our choice, and
the same for all three. Not one of these runs has been recorded yet; those that are, ``eanet
results`` lists.
"""

from typing import Any

from eanet.recipe import DataSpec, ModelSpec, OptimSpec, Recipe, ScheduleSpec, TrainSpec

__all__ = ["RECIPES"]

_MODELS = {"eamlp": "eamlp_tiny", "self_attention": "t2t_vit_tiny", "mlp": "mlp_tiny"}


def _recipe(data: str, model: str, *, epochs: int, options: dict[str, Any]) -> Recipe:
    return Recipe(
        task="classification",
        model=ModelSpec(name=model),
        data=DataSpec(name=data, batch_size=64),
        options={"image_size": 32, "label_smoothing": 0.1, **options},
        optim=OptimSpec(name="adamw", lr=2e-3, weight_decay=0.05, clip_norm=1.0),
        schedule=ScheduleSpec(name="cosine", warmup=140, min_lr=0.01),
        train=TrainSpec(epochs=epochs, ema_decay=0.995, evaluate_every=2),
    )


RECIPES = {
    f"{data}_{name}": _recipe(data, model, epochs=epochs, options={"augment": augment})
    for data, epochs, augment in (("fashion_mnist", 12, "crop_flip"), ("cifar10", 12, "crop_flip"))
    for name, model in _MODELS.items()
}
