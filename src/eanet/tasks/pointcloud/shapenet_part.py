"""ShapeNetPart, in both formats it is given out in, and any data set laid out like it."""

from pathlib import Path
from typing import Any

from eanet.data.files import require_root
from eanet.data.splits import Splits
from eanet.errors import UserError
from eanet.registry import register_dataset
from eanet.tasks.pointcloud.clouds import CloudFiles, class_facts, in_unit_sphere, join_clouds
from eanet.tasks.pointcloud.hdf5_splits import read_split
from eanet.tasks.pointcloud.list_files import files_of_split, lines_of, read_json
from eanet.tasks.pointcloud.part_ranges import (
    numbered_parts,
    part_facts,
    parts_of_arrays,
    ranges_of_files,
)

__all__ = ["ShapeNetPart"]


@register_dataset("shapenet_part")
class ShapeNetPart:
    """ShapeNetPart and all in its layouts: HDF5 files, or text files with normals.

    HDF5 (``hdf5_data``): ``ply_data_{train,val,test}*.h5`` with the keys ``data``, ``label`` and
    ``pid`` (or ``seg``); ``all_object_categories.txt`` names the categories,
    ``overallid_to_catid_partid.json`` says which parts each has. Text
    (``shapenetcore_partanno_segmentation_benchmark_v0_normal``): ``<synset>/<id>.txt`` with lines
    ``x y z nx ny nz part``, ``synsetoffset2category.txt`` and
    ``train_test_split/shuffled_*_file_list.json``; clouds are brought to the unit sphere.

    Args:
        root: the folder.
        in_channels: 3, or 6 for the normals of the text files.
        train_on_validation: as the paper, learn from the validation clouds too; then a validation
            split is carved out of both.

    Raises:
        UserError: the folder has neither layout, or a file is damaged.
    """

    def __init__(
        self,
        root: str | None,
        *,
        in_channels: int = 3,
        train_on_validation: bool = False,
    ) -> None:
        folder = require_root(root, "shapenet_part", "HDF5 or text files with parts")
        files = {
            name: files_of_split(
                folder, [f"{split}_hdf5_file_list.txt"], [f"ply_data_{split}*.h5", f"{split}*.h5"]
            )
            for name, split in (("train", "train"), ("validation", "val"), ("test", "test"))
        }
        if files["train"]:
            if in_channels != 3:
                raise UserError(f"{folder}: HDF5 clouds have 3 channels, in_channels={in_channels}")
            found, facts = self._read_hdf5(folder, files)
        elif (folder / "synsetoffset2category.txt").is_file():
            found, facts = self._read_text(folder, in_channels)
        else:
            raise UserError(
                f"{folder}: neither ply_data_train*.h5 nor synsetoffset2category.txt, so no "
                "ShapeNetPart layout"
            )
        train, validation = found["train"], found.get("validation")
        if train_on_validation and validation is not None:
            train, validation = join_clouds(train, validation), None
        self.splits = Splits(train, validation, found.get("test"), facts)

    def _read_hdf5(
        self, folder: Path, files: dict[str, list[Path]]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        table = folder / "all_object_categories.txt"
        class_names = [line.split()[0] for line in lines_of(table)] if table.is_file() else None
        if class_names == []:
            raise UserError(f"{table}: names no categories")
        count = None if class_names is None else len(class_names)
        found = {
            name: read_split(paths, f"{folder.name}/{name}", count, parts=True)
            for name, paths in files.items()
            if paths
        }
        if class_names is None:
            most = max(max(split.labels) for split in found.values())
            class_names = [f"category {number}" for number in range(most + 1)]
        facts = class_facts(class_names, 3, unit_sphere=in_unit_sphere(found["train"].points))
        return found, facts | parts_of_arrays(folder, found, class_names)

    def _read_text(self, folder: Path, in_channels: int) -> tuple[dict[str, Any], dict[str, Any]]:
        if in_channels not in (3, 6):
            raise UserError(f"shapenet_part: in_channels must be 3 or 6, got {in_channels}")
        pairs = [line.split() for line in lines_of(folder / "synsetoffset2category.txt")]
        class_names, synsets = [pair[0] for pair in pairs], [pair[-1] for pair in pairs]
        found: dict[str, Any] = {}
        for name, split in (("train", "train"), ("validation", "val"), ("test", "test")):
            listed = folder / "train_test_split" / f"shuffled_{split}_file_list.json"
            if not listed.is_file():
                continue
            shapes = _listed_shapes(listed)
            unknown = sorted({synset for synset, _ in shapes} - set(synsets))
            if unknown:
                raise UserError(f"{listed}: the synset {unknown[0]!r} is of no category")
            found[name] = CloudFiles(
                [folder / synset / f"{shape}.txt" for synset, shape in shapes],
                [synsets.index(synset) for synset, _ in shapes],
                in_channels,
                part_column=6,
            )
        if "train" not in found:
            raise UserError(f"{folder}: train_test_split has no shuffled_train_file_list.json")
        ranges = ranges_of_files(found["train"], len(class_names))
        names = numbered_parts(class_names, ranges)
        facts = class_facts(class_names, in_channels, unit_sphere=True)
        return found, facts | part_facts(names, ranges)


def _listed_shapes(file: Path) -> list[tuple[str, str]]:
    """Return synset and name of the shapes of a split."""
    entries = read_json(file)
    shapes: list[tuple[str, str]] = []
    for entry in entries if isinstance(entries, list) else ():
        *_, synset, shape = ("", "", *Path(str(entry)).parts)
        shapes.append((synset, shape))
    if not shapes or any(not synset for synset, _ in shapes):
        raise UserError(f"{file}: must be a list of 'shape_data/<synset>/<shape>'")
    return shapes
