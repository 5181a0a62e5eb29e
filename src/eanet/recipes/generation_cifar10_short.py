"""SAGAN and EAGAN on CIFAR-10 at full width, at one short budget for a GPU.

    eanet train generation_cifar10_short/sagan --data.root path/to/cifar10
    eanet train generation_cifar10_short/eagan --data.root path/to/cifar10

No table of the paper. The networks are those of Table 8. Both runs have the same samples,
optimizers and number of steps and differ in the attention alone. They are judged by the features of
a classifier of the same images, which is trained first by its own recipe, beside the run; runs in
one folder share it. What was measured, ``eanet results`` lists.
"""

from dataclasses import replace

from eanet.recipe import DataSpec, ModelSpec, OptimSpec, Recipe, ScheduleSpec, TrainSpec

__all__ = ["RECIPES"]

# Every number is our choice: one update of the critic for each of the generator, the critic at
# twice the rate in place of further updates, and averaged weights, for a run this short.
_GENERATOR = OptimSpec(
    name="adam", lr=2e-4, weight_decay=0.0, betas=(0.0, 0.99), eps=1e-6, decay_vectors=True
)


def _recipe(model: str) -> Recipe:
    return Recipe(
        task="generation",
        model=ModelSpec(name=model),
        data=DataSpec(name="cifar10", batch_size=64),
        options={
            "loss": "hinge",
            "augment": "flip",
            "judge": "classification_small/cifar10_eamlp",
        },
        optim=_GENERATOR,
        optim_by_network={"critic": replace(_GENERATOR, lr=4e-4)},
        schedule=ScheduleSpec(name="constant"),
        train=TrainSpec(steps=700, ema_decay=0.995, evaluate_every=350),
    )


RECIPES = {"sagan": _recipe("sagan_32"), "eagan": _recipe("eagan_32")}
