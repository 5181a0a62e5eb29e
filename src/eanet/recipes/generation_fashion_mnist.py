"""SAGAN and EAGAN on Fashion-MNIST at 32 pixels, narrow, at one budget for a CPU.

    eanet train generation_fashion_mnist/sagan --data.root path/to/fashion_mnist
    eanet train generation_fashion_mnist/eagan --data.root path/to/fashion_mnist

No table of the paper. Both have the same widths, samples, optimizers and number of steps and differ
in the attention alone. They are judged by the features of a classifier of the same images, which is
trained first by its own recipe, beside the run; two runs in one folder share it. What was measured,
``eanet results`` lists.
"""

from eanet.recipe import DataSpec, ModelSpec, OptimSpec, Recipe, ScheduleSpec, TrainSpec

__all__ = ["RECIPES"]


def _recipe(model: str) -> Recipe:
    # Every number is our choice. A generator of 32 and a critic of 32 channels; one update of the
    # critic for each of the generator and rates above the usual 2e-4, for a run this short.
    return Recipe(
        task="generation",
        model=ModelSpec(name=model, arguments={"generator_width": 8, "critic_width": 16}),
        data=DataSpec(name="fashion_mnist", batch_size=64),
        options={"loss": "hinge", "judge": "classification_small/fashion_mnist_eamlp"},
        optim=OptimSpec(
            name="adam", lr=4e-4, weight_decay=0.0, betas=(0.0, 0.99), eps=1e-6, decay_vectors=True
        ),
        schedule=ScheduleSpec(name="constant"),
        train=TrainSpec(steps=1200, ema_decay=0.995, evaluate_every=200, channels_last=True),
    )


RECIPES = {"sagan": _recipe("sagan_32"), "eagan": _recipe("eagan_32")}
