"""Data that needs no download: drawn scenes with a box and a mask for each shape."""

from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from eanet.data.drawing import SHAPES, draw_scene
from eanet.data.splits import Splits
from eanet.errors import UserError
from eanet.registry import register_dataset
from eanet.tasks.detection.datasets import IMAGENET_MEAN, IMAGENET_STD
from eanet.tasks.detection.mask_codes import encode_mask
from eanet.tasks.detection.samples import Instance, Sample

__all__ = ["DrawnScenes", "Scenes"]

#: the series of scenes of each split; they share no scene
_SERIES = {"train": 0, "validation": 1, "test": 2}


@dataclass
class Scenes:
    """Scenes, drawn when they are asked for the first time.

    Args:
        series: which.
        count: how many.
        image_size: height and width in pixels.
        name: how they are called.
    """

    series: int
    count: int
    image_size: int
    name: str
    _drawn: dict[int, Sample] = field(default_factory=dict[int, Sample], repr=False)

    def __len__(self) -> int:
        """Return the number of scenes."""
        return self.count

    def __getitem__(self, index: int) -> Sample:
        """Return one scene."""
        if index not in self._drawn:
            self._drawn[index] = self._draw(index)
        return self._drawn[index]

    def _draw(self, index: int) -> Sample:
        size = self.image_size
        scene = draw_scene(
            self.series, index, height=size, width=size, num_shapes=(1, 3), radius=(0.16, 0.3)
        )
        instances: list[Instance] = []
        for number, drawn in enumerate(scene.instances, start=1):
            rows, columns = np.nonzero(drawn.mask)
            x, y = int(columns.min()), int(rows.min())
            box = (float(x), float(y), float(columns.max() + 1 - x), float(rows.max() + 1 - y))
            code = encode_mask(drawn.mask)
            instances.append(
                Instance(
                    SHAPES.index(drawn.kind), box, float(drawn.mask.sum()), False, code, number
                )
            )
        return Sample(
            Image.fromarray(scene.image),
            tuple(instances),
            f"{self.name}[{index}]",
            index + 1,
            (size, size),
        )


@register_dataset("scenes")
class DrawnScenes:
    """Textured shapes of six kinds on textured grounds, one to three in a picture.

    Args:
        root: must be left out; nothing is read from disk.
        image_size: height and width in pixels.
        num_train: training scenes.
        num_test: scenes of each of the other two splits.
    """

    def __init__(
        self,
        root: str | None = None,
        *,
        image_size: int = 96,
        num_train: int = 1800,
        num_test: int = 100,
    ) -> None:
        if root is not None:
            raise UserError(f"data set 'scenes' is built in and takes no folder, got {root!r}")
        counts = {"train": num_train, "validation": num_test, "test": num_test}
        if image_size < 32 or min(counts.values()) < 1:
            raise UserError("data set 'scenes' needs image_size of 32 or more and scenes to draw")
        splits = {
            name: Scenes(_SERIES[name], count, image_size, f"scenes/{name}")
            for name, count in counts.items()
        }
        self.splits = Splits(
            splits["train"],
            splits["validation"],
            splits["test"],
            {
                "class_names": list(SHAPES),
                "category_ids": list(range(1, len(SHAPES) + 1)),
                "num_classes": len(SHAPES),
                "in_channels": 3,
                "mean": list(IMAGENET_MEAN),
                "std": list(IMAGENET_STD),
                "has_masks": True,
            },
        )
