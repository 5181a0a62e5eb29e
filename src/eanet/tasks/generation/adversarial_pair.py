"""A generator and its critic as one network, and how images are drawn from it."""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from eanet.tasks.generation.critics import ConvCritic, ResNetCritic
from eanet.tasks.generation.generators import Attention, ConvGenerator, ResNetGenerator

__all__ = ["AdversarialPair", "NormStatistics", "sampling_statistics"]

#: which statistics the generator's batch norms use when images are drawn: the running ones, those
#: of the batch at hand, or running ones counted anew over many batches
NormStatistics = Literal["running", "batch", "standing"]

#: batches that "standing" statistics are counted over
_STANDING_BATCHES = 16


class AdversarialPair(nn.Module):
    """A generator and its critic.

    Args:
        num_classes: of the data.
        in_channels: of the images: 1 or 3.
        image_size: edge of the images: 16, 32 or 64 pixels; 32 for ``architecture="conv"``.
        architecture: "resnet", or the plain convolutions of DCGAN.
        conditional: whether images are drawn and judged by class: conditional batch norm and
            projection. Otherwise labels do not matter.
        latent_size: length of a latent vector.
        generator_width: channels that all of the generator's are multiples of.
        critic_width: the same of the critic.
        spectral_norm: of all weights of both.
        attention: the layer inside both.
        generator_attention_after: the block or blocks of the generator it follows, from 1; by
            default where SAGAN has it: the second, the third at 64 pixels.
        critic_attention_after: the same of the critic; by default the first.
        num_slots: S of external attention.
        inner_channels: d of external attention; ``None`` takes half the channels.
        key_spectral_norm: of M_k; ``None`` as ``spectral_norm``.
        value_spectral_norm: of M_v, together with a fixed gain.
        shortcut_relu: see :class:`~eanet.tasks.generation.critics.CriticBlock`.

    Raises:
        ValueError: arguments do not fit together.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 3,
        *,
        image_size: int = 32,
        architecture: Literal["resnet", "conv"] = "resnet",
        conditional: bool = True,
        latent_size: int = 128,
        generator_width: int = 64,
        critic_width: int = 64,
        spectral_norm: bool = False,
        attention: Attention = "none",
        generator_attention_after: int | Sequence[int] | None = None,
        critic_attention_after: int | Sequence[int] = 1,
        num_slots: int = 64,
        inner_channels: int | None = None,
        key_spectral_norm: bool | None = None,
        value_spectral_norm: bool = False,
        shortcut_relu: bool = True,
    ) -> None:
        super().__init__()
        if conditional and num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        self.image_size, self.in_channels = image_size, in_channels
        self.latent_size = latent_size
        self.num_classes = num_classes if conditional else None
        self.generator: ResNetGenerator | ConvGenerator
        self.critic: ResNetCritic | ConvCritic
        if architecture == "conv":
            if conditional or spectral_norm or attention != "none" or image_size != 32:
                raise ValueError(
                    "architecture 'conv' is unconditional, for images of 32 pixels, without "
                    "spectral norm and attention"
                )
            self.generator = ConvGenerator(
                in_channels, latent_size=latent_size, width=generator_width
            )
            self.critic = ConvCritic(in_channels, width=critic_width)
            return
        if architecture != "resnet":
            raise ValueError(f"architecture must be 'resnet' or 'conv', got {architecture!r}")
        arguments: dict[str, Any] = {}
        if attention == "external":
            arguments = {
                "num_slots": num_slots,
                "inner_channels": inner_channels,
                "key_spectral_norm": key_spectral_norm,
                "value_spectral_norm": value_spectral_norm,
            }
        shared: dict[str, Any] = {
            "num_classes": self.num_classes,
            "spectral_norm": spectral_norm,
            "attention": attention,
            "attention_arguments": arguments,
        }
        if generator_attention_after is None:
            generator_attention_after = 3 if image_size == 64 else 2 if image_size == 32 else 1
        self.generator = ResNetGenerator(
            image_size,
            in_channels,
            latent_size=latent_size,
            width=generator_width,
            attention_after=generator_attention_after,
            **shared,
        )
        self.critic = ResNetCritic(
            image_size,
            in_channels,
            width=critic_width,
            attention_after=critic_attention_after,
            shortcut_relu=shortcut_relu,
            **shared,
        )

    def forward(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return generated images within [-1, 1]; see the generator."""
        return self.generator(latents, labels)

    @torch.no_grad()
    def generate(
        self,
        num: int,
        labels: Sequence[int] | Tensor | None = None,
        *,
        seed: int = 0,
        batch_size: int = 64,
        norm_statistics: NormStatistics = "running",
    ) -> Tensor:
        """Draw images; the same ones for the same arguments.

        Args:
            num: how many.
            labels: the class of each; by default class after class in turn.
            seed: of the latent vectors.
            batch_size: images that go through the generator at a time.
            norm_statistics: see :data:`NormStatistics`.

        Returns:
            (num, channels, size, size) within [-1, 1], on the CPU.

        Raises:
            ValueError: labels of another number, or outside the classes.
        """
        device = next(self.generator.parameters()).device
        classes = torch.arange(num) % (self.num_classes or 1)
        if labels is not None:
            classes = torch.as_tensor(labels, dtype=torch.int64).cpu()
        if len(classes) != num:
            raise ValueError(f"{len(classes)} labels for {num} images")
        if self.num_classes is not None and bool(
            ((classes < 0) | (classes >= self.num_classes)).any()
        ):
            raise ValueError(
                f"labels must be within 0..{self.num_classes - 1}, "
                f"got {int(classes.min())}..{int(classes.max())}"
            )
        generator = torch.Generator().manual_seed(seed)
        latents = torch.randn(num, self.latent_size, generator=generator)
        images = []
        with sampling_statistics(self.generator, norm_statistics, self.num_classes, seed=seed):
            for start in range(0, num, batch_size):
                part = slice(start, start + batch_size)
                drawn = self.generator(latents[part].to(device), classes[part].to(device))
                images.append(drawn.float().cpu())
        return torch.cat(images) if images else torch.empty(0, self.in_channels, 0, 0)


@contextmanager
def sampling_statistics(
    generator: nn.Module, statistics: NormStatistics, num_classes: int | None, *, seed: int = 0
) -> Generator[None]:
    """Put a generator into the mode in which images are drawn; restore everything afterwards.

    Weights, running statistics and the vectors of the spectral norms stay as they are.

    Args:
        generator: in evaluation mode inside the context, but for its batch norms.
        statistics: see :data:`NormStatistics`.
        num_classes: of a conditional generator; "standing" draws them evenly.
        seed: of the images that "standing" counts over.

    Raises:
        ValueError: unknown statistics.
    """
    if statistics not in ("running", "batch", "standing"):
        raise ValueError(
            f"norm_statistics must be 'running', 'batch' or 'standing', got {statistics!r}"
        )
    norms = [module for module in generator.modules() if isinstance(module, nn.BatchNorm2d)]
    modes = [(module, module.training) for module in generator.modules()]
    settings = [(norm, norm.momentum, norm.track_running_stats) for norm in norms]
    kept = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers()]
    generator.eval()
    try:
        if statistics == "standing":
            _count_statistics(generator, norms, num_classes, seed=seed)
        elif statistics == "batch":
            for norm in norms:
                # in training mode without an update: momentum 0 leaves the running ones alone
                norm.train()
                norm.momentum = 0.0
        yield
    finally:
        for norm, momentum, tracks in settings:
            norm.momentum, norm.track_running_stats = momentum, tracks
        for module, mode in modes:
            module.training = mode
        with torch.no_grad():
            for buffer, value in kept:
                buffer.copy_(value)


@torch.no_grad()
def _count_statistics(
    generator: Any, norms: Sequence[nn.BatchNorm2d], num_classes: int | None, *, seed: int
) -> None:
    """Replace running statistics by means over fresh batches."""
    device = next(generator.parameters()).device
    source = torch.Generator().manual_seed(seed)
    for norm in norms:
        norm.reset_running_stats()
        norm.train()
        norm.momentum = None  # the plain mean over all batches
    for _ in range(_STANDING_BATCHES):
        latents = torch.randn(64, generator.latent_size, generator=source)
        labels = torch.randint(num_classes or 1, (64,), generator=source)
        generator(latents.to(device), labels.to(device))
    for norm in norms:
        norm.eval()
