"""Figures become pictures without global state."""

import io
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image

from eanet.report.figures import new_figure, picture, style_axes


def decode(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGBA"))


def drawn():
    figure = new_figure(2.0, 1.0)
    axes = figure.subplots()
    style_axes(axes, title="costs $5 and $6_", xlabel="a_b", ylabel="$")
    axes.plot([0, 1], [0, 1], color="#d00000")
    return figure


def test_picture_is_a_sharp_transparent_png():
    made = picture(drawn(), "a line", width_pixels=192)
    pixels = decode(made.data)
    assert pixels.shape == (192, 384, 4)
    assert pixels[0, -1, 3] == 0
    red = (pixels[..., 0] > 150) & (pixels[..., 1] < 60) & (pixels[..., 3] > 200)
    assert red.sum() > 100
    assert (made.caption, made.width_pixels, made.media_type) == ("a line", 192, "image/png")


def test_equal_figures_are_equal_bytes():
    assert picture(drawn(), "c").data == picture(drawn(), "c").data


def test_pyplot_is_never_loaded():
    code = (
        "import sys, eanet.report.attention, eanet.report.curves, eanet.report.grids;"
        "assert 'matplotlib.pyplot' not in sys.modules;"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_page_itself_needs_the_standard_library_alone():
    code = (
        "import sys, eanet.report.page;"
        "assert not {'matplotlib', 'numpy', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_threads_draw_at_once():
    expected = picture(drawn(), "c").data
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: picture(drawn(), "c").data, range(16)))
    assert set(found) == {expected}
