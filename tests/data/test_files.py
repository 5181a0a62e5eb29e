"""Odd image files are handled by a stated rule or refused with their name."""

import gzip
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from eanet.data.files import decode_image, decode_image_bytes, decode_indices, read_idx
from eanet.errors import UserError

GRADIENT = np.arange(12 * 16, dtype=np.uint8).reshape(12, 16)
COLORS = np.stack([GRADIENT, GRADIENT[::-1], 255 - GRADIENT], axis=-1)


def save(path, array, *, mode=None, **options):
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(path, **options)
    return path


def refuses(path, *words):
    with pytest.raises(UserError) as caught:
        decode_image(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    for word in words:
        assert word in message


def big_endian_png(width, height, *, depth=8, color=0, rows=b""):
    """A PNG whose header may claim any size."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )  # fmt: skip


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "ppm", "webp"])
def test_plain_color_comes_back_unchanged(tmp_path, suffix):
    options = {"lossless": True} if suffix == "webp" else {}
    image = decode_image(save(tmp_path / f"a.{suffix}", COLORS, **options))
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image), COLORS)


def test_grey_stays_grey_unless_a_mode_is_asked(tmp_path):
    path = save(tmp_path / "a.png", GRADIENT)
    assert decode_image(path).mode == "L"
    np.testing.assert_array_equal(np.asarray(decode_image(path)), GRADIENT)
    np.testing.assert_array_equal(
        np.asarray(decode_image(path, mode="RGB")), np.repeat(GRADIENT[..., None], 3, axis=-1)
    )
    assert decode_image(save(tmp_path / "b.png", COLORS), mode="L").mode == "L"


def test_content_decides_not_the_suffix(tmp_path):
    path = tmp_path / "a.jpg"
    Image.fromarray(COLORS).save(path, format="PNG")
    np.testing.assert_array_equal(np.asarray(decode_image(path)), COLORS)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "jpg", "tiff"])
def test_exif_orientation_is_applied(tmp_path, orientation, suffix):
    upright = np.zeros((16, 24), dtype=np.uint8)
    upright[:8, :8] = 255  # white corner at the upper left, where the picture stands upright
    inverse = {
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.T,
        6: lambda a: np.rot90(a, 1),
        7: lambda a: a[::-1, ::-1].T,
        8: lambda a: np.rot90(a, -1),
    }
    stored = inverse.get(orientation, lambda a: a)(upright)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / f"a.{suffix}", np.ascontiguousarray(stored), exif=exif.tobytes())
    got = np.asarray(decode_image(path)).astype(int)
    assert got.shape == upright.shape
    assert np.abs(got - upright).max() <= 3  # JPEG rounds


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")  # Pillow's own words on it
def test_unreadable_exif_orders_no_rotation(tmp_path):
    path = save(tmp_path / "a.png", GRADIENT, exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff")
    np.testing.assert_array_equal(np.asarray(decode_image(path)), GRADIENT)


@pytest.mark.parametrize("suffix", ["png", "tiff", "pgm"])
def test_sixteen_bits_are_scaled_not_clipped(tmp_path, suffix):
    values = np.array([[0, 128, 257, 1000], [30000, 32896, 65000, 65535]], dtype=np.uint16)
    path = tmp_path / f"a.{suffix}"
    if suffix == "pgm":
        path.write_bytes(b"P5\n4 2\n65535\n" + values.astype(">u2").tobytes())
    else:
        Image.fromarray(values).save(path)
    image = decode_image(path)
    assert image.mode == "L"
    np.testing.assert_array_equal(np.asarray(image), np.rint(values / 257).astype(np.uint8))


def test_one_bit_becomes_black_and_white(tmp_path):
    image = decode_image(save(tmp_path / "a.png", GRADIENT > 90, mode="1"))
    np.testing.assert_array_equal(np.asarray(image), (GRADIENT > 90) * np.uint8(255))


def test_palette_gives_its_colors(tmp_path):
    palette = Image.fromarray(np.array([[0, 1], [2, 1]], dtype=np.uint8), mode="P")
    palette.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    palette.save(tmp_path / "a.png")
    expected = [[[10, 20, 30], [40, 50, 60]], [[70, 80, 90], [40, 50, 60]]]
    np.testing.assert_array_equal(np.asarray(decode_image(tmp_path / "a.png")), expected)


def test_palette_transparency_is_white(tmp_path):
    palette = Image.fromarray(np.array([[0, 1]], dtype=np.uint8), mode="P")
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.save(tmp_path / "a.png", transparency=0)
    got = np.asarray(decode_image(tmp_path / "a.png"))
    np.testing.assert_array_equal(got, [[[255, 255, 255], [40, 50, 60]]])


def test_transparent_color_and_grey_lie_over_white(tmp_path):
    alpha = np.full_like(GRADIENT, 255)
    alpha[0], alpha[1] = 0, 128
    rgba = decode_image(save(tmp_path / "a.png", np.dstack([COLORS, alpha])))
    assert rgba.mode == "RGB"
    got = np.asarray(rgba).astype(float)
    np.testing.assert_array_equal(got[0], 255)
    np.testing.assert_array_equal(got[2:], COLORS[2:])
    share = 128 / 255
    assert np.abs(got[1] - (share * COLORS[1] + (1 - share) * 255)).max() <= 1

    grey = Image.merge("LA", [Image.fromarray(GRADIENT), Image.fromarray(alpha)])
    grey.save(tmp_path / "b.png")
    got = decode_image(tmp_path / "b.png")
    assert got.mode == "L"
    np.testing.assert_array_equal(np.asarray(got)[2:], GRADIENT[2:])
    assert (np.asarray(got)[0] == 255).all()


def test_cmyk_becomes_rgb(tmp_path):
    flat = np.broadcast_to(np.array([200, 60, 30], dtype=np.uint8), (16, 16, 3)).copy()
    got = np.asarray(decode_image(save(tmp_path / "a.jpg", flat, mode="CMYK", quality=95)))
    assert got.shape == (16, 16, 3)
    assert np.abs(got.astype(int) - flat).max() <= 6


@pytest.mark.parametrize("shape", [(1, 1), (1, 5000), (5000, 1)])
def test_extreme_shapes(tmp_path, shape):
    path = save(tmp_path / "a.png", np.full(shape, 7, dtype=np.uint8))
    assert np.asarray(decode_image(path)).shape == shape


@pytest.mark.parametrize("name", ["mit leerzeichen.png", "ünïcødé-图.png", "x" * 240 + ".png"])
def test_unusual_names(tmp_path, name):
    assert decode_image(save(tmp_path / name, GRADIENT)).size == (16, 12)


def test_memory_and_file_agree(tmp_path):
    path = save(tmp_path / "a.png", COLORS)
    image = decode_image_bytes(path.read_bytes(), name="upload")
    np.testing.assert_array_equal(np.asarray(image), COLORS)
    with pytest.raises(UserError, match="upload"):
        decode_image_bytes(b"", name="upload")


def test_missing_folder_link_loop_and_long_name(tmp_path):
    refuses(tmp_path / "none.png", "does not exist")
    refuses(tmp_path, "not a regular file")
    loop = tmp_path / "loop.png"
    loop.symlink_to(loop)
    refuses(loop)
    refuses(tmp_path / ("y" * 500 + ".png"))


def test_empty_web_page_and_text(tmp_path):
    path = tmp_path / "a.jpg"
    path.write_bytes(b"")
    refuses(path, "0 bytes")
    path.write_text("\n <!DOCTYPE html><html><body>404</body></html>")
    refuses(path, "HTML")
    path.write_text("just a text")
    refuses(path, "not a readable")
    path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n")
    refuses(path, "not a readable")


@pytest.mark.parametrize("suffix", ["jpg", "png", "bmp", "tiff", "webp", "gif", "ppm"])
def test_truncated_files_are_refused_at_every_length(tmp_path, suffix):
    whole = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    name = {"jpg": "JPEG", "tiff": "TIFF", "ppm": "PPM"}.get(suffix, suffix.upper())
    Image.fromarray(noise).save(whole, format=name)
    data = whole.getvalue()
    path = tmp_path / f"a.{suffix}"
    for share in np.linspace(0.05, 0.9, 20):
        path.write_bytes(data[: int(len(data) * share)])
        refuses(path)


def test_flipped_bytes_never_raise_anything_else(tmp_path):
    whole = io.BytesIO()
    Image.fromarray(COLORS).save(whole, format="PNG")
    data = whole.getvalue()
    path = tmp_path / "a.png"
    refused = 0
    for position in range(len(data)):
        path.write_bytes(data[:position] + bytes([data[position] ^ 0xFF]) + data[position + 1 :])
        try:
            decode_image(path)
        except UserError as error:
            refused += 1
            assert str(path) in str(error)  # noqa: PT017  the loop counts refusals
    assert refused > len(data) // 2


def test_values_without_a_white_are_refused(tmp_path):
    refuses(save(tmp_path / "a.tiff", GRADIENT.astype(np.float32)), "floating-point")
    refuses(save(tmp_path / "b.tiff", GRADIENT.astype(np.int32)), "32-bit")


def test_several_frames_are_refused(tmp_path):
    frames = [Image.fromarray(np.roll(GRADIENT, step)) for step in (0, 70, 140)]
    for suffix in ("gif", "tiff", "webp", "png"):
        path = tmp_path / f"a.{suffix}"
        frames[0].save(path, save_all=True, append_images=frames[1:])
        refuses(path, "3 frames")


def test_decompression_bombs_are_refused_before_decoding(tmp_path, monkeypatch):
    path = tmp_path / "bomb.png"
    path.write_bytes(big_endian_png(8193, 8192, rows=b""))
    refuses(path, "8193 x 8192", "EANET_MAX_IMAGE_PIXELS")
    path.write_bytes(big_endian_png(20_000, 20_000, rows=b""))
    refuses(path)
    small = save(tmp_path / "a.png", GRADIENT)
    monkeypatch.setenv("EANET_MAX_IMAGE_PIXELS", "100")
    refuses(small, "16 x 12")
    monkeypatch.setenv("EANET_MAX_IMAGE_PIXELS", "many")
    with pytest.raises(UserError, match="EANET_MAX_IMAGE_PIXELS"):
        decode_image(small)


def test_unknown_mode_is_a_programming_error(tmp_path):
    with pytest.raises(ValueError, match="mode"):
        decode_image(save(tmp_path / "a.png", GRADIENT), mode="CMYK")


# IDX


def idx_bytes(array, code):
    head = struct.pack(">HBB", 0, code, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    return head + array.tobytes()


@pytest.mark.parametrize(
    ("code", "stored_type"), [(8, ">u1"), (11, ">i2"), (12, ">i4"), (13, ">f4")]
)
@pytest.mark.parametrize("packed", [False, True])
def test_idx_round_trip(tmp_path, code, stored_type, packed):
    array = np.arange(24).reshape(2, 3, 4).astype(stored_type)
    path = tmp_path / ("a.gz" if packed else "a")
    data = idx_bytes(array, code)
    path.write_bytes(gzip.compress(data) if packed else data)
    got = read_idx(path)
    np.testing.assert_array_equal(got, array)
    assert got.dtype.isnative


def test_idx_damage_is_named(tmp_path):
    good = idx_bytes(np.zeros((4, 5), dtype=np.uint8), 8)
    cases = {
        "missing": None,
        "empty": b"",
        "head": good[:2],
        "magic": b"\1\0\x08\1" + good[4:],
        "type": b"\0\0\x07\1" + good[4:],
        "sizes": good[:9],
        "short": good[:-1],
        "long": good + b"\0",
        "claims": b"\0\0\x08\2" + struct.pack(">II", 2**32 - 1, 2**32 - 1),
        "cut.gz": gzip.compress(good)[:-9],
        "text.gz": b"no gzip",
        "bomb.gz": gzip.compress(good + b"\0" * 10_000_000),
    }
    for name, data in cases.items():
        path = tmp_path / name
        if data is not None:
            path.write_bytes(data)
        with pytest.raises(UserError) as caught:
            read_idx(path)
        assert name in str(caught.value)


def test_indices_are_values_and_never_colors(tmp_path):
    values = np.array([[0, 3], [255, 7]], dtype=np.uint8)
    grey, palette, deep = tmp_path / "grey.png", tmp_path / "palette.png", tmp_path / "deep.png"
    Image.fromarray(values).save(grey)
    colored = Image.fromarray(values, mode="P")
    colored.putpalette([200, 10, 10] * 256)
    colored.save(palette)
    Image.fromarray(values.astype(np.uint16) * 200).save(deep)
    for path in (grey, palette):
        found = decode_indices(path)
        assert found.dtype == np.uint8
        np.testing.assert_array_equal(found, values)
    np.testing.assert_array_equal(decode_indices(deep), values.astype(np.uint16) * 200)


def test_what_is_no_index_image_is_named(tmp_path):
    color, lossy, text = tmp_path / "color.png", tmp_path / "a.jpg", tmp_path / "text.png"
    Image.new("RGB", (3, 2)).save(color)
    Image.new("L", (3, 2)).save(lossy)
    text.write_text("no image")
    for path, words in (
        (color, "holds colors"),
        (lossy, "lose values"),
        (text, "not a readable"),
        (tmp_path / "missing.png", "does not exist"),
    ):
        with pytest.raises(UserError, match=words) as raised:
            decode_indices(path)
        assert str(path) in str(raised.value)
