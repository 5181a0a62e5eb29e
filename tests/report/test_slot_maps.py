"""Attention maps over images: values, colors, choice of slots."""

import numpy as np
import pytest
from matplotlib import colormaps
from scipy.ndimage import zoom

from eanet.report.attention import (
    COLOR_MAP,
    overlay,
    salient_slots,
    scale,
    slot_grid,
    token_saliency,
)
from eanet.report.figures import picture

GRAY = np.full((12, 18, 3), 128, dtype=np.uint8)


def peak(row: int, column: int, height: float = 1.0, size: int = 6) -> np.ndarray:
    found = np.zeros((size, size))
    found[row, column] = height
    return found


def test_saliency_is_the_softmax_over_tokens():
    generator = np.random.default_rng(0)
    logits = generator.normal(0, 30, (2, 5, 4, 7))
    found = token_saliency(logits)
    np.testing.assert_allclose(found.sum(axis=(-2, -1)), 1, rtol=1e-12)
    expected = np.exp(logits) / np.exp(logits).sum(axis=(-2, -1), keepdims=True)
    np.testing.assert_allclose(found, expected, rtol=1e-10)
    assert np.isfinite(token_saliency(logits * 1e4)).all()
    tokens_first = np.moveaxis(logits.reshape(2, 5, 28), 1, 2)
    by_token = token_saliency(tokens_first, token_axes=(1,))
    np.testing.assert_allclose(by_token.sum(axis=1), 1, rtol=1e-12)


def test_scale_of_each_map_and_of_all():
    maps = np.stack([peak(0, 0, 4.0) - 1, np.full((6, 6), 3.0), peak(1, 1, 0.5)])
    own = scale(maps)
    assert own[0].max() == 1
    assert own[0].min() == 0
    assert (own[1] == 0).all()  # nothing to tell apart
    assert own[2].max() == 1
    together = scale(maps, shared=True)
    assert together.min() == 0
    assert together.max() == 1
    np.testing.assert_allclose(together, (maps + 1) / 4)


def test_overlay_of_a_flat_map_is_the_lowest_color_over_gray():
    found = overlay(GRAY, np.full((3, 3), 7.0), opacity=0.6)
    color = np.array(colormaps[COLOR_MAP](0.0)[:3])
    expected = np.rint(255 * (0.4 * 128 / 255 + 0.6 * color))
    np.testing.assert_array_equal(found, np.broadcast_to(expected, GRAY.shape))


def test_overlay_puts_the_peak_where_it_is():
    attention = peak(0, 5)
    found = overlay(GRAY, attention).astype(int)
    brightest = np.unravel_index(found.sum(axis=2).argmax(), found.shape[:2])
    assert brightest[0] < 2
    assert brightest[1] >= 15
    # at the corner the map reaches its largest value, since edges are continued
    color = np.array(colormaps[COLOR_MAP](1.0)[:3])
    np.testing.assert_array_equal(found[0, -1], np.rint(255 * (0.4 * 128 / 255 + 0.6 * color)))


@pytest.mark.parametrize("factor", [2, 3, 5])
def test_resizing_is_bilinear_with_aligned_pixel_centers(factor):
    attention = np.random.default_rng(factor).random((4, 6))
    image = np.zeros((4 * factor, 6 * factor, 3), np.uint8)
    resized = zoom(attention, factor, order=1, grid_mode=True, mode="nearest")
    expected = np.rint(255 * colormaps[COLOR_MAP](resized)[:, :, :3])
    found = overlay(image, attention, opacity=1.0, limits=(0.0, 1.0))
    np.testing.assert_array_equal(found, expected)


def test_opacity_zero_is_the_gray_image_and_limits_clip():
    image = np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    gray = overlay(image, peak(2, 2), opacity=0.0)
    assert (gray[..., 0] == gray[..., 1]).all()
    luminance = image @ np.array([0.299, 0.587, 0.114])
    assert np.abs(gray[..., 0] - luminance).max() <= 0.5 + 1e-9
    high = overlay(image, np.full((2, 2), 9.0), opacity=1.0, limits=(0.0, 1.0))
    np.testing.assert_array_equal(
        high[0, 0], np.rint(255 * np.array(colormaps[COLOR_MAP](1.0)[:3]))
    )
    assert overlay(image[..., 0], peak(1, 1)).shape == (6, 6, 3)


@pytest.mark.parametrize(
    ("attention", "options", "message"),
    [
        (np.zeros((2, 2, 2)), {}, r"attention must be \(height, width\), got \(2, 2, 2\)"),
        (np.zeros((0, 2)), {}, r"got \(0, 2\)"),
        (np.array([[0.0, np.nan]]), {}, "not finite"),
        (np.zeros((2, 2)), {"opacity": 1.5}, "opacity must be within"),
        (np.zeros((2, 2)), {"limits": (1.0, 0.0)}, "ascending order"),
    ],
)
def test_overlay_names_mistakes(attention, options, message):
    with pytest.raises(ValueError, match=message):
        overlay(GRAY, attention, **options)


def test_salient_slots_prefer_contrast_and_pass_over_twins():
    maps = np.stack([0.1 * peak(0, 0), peak(2, 2), 0.9 * peak(2, 2), 0.5 * peak(4, 4)])[None]
    assert salient_slots(maps, 2) == [1, 3]  # slot 2 repeats slot 1
    assert salient_slots(maps, 9) == [1, 3, 0, 2]
    assert salient_slots(maps, 2, max_correlation=1.0) == [1, 2]


def test_salient_slots_average_over_images_and_break_ties_by_index():
    first = np.stack([peak(0, 0), peak(1, 1), peak(2, 2)])
    second = np.stack([peak(0, 0, 0.0), peak(1, 1), peak(2, 2)])
    assert salient_slots(np.stack([first, second]), 3) == [1, 2, 0]
    assert salient_slots(np.ones((2, 3, 4, 4)), 2) == [0, 1]


def drawn_cells(figure) -> list:
    return [axes for axes in figure.axes if axes.images and axes.images[0].get_array().ndim == 3]


def test_slot_grid_draws_the_image_and_its_maps():
    images = [GRAY, np.zeros((10, 10), np.uint8)]
    maps = np.random.default_rng(0).random((2, 5, 4, 4))
    figure = slot_grid(images, maps, titles=["one", "two"], slots=[3, 0])
    cells = drawn_cells(figure)
    assert len(cells) == 6
    assert [axes.get_title() for axes in cells] == ["one", "slot 3", "slot 0", "two", "", ""]
    np.testing.assert_array_equal(cells[0].images[0].get_array(), GRAY)
    np.testing.assert_array_equal(cells[1].images[0].get_array(), overlay(GRAY, maps[0, 3]))
    np.testing.assert_array_equal(cells[5].images[0].get_array(), overlay(images[1], maps[1, 0]))
    assert len(picture(figure, "c").data) > 2000


def test_slot_grid_shares_one_scale_when_asked():
    maps = np.stack([peak(0, 0, 1.0), peak(0, 0, 0.1)])[None]
    cells = drawn_cells(slot_grid([GRAY], maps, slots=[0, 1], scaling="shared"))
    weak = cells[2].images[0].get_array()
    np.testing.assert_array_equal(weak, overlay(GRAY, maps[0, 1], limits=(0.0, 1.0)))
    assert not np.array_equal(weak, overlay(GRAY, maps[0, 1]))


def test_slot_grid_chooses_slots_itself():
    maps = np.stack([0.1 * peak(0, 0), peak(2, 2), 0.5 * peak(4, 4)])[None]
    cells = drawn_cells(slot_grid([GRAY], maps, num_slots=2))
    assert [axes.get_title() for axes in cells] == ["image", "slot 1", "slot 2"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"maps": np.zeros((5, 4, 4))}, r"\(images, slots, height, width\), got \(5, 4, 4\)"),
        ({"maps": np.full((1, 5, 4, 4), np.inf)}, "not finite"),
        ({"maps": np.zeros((2, 5, 4, 4))}, "1 images for 2 rows"),
        ({"titles": ["a", "b"]}, "2 titles for 1 images"),
        ({"slots": [5]}, r"slots must be within 0..4, got \[5\]"),
        ({"slots": []}, "slots must be within"),
        ({"slots": [0], "slot_titles": ["a", "b"]}, "2 slot_titles for 1 slots"),
        ({"num_slots": 0}, "count must be at least 1"),
    ],
)
def test_slot_grid_names_mistakes(options, message):
    with pytest.raises(ValueError, match=message):
        slot_grid([GRAY], **{"maps": np.zeros((1, 5, 4, 4)), **options})
