"""Small detectors and a batch of two images, for the tests of this room."""

import torch

from eanet import registry

KINDS = ("faster_rcnn", "mask_rcnn", "retinanet", "cascade_rcnn", "cascade_mask_rcnn")


def detector(kind, *, size="tiny", num_classes=3, **arguments):
    """Build a small detector from the same random state each time."""
    torch.manual_seed(1)
    return registry.create_model(f"{kind}_{size}", num_classes=num_classes, **arguments)


def images():
    """Two images of different sizes, normalized."""
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(3, *size, generator=generator) for size in ((64, 96), (70, 50))]


def targets(*, empty=False):
    """Two objects in the first image; in the second one, or none."""
    masks = torch.zeros(2, 64, 96, dtype=torch.uint8)
    masks[0, 10:30, 10:40] = 1
    masks[1, 20:60, 50:90] = 1
    first = {
        "boxes": torch.tensor([[10.0, 10, 40, 30], [50, 20, 90, 60]]),
        "labels": torch.tensor([0, 2]),
        "masks": masks,
    }
    count = 0 if empty else 1
    second = {
        "boxes": torch.tensor([[5.0, 8, 37, 61]])[:count],
        "labels": torch.tensor([1])[:count],
        "masks": torch.zeros(1, 70, 50, dtype=torch.uint8)[:count],
    }
    if count:
        second["masks"][0, 8:61, 5:37] = 1
    return [first, second]
