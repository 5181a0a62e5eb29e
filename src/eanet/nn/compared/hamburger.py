"""Hamburger (Ham): two 1x1 convolutions around a matrix factorization."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from eanet.nn.compared.feature_maps import check_feature_map
from eanet.nn.memories import autocast_input, check_positive, full_precision

__all__ = ["Hamburger", "factorize"]


class Hamburger(nn.Module):
    """Replace a feature map by its non-negative approximation of low rank.

    Geng et al., "Is Attention Better Than Matrix Decomposition?", ICLR 2021, first version, with
    non-negative matrix factorization::

        H = relu(W_1 X + b),  H ~ D C^T by :func:`factorize`,  y = relu(X + bn(W_2 (D C^T)))

    The start of D is drawn anew in every forward pass, in evaluation too; seed torch's generator
    to repeat a result. Half-precision inputs are factorized in float32. 2 C^2 + 3 C parameters
    (525,824 at 512 channels); multiply-adds with r components and 6 steps
    (2 C^2 + 15 C r + 13 r^2) N + 13 C r^2.

    Args:
        channels: C, width of the input and of the result.
        inner_channels: d, width of the factorized map; ``None`` for ``channels``.
        num_components: r, the rank.
        num_steps: updates of both factors in training.
        num_evaluation_steps: the same in evaluation; 7 in some published experiments.

    Raises:
        ValueError: a number is below 1.

    >>> Hamburger(16, num_components=4)(torch.zeros(2, 16, 5, 4)).shape
    torch.Size([2, 16, 5, 4])
    """

    def __init__(
        self,
        channels: int,
        *,
        inner_channels: int | None = None,
        num_components: int = 64,
        num_steps: int = 6,
        num_evaluation_steps: int = 6,
    ) -> None:
        super().__init__()
        inner = channels if inner_channels is None else inner_channels
        check_positive(
            channels=channels,
            inner_channels=inner,
            num_components=num_components,
            num_steps=num_steps,
            num_evaluation_steps=num_evaluation_steps,
        )
        self.channels = self.out_channels = channels
        self.num_components = num_components
        self.num_steps = num_steps
        self.num_evaluation_steps = num_evaluation_steps
        self.lower = nn.Conv2d(channels, inner, 1)
        self.upper = nn.Conv2d(inner, channels, 1, bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def forward(
        self, x: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch channels height width"]:
        """Factorize the map and put it together again."""
        check_feature_map(x, self.channels, type(self).__name__)
        hidden = self.lower(autocast_input(x)).relu().flatten(2)
        half = hidden.dtype in (torch.bfloat16, torch.float16)
        with full_precision(x):
            features = hidden.float() if half else hidden
            bases = torch.rand(
                (x.shape[0], features.shape[1], self.num_components),
                dtype=features.dtype,
                device=features.device,
            )
            bases, coefficients = factorize(
                features, bases, self.num_steps if self.training else self.num_evaluation_steps
            )
            low_rank = (bases @ coefficients.transpose(1, 2)).to(hidden.dtype)
        return (x + self.norm(self.upper(low_rank.unflatten(2, x.shape[2:])))).relu()


def factorize(
    features: Float[Tensor, "batch channels tokens"],
    bases: Float[Tensor, "batch channels components"],
    num_steps: int,
) -> tuple[Float[Tensor, "batch channels components"], Float[Tensor, "batch tokens components"]]:
    """Approximate non-negative features H by ``D C^T`` with multiplicative updates.

    The columns of D are scaled to length 1 and C starts as the softmax of ``H^T D`` over the
    components. A step is ``C <- C * (H^T D) / (C D^T D + 1e-6)``, then
    ``D <- D * (H C) / (D C^T C + 1e-6)``. Gradients flow only through one last update of C: the
    steps before it are the fixed-point search whose gradient is approximated by one step.

    Args:
        features: H, not negative.
        bases: the start of D, not negative.
        num_steps: how many steps before the last update of C.

    Returns:
        D and C.
    """
    with torch.no_grad():
        bases = F.normalize(bases, dim=1)
        coefficients = (features.transpose(1, 2) @ bases).softmax(dim=-1)
        for _ in range(num_steps):
            coefficients = _update_coefficients(features, bases, coefficients)
            gram = coefficients.transpose(1, 2) @ coefficients
            bases = bases * (features @ coefficients) / (bases @ gram + 1e-6)
    return bases, _update_coefficients(features, bases, coefficients)


def _update_coefficients(features: Tensor, bases: Tensor, coefficients: Tensor) -> Tensor:
    gram = bases.transpose(1, 2) @ bases
    return coefficients * (features.transpose(1, 2) @ bases) / (coefficients @ gram + 1e-6)
