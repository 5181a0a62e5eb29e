"""Drawn scenes: a pure function, exact masks, every kind of shape."""

import hashlib

import numpy as np
import pytest

from eanet.data.drawing import SHAPES, draw_scene


def test_a_scene_is_a_function_of_its_arguments():
    first, again = draw_scene(0, 5), draw_scene(0, 5)
    np.testing.assert_array_equal(first.image, again.image)
    assert [i.kind for i in first.instances] == [i.kind for i in again.instances]
    assert (draw_scene(1, 5).image != first.image).any()
    assert (draw_scene(0, 6).image != first.image).any()


def test_global_generators_are_neither_read_nor_moved():
    np.random.seed(3)
    before = draw_scene(0, 0).image
    state = np.random.get_state()[1].copy()
    np.testing.assert_array_equal(draw_scene(0, 0).image, before)
    np.testing.assert_array_equal(np.random.get_state()[1], state)


def test_bytes_stay_the_same_in_later_versions():
    image = draw_scene(0, 0, height=48, width=64).image
    assert image.dtype == np.uint8
    assert hashlib.sha256(image.tobytes()).hexdigest()[:16] == "c26018a64fc485e0"


def test_masks_are_disjoint_and_not_empty():
    for index in range(40):
        scene = draw_scene(7, index, num_shapes=(2, 6), max_overlap=0.5)
        stacked = np.stack([instance.mask for instance in scene.instances])
        assert stacked.any(axis=(1, 2)).all()
        assert stacked.sum(axis=0).max() == 1


@pytest.mark.parametrize("kind", SHAPES)
def test_every_kind_lies_within_the_picture_and_is_seen(kind):
    for index in range(10):
        scene = draw_scene(1, index, height=64, width=80, kinds=[kind], num_shapes=(1, 1), noise=0)
        (instance,) = scene.instances
        assert instance.kind == kind
        edge = np.ones((64, 80), dtype=bool)
        edge[1:-1, 1:-1] = False
        assert not (instance.mask & edge).any()
        assert 0.02 < instance.mask.mean() < 0.3
        inside = scene.image[instance.mask].astype(int)
        outside = scene.image[~instance.mask].astype(int)
        # no color of a shape is one of the ground: nothing blends at the border
        assert not set(map(tuple, inside)) & set(map(tuple, outside))


def test_bad_arguments_are_refused():
    for arguments, word in (
        ({"kinds": ["blob"]}, "kinds"),
        ({"num_shapes": (0, 2)}, "num_shapes"),
        ({"radius": (0.3, 0.6)}, "radius"),
        ({"height": 4}, "height"),
    ):
        with pytest.raises(ValueError, match=word):
            draw_scene(0, 0, **arguments)
