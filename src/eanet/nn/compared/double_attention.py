"""Double attention of A2-Nets (A2): gather features from everywhere, then distribute them."""

from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn

from eanet.nn.compared.feature_maps import check_feature_map
from eanet.nn.memories import check_positive

__all__ = ["DoubleAttention"]


class DoubleAttention(nn.Module):
    """Gather a few global descriptors, then give each position a mixture of them.

    Chen et al., "A^2-Nets: Double Attention Networks", NeurIPS 2018. With X of C channels and N
    positions::

        F = conv_a(X)                             (m x N)  features
        B = softmax over positions of conv_b(X)   (n x N)  where to gather
        V = softmax over n of conv_v(X)           (n x N)  what each position receives
        y = conv_o((F B^T) V) + X

    All four are 1x1 convolutions. With m = n = C: 4 C^2 parameters, with biases and batch norms
    1,054,720 at 512 channels; multiply-adds 6 C^2 N.

    Args:
        channels: C, width of the input and of the result.
        feature_channels: m; ``None`` for ``channels``.
        num_descriptors: n; ``None`` for ``channels``.
        bias: whether the convolutions have biases.
        norm: "batch" puts a batch norm behind each convolution, "none" does not.

    Raises:
        ValueError: a width is below 1 or ``norm`` unknown.

    >>> import torch
    >>> DoubleAttention(16)(torch.zeros(2, 16, 5, 4)).shape
    torch.Size([2, 16, 5, 4])
    """

    def __init__(
        self,
        channels: int,
        *,
        feature_channels: int | None = None,
        num_descriptors: int | None = None,
        bias: bool = True,
        norm: Literal["batch", "none"] = "batch",
    ) -> None:
        super().__init__()
        features = channels if feature_channels is None else feature_channels
        descriptors = channels if num_descriptors is None else num_descriptors
        check_positive(channels=channels, feature_channels=features, num_descriptors=descriptors)
        if norm not in ("batch", "none"):
            raise ValueError(f"norm must be 'batch' or 'none', got {norm!r}")

        def convolution(in_channels: int, out_channels: int) -> nn.Sequential:
            layers: list[nn.Module] = [nn.Conv2d(in_channels, out_channels, 1, bias=bias)]
            if norm == "batch":
                layers.append(nn.BatchNorm2d(out_channels))
            return nn.Sequential(*layers)

        self.channels = self.out_channels = channels
        self.features = convolution(channels, features)
        self.gathering = convolution(channels, descriptors)
        self.distribution = convolution(channels, descriptors)
        self.projection = convolution(features, channels)

    def forward(
        self, x: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch channels height width"]:
        """Gather from all positions and distribute to all positions."""
        check_feature_map(x, self.channels, type(self).__name__)
        features = self.features(x).flatten(2)
        gathering = self.gathering(x).flatten(2).softmax(dim=2)
        distribution = self.distribution(x).flatten(2).softmax(dim=1)
        # the m x n descriptors first: the other order would build an N x N map
        descriptors = features @ gathering.transpose(1, 2)
        return self.projection((descriptors @ distribution).unflatten(2, x.shape[2:])) + x
