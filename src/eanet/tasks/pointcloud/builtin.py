"""Data that needs no download: solids of ten categories, put together from boxes, tubes and balls.

Every solid has two or three parts of random proportions, stands upright and faces anywhere. Points
are sampled on the surfaces of its pieces, evenly by area, also where one piece runs into another.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from eanet.data.splits import Splits
from eanet.errors import UserError
from eanet.registry import register_dataset
from eanet.tasks.pointcloud.clouds import CloudArrays, class_facts
from eanet.tasks.pointcloud.part_ranges import part_facts
from eanet.tasks.pointcloud.transforms import normalize_to_unit_sphere

__all__ = ["CATEGORIES", "Solids"]

_Random = np.random.Generator


@dataclass(frozen=True)
class Piece:
    """A surface that points are sampled on, moved to its place.

    Args:
        part: which part of the solid it belongs to.
        area: of the surface.
        sample: from a number and a generator to points about the origin.
        center: where its own origin goes.
        axis: which axis its own y becomes: "x", "y" or "z".
    """

    part: int
    area: float
    sample: Callable[[int, _Random], np.ndarray]
    center: tuple[float, float, float] = (0.0, 0.0, 0.0)
    axis: str = "y"

    def points(self, count: int, random: _Random) -> np.ndarray:
        """Return so many points, evenly spread over the surface."""
        points = self.sample(count, random)
        # cyclic, so that nothing is mirrored
        turned = np.roll(points, {"y": 0, "z": 1, "x": 2}[self.axis], axis=1)
        return turned + np.array(self.center)


def box(part: int, size: Sequence[float], center: Sequence[float]) -> Piece:
    """Return a box of widths along x, y, z."""
    x, y, z = size
    faces = np.array([y * z, x * z, x * y])

    def sample(count: int, random: _Random) -> np.ndarray:
        points = random.uniform(-0.5, 0.5, (count, 3))
        face = random.choice(3, count, p=faces / faces.sum())
        points[np.arange(count), face] = random.choice([-0.5, 0.5], count)
        return points * np.array(size)

    return Piece(part, 2 * float(faces.sum()), sample, (center[0], center[1], center[2]))


def tube(
    part: int,
    radius: float,
    height: float,
    center: Sequence[float],
    *,
    top_radius: float | None = None,
    axis: str = "y",
    open_ends: bool = False,
) -> Piece:
    """Return a cylinder, or a cone where its top has another radius, with or without its ends."""
    top = radius if top_radius is None else top_radius
    side = math.pi * (radius + top) * math.hypot(height, radius - top)
    ends = [0.0, 0.0] if open_ends else [math.pi * radius**2, math.pi * top**2]
    areas = np.array([side, *ends])

    def sample(count: int, random: _Random) -> np.ndarray:
        surface = random.choice(3, count, p=areas / areas.sum())
        angle = random.uniform(0, 2 * math.pi, count)
        share = random.uniform(0, 1, count)
        # along a cone's side the area of a ring grows with its radius
        if abs(radius - top) > 1e-9:
            width = np.sqrt(radius**2 + share * (top**2 - radius**2))
            along = (width - radius) / (top - radius)
        else:
            along, width = share, np.full(count, radius)
        width = np.where(surface == 0, width, np.sqrt(share) * np.where(surface == 1, radius, top))
        along = np.where(surface == 0, along, surface - 1.0)
        return np.stack(
            [width * np.cos(angle), (along - 0.5) * height, width * np.sin(angle)], axis=1
        )

    return Piece(part, float(areas.sum()), sample, (center[0], center[1], center[2]), axis)


def ball(part: int, radii: Sequence[float], center: Sequence[float]) -> Piece:
    """Return an ellipsoid; its points are denser where it is flattened."""
    sizes = np.array(radii)
    power = 1.6075
    pairs = (sizes * np.roll(sizes, 1)) ** power
    area = 4 * math.pi * float(pairs.mean()) ** (1 / power)  # Thomsen's formula, within 1.2 %

    def sample(count: int, random: _Random) -> np.ndarray:
        points = random.normal(size=(count, 3))
        return points / np.linalg.norm(points, axis=1, keepdims=True) * sizes

    return Piece(part, area, sample, (center[0], center[1], center[2]))


def handle(part: int, bow: float, thickness: float, center: Sequence[float]) -> Piece:
    """Return half a ring in the plane of x and y, open to the left."""
    area = math.pi * bow * 2 * math.pi * thickness

    def sample(count: int, random: _Random) -> np.ndarray:
        along = random.uniform(-math.pi / 2, math.pi / 2, count)
        around = random.uniform(0, 2 * math.pi, count)
        radius = bow + thickness * np.cos(around)
        return np.stack(
            [radius * np.cos(along), radius * np.sin(along), thickness * np.sin(around)], axis=1
        )

    return Piece(part, area, sample, (center[0], center[1], center[2]))


def airplane(random: _Random) -> list[Piece]:
    """Body, wings, tail."""
    length, width = random.uniform(1.6, 2.4), random.uniform(0.12, 0.2)
    span, chord = random.uniform(1.5, 2.4), random.uniform(0.25, 0.45)
    fin = random.uniform(0.35, 0.5)
    tail = -0.46 * length
    return [
        ball(0, (length / 2, width, width), (0, 0, 0)),
        box(1, (chord, 0.04, span), (random.uniform(-0.05, 0.25), random.uniform(-0.1, 0.1), 0)),
        box(2, (0.3, fin, 0.03), (tail, fin / 2, 0)),
        box(2, (0.26, 0.03, 0.4 * span), (tail, random.choice([0.03, fin]), 0)),
    ]


def bottle(random: _Random) -> list[Piece]:
    """Body, neck."""
    radius, height = random.uniform(0.25, 0.45), random.uniform(0.9, 1.5)
    neck, long = radius * random.uniform(0.25, 0.45), random.uniform(0.3, 0.6)
    slope = random.uniform(0.1, 0.3)
    return [
        tube(0, radius, height, (0, height / 2, 0)),
        tube(0, radius, slope, (0, height + slope / 2, 0), top_radius=neck, open_ends=True),
        tube(1, neck, long, (0, height + slope + long / 2, 0)),
    ]


def cart(random: _Random) -> list[Piece]:
    """Body, wheels, handle."""
    length, height, width = (random.uniform(*pair) for pair in ((1.0, 1.7), (0.3, 0.6), (0.5, 0.9)))
    radius, thick = random.uniform(0.18, 0.3), 0.08
    rise = random.uniform(0.4, 0.8)
    wheels = [
        tube(1, radius, thick, (x, 0, z), axis="z")
        for x in (-0.35 * length, 0.35 * length)
        for z in (-0.55 * width, 0.55 * width)
    ]
    body = box(0, (length, height, width), (0, radius + height / 2, 0))
    back = length / 2
    bars = [
        tube(2, 0.03, rise, (back, radius + height + rise / 2, z))
        for z in (-0.4 * width, 0.4 * width)
    ]
    grip = tube(2, 0.04, 0.9 * width, (back, radius + height + rise, 0), axis="z")
    return [body, *wheels, *bars, grip]


def chair(random: _Random) -> list[Piece]:
    """Seat, back, legs."""
    width, depth, tall = (random.uniform(*pair) for pair in ((0.7, 1.0), (0.7, 1.0), (0.5, 0.9)))
    back, thick = random.uniform(0.7, 1.2), random.uniform(0.06, 0.12)
    size = random.uniform(0.06, 0.1)
    legs = [
        box(2, (size, tall, size), (x * (width - size) / 2, tall / 2, z * (depth - size) / 2))
        for x in (-1, 1)
        for z in (-1, 1)
    ]
    return [
        box(0, (width, thick, depth), (0, tall, 0)),
        box(1, (thick, back, depth), (-width / 2, tall + back / 2, 0)),
        *legs,
    ]


def dumbbell(random: _Random) -> list[Piece]:
    """Bar, weights."""
    length, radius = random.uniform(1.0, 1.8), random.uniform(0.25, 0.5)
    thick, bar = random.uniform(0.2, 0.4), random.uniform(0.05, 0.1)
    round_weights = random.random() < 0.4
    weights = [
        ball(1, (radius, radius, radius), (x * length / 2, 0, 0))
        if round_weights
        else tube(1, radius, thick, (x * length / 2, 0, 0), axis="x")
        for x in (-1, 1)
    ]
    return [tube(0, bar, length, (0, 0, 0), axis="x"), *weights]


def hammer(random: _Random) -> list[Piece]:
    """Handle, head."""
    long, thick = random.uniform(1.3, 2.0), random.uniform(0.05, 0.1)
    wide, head = random.uniform(0.5, 0.9), random.uniform(0.12, 0.22)
    top: Piece = tube(1, head, wide, (0, long, 0), axis="x")
    if random.random() < 0.5:
        top = box(1, (wide, 1.8 * head, 1.8 * head), (0, long, 0))
    return [tube(0, thick, long, (0, long / 2, 0)), top]


def lamp(random: _Random) -> list[Piece]:
    """Base, pole, shade."""
    base, tall = random.uniform(0.3, 0.5), random.uniform(0.9, 1.7)
    shade, high = random.uniform(0.35, 0.65), random.uniform(0.35, 0.6)
    narrow = shade * random.uniform(0.4, 0.9)
    return [
        tube(0, base, random.uniform(0.05, 0.12), (0, 0, 0)),
        tube(1, random.uniform(0.03, 0.05), tall, (0, tall / 2, 0)),
        tube(2, shade, high, (0, tall, 0), top_radius=narrow, open_ends=True),
    ]


def mug(random: _Random) -> list[Piece]:
    """Body, handle."""
    radius, height = random.uniform(0.35, 0.55), random.uniform(0.7, 1.2)
    bow = height * random.uniform(0.28, 0.42)
    return [
        tube(0, radius, height, (0, 0, 0), open_ends=True),
        tube(0, radius, 0.02, (0, -height / 2, 0)),
        handle(1, bow, random.uniform(0.06, 0.09), (radius, 0, 0)),
    ]


def rocket(random: _Random) -> list[Piece]:
    """Body, nose, fins."""
    radius, height = random.uniform(0.18, 0.3), random.uniform(1.2, 1.9)
    nose = random.uniform(0.35, 0.7)
    count, wide, tall = int(random.integers(3, 5)), random.uniform(0.25, 0.4), 0.45
    fins = []
    for number in range(count):
        angle = 2 * math.pi * number / count
        plate = box(2, (wide, tall, 0.03), (radius + wide / 2, tall / 2, 0))
        fins.append(_turned(plate, angle))
    return [
        tube(0, radius, height, (0, height / 2, 0)),
        tube(1, radius, nose, (0, height + nose / 2, 0), top_radius=0.01, open_ends=True),
        *fins,
    ]


def table(random: _Random) -> list[Piece]:
    """Top, legs."""
    width, depth, tall = (random.uniform(*pair) for pair in ((1.0, 1.9), (0.7, 1.2), (0.5, 1.0)))
    thick, size = random.uniform(0.05, 0.12), random.uniform(0.06, 0.12)
    top: Piece = box(0, (width, thick, depth), (0, tall, 0))
    if random.random() < 0.3:
        width = depth = 0.7 * width
        top = tube(0, 0.72 * width, thick, (0, tall, 0))
    legs = [
        box(1, (size, tall, size), (x * (width - size) / 2, tall / 2, z * (depth - size) / 2))
        for x in (-1, 1)
        for z in (-1, 1)
    ]
    return [top, *legs]


def _turned(piece: Piece, angle: float) -> Piece:
    """Return a piece turned about the vertical axis, its place included."""
    cosine, sine = math.cos(angle), math.sin(angle)
    matrix = np.array([[cosine, 0, sine], [0, 1, 0], [-sine, 0, cosine]])

    def sample(count: int, random: _Random) -> np.ndarray:
        return piece.points(count, random) @ matrix.T

    return Piece(piece.part, piece.area, sample)


#: what can be built, and the names of the parts
CATEGORIES: dict[str, tuple[Callable[[_Random], list[Piece]], tuple[str, ...]]] = {
    "airplane": (airplane, ("body", "wings", "tail")),
    "bottle": (bottle, ("body", "neck")),
    "cart": (cart, ("body", "wheels", "handle")),
    "chair": (chair, ("seat", "back", "legs")),
    "dumbbell": (dumbbell, ("bar", "weights")),
    "hammer": (hammer, ("handle", "head")),
    "lamp": (lamp, ("base", "pole", "shade")),
    "mug": (mug, ("body", "handle")),
    "rocket": (rocket, ("body", "nose", "fins")),
    "table": (table, ("top", "legs")),
}

#: the number of a split is part of the seed of its solids
_SPLITS = ("train", "validation", "test")


def build_solid(
    category: str, seed: Sequence[int], num_points: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return points (num_points, 3) in the unit sphere and the part of each, within its category.

    Args:
        category: a key of :data:`CATEGORIES`.
        seed: numbers that the solid is a function of.
        num_points: points on its surface.
    """
    random = np.random.default_rng(seed)
    pieces = CATEGORIES[category][0](random)
    areas = np.array([piece.area for piece in pieces])
    chosen = np.sort(random.choice(len(pieces), num_points, p=areas / areas.sum()))
    points = np.concatenate(
        [piece.points(int((chosen == number).sum()), random) for number, piece in enumerate(pieces)]
    )
    parts = np.array([piece.part for piece in pieces])[chosen]
    angle = random.uniform(0, 2 * math.pi)
    cosine, sine = math.cos(angle), math.sin(angle)
    points = points @ np.array([[cosine, 0, sine], [0, 1, 0], [-sine, 0, cosine]])
    order = random.permutation(num_points)
    cloud = normalize_to_unit_sphere(torch.from_numpy(points[order].astype(np.float32)))
    return cloud.numpy(), parts[order]


@register_dataset("solids")
class Solids:
    """Solids of ten categories with two or three parts each, made on the spot.

    airplane, bottle, cart, chair, dumbbell, hammer, lamp, mug, rocket, table. The same arguments
    give the same solids, whatever the seed of a run.

    Args:
        root: must be left out; nothing is read from disk.
        per_category: solids of each category in training, validation and test.
        num_points: points of each.
    """

    def __init__(
        self,
        root: str | None = None,
        *,
        per_category: Sequence[int] = (48, 10, 30),
        num_points: int = 1024,
    ) -> None:
        if root is not None:
            raise UserError(f"data set 'solids' is built in and takes no folder, got {root!r}")
        if len(per_category) != 3 or min(per_category) < 1 or num_points < 2:
            raise UserError(
                "data set 'solids': per_category needs three numbers from 1, num_points 2 or more; "
                f"got {per_category} and {num_points}"
            )
        ranges: list[list[int]] = []
        names: list[str] = []
        for category, (_, parts) in CATEGORIES.items():
            ranges.append([len(names), len(names) + len(parts)])
            names += [f"{category}: {part}" for part in parts]
        train, validation, test = (
            self._build(number, count, num_points, ranges)
            for number, count in enumerate(per_category)
        )
        facts = class_facts(list(CATEGORIES), 3, unit_sphere=True) | part_facts(names, ranges)
        self.splits = Splits(train, validation, test, facts)

    @staticmethod
    def _build(
        split: int, per_category: int, num_points: int, ranges: Sequence[Sequence[int]]
    ) -> CloudArrays:
        """Build the solids of one split, categories in turn."""
        labels = [label for _ in range(per_category) for label in range(len(CATEGORIES))]
        built = [
            build_solid(list(CATEGORIES)[label], (split, number), num_points)
            for number, label in enumerate(labels)
        ]
        starts = np.array([start for start, _ in ranges])[labels]
        points = np.stack([points for points, _ in built])
        parts = np.stack([parts for _, parts in built]) + starts[:, None]
        return CloudArrays(points, labels, parts, f"solids/{_SPLITS[split]}")
