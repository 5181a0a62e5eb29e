"""Attention maps of memory slots, drawn over the image they belong to.

Two maps tell different things about a slot. After both normalizations (Eq. 9-11,
arXiv 2105.02358) the value at a position is the *share* of the slot among all slots there. Before
the second one it is the slot's *saliency*: its softmax over the positions, which says where the
slot looks, whatever the other slots do (:func:`token_saliency`). All functions here take either.
"""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from numpy.typing import NDArray

from eanet.report.figures import INK, MUTED, new_figure
from eanet.report.grids import as_color_image, row_heights, show_image

__all__ = ["COLOR_MAP", "overlay", "salient_slots", "scale", "slot_grid", "token_saliency"]

#: even in brightness and told apart with any kind of color vision
COLOR_MAP = "viridis"

_Map = NDArray[np.floating[Any]]


def token_saliency(logits: _Map, *, token_axes: tuple[int, ...] = (-2, -1)) -> _Map:
    """Return where each slot looks: the softmax of its logits over the tokens (Eq. 10).

    Args:
        logits: attention before any normalization, such as (images, slots, height, width).
        token_axes: the axes that together hold the tokens.

    Returns:
        Values of the same shape within [0, 1] that sum to 1 over the token axes.
    """
    logits = np.asarray(logits, dtype=np.float64)
    powers = np.exp(logits - logits.max(axis=token_axes, keepdims=True))
    return powers / powers.sum(axis=token_axes, keepdims=True)


def scale(maps: _Map, *, shared: bool = False) -> _Map:
    """Stretch maps to [0, 1]: the smallest value becomes 0, the largest 1.

    Args:
        maps: (..., height, width), finite.
        shared: whether all maps are stretched alike, so that they can be compared with one
            another, or each by itself, so that the pattern of weak ones shows too.

    Returns:
        Float64 of the same shape; a map without any difference is 0 everywhere.

    Raises:
        ValueError: fewer than two axes, no values, or values that are not finite.
    """
    maps = np.asarray(maps, dtype=np.float64)
    if maps.ndim < 2 or maps.size == 0:
        raise ValueError(f"maps must be (..., height, width), got {maps.shape}")
    if not np.isfinite(maps).all():
        raise ValueError("maps hold values that are not finite")
    axes = None if shared else (-2, -1)
    low = maps.min(axis=axes, keepdims=True)
    span = maps.max(axis=axes, keepdims=True) - low
    return np.where(span > 0, (maps - low) / np.where(span > 0, span, 1.0), 0.0)


def overlay(
    image: NDArray[np.uint8],
    attention: _Map,
    *,
    opacity: float = 0.6,
    limits: tuple[float, float] | None = None,
) -> NDArray[np.uint8]:
    """Lay an attention map in colors over an image.

    The map is resized bilinearly with pixel centers aligned, colored, and mixed with the image in
    gray, so that every color seen is the map's.

    Args:
        image: uint8, (height, width, 3), or gray.
        attention: (map height, map width), any size, finite.
        opacity: share of the map in the mixture, within [0, 1].
        limits: the values shown as the darkest and the lightest color; values outside are clipped
            to them. ``None`` takes the smallest and largest of the map.

    Returns:
        uint8, (height, width, 3).

    Raises:
        ValueError: shapes, types or values are not as said.
    """
    image = as_color_image(image)
    attention = np.asarray(attention, dtype=np.float64)
    if attention.ndim != 2 or attention.size == 0:
        raise ValueError(f"attention must be (height, width), got {attention.shape}")
    if not np.isfinite(attention).all():
        raise ValueError("attention holds values that are not finite")
    if not 0 <= opacity <= 1:
        raise ValueError(f"opacity must be within [0, 1], got {opacity}")
    low, high = limits if limits is not None else (attention.min(), attention.max())
    if not low <= high:
        raise ValueError(f"limits must be in ascending order, got {limits}")
    values = np.clip((attention - low) / (high - low), 0, 1) if high > low else 0 * attention
    colored = colormaps[COLOR_MAP](_resize(values, image.shape[0], image.shape[1]))[:, :, :3]
    # luminance weights of ITU-R BT.601
    gray = (image / 255.0) @ np.array([0.299, 0.587, 0.114])
    mixed = (1 - opacity) * gray[:, :, None] + opacity * colored
    return np.rint(255 * mixed).astype(np.uint8)


def salient_slots(maps: _Map, count: int, *, max_correlation: float = 0.9) -> list[int]:
    """Choose the slots whose maps say most, in order.

    Slots are ranked by how much they tell positions apart: the standard deviation of the map over
    the positions, averaged over the images. Slots often look at the same things, so the list is
    walked from its head and a slot is passed over when its maps correlate with those of a chosen
    one by more than ``max_correlation`` (Pearson, over all images and positions, each map
    centered). Passed-over slots fill up the list where too few are left. Ties go to the lower
    index.

    Args:
        maps: (images, slots, height, width).
        count: how many to choose; all where there are fewer.
        max_correlation: 1 switches the second rule off.

    Returns:
        Indices of slots.

    Raises:
        ValueError: the shape is another one, or ``count`` is below 1.
    """
    maps = _checked_maps(maps)
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    centered = maps - maps.mean(axis=(-2, -1), keepdims=True)
    spread = centered.std(axis=(-2, -1)).mean(axis=0)
    vectors = np.moveaxis(centered, 1, 0).reshape(maps.shape[1], -1)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors = vectors / np.where(lengths > 0, lengths, 1.0)
    chosen: list[int] = []
    passed: list[int] = []
    for slot in np.argsort(-spread, kind="stable").tolist():
        # rounding may carry the correlation of twins above 1
        correlation = min(float((vectors[chosen] @ vectors[slot]).max(initial=-1.0)), 1.0)
        if correlation > max_correlation:
            passed.append(slot)
        else:
            chosen.append(slot)
    return (chosen + passed)[:count]


def slot_grid(
    images: Sequence[NDArray[np.uint8]],
    maps: _Map,
    *,
    titles: Sequence[str] | None = None,
    slots: Sequence[int] | None = None,
    num_slots: int = 6,
    slot_titles: Sequence[str] | None = None,
    scaling: Literal["map", "shared"] = "map",
    opacity: float = 0.6,
) -> Figure:
    """Draw images in rows: the image, then the maps of some slots over it.

    Args:
        images: uint8, (height, width, 3) or gray; sizes may differ.
        maps: (images, slots, map height, map width), finite. For several heads put them on the
            axis of the slots and name them by ``slot_titles``.
        titles: one for each image.
        slots: which slots to show, the same for all images so that columns can be read down;
            ``None`` lets :func:`salient_slots` choose.
        num_slots: how many to choose.
        slot_titles: one for each entry of ``slots``; ``None`` writes "slot" and the index.
        scaling: ``"map"`` stretches each map to the whole range of colors, ``"shared"`` all shown
            maps alike.
        opacity: of the maps, see :func:`overlay`.

    Raises:
        ValueError: shapes or lengths do not fit one another, or a slot does not exist.
    """
    maps = _checked_maps(maps)
    if len(images) != len(maps):
        raise ValueError(f"{len(images)} images for {len(maps)} rows of maps")
    if titles is not None and len(titles) != len(images):
        raise ValueError(f"{len(titles)} titles for {len(images)} images")
    slots = list(slots) if slots is not None else salient_slots(maps, num_slots)
    if not slots or not all(0 <= slot < maps.shape[1] for slot in slots):
        raise ValueError(f"slots must be within 0..{maps.shape[1] - 1}, got {slots}")
    names = list(slot_titles) if slot_titles is not None else [f"slot {slot}" for slot in slots]
    if len(names) != len(slots):
        raise ValueError(f"{len(names)} slot_titles for {len(slots)} slots")
    shown = maps[:, slots]
    limits = (float(shown.min()), float(shown.max())) if scaling == "shared" else None

    cell_inches = 1.3
    heights = row_heights(images, 1)
    title_inches = 0.25 * (1 if titles is None else len(images))
    figure = new_figure(
        cell_inches * (1 + len(slots)) + 0.7, cell_inches * sum(heights) + title_inches
    )
    cells = figure.subplots(len(images), 1 + len(slots), squeeze=False, height_ratios=heights)
    for row, image in enumerate(images):
        title = titles[row] if titles is not None else "image" if row == 0 else ""
        show_image(cells[row, 0], image, title)
        for column, name in enumerate(names):
            laid = overlay(image, shown[row, column], opacity=opacity, limits=limits)
            show_image(cells[row, column + 1], laid, name if row == 0 else "")
    _draw_color_bar(figure, cells, limits)
    return figure


def _draw_color_bar(figure: Figure, cells: Any, limits: tuple[float, float] | None) -> None:
    """Explain the colors at the right edge."""
    normalize = Normalize(*limits) if limits is not None else Normalize(0, 1)
    mappable = ScalarMappable(normalize, colormaps[COLOR_MAP])
    bar = figure.colorbar(mappable, ax=cells, fraction=0.03, pad=0.01, aspect=25, shrink=0.8)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8, colors=MUTED, labelcolor=INK)
    if limits is None:
        bar.set_ticks([0, 1], labels=["lowest", "highest"])


def _checked_maps(maps: _Map) -> _Map:
    """Return maps as float64 (images, slots, height, width)."""
    maps = np.asarray(maps, dtype=np.float64)
    if maps.ndim != 4 or maps.size == 0:
        raise ValueError(f"maps must be (images, slots, height, width), got {maps.shape}")
    if not np.isfinite(maps).all():
        raise ValueError("maps hold values that are not finite")
    return maps


def _resize(values: _Map, height: int, width: int) -> _Map:
    """Resize bilinearly with pixel centers aligned; edges are continued."""
    return _resize_axis(_resize_axis(values, height, 0), width, 1)


def _resize_axis(values: _Map, length: int, axis: int) -> _Map:
    """Interpolate linearly along one axis."""
    size = values.shape[axis]
    position = np.clip((np.arange(length) + 0.5) * size / length - 0.5, 0, size - 1)
    below = np.floor(position).astype(np.intp)
    above = np.minimum(below + 1, size - 1)
    weight = (position - below).reshape((-1, 1) if axis == 0 else (1, -1))
    return (1 - weight) * values.take(below, axis) + weight * values.take(above, axis)
