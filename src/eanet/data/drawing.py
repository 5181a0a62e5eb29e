"""Drawn scenes: textured shapes on a textured ground, with the exact mask of each.

Several tasks have built-in data that needs no download; what they share is drawn here. A scene is a
pure function of its arguments: the same (seed, index) gives the same bytes in every process and
with every version of numpy, because only raw words of a generator are used. Every pixel belongs to
one surface altogether (no anti-aliasing), so masks are exact.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from eanet.data.loading import derive_seed

__all__ = ["SHAPES", "TEXTURES", "DrawnInstance", "Scene", "draw_scene"]

_Mask = np.ndarray

#: how often a place is looked for before a shape is left out
_MAX_TRIES = 20
#: smallest distance between the color of a shape and that of the ground, in values of 0..1
_MIN_CONTRAST = 0.45


@dataclass(frozen=True)
class DrawnInstance:
    """One shape of a scene.

    Args:
        kind: one of :data:`SHAPES`.
        texture: one of :data:`TEXTURES`.
        mask: (height, width), true where the shape is seen; what later shapes cover is left out.
    """

    kind: str
    texture: str
    mask: _Mask


@dataclass(frozen=True)
class Scene:
    """A picture and what is in it.

    Args:
        image: bytes, (height, width, 3).
        instances: in the order they were painted; their masks are disjoint and not empty.
    """

    image: np.ndarray
    instances: tuple[DrawnInstance, ...]


class _Draws:
    """Random numbers out of raw generator words, which numpy promises not to change."""

    def __init__(self, *numbers: int) -> None:
        self._words = np.random.PCG64(derive_seed("drawing", *numbers))

    def uniform(self, low: float, high: float) -> float:
        """Return a number within [low, high)."""
        return low + (high - low) * (int(self._words.random_raw()) >> 11) * 2.0**-53

    def integer(self, low: int, high: int) -> int:
        """Return an integer within [low, high]."""
        return low + int(self.uniform(0, high - low + 1))

    def field(self, *shape: int) -> np.ndarray:
        """Return an array of numbers within [0, 1)."""
        words = self._words.random_raw(math.prod(shape)).reshape(shape)
        return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _disk(x: np.ndarray, y: np.ndarray) -> _Mask:
    return np.hypot(x, y) <= 1


def _square(x: np.ndarray, y: np.ndarray) -> _Mask:
    return np.maximum(abs(x), abs(y)) <= 0.8


def _triangle(x: np.ndarray, y: np.ndarray) -> _Mask:
    slope = math.sqrt(3)
    return (y <= 0.5) & (slope * x - y <= 1) & (-slope * x - y <= 1)


def _ring(x: np.ndarray, y: np.ndarray) -> _Mask:
    radius = np.hypot(x, y)
    return (radius <= 1) & (radius >= 0.55)


def _cross(x: np.ndarray, y: np.ndarray) -> _Mask:
    return (np.minimum(abs(x), abs(y)) <= 0.3) & (np.maximum(abs(x), abs(y)) <= 0.95)


def _star(x: np.ndarray, y: np.ndarray) -> _Mask:
    fifth = 2 * math.pi / 5
    angle = abs((np.arctan2(x, -y) + fifth / 2) % fifth - fifth / 2)
    # the edge of a ray runs from the tip, at radius 1, to the notch, at radius 0.45
    notch = 0.45
    slope = (1 - notch * math.cos(fifth / 2)) / (notch * math.sin(fifth / 2))
    radius = np.hypot(x, y)
    return radius * (np.cos(angle) + slope * np.sin(angle)) <= 1


_INSIDE: dict[str, Callable[[np.ndarray, np.ndarray], _Mask]] = {
    "disk": _disk,
    "square": _square,
    "triangle": _triangle,
    "ring": _ring,
    "cross": _cross,
    "star": _star,
}


def _plain(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    del y
    return np.ones_like(x)


def _stripes(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    del y
    return np.floor(x) % 2


def _checks(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (np.floor(x) + np.floor(y)) % 2


def _dots(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (np.hypot(x % 2 - 1, y % 2 - 1) > 0.6).astype(np.float64)


_PATTERNS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "plain": _plain,
    "stripes": _stripes,
    "checks": _checks,
    "dots": _dots,
}

#: the outlines that can be drawn
SHAPES = tuple(_INSIDE)
#: the patterns that fill them
TEXTURES = tuple(_PATTERNS)


def draw_scene(
    seed: int,
    index: int,
    *,
    height: int = 64,
    width: int = 64,
    kinds: Sequence[str] = SHAPES,
    num_shapes: tuple[int, int] = (1, 4),
    radius: tuple[float, float] = (0.14, 0.28),
    max_overlap: float = 0.2,
    noise: float = 0.05,
) -> Scene:
    """Draw one scene; a pure function of its arguments.

    Shapes of any turn, size, color and texture lie wholly within the picture, on a ground of two
    colors. A shape for which no place is found is left out, so there may be fewer than asked for,
    but never none.

    Args:
        seed: of the whole data set.
        index: number of the scene.
        height: of the picture in pixels.
        width: of the picture in pixels.
        kinds: outlines to choose from, all equally likely.
        num_shapes: least and largest number of shapes.
        radius: least and largest, as a share of the shorter side.
        max_overlap: largest share of a shape that the following ones may cover each time.
        noise: standard deviation of the grain of the picture, of a range of 1.

    Raises:
        ValueError: an argument is outside its range.

    >>> scene = draw_scene(0, 3, height=48, width=64)
    >>> scene.image.shape, {i.mask.shape for i in scene.instances}
    ((48, 64, 3), {(48, 64)})
    """
    _check(height, width, kinds, num_shapes, radius)
    draws = _Draws(seed, index, height, width)
    rows, columns = np.mgrid[:height, :width] + 0.5
    ground = draws.field(3)
    image = _fill(draws, columns, rows, ground, contrast=0.25)
    masks: list[_Mask] = []
    looks: list[tuple[str, str]] = []
    for _ in range(draws.integer(*num_shapes)):
        kind = kinds[draws.integer(0, len(kinds) - 1)]
        mask = _placed(draws, kind, masks, radius, max_overlap, rows, columns)
        if mask is None:
            continue
        texture, surface = _surface(draws, columns, rows, ground)
        image[mask] = surface[mask]
        masks = [other & ~mask for other in masks]
        masks.append(mask)
        looks.append((kind, texture))
    # the sum of four uniform numbers: nearly normal, of variance 1/3
    grain = (draws.field(4, height, width, 3).sum(axis=0) - 2) * (noise * math.sqrt(3))
    pixels = np.rint(255 * np.clip(image + grain, 0, 1)).astype(np.uint8)
    instances = zip(looks, masks, strict=True)
    return Scene(pixels, tuple(DrawnInstance(*look, mask) for look, mask in instances))


def _check(
    height: int,
    width: int,
    kinds: Sequence[str],
    num_shapes: tuple[int, int],
    radius: tuple[float, float],
) -> None:
    if min(height, width) < 8:
        raise ValueError(f"height and width must be 8 or more, got {height} and {width}")
    if not kinds or not set(kinds) <= set(SHAPES):
        raise ValueError(f"kinds must be some of {', '.join(SHAPES)}; got {list(kinds)}")
    if not 1 <= num_shapes[0] <= num_shapes[1]:
        raise ValueError(f"num_shapes must be 1 <= least <= largest, got {num_shapes}")
    if not 0 < radius[0] <= radius[1] <= 0.45 or radius[0] * min(height, width) < 1:
        raise ValueError(
            f"radius must be 0 < least <= largest <= 0.45 and a pixel or more, got {radius}"
        )


def _placed(
    draws: _Draws,
    kind: str,
    masks: Sequence[_Mask],
    radius: tuple[float, float],
    max_overlap: float,
    rows: np.ndarray,
    columns: np.ndarray,
) -> _Mask | None:
    """Return the mask of a shape somewhere, or ``None`` where there is no room."""
    height, width = rows.shape
    for _ in range(_MAX_TRIES):
        size = draws.uniform(*radius) * min(height, width)
        margin = 1.15 * size  # the corners of a square stand out
        row, column = draws.uniform(margin, height - margin), draws.uniform(margin, width - margin)
        turn = draws.uniform(0, 2 * math.pi)
        down, right = (rows - row) / size, (columns - column) / size
        cosine, sine = math.cos(turn), math.sin(turn)
        mask = _INSIDE[kind](cosine * right + sine * down, cosine * down - sine * right)
        covered = ((other & mask).sum() / other.sum() for other in masks)
        if mask.any() and all(share <= max_overlap for share in covered):
            return mask
    return None


def _surface(
    draws: _Draws, columns: np.ndarray, rows: np.ndarray, ground: np.ndarray
) -> tuple[str, np.ndarray]:
    """Return the name and the colors of a texture that stands out from the ground."""
    color = draws.field(3)
    while abs(color - ground).max() < _MIN_CONTRAST:
        color = draws.field(3)
    texture = TEXTURES[draws.integer(0, len(TEXTURES) - 1)]
    return texture, _fill(draws, columns, rows, color, contrast=0.3, texture=texture)


def _fill(
    draws: _Draws,
    columns: np.ndarray,
    rows: np.ndarray,
    color: np.ndarray,
    *,
    contrast: float,
    texture: str | None = None,
) -> np.ndarray:
    """Return a pattern of a color and a lighter or darker one, (height, width, 3)."""
    name = texture or TEXTURES[draws.integer(0, len(TEXTURES) - 1)]
    turn, period = draws.uniform(0, math.pi), draws.uniform(2.5, 5.0)
    cosine, sine = math.cos(turn), math.sin(turn)
    pattern = _PATTERNS[name](
        (cosine * columns + sine * rows) / period, (cosine * rows - sine * columns) / period
    )
    other = np.clip(color + contrast * (draws.field(3) - 0.5), 0, 1)
    return np.where(pattern[..., None] > 0.5, color, other)
