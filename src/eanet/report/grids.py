"""Grids of images with titles."""

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from eanet.report.figures import INK, new_figure

__all__ = ["as_color_image", "image_grid", "row_heights", "show_image"]


def as_color_image(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return an image as (height, width, 3), gray values repeated for the three colors.

    Args:
        image: uint8, (height, width), (height, width, 1) or (height, width, 3).

    Raises:
        ValueError: another type or shape, or an image without pixels.
    """
    image = np.asarray(image)
    if image.dtype != np.uint8:
        raise ValueError(f"images must be uint8, got {image.dtype}")
    if image.ndim == 2:
        image = image[:, :, None]
    if image.ndim != 3 or image.shape[2] not in (1, 3) or image.size == 0:
        raise ValueError(
            "images must be (height, width), (height, width, 1) or (height, width, 3), "
            f"got {image.shape}"
        )
    return np.ascontiguousarray(np.broadcast_to(image, (*image.shape[:2], 3)))


def row_heights(images: Sequence[NDArray[np.uint8]], columns: int) -> list[float]:
    """Return the height of each row of a grid in column widths: that of its highest image.

    Very flat and very high images do not rule the page: heights stay within 0.3 and 2.
    """
    ratios = [image.shape[0] / image.shape[1] for image in map(as_color_image, images)]
    rows = (ratios[start : start + columns] for start in range(0, len(ratios), columns))
    return [min(max(max(row), 0.3), 2.0) for row in rows]


def show_image(axes: Axes, image: NDArray[np.uint8], title: str = "", color: str = INK) -> None:
    """Draw an image without axes; its pixels stay squares where it is enlarged.

    Args:
        axes: where to draw.
        image: see :func:`as_color_image`.
        title: plain text above it; several lines are allowed.
        color: of the title.
    """
    axes.imshow(as_color_image(image), interpolation="nearest")
    axes.set_title(title, fontsize=8.5, color=color, parse_math=False)
    axes.set_axis_off()


def image_grid(
    images: Sequence[NDArray[np.uint8]],
    titles: Sequence[str] | None = None,
    columns: int | None = None,
    *,
    title_colors: Sequence[str] | None = None,
    cell_inches: float = 1.4,
) -> Figure:
    """Draw images in rows, each under its title.

    Args:
        images: uint8 arrays, see :func:`as_color_image`; sizes may differ.
        titles: one for each image; ``None`` for none.
        columns: images in a row; ``None`` chooses a grid about twice as wide as high, at most 10.
        title_colors: one for each image. Say in the title too what a color says, since not
            everyone sees colors.
        cell_inches: width of a column; a page is about 9 inches wide.

    Raises:
        ValueError: there is no image, or lengths differ.
    """
    if len(images) == 0:
        raise ValueError("image_grid needs at least one image")
    for name, values in (("titles", titles), ("title_colors", title_colors)):
        if values is not None and len(values) != len(images):
            raise ValueError(f"{len(values)} {name} for {len(images)} images")
    if columns is None:
        columns = min(10, math.ceil(math.sqrt(2 * len(images))))
    if columns < 1:
        raise ValueError(f"columns must be at least 1, got {columns}")
    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    heights = row_heights(images, columns)
    title_lines = max((title.count("\n") + 1 for title in titles or ()), default=0)
    figure = new_figure(
        columns * cell_inches, cell_inches * sum(heights) + rows * (0.16 * title_lines + 0.06)
    )
    cells = figure.subplots(rows, columns, squeeze=False, height_ratios=heights).ravel()
    for index, axes in enumerate(cells):
        if index >= len(images):
            axes.set_axis_off()
            continue
        title = titles[index] if titles is not None else ""
        color = title_colors[index] if title_colors is not None else INK
        show_image(axes, images[index], title, color)
    return figure
