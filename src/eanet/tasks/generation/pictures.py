"""Pictures of generated images: grids by class, interpolations, attention over them."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from eanet.nn.capture import capture_attention
from eanet.report.figures import picture
from eanet.report.grids import image_grid
from eanet.tasks.generation.adversarial_pair import AdversarialPair, NormStatistics
from eanet.tasks.generation.attention import GatedExternalAttention2d
from eanet.tasks.generation.samples import Sample, to_bytes

__all__ = [
    "class_grid",
    "encode",
    "interpolation",
    "mosaic",
    "scored",
    "slot_maps",
    "write_progress",
]

#: edge that a single image has at least in a mosaic, in pixels
_CELL_PIXELS = 48
#: rows of a grid by class
_MAX_ROWS = 10


def mosaic(images: np.ndarray, columns: int, *, gap: int = 2) -> Image.Image:
    """Return images side by side in rows, enlarged by a whole factor where they are small.

    Args:
        images: bytes, (images, height, width, channels).
        columns: images in a row.
        gap: white pixels between them.
    """
    factor = max(1, _CELL_PIXELS // images.shape[1])
    images = images.repeat(factor, axis=1).repeat(factor, axis=2)
    count, height, width, channels = images.shape
    rows = -(-count // columns)
    canvas = np.full(
        (rows * (height + gap) - gap, columns * (width + gap) - gap, channels), 255, np.uint8
    )
    for place, image in enumerate(images):
        top, left = (place // columns) * (height + gap), (place % columns) * (width + gap)
        canvas[top : top + height, left : left + width] = image
    return Image.fromarray(canvas[:, :, 0] if channels == 1 else canvas)


def encode(image: Image.Image) -> bytes:
    """Return an image as a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def class_grid(
    model: AdversarialPair,
    *,
    columns: int = 10,
    seed: int = 0,
    norm_statistics: NormStatistics = "running",
) -> Image.Image:
    """Return generated images, a row for each class (Figure 6 of arXiv 2105.02358).

    Args:
        model: draws them; unconditional ones fill as many rows.
        columns: images of a class.
        seed: of the latent vectors.
        norm_statistics: of the generator.
    """
    rows = min(model.num_classes or _MAX_ROWS, _MAX_ROWS)
    labels = torch.arange(rows).repeat_interleave(columns)
    if model.num_classes is None:
        labels = torch.zeros_like(labels)
    images = model.generate(len(labels), labels, seed=seed, norm_statistics=norm_statistics)
    return mosaic(to_bytes(images), columns)


def interpolation(
    model: AdversarialPair,
    *,
    rows: int = 5,
    columns: int = 10,
    seed: int = 0,
    norm_statistics: NormStatistics = "running",
) -> Image.Image:
    """Return images on the way from one latent vector to another, a row for each of some classes.

    The way is an arc: latent vectors of a normal distribution all have about the same length, and
    the middle of a straight line would be too short.
    """
    source = torch.Generator().manual_seed(seed)
    first, second = torch.randn(2, rows, 1, model.latent_size, generator=source)
    cosine = torch.nn.functional.cosine_similarity(first, second, dim=-1).unsqueeze(-1)
    angle = torch.arccos(cosine.clamp(-0.999, 0.999))
    place = torch.linspace(0, 1, columns).reshape(1, columns, 1)
    latents = torch.sin((1 - place) * angle) * first + torch.sin(place * angle) * second
    latents = (latents / torch.sin(angle)).flatten(0, 1)
    labels = torch.arange(rows).repeat_interleave(columns) % (model.num_classes or 1)
    images = model.draw(latents, labels, norm_statistics=norm_statistics)
    return mosaic(to_bytes(images), columns)


def write_progress(
    model: AdversarialPair, folder: Path, step: int, norm_statistics: NormStatistics
) -> list[Path]:
    """Write a grid by class and an interpolation, from the same noise at every step."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = {
        "samples": class_grid(model, norm_statistics=norm_statistics),
        "interpolation": interpolation(model, norm_statistics=norm_statistics),
    }
    files = []
    for name, image in drawn.items():
        files.append(folder / f"{name}-{step:08d}.png")
        files[-1].write_bytes(encode(image))
    return files


def scored(sample: Sample, record: Mapping[str, Any]) -> bytes:
    """Return an image under the critic's score as a PNG file."""
    assert isinstance(sample.image, Image.Image)
    title = f"critic {record['critic_score']:.2f}"
    if "label" in record:
        title += f", {record['label']}"
    figure = image_grid([np.asarray(sample.image)], [title], cell_inches=2.4)
    return picture(figure, title).data


@torch.no_grad()
def slot_maps(
    generator: nn.Module, latents: Tensor, labels: Tensor
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return generated images and the maps of the memory slots that drew them.

    Args:
        generator: in evaluation mode.
        latents: of the images.
        labels: of their classes.

    Returns:
        Images as bytes, and for each layer of external attention, by the number of the block it
        follows, its maps (images, slots, height, width).
    """
    external = {
        name
        for name, module in generator.named_modules()
        if isinstance(module, GatedExternalAttention2d)
    }
    device = next(generator.parameters()).device
    with capture_attention(generator) as found:
        images = generator(latents.to(device), labels.to(device))
    maps = {name.rpartition(".")[2]: found[name].float().cpu().numpy() for name in sorted(external)}
    return to_bytes(images), maps


def titles(labels: Sequence[int], class_names: Sequence[str], *, conditional: bool) -> list[str]:
    """Return what stands above generated images: the class asked for."""
    if not conditional:
        return ["" for _ in labels]
    return [class_names[label] for label in labels]
