"""Table 9: image generation on Tiny-ImageNet, 64 x 64 (FID lower is better, IS higher).

    export EANET_INCEPTION=path/to/pt_inception-2015-12-05-6726825d.pth
    eanet train generation_tiny_imagenet/eagan --data.root path/to/tiny-imagenet-200

Published (FID / IS): DCGAN 91.625 / 5.640, LSGAN 90.008 / 5.381, ProjGAN 89.175 / 6.224, SAGAN
51.414 / 8.342, EAGAN 48.374 / 8.673; the best of 50 evaluations on the very images they are
reported for. ``wgan_gp`` is what the table leaves out: it diverges. The settings are those of
PyTorch-StudioGAN (commit c98d0e9); its runs kept batch statistics for each GPU. None of these
recipes has been run in full with this package.
"""

from dataclasses import replace
from typing import Any

from eanet.recipe import DataSpec, ModelSpec, OptimSpec, Recipe, ScheduleSpec, TrainSpec

__all__ = ["RECIPES"]

_GENERATOR = OptimSpec(
    name="adam", lr=1e-4, weight_decay=0.0, betas=(0.0, 0.999), eps=1e-6, decay_vectors=True
)


def _recipe(model: str, **options: Any) -> Recipe:
    return Recipe(
        task="generation",
        model=ModelSpec(name=model),
        data=DataSpec(name="tiny_imagenet", batch_size=256),
        options={
            "augment": "flip",
            "critic_updates": 1,
            "judge": "inception",
            "protocol": "studiogan_10k",
            **options,
        },
        optim=_GENERATOR,
        optim_by_network={"critic": replace(_GENERATOR, lr=4e-4)},
        schedule=ScheduleSpec(name="constant"),
        train=TrainSpec(steps=100_000, evaluate_every=2000),
    )


RECIPES = {
    "dcgan": _recipe("resgan_64", loss="vanilla_studiogan"),
    "lsgan": _recipe("resgan_64", loss="least_squares"),
    "wgan_gp": _recipe("resgan_64", loss="wasserstein", gradient_penalty=10.0),
    "projgan": _recipe("projgan_64", loss="hinge"),
    "sagan": _recipe("sagan_64", loss="hinge"),
    "eagan": _recipe("eagan_64", loss="hinge"),
}
