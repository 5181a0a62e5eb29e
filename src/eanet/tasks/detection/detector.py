"""What all detectors have in common: images of several sizes in, losses or detections out."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from eanet.nn.padding import image_sizes
from eanet.tasks.detection.backbone import Backbone
from eanet.tasks.detection.cascade_heads import CascadeHeads
from eanet.tasks.detection.heads import BOX_CELLS, MASK_CELLS
from eanet.tasks.detection.mmdetection_keys import from_mmdetection
from eanet.tasks.detection.region_heads import Detections, RegionHeads
from eanet.tasks.detection.region_proposals import RegionProposals

__all__ = ["Detector", "TwoStageDetector", "pad_images"]

#: batches are padded to a multiple of the largest stride of the ResNet
_MULTIPLE = 32


def pad_images(images: Sequence[Tensor]) -> tuple[Tensor, list[tuple[int, int]]]:
    """Put images into one batch, padded by zeros at the right and below to a multiple of 32.

    Args:
        images: (channels, height, width) each, normalized.

    Returns:
        The batch, and (height, width) of each image.
    """
    sizes = [(image.shape[-2], image.shape[-1]) for image in images]
    height, width = (
        -(-max(lengths) // _MULTIPLE) * _MULTIPLE for lengths in zip(*sizes, strict=True)
    )
    batch = images[0].new_zeros(len(images), images[0].shape[0], height, width)
    for place, image in zip(batch, images, strict=True):
        place[:, : image.shape[-2], : image.shape[-1]] = image
    return batch, sizes


class Detector(nn.Module):
    """Finds objects in images.

    In training mode it returns losses, in evaluation mode detections.

    Args:
        backbone: images to feature maps.
        num_classes: without a background.
    """

    #: (channels, height, width) of a typical image
    input_shape = (3, 800, 1344)

    def __init__(self, backbone: Backbone, num_classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.num_classes = num_classes

    def forward(
        self,
        images: Tensor | Sequence[Tensor],
        targets: Sequence[dict[str, Tensor]] | None = None,
        sizes: Sequence[tuple[int, int]] | None = None,
    ) -> dict[str, Tensor] | list[Detections]:
        """Look at a batch.

        Args:
            images: normalized, as a list of (3, height, width), which are padded here, or as one
                batch (batch, 3, height, width).
            targets: in training mode, for each image ``boxes`` (N, 4) as corners in pixels,
                ``labels`` (N) from 0 and, for masks, ``masks`` (N, height, width).
            sizes: (height, width) of each image of a batch that is padded; by default the whole.

        Returns:
            Named losses; or for each image ``boxes``, ``scores``, ``labels`` and, where masks are
            predicted, ``mask_probabilities`` (N, 28, 28), best first, to be put into the image by
            :func:`~eanet.tasks.detection.instance_masks.paste_masks`.

        Raises:
            ValueError: targets are missing in training mode, or do not fit the images.

        On the meta device nothing can be found; all weights run on as many regions as there may
        be, so that the cost of a pass can be counted.
        """
        if not isinstance(images, Tensor):
            images, sizes = pad_images(images)
        padded = (images.shape[-2], images.shape[-1])
        sizes = [padded] * len(images) if sizes is None else list(sizes)
        if self.training:
            _check_targets(targets, len(images))
        with image_sizes(self.backbone, sizes, padded):
            features = self.backbone(images)
        if self.training:
            return self.losses(features, sizes, targets or [])
        if images.is_meta:
            self.look(features)
            return []
        return self.detect(features, sizes)

    def load_published_weights(self, tensors: Mapping[str, Tensor], *, source: str) -> None:
        """Take the weights of the same detector of MMDetection 2.x; the block keeps its own.

        Args:
            tensors: its state.
            source: how messages call it.

        Raises:
            UserError: it is another network, or of another number of classes.
        """
        self.load_state_dict(from_mmdetection(self.state_dict(), tensors, source), strict=False)

    def look(self, features: list[Tensor]) -> None:
        """Run what has weights on as many regions as there may be, for counting its cost."""
        raise NotImplementedError

    def losses(
        self,
        features: list[Tensor],
        sizes: list[tuple[int, int]],
        targets: Sequence[dict[str, Tensor]],
    ) -> dict[str, Tensor]:
        """Return the named losses of a batch of feature maps."""
        raise NotImplementedError

    def detect(self, features: list[Tensor], sizes: list[tuple[int, int]]) -> list[Detections]:
        """Return the detections of each image of a batch of feature maps."""
        raise NotImplementedError


def _check_targets(targets: Sequence[dict[str, Tensor]] | None, count: int) -> None:
    """Refuse what no loss can be computed of."""
    if targets is None or len(targets) != count:
        given = "none" if targets is None else f"those of {len(targets)}"
        raise ValueError(f"training needs targets of all {count} images, got {given}")


class TwoStageDetector(Detector):
    """Proposals first, then heads that look at each: Faster, Mask and Cascade R-CNN.

    Args:
        backbone: images to feature maps.
        num_classes: without the background.
        proposals: the first stage, on all levels.
        heads: the second, on all levels but the coarsest.
    """

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        *,
        proposals: RegionProposals,
        heads: RegionHeads | CascadeHeads,
    ) -> None:
        super().__init__(backbone, num_classes)
        self.proposals = proposals
        self.heads = heads

    def look(self, features: list[Tensor]) -> None:
        """Run what has weights, for counting its cost."""
        self.proposals.predict(features)
        batch, channels = features[0].shape[:2]
        counts = self.proposals.settings.test_count, self.heads.settings.max_detections
        regions, detected = (
            features[0].new_empty(batch * count, channels, cells, cells)
            for count, cells in zip(counts, (BOX_CELLS, MASK_CELLS), strict=True)
        )
        self.heads.look(regions, detected)

    def losses(
        self,
        features: list[Tensor],
        sizes: list[tuple[int, int]],
        targets: Sequence[dict[str, Tensor]],
    ) -> dict[str, Tensor]:
        """Return the losses of both stages."""
        found, losses = self.proposals(features, sizes, targets)
        return losses | self.heads.losses(features[:-1], found, sizes, targets)

    @torch.no_grad()
    def detect(self, features: list[Tensor], sizes: list[tuple[int, int]]) -> list[Detections]:
        """Return the detections of each image."""
        found, _ = self.proposals(features, sizes)
        return self.heads.detect(features[:-1], found, sizes)
