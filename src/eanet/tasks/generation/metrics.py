"""Distances between sets of images, from features and logits of a network."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["FeatureStatistics", "frechet_distance", "inception_score"]


@dataclass
class FeatureStatistics:
    """Mean and covariance of features, in float64; ``+`` gives those of two sets together.

    Args:
        count: number of samples.
        mean: (dimensions).
        scatter: (dimensions, dimensions), sum of the outer products of the deviations from it.
    """

    count: int
    mean: Tensor
    scatter: Tensor

    @classmethod
    def of(cls, features: Float[Tensor, "samples dimensions"]) -> "FeatureStatistics":
        """Return the statistics of some samples."""
        features = features.detach().double().cpu()
        mean = features.mean(dim=0)
        deviations = features - mean
        return cls(len(features), mean, deviations.t() @ deviations)

    def __add__(self, other: "FeatureStatistics") -> "FeatureStatistics":
        """Return the statistics of both sets together (Chan, Golub, LeVeque 1983)."""
        count = self.count + other.count
        offset = other.mean - self.mean
        mean = self.mean + offset * (other.count / count)
        between = torch.outer(offset, offset) * (self.count * other.count / count)
        return FeatureStatistics(count, mean, self.scatter + other.scatter + between)

    @property
    def covariance(self) -> Tensor:
        """The unbiased covariance, (dimensions, dimensions).

        Raises:
            ValueError: fewer than two samples.
        """
        if self.count < 2:
            raise ValueError(f"a covariance needs at least two samples, got {self.count}")
        return self.scatter / (self.count - 1)


def frechet_distance(first: FeatureStatistics, second: FeatureStatistics) -> float:
    """Return the Frechet distance of two normal distributions (FID where features are Inception's).

    ``|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))`` (arXiv 1706.08500). The trace of the root comes
    from the eigenvalues of ``S1^(1/2) S2 S1^(1/2)``, a symmetric matrix, in float64; that holds for
    fewer samples than dimensions too, where a general matrix root fails.

    Args:
        first: statistics of one set.
        second: of the other.
    """
    values, vectors = torch.linalg.eigh(first.covariance)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.t()
    product = root @ second.covariance @ root
    eigenvalues = torch.linalg.eigvalsh((product + product.t()) / 2)
    shared = eigenvalues.clamp(min=0).sqrt().sum()
    offset = (first.mean - second.mean).square().sum()
    traces = first.covariance.trace() + second.covariance.trace()
    return float(offset + traces - 2 * shared)


def inception_score(
    logits: Float[Tensor, "samples classes"], *, num_splits: int = 1
) -> tuple[float, float]:
    """Return ``exp(mean KL(p(y|x) || p(y)))`` (arXiv 1606.03498): mean and spread over splits.

    Args:
        logits: of generated images.
        num_splits: consecutive parts, each judged by itself.

    Returns:
        The mean over the parts and their sample standard deviation, nan for one part.

    Raises:
        ValueError: fewer samples than parts.
    """
    if not 1 <= num_splits <= len(logits):
        raise ValueError(f"num_splits must be within 1..{len(logits)}, got {num_splits}")
    log_shares = logits.detach().double().cpu().log_softmax(dim=1)
    size = len(logits) // num_splits
    scores = []
    for start in range(0, size * num_splits, size):
        part = log_shares[start : start + size]
        marginal = part.exp().mean(dim=0).clamp(min=torch.finfo(torch.float64).tiny).log()
        scores.append((part.exp() * (part - marginal)).sum(dim=1).mean().exp())
    values = torch.stack(scores)
    spread = float(values.std()) if num_splits > 1 else math.nan
    return float(values.mean()), spread
