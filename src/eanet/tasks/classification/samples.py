"""What travels through this room: a labeled image, and many of them stacked."""

from eanet.data.labeled_images import Batch, Sample, collate, image_to_tensor

__all__ = ["Batch", "Sample", "collate", "image_to_tensor"]
