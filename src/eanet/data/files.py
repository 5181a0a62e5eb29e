"""Files to arrays, safely: every refusal names the file, and nothing is altered without a rule.

Images are judged by their content, never by their suffix, and come out as 8-bit ``L`` or ``RGB``:

================================  ============================================================
in the file                       what comes out
================================  ============================================================
8-bit grey, RGB, YCbCr, 1-bit     the same values (1-bit: 0 and 255)
palette                           the colors the palette names
CMYK                              RGB by Pillow's conversion
transparency                      composed over white, as a viewer would show it
16-bit                            scaled by the range of the format to 0..255, not clipped
EXIF orientation                  applied, so that the picture stands as a viewer shows it
32-bit integers, floating point   refused: the file does not say which value is white
several frames or pages           refused: the file does not say which one is meant
================================  ============================================================

Environment variable: ``EANET_MAX_IMAGE_PIXELS`` raises or lowers the largest image that is decoded.
"""

import gzip
import io
import math
import os
import struct
import zlib
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from eanet.errors import UserError

__all__ = [
    "IMAGE_SUFFIXES",
    "decode_image",
    "decode_image_bytes",
    "decode_indices",
    "read_idx",
    "require_root",
]

#: what a folder of images is searched for
IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")

#: decoders that may run; others (EPS calls an interpreter) stay closed
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")

#: 8192 x 8192: 192 MiB as RGB. A file of 50 kB can claim a thousand times its size.
_MAX_PIXELS = 8192 * 8192

_BITS_PER_SAMPLE_TAG = 258

#: a header may claim more than any data set of this format holds
_MAX_IDX_BYTES = 4 * 2**30

_IDX_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}

ImageMode = Literal["L", "RGB"]


def decode_image(
    path: str | os.PathLike[str], *, mode: ImageMode | None = None, upright: bool = True
) -> Image.Image:
    """Decode an image file; see the table at the top of this module.

    Args:
        path: the file.
        mode: ``"L"`` or ``"RGB"`` converts (grey by the luma of ITU-R 601); ``None`` keeps grey
            files grey and gives RGB for all others.
        upright: whether the EXIF orientation is applied; without it the image comes as stored,
            for annotations that were made so.

    Returns:
        A loaded image of mode ``L`` or ``RGB``, 8 bits per channel.

    Raises:
        UserError: the file is missing, empty, no image, damaged, too large, or of a kind whose
            values have no defined 8-bit meaning. The message names the file.
    """
    path = Path(path)
    try:
        if not path.is_file():
            state = "is not a regular file" if path.exists() else "does not exist"
            raise UserError(f"image {str(path)!r} {state}")
        with path.open("rb") as stream:
            return _decode(stream, name=str(path), mode=mode, upright=upright)
    except UserError:
        raise
    except OSError as error:  # permissions, loops of links, names that are too long
        raise UserError(
            f"image {str(path)!r} cannot be opened: {error.strerror or error}"
        ) from error


def decode_image_bytes(data: bytes, *, name: str, mode: ImageMode | None = None) -> Image.Image:
    """Decode an image held in memory.

    Args:
        data: content of an image file.
        name: how error messages call it.
        mode: as in :func:`decode_image`.

    Raises:
        UserError: as :func:`decode_image`.
    """
    return _decode(io.BytesIO(data), name=name, mode=mode)


def decode_indices(path: str | os.PathLike[str]) -> np.ndarray:
    """Decode an image whose values are numbers, such as classes, and not brightness or colors.

    Palette images give their indices and not the palette's colors, grey ones their values; nothing
    is scaled, and EXIF orientation is not applied.

    Args:
        path: the file.

    Returns:
        (height, width), uint8, or uint16 for files of 16 bits.

    Raises:
        UserError: the file is missing, damaged, or holds colors. The message names the file.
    """
    path = Path(path)
    try:
        with path.open("rb") as stream, Image.open(stream, formats=("BMP", "PNG", "TIFF")) as image:
            _refuse_unsuitable(image, str(path))
            image.load()
            if image.mode in ("P", "L"):
                return np.array(image)
            if image.mode.startswith("I"):
                values = np.array(image)
                if values.min() >= 0 and values.max() < 2**16:
                    return values.astype(np.uint16)
                raise UserError(f"index image {str(path)!r} holds values outside 0..65535")
            if image.mode == "1":
                return np.array(image).astype(np.uint8)
            raise UserError(
                f"{str(path)!r} holds colors (mode {image.mode}) where an index image is needed: "
                "one channel whose values are classes; give a map from colors to classes, or "
                "convert it"
            )
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"index image {str(path)!r} does not exist") from error
    except UnidentifiedImageError as error:
        raise UserError(
            f"index image {str(path)!r} is not a readable PNG, BMP or TIFF file; formats that lose "
            "values, such as JPEG, cannot hold classes"
        ) from error
    except (OSError, SyntaxError, ValueError, TypeError, struct.error) as error:
        raise UserError(f"index image {str(path)!r} is damaged: {error}") from error


def _decode(
    stream: BinaryIO, *, name: str, mode: ImageMode | None, upright: bool = True
) -> Image.Image:
    """Decode an open file."""
    if mode not in (None, "L", "RGB"):
        raise ValueError(f"mode must be 'L', 'RGB' or None, got {mode!r}")
    head = stream.read(512)
    stream.seek(0)
    if not head:
        raise UserError(f"image {name!r} is empty (0 bytes)")
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml", b"<svg", b"<head")):
        raise UserError(f"image {name!r} is a text page (HTML, XML or SVG); fetch the image again")
    try:
        with Image.open(stream, formats=_FORMATS) as image:
            _refuse_unsuitable(image, name)
            image.load()
            return _to_eight_bits(_upright(image) if upright else image, name, mode)
    except UserError:
        raise
    except UnidentifiedImageError as error:
        raise UserError(
            f"image {name!r} is not a readable {', '.join(_FORMATS)} file (damaged or no image)"
        ) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UserError(f"image {name!r} is too large: {error}") from error
    except MemoryError as error:
        raise UserError(f"image {name!r} does not fit into memory") from error
    # Pillow's decoders answer damaged data with any of these.
    except (OSError, SyntaxError, ValueError, TypeError, EOFError) as error:
        raise UserError(f"image {name!r} is damaged: {error}") from error
    except (struct.error, IndexError, KeyError, OverflowError, RuntimeError) as error:
        raise UserError(f"image {name!r} is damaged: {error}") from error


def _max_pixels() -> int:
    """Return the largest number of pixels that is decoded."""
    given = os.environ.get("EANET_MAX_IMAGE_PIXELS", "")
    if not given:
        return _MAX_PIXELS
    if not given.isdecimal() or int(given) == 0:
        raise UserError(f"EANET_MAX_IMAGE_PIXELS must be a positive integer, got {given!r}")
    return int(given)


def _refuse_unsuitable(image: Image.Image, name: str) -> None:
    """Refuse by what the header says, before any pixel is decoded."""
    width, height = image.size
    limit = _max_pixels()
    if width * height > limit:
        raise UserError(
            f"image {name!r} has {width} x {height} pixels, the limit is {limit}; "
            "set EANET_MAX_IMAGE_PIXELS if the file is to be trusted"
        )
    # A JPEG of several pictures (MPO) is a photograph and its previews; the first is the picture.
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":
        raise UserError(f"image {name!r} has {frames} frames; save the one that is meant by itself")


def _upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation; EXIF data that cannot be read orders none."""
    try:
        orientation = image.getexif().get(0x0112, 1)
    except (OSError, SyntaxError, ValueError, TypeError, struct.error, KeyError, IndexError):
        return image
    return ImageOps.exif_transpose(image) if orientation in range(2, 9) else image


def _to_eight_bits(image: Image.Image, name: str, mode: ImageMode | None) -> Image.Image:
    """Bring a decoded image of any mode to ``L`` or ``RGB``."""
    if image.mode == "F":
        raise UserError(
            f"image {name!r} holds floating-point values, which have no defined white; "
            "save it with 8 or 16 bits"
        )
    if image.mode.startswith("I"):
        image = _scale_integers(image, name)
    elif image.mode in ("1", "L"):
        image = image.convert("L")
    if image.has_transparency_data:
        grey = image.mode in ("LA", "La", "L", "1")
        image = _over_white(image)
        image = image.convert("L") if grey else image
    if image.mode not in ("L", "RGB"):
        image = image.convert("RGB")  # P, CMYK, YCbCr, HSV; LAB raises and is refused by the caller
    return image if mode in (None, image.mode) else image.convert(mode)


def _over_white(image: Image.Image) -> Image.Image:
    """Compose a transparent image over white."""
    colored = image.convert("RGBA")
    white = Image.new("RGBA", colored.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, colored).convert("RGB")


def _scale_integers(image: Image.Image, name: str) -> Image.Image:
    """Scale a grey image of 9 to 16 bits to 8 bits."""
    # Pillow holds grey PNG and PGM of 16 bits in mode I in some releases, in I;16 in others.
    if image.mode == "I" and image.format not in ("PNG", "PPM"):
        raise UserError(
            f"image {name!r} holds 32-bit or signed integers, which have no defined white; "
            "save it with 8 or 16 bits"
        )
    bits = 16
    if image.format == "TIFF":
        declared = getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE_TAG, 16)
        bits = declared[0] if isinstance(declared, tuple) else declared
    values = np.asarray(image).astype(np.float64)
    scaled = np.rint(values * (255 / (2**bits - 1)))
    return Image.fromarray(scaled.astype(np.uint8), mode="L")


def read_idx(path: str | os.PathLike[str]) -> np.ndarray:
    """Read an IDX file (the format of MNIST), plain or compressed with gzip.

    Args:
        path: the file; a name ending in ``.gz`` is unpacked while it is read.

    Returns:
        The array the header describes.

    Raises:
        UserError: the file is missing or its content is not what its header says.
    """
    path = Path(path)
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
            head = stream.read(4)
            if len(head) < 4 or head[:2] != b"\0\0" or head[2] not in _IDX_TYPES or not head[3]:
                raise UserError(f"{str(path)!r} is not an IDX file (bad first four bytes)")
            dtype, rank = np.dtype(_IDX_TYPES[head[2]]), head[3]
            sizes = stream.read(4 * rank)
            if len(sizes) < 4 * rank:
                raise UserError(f"IDX file {str(path)!r} ends within its header")
            shape = struct.unpack(f">{rank}I", sizes)
            expected = math.prod(shape) * dtype.itemsize
            if expected > _MAX_IDX_BYTES:
                raise UserError(f"IDX file {str(path)!r} claims {expected} bytes of data")
            # One byte more than is needed: a longer file is noticed, a gzip bomb not unpacked.
            data = stream.read(expected + 1)
    except UserError:
        raise
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"IDX file {str(path)!r} cannot be read: {reason}") from error
    if len(data) != expected:
        have = f"{len(data)} bytes" if len(data) < expected else "more"
        raise UserError(f"IDX file {str(path)!r} should hold {expected} bytes of data, has {have}")
    array = np.frombuffer(data, dtype=dtype).reshape(shape)
    return array.astype(dtype.newbyteorder("="))


def require_root(root: str | None, name: str, what: str) -> Path:
    """Return the folder of a data set, which must exist.

    Args:
        root: as the recipe gives it.
        name: of the data set, for the error.
        what: should be in it, for the error.

    Raises:
        UserError: no folder was given, or there is none.
    """
    if root is None:
        raise UserError(f"data set {name!r} needs a folder (data.root) with {what}")
    path = Path(root).expanduser()
    if not path.is_dir():
        raise UserError(f"data set {name!r}: the folder {str(path)!r} does not exist")
    return path
