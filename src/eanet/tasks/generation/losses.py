"""What critic and generator minimize, from the critic's scores."""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

__all__ = ["LOSSES", "Loss", "critic_loss", "generator_loss", "gradient_penalty"]

Loss = Literal["hinge", "vanilla", "vanilla_studiogan", "least_squares", "wasserstein"]
LOSSES: tuple[Loss, ...] = (
    "hinge",
    "vanilla",
    "vanilla_studiogan",
    "least_squares",
    "wasserstein",
)


def critic_loss(
    loss: Loss, real: Float[Tensor, "batch"], fake: Float[Tensor, "batch"]
) -> dict[str, Tensor]:
    """Return the two parts of the critic's loss, ``real`` and ``fake``.

    With D the scores: hinge ``mean relu(1 - D(x)) + mean relu(1 + D(G(z)))``; vanilla ``-mean log
    sigmoid(D(x)) - mean log sigmoid(-D(G(z)))``; ``vanilla_studiogan`` has ``1 - D(G(z))`` in the
    last place, as the code behind the paper's tables; least squares ``0.5 mean (D(x) - 1)^2 + 0.5
    mean D(G(z))^2``; wasserstein ``-mean D(x) + mean D(G(z))``.

    Args:
        loss: which.
        real: scores of real images.
        fake: scores of generated ones.

    Raises:
        ValueError: an unknown loss.
    """
    match loss:
        case "hinge":
            parts = F.relu(1 - real), F.relu(1 + fake)
        case "vanilla":
            parts = -F.logsigmoid(real), -F.logsigmoid(-fake)
        case "vanilla_studiogan":
            parts = -F.logsigmoid(real), -F.logsigmoid(1 - fake)
        case "least_squares":
            parts = 0.5 * (real - 1).square(), 0.5 * fake.square()
        case "wasserstein":
            parts = -real, fake
        case _:
            raise ValueError(f"loss must be one of {LOSSES}, got {loss!r}")
    return {"real": parts[0].mean(), "fake": parts[1].mean()}


def generator_loss(loss: Loss, fake: Float[Tensor, "batch"]) -> Tensor:
    """Return the generator's loss: ``-mean D`` for hinge and wasserstein, else what mirrors D's.

    Args:
        loss: which.
        fake: scores of generated images.

    Raises:
        ValueError: an unknown loss.
    """
    match loss:
        case "hinge" | "wasserstein":
            return -fake.mean()
        case "vanilla" | "vanilla_studiogan":
            return -F.logsigmoid(fake).mean()
        case "least_squares":
            return 0.5 * (fake - 1).square().mean()
        case _:
            raise ValueError(f"loss must be one of {LOSSES}, got {loss!r}")


def gradient_penalty(
    critic: nn.Module | Callable[..., Tensor],
    real: Float[Tensor, "batch channels height width"],
    fake: Float[Tensor, "batch channels height width"],
    labels: Int[Tensor, "batch"] | None = None,
    *,
    alpha: Float[Tensor, "batch"] | None = None,
) -> Tensor:
    """Return ``mean (|grad D(x_hat)| - 1)^2`` at points between real and generated images.

    ``x_hat = alpha x + (1 - alpha) G(z)`` with alpha uniform for each sample (arXiv 1704.00028).
    The critic runs in the mode it is in, batch norms included.

    Args:
        critic: gives a score for each image.
        real: real images.
        fake: generated images; no gradient flows into them.
        labels: classes of the real images.
        alpha: in place of random numbers.
    """
    if alpha is None:
        alpha = torch.rand(len(real), device=real.device, dtype=real.dtype)
    share = alpha.reshape(-1, 1, 1, 1)
    between = (share * real + (1 - share) * fake.detach()).requires_grad_()
    scores = critic(between, labels)
    (gradient,) = torch.autograd.grad(scores.sum(), between, create_graph=True)
    return (gradient.flatten(1).norm(dim=1) - 1).square().mean()
