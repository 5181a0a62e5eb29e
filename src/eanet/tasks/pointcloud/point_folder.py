"""A folder of one's own: clouds and meshes, a folder per class."""

from collections.abc import Sequence
from pathlib import Path

from eanet.data.files import require_root
from eanet.data.splits import Splits, carve_validation
from eanet.errors import UserError
from eanet.registry import register_dataset
from eanet.tasks.pointcloud.clouds import CloudFiles, class_facts
from eanet.tasks.pointcloud.point_files import POINT_SUFFIXES

__all__ = ["PointFolder"]

#: of the choice of test samples where a folder has none of its own; never the seed of a run
_TEST_SPLIT_SEED = 2105


@register_dataset("point_folder")
class PointFolder:
    """A folder per class with OFF, PLY, OBJ, STL, XYZ, TXT, PTS, CSV, NPY or NPZ files.

    ``root/train/<class>/...`` with ``test`` (and ``val``) beside ``train``;
    ``root/<class>/{train,test}/...`` as the original ModelNet has it; or ``root/<class>/...``, of
    which a fifth of each class, always the same, becomes the test split. Meshes are sampled on
    their surface; every cloud is brought to the unit sphere.

    Args:
        root: the folder.
        in_channels: columns of the files to take, x, y, z first; of a mesh 6 for normals.
        mesh_points: points sampled on a mesh.
        test_fraction: share that becomes the test split where one folder is divided.

    Raises:
        UserError: a folder is missing or has no clouds, or the splits differ in their classes.
    """

    def __init__(
        self,
        root: str | None,
        *,
        in_channels: int = 3,
        mesh_points: int = 2048,
        test_fraction: float = 0.2,
    ) -> None:
        folder = require_root(root, "point_folder", "a folder per class")
        self._settings = {"in_channels": in_channels, "mesh_points": mesh_points}
        class_first = not (folder / "train").is_dir()
        top = folder if class_first else folder / "train"
        class_names = sorted(
            entry.name for entry in top.iterdir() if entry.is_dir() and entry.name[0] != "."
        )
        if len(class_names) < 2:
            raise UserError(
                f"{top}: must hold a folder per class, at least two; found {class_names}"
            )
        splits: dict[str, CloudFiles | None] = {}
        for name, spelling in (("train", "train"), ("validation", "val"), ("test", "test")):
            folders = [
                folder / kind / spelling if class_first else folder / spelling / kind
                for kind in class_names
            ]
            splits[name] = self._read(folders) if any(f.is_dir() for f in folders) else None
        if splits["train"] is None:
            whole = self._read([folder / kind for kind in class_names])
            splits["train"], splits["test"] = self._divide(whole, test_fraction, folder)
        facts = class_facts(class_names, in_channels, unit_sphere=True)
        assert splits["train"] is not None
        self.splits = Splits(splits["train"], splits["validation"], splits["test"], facts)

    def _read(self, folders: Sequence[Path]) -> CloudFiles:
        """List the files of one split."""
        paths: list[Path] = []
        labels: list[int] = []
        for label, folder in enumerate(folders):
            found = sorted(
                path
                for path in folder.rglob("*")
                if path.suffix.lower() in POINT_SUFFIXES and not path.name.startswith(".")
            )
            if not found:
                raise UserError(f"{folder}: holds no clouds ({', '.join(POINT_SUFFIXES)})")
            paths += found
            labels += [label] * len(found)
        return CloudFiles(paths, labels, **self._settings)

    def _divide(
        self, whole: CloudFiles, fraction: float, folder: Path
    ) -> tuple[CloudFiles, CloudFiles]:
        """Divide one folder into training and test files."""
        try:
            train, test = carve_validation(
                list(whole.labels), len(whole), fraction, seed=_TEST_SPLIT_SEED
            )
        except ValueError as error:
            raise UserError(f"point_folder {str(folder)!r}: test_fraction: {error}") from error
        first, second = (
            CloudFiles(
                [whole.paths[index] for index in part],
                [whole.labels[index] for index in part],
                **self._settings,
            )
            for part in (train, test)
        )
        return first, second
