"""Table 8: image generation on CIFAR-10, 32 x 32 (FID lower is better, IS higher).

    export EANET_INCEPTION=path/to/pt_inception-2015-12-05-6726825d.pth
    eanet train generation_cifar10/eagan --data.root path/to/cifar10

Published (FID / IS): DCGAN 49.030 / 6.638, LSGAN 66.686 / 5.577, WGAN-GP 25.852 / 7.458, ProjGAN
33.830 / 7.539, SAGAN 14.498 / 8.626, EAGAN 14.105 / 8.630. Each is the best of 50 evaluations (of
100 for DCGAN and LSGAN) on the very images it is reported for; here the best is chosen on a part of
the training images, and the last step is reported beside it. None of these recipes has been run in
full with this package.

The settings are those of PyTorch-StudioGAN (commit c98d0e9), on which the paper builds. Without
Inception's weights ``--options.judge`` takes a classifier: its figures have names of their own.
"""

from dataclasses import replace
from typing import Any

from eanet.recipe import DataSpec, ModelSpec, OptimSpec, Recipe, ScheduleSpec, TrainSpec

__all__ = ["RECIPES"]

_ADAM = OptimSpec(
    name="adam", lr=2e-4, weight_decay=0.0, betas=(0.5, 0.999), eps=1e-6, decay_vectors=True
)


def _recipe(model: str, *, steps: int = 100_000, **options: Any) -> Recipe:
    return Recipe(
        task="generation",
        model=ModelSpec(name=model),
        data=DataSpec(name="cifar10", batch_size=64),
        options={
            "augment": "flip",
            "critic_updates": 5,
            "judge": "inception",
            "protocol": "studiogan_10k",
            **options,
        },
        optim=_ADAM,
        schedule=ScheduleSpec(name="constant"),
        train=TrainSpec(steps=steps, evaluate_every=2000),
    )


_SAGAN = _recipe("sagan_32", loss="hinge")
_EAGAN = _recipe("eagan_32", loss="hinge")


def _short(recipe: Recipe) -> Recipe:
    """Return the same networks for 10,000 images and one GPU, judged by a classifier of ours."""
    # our choice: a tenth of the steps for a fifth of the images, and averaged weights
    return replace(
        recipe,
        options={**recipe.options, "judge": "classification_small/cifar10_eamlp"},
        train=replace(recipe.train, steps=10_000, evaluate_every=1000, ema_decay=0.999),
    )


RECIPES = {
    "dcgan": _recipe("dcgan_32", steps=200_000, loss="vanilla_studiogan", critic_updates=2),
    "lsgan": _recipe("dcgan_32", steps=200_000, loss="least_squares", critic_updates=2),
    "wgan_gp": _recipe("resgan_32", loss="wasserstein", gradient_penalty=10.0),
    "projgan": _recipe("projgan_32", loss="hinge"),
    "sagan": _SAGAN,
    "eagan": _EAGAN,
    "sagan_short": _short(_SAGAN),
    "eagan_short": _short(_EAGAN),
}
