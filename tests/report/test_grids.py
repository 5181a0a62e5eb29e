"""Grids of images."""

import numpy as np
import pytest

from eanet.report.figures import picture
from eanet.report.grids import as_color_image, image_grid, row_heights


def shown(figure) -> list[np.ndarray]:
    return [np.asarray(axes.images[0].get_array()) for axes in figure.axes if axes.images]


@pytest.fixture
def images() -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    shapes = [(8, 8), (8, 8, 1), (5, 9, 3), (1, 1, 3), (16, 4)]
    return [generator.integers(0, 256, shape, dtype=np.uint8) for shape in shapes]


def test_every_image_is_shown_as_it_is(images):
    figure = image_grid(images, [f"$image_{number}" for number in range(5)], 3)
    for array, image in zip(shown(figure), images, strict=True):
        np.testing.assert_array_equal(array, as_color_image(image))
    titles = [axes.get_title() for axes in figure.axes if axes.images]
    assert titles == [f"$image_{number}" for number in range(5)]
    assert len(picture(figure, "c").data) > 1000


@pytest.mark.parametrize(
    ("count", "columns", "grid"),
    [(1, None, (1, 1)), (8, None, (2, 4)), (5, 2, (3, 2)), (2, 9, (1, 2))],
)
def test_shape_of_the_grid(count, columns, grid):
    figure = image_grid([np.zeros((4, 4), np.uint8)] * count, columns=columns)
    assert figure.axes[0].get_gridspec().get_geometry() == grid
    assert len(shown(figure)) == count


def test_gray_is_repeated_and_color_kept():
    gray = np.arange(6, dtype=np.uint8).reshape(2, 3)
    np.testing.assert_array_equal(as_color_image(gray), np.stack([gray] * 3, axis=-1))
    np.testing.assert_array_equal(as_color_image(gray[..., None]), as_color_image(gray))


def test_rows_follow_their_highest_image():
    flat, square, high = (np.zeros(shape, np.uint8) for shape in [(5, 10), (4, 4), (100, 1)])
    assert row_heights([flat, square, flat, flat, high], 2) == [1.0, 0.5, 2.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"images": []}, "at least one image"),
        ({"images": [np.zeros((4, 4))]}, "must be uint8, got float64"),
        ({"images": [np.zeros((4, 4, 2), np.uint8)]}, r"got \(4, 4, 2\)"),
        ({"images": [np.zeros((0, 4), np.uint8)]}, r"got \(0, 4, 1\)"),
        ({"images": [np.zeros((4, 4), np.uint8)], "titles": ["a", "b"]}, "2 titles for 1 images"),
        ({"images": [np.zeros((4, 4), np.uint8)], "title_colors": []}, "0 title_colors for 1"),
        ({"images": [np.zeros((4, 4), np.uint8)], "columns": 0}, "columns must be at least 1"),
    ],
)
def test_mistakes_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        image_grid(**arguments)
