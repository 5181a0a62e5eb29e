"""A generator and its critic as one network, and how images are drawn from it."""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from eanet.tasks.generation.critics import ConvCritic, ResNetCritic
from eanet.tasks.generation.generators import Attention, ConvGenerator, ResNetGenerator

__all__ = ["AdversarialPair", "NormStatistics", "count_statistics", "sampling_statistics"]

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
        classes = torch.arange(num) % (self.num_classes or 1)
        if labels is not None:
            classes = torch.as_tensor(labels, dtype=torch.int64).cpu()
        latents = torch.randn(num, self.latent_size, generator=torch.Generator().manual_seed(seed))
        return self.draw(latents, classes, batch_size=batch_size, norm_statistics=norm_statistics)

    @torch.no_grad()
    def draw(
        self,
        latents: Tensor,
        labels: Tensor,
        *,
        batch_size: int = 64,
        norm_statistics: NormStatistics = "running",
    ) -> Tensor:
        """Return the images of latent vectors; arguments and result as in :meth:`generate`."""
        num, classes = len(latents), self.num_classes
        if len(labels) != num:
            raise ValueError(f"{len(labels)} labels for {num} images")
        if classes is not None and bool(((labels < 0) | (labels >= classes)).any()):
            raise ValueError(
                f"labels must be within 0..{classes - 1}, "
                f"got {int(labels.min())}..{int(labels.max())}"
            )
        device = next(self.generator.parameters()).device
        counted = None
        if norm_statistics == "standing":
            counted = count_statistics(
                self.generator,
                latent_size=self.latent_size,
                num_classes=self.num_classes,
                device=device,
            )
        images = [torch.empty(0, self.in_channels, self.image_size, self.image_size)]
        with sampling_statistics(self.generator, norm_statistics, counted=counted):
            for start in range(0, num, batch_size):
                part = slice(start, start + batch_size)
                drawn = self.generator(latents[part].to(device), labels[part].to(device))
                images.append(drawn.float().cpu())
        return torch.cat(images)


def count_statistics(
    generator: nn.Module,
    *,
    latent_size: int,
    num_classes: int | None,
    device: torch.device,
    seed: int = 0,
) -> list[Tensor]:
    """Return statistics of a generator's batch norms, counted anew over many batches.

    Args:
        generator: is left as it was.
        latent_size: of its latent vectors.
        num_classes: of a conditional generator, drawn evenly.
        device: it is on.
        seed: of what is drawn.

    Returns:
        The buffers of all batch norms in their order, for :func:`sampling_statistics`.
    """
    source = torch.Generator().manual_seed(seed)
    norms = _batch_norms(generator)
    with _restored(generator), torch.no_grad():
        generator.eval()
        for norm in norms:
            norm.reset_running_stats()
            norm.train()
            norm.momentum = None  # the plain mean over all batches
        for _ in range(_STANDING_BATCHES):
            latents = torch.randn(64, latent_size, generator=source)
            labels = torch.randint(num_classes or 1, (64,), generator=source)
            generator(latents.to(device), labels.to(device))
        return [buffer.clone() for norm in norms for buffer in norm.buffers()]


@contextmanager
def sampling_statistics(
    generator: nn.Module, statistics: NormStatistics, *, counted: Sequence[Tensor] | None = None
) -> Generator[None]:
    """Put a generator into the mode in which images are drawn; restore everything afterwards.

    Weights, running statistics and the vectors of the spectral norms stay as they are.

    Args:
        generator: in evaluation mode inside the context, but for its batch norms.
        statistics: see :data:`NormStatistics`.
        counted: what :func:`count_statistics` returned, for "standing".

    Raises:
        ValueError: unknown statistics, or "standing" without those counted.
    """
    if statistics not in ("running", "batch", "standing"):
        raise ValueError(
            f"norm_statistics must be 'running', 'batch' or 'standing', got {statistics!r}"
        )
    if statistics == "standing" and counted is None:
        raise ValueError("norm_statistics 'standing' needs the statistics counted before")
    with _restored(generator):
        generator.eval()
        norms = _batch_norms(generator)
        if statistics == "standing" and counted is not None:
            buffers = [buffer for norm in norms for buffer in norm.buffers()]
            with torch.no_grad():
                for buffer, value in zip(buffers, counted, strict=True):
                    buffer.copy_(value)
        elif statistics == "batch":
            for norm in norms:
                norm.train()
        yield


def _batch_norms(generator: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in generator.modules() if isinstance(module, nn.BatchNorm2d)]


@contextmanager
def _restored(generator: nn.Module) -> Generator[None]:
    """Give every module its mode and every batch norm its statistics back."""
    norms = _batch_norms(generator)
    modes = [(module, module.training) for module in generator.modules()]
    momenta = [(norm, norm.momentum) for norm in norms]
    kept = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for norm, momentum in momenta:
            norm.momentum = momentum
        with torch.no_grad():
            for buffer, value in kept:
                buffer.copy_(value)
