"""Data that needs no download: drawn scenes of textured shapes."""

from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from eanet.data.drawing import SHAPES, draw_scene
from eanet.data.splits import Splits
from eanet.errors import UserError
from eanet.registry import register_dataset
from eanet.tasks.segmentation.class_names import palette
from eanet.tasks.segmentation.samples import IGNORE, Sample

__all__ = ["DrawnScenes"]

#: of what is drawn; constants, so that every run is judged on the same scenes
_SEEDS = {"train": 1, "validation": 2, "test": 3}


@dataclass
class _Scenes:
    """Scenes of one split, each drawn when it is first asked for and then kept."""

    split: str
    num_samples: int
    size: int
    _drawn: dict[int, tuple[np.ndarray, np.ndarray]] = field(
        default_factory=dict[int, tuple[np.ndarray, np.ndarray]], repr=False
    )

    def __len__(self) -> int:
        """Return the number of samples."""
        return self.num_samples

    def __getitem__(self, index: int) -> Sample:
        """Return one scene."""
        if not 0 <= index < self.num_samples:
            raise IndexError(index)
        if index not in self._drawn:
            scene = draw_scene(
                _SEEDS[self.split],
                index,
                height=self.size,
                width=self.size,
                num_shapes=(1, 3),
                radius=(0.17, 0.3),
                max_overlap=0.15,
            )
            labels = np.zeros(scene.image.shape[:2], dtype=np.uint8)
            for instance in scene.instances:
                labels[instance.mask] = 1 + SHAPES.index(instance.kind)
            self._drawn[index] = scene.image, _with_border(labels, scene.instances)
        image, labels = self._drawn[index]
        name = f"drawn_scenes/{self.split}[{index}]"
        return Sample(Image.fromarray(image), labels.copy(), name)


def _with_border(labels: np.ndarray, instances: tuple) -> np.ndarray:
    """Return labels with one pixel on either side of every outline ignored, as in PASCAL VOC."""
    surface = np.zeros(labels.shape, dtype=np.int16)
    for number, instance in enumerate(instances, start=1):
        surface[instance.mask] = number
    border = np.zeros(labels.shape, dtype=bool)
    for axis in (0, 1):
        along = np.moveaxis(surface, axis, 0)
        edge = np.moveaxis(border, axis, 0)
        changes = along[1:] != along[:-1]
        edge[1:] |= changes
        edge[:-1] |= changes
    return np.where(border, IGNORE, labels).astype(np.uint8)


@register_dataset("drawn_scenes")
class DrawnScenes:
    """Scenes of one to three textured shapes on a textured ground, 64 x 64, drawn on the fly.

    Seven classes: the ground and six outlines (disk, square, triangle, ring, cross, star); size,
    turn, color and texture say nothing about the class. Outlines are ignored, as in PASCAL VOC.

    Args:
        root: must be left out.
        num_train: training scenes.
        num_validation: validation scenes.
        num_test: test scenes.
        size: height and width in pixels.
    """

    def __init__(
        self,
        root: str | None = None,
        *,
        num_train: int = 1200,
        num_validation: int = 100,
        num_test: int = 200,
        size: int = 64,
    ) -> None:
        if root is not None:
            raise UserError(
                f"data set 'drawn_scenes' is built in and takes no folder, got {root!r}"
            )
        if min(num_train, num_validation, num_test) < 1 or size < 16:
            raise UserError("drawn_scenes: every split needs a scene, and size 16 pixels or more")
        names = ["ground", *SHAPES]
        self.splits = Splits(
            train=_Scenes("train", num_train, size),
            validation=_Scenes("validation", num_validation, size),
            test=_Scenes("test", num_test, size),
            facts={
                "class_names": names,
                "num_classes": len(names),
                "in_channels": 3,
                "mean": [0.5, 0.5, 0.5],
                "std": [0.27, 0.27, 0.27],
                "palette": [list(color) for color in palette(names)],
                "notes": [],
            },
        )
