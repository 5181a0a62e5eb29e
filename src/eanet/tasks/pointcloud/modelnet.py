"""ModelNet40, in both formats it is given out in, and any data set laid out like it."""

from pathlib import Path

from eanet.data.files import require_root
from eanet.data.splits import Splits
from eanet.errors import UserError
from eanet.registry import register_dataset
from eanet.tasks.pointcloud.clouds import CloudFiles, class_facts, in_unit_sphere
from eanet.tasks.pointcloud.hdf5_splits import read_split
from eanet.tasks.pointcloud.list_files import files_of_split, lines_of

__all__ = ["ModelNet"]


@register_dataset("modelnet40")
class ModelNet:
    """ModelNet40 and all in its layouts: HDF5 files of 2,048 points, or resampled text files.

    HDF5 (``modelnet40_ply_hdf5_2048``): ``ply_data_train*.h5`` and ``ply_data_test*.h5``, or
    ``train*.h5`` and ``test*.h5``, with the keys ``data`` and ``label``; ``shape_names.txt`` names
    the classes. Text (``modelnet40_normal_resampled``): ``<class>/<class>_0001.txt`` with lines
    ``x,y,z,nx,ny,nz``, and lists ``*train.txt``, ``*test.txt``, ``*shape_names.txt``; clouds are
    brought to the unit sphere. A validation split is carved out of the training clouds.

    Args:
        root: the folder.
        in_channels: 3, or 6 for the normals of the text files.
        max_points: of a text file take the first so many points; 0 for all.

    Raises:
        UserError: the folder has neither layout, or a file is damaged.
    """

    def __init__(self, root: str | None, *, in_channels: int = 3, max_points: int = 2048) -> None:
        folder = require_root(root, "modelnet40", "HDF5 or resampled text files")
        self._hdf5 = {
            split: files_of_split(
                folder, [f"{split}_files.txt"], [f"ply_data_{split}*.h5", f"{split}*.h5"]
            )
            for split in ("train", "test")
        }
        if self._hdf5["train"]:
            self.splits = self._read_hdf5(folder, in_channels)
        elif list(folder.glob("*_train.txt")):
            self.splits = self._read_text(folder, in_channels, max_points or None)
        else:
            raise UserError(
                f"{folder}: neither ply_data_train*.h5 nor *_train.txt, so no ModelNet40 layout"
            )

    def _read_hdf5(self, folder: Path, in_channels: int) -> Splits:
        if in_channels != 3:
            raise UserError(f"{folder}: HDF5 clouds have 3 channels, in_channels={in_channels}")
        names = folder / "shape_names.txt"
        class_names = lines_of(names) if names.is_file() else None
        count = None if class_names is None else len(class_names)
        train = read_split(self._hdf5["train"], f"{folder.name}/train", count, parts=False)
        if class_names is None:
            class_names = [f"class {number}" for number in range(max(train.labels) + 1)]
        test = None
        if self._hdf5["test"]:
            test = read_split(
                self._hdf5["test"], f"{folder.name}/test", len(class_names), parts=False
            )
        facts = class_facts(class_names, 3, unit_sphere=in_unit_sphere(train.points))
        return Splits(train, None, test, facts)

    def _read_text(self, folder: Path, in_channels: int, max_points: int | None) -> Splits:
        if in_channels not in (3, 6):
            raise UserError(f"modelnet40: in_channels must be 3 or 6, got {in_channels}")
        (list_file, *_) = sorted(folder.glob("*_train.txt"))
        prefix = list_file.name.removesuffix("_train.txt")
        listed = {
            split: lines_of(folder / f"{prefix}_{split}.txt")
            for split in ("train", "test")
            if (folder / f"{prefix}_{split}.txt").is_file()
        }
        names = folder / f"{prefix}_shape_names.txt"
        class_names = (
            lines_of(names)
            if names.is_file()
            else sorted({name.rpartition("_")[0] for name in listed["train"]})
        )
        splits = {}
        for split, shapes in listed.items():
            classes = [name.rpartition("_")[0] for name in shapes]
            if not shapes or "" in classes:
                wrong = repr(shapes[classes.index("")]) if shapes else "none"
                raise UserError(
                    f"{folder / f'{prefix}_{split}.txt'}: must list clouds as <class>_<number>, "
                    f"got {wrong}"
                )
            unknown = sorted(set(classes) - set(class_names))
            if unknown:
                raise UserError(f"{names}: lacks the class {unknown[0]!r} of {list_file.name}")
            splits[split] = CloudFiles(
                [folder / kind / f"{name}.txt" for kind, name in zip(classes, shapes, strict=True)],
                [class_names.index(kind) for kind in classes],
                in_channels,
                max_points=max_points,
            )
        facts = class_facts(class_names, in_channels, unit_sphere=True)
        return Splits(splits["train"], None, splits.get("test"), facts)
