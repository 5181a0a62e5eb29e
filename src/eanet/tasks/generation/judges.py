"""Networks whose features generated images are compared by, and the rules of a comparison."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eanet.tasks.generation.inception import FidInception, Preparation, prepare_images

__all__ = ["PROTOCOLS", "InceptionJudge", "Judge", "JudgeKind", "Protocol", "RandomFeatures"]

#: which network judges: Inception gives FID and IS; a classifier of our own or random features give
#: figures by the same formulas that can be compared with one another only
JudgeKind = Literal["inception", "classifier", "random"]


@dataclass(frozen=True)
class Protocol:
    """How published figures of FID and IS are obtained; those of two protocols never mix.

    Args:
        num_images: real images, and as many generated ones.
        split: the real ones.
        preparation: of images for Inception.
        logits_have_bias: whether IS reads Inception's logits with their bias.
        num_score_splits: parts that IS is averaged over.
    """

    num_images: int
    split: Literal["train", "test"]
    preparation: Preparation
    logits_have_bias: bool
    num_score_splits: int


PROTOCOLS = {
    # Tables 8 and 9: PyTorch-StudioGAN of May 2021
    "studiogan_10k": Protocol(10_000, "test", "float", True, 1),
    # what later papers report, as torch-fidelity computes it
    "50k": Protocol(50_000, "train", "bytes", False, 10),
}


@dataclass
class Judge:
    """A network that images are compared by.

    Args:
        kind: see :data:`JudgeKind`.
        name: for people.
        network: from images within [-1, 1] to features and logits.
        num_classes: that its logits tell apart.
    """

    kind: JudgeKind
    name: str
    network: Callable[[Tensor], tuple[Tensor, Tensor]]
    num_classes: int

    @property
    def prefix(self) -> str:
        """What the names of its figures start with, so that no two kinds are mixed up."""
        return {"inception": "", "classifier": "feature_", "random": "random_"}[self.kind]

    def to(self, device: torch.device) -> "Judge":
        """Move the network where it can be moved."""
        if isinstance(self.network, nn.Module):
            self.network.to(device).eval()
        return self

    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return features and logits of images within [-1, 1]."""
        features, logits = self.network(images.float())
        return features.float(), logits.float()


class InceptionJudge(nn.Module):
    """FID's Inception with the preparation of a protocol.

    Args:
        network: with its weights.
        protocol: says how.
    """

    def __init__(self, network: FidInception, protocol: Protocol) -> None:
        super().__init__()
        self.network, self.protocol = network, protocol

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return pooled features and logits."""
        features, logits = self.network(prepare_images(images, self.protocol.preparation))
        return features, logits if self.protocol.logits_have_bias else logits - self.network.fc.bias


class RandomFeatures(nn.Module):
    """Three convolutions with fixed random weights: good enough to see whether a run moves.

    Args:
        in_channels: of the images.
        num_features: of the result; there are 10 logits.
    """

    def __init__(self, in_channels: int, *, num_features: int = 48) -> None:
        super().__init__()
        source = torch.Generator().manual_seed(2105)
        widths = [in_channels, 16, 32, num_features]
        for place, (before, after) in enumerate(itertools.pairwise(widths)):
            scale = (2 / (before * 9)) ** 0.5
            weight = torch.randn(after, before, 3, 3, generator=source) * scale
            self.register_buffer(f"weight{place}", weight)
        self.register_buffer("head", torch.randn(10, num_features, generator=source))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean activations and a linear map of them."""
        x = images
        for place in range(3):
            x = F.relu(F.conv2d(x, self.get_buffer(f"weight{place}"), stride=2, padding=1))
        features = x.mean(dim=(2, 3))
        return features, F.linear(features, self.get_buffer("head"))
