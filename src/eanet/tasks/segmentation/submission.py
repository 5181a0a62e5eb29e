"""What the test server of PASCAL VOC takes: one palette image for each test image, packed."""

import os
import zipfile
from collections.abc import Iterable
from pathlib import Path

from PIL import Image

from eanet.data.files import decode_indices
from eanet.errors import UserError
from eanet.tasks.segmentation.class_names import VOC

__all__ = ["pack_voc"]

#: where the server looks for results of the segmentation task with own training data
_FOLDER = "results/VOC2012/Segmentation/comp6_test_cls"


def pack_voc(
    predictions: str | os.PathLike[str], ids: Iterable[str], archive: str | os.PathLike[str]
) -> Path:
    """Pack the index images that ``eanet predict`` wrote for the test server.

    Args:
        predictions: the folder that holds ``<id>.index.png``: ``pictures`` in the output folder.
        ids: names of the test images, the lines of ``ImageSets/Segmentation/test.txt``.
        archive: the ``.zip`` to write.

    Returns:
        The archive.

    Raises:
        UserError: there are no ids, or the image of one is missing, damaged or holds other values
            than 0 to 20.
    """
    folder, path = Path(predictions), Path(archive)
    names = [name.strip() for name in ids if name.strip()]
    if not names:
        raise UserError("there are no names of test images to pack")
    if path.suffix != ".zip":
        raise UserError(f"{path}: the name of the archive must end in .zip")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as file:  # PNG is compressed
            for name in names:
                image = folder / f"{name}.index.png"
                if not image.is_file():
                    raise UserError(f"{name!r} has no prediction: {str(image)!r} does not exist")
                highest = int(decode_indices(image).max())
                if highest >= len(VOC):
                    raise UserError(
                        f"{str(image)!r} holds class {highest}; VOC has 0 to {len(VOC) - 1}"
                    )
                with Image.open(image) as opened:
                    if opened.mode != "P":
                        raise UserError(f"{str(image)!r} is no palette image")
                file.write(image, f"{_FOLDER}/{name}.png")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path
