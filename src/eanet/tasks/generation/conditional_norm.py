"""Batch normalization whose scale and shift depend on the class."""

from jaxtyping import Float, Int
from torch import Tensor, nn

from eanet.tasks.generation.spectral_norm import Embedding

__all__ = ["BATCH_NORM_EPS", "ConditionalBatchNorm2d", "batch_norm"]

#: of every batch norm of these networks
BATCH_NORM_EPS = 1e-4


def batch_norm(channels: int) -> nn.BatchNorm2d:
    """Return a batch norm with a scale and a shift of its own."""
    return nn.BatchNorm2d(channels, eps=BATCH_NORM_EPS, momentum=0.1)


class ConditionalBatchNorm2d(nn.Module):
    """Normalizes with the statistics of the batch, then scales and shifts by class.

    ``y = normalized(x) * (1 + gain[label]) + bias[label]``; gain and bias start orthogonal, not
    at 0.

    Args:
        channels: of the feature map.
        num_classes: rows of the two tables.
        spectral_norm: divide each table by its largest singular value.
    """

    def __init__(self, channels: int, num_classes: int, *, spectral_norm: bool = False) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, eps=BATCH_NORM_EPS, momentum=0.1, affine=False)
        self.gain = Embedding(num_classes, channels, spectral_norm=spectral_norm)
        self.bias = Embedding(num_classes, channels, spectral_norm=spectral_norm)

    def forward(
        self, x: Float[Tensor, "batch channels height width"], labels: Int[Tensor, "batch"]
    ) -> Float[Tensor, "batch channels height width"]:
        """Normalize feature maps of the given classes."""
        gain = 1 + self.gain(labels)[:, :, None, None]
        bias = self.bias(labels)[:, :, None, None]
        return self.norm(x) * gain + bias
