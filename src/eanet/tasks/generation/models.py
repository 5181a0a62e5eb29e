"""The networks of Tables 8 and 9 (arXiv 2105.02358) by name, and small ones.

All widths are 64 as in PyTorch-StudioGAN, on which the paper builds; 32 pixels for CIFAR-10, 64 for
Tiny-ImageNet.
"""

from typing import Any

from eanet.registry import register_model
from eanet.tasks.generation.adversarial_pair import AdversarialPair

__all__ = [
    "dcgan_32",
    "eagan_32",
    "eagan_64",
    "eagan_tiny",
    "projgan_32",
    "projgan_64",
    "resgan_32",
    "resgan_64",
    "resgan_tiny",
    "sagan_32",
    "sagan_64",
    "sagan_tiny",
]

_SELF: dict[str, Any] = {"spectral_norm": True, "attention": "self"}
_EXTERNAL: dict[str, Any] = {"spectral_norm": True, "attention": "external"}
_TINY: dict[str, Any] = {
    "image_size": 16,
    "latent_size": 32,
    "generator_width": 8,
    "critic_width": 16,
}


def _build(
    num_classes: int, in_channels: int, preset: dict[str, Any], given: dict[str, Any]
) -> AdversarialPair:
    """Build a preset with what the caller changes of it."""
    return AdversarialPair(num_classes, in_channels, **{**preset, **given})


@register_model
def dcgan_32(num_classes: int = 10, in_channels: int = 3, **arguments: Any) -> AdversarialPair:
    """DCGAN's plain convolutions, unconditional (Table 8, rows DCGAN and LSGAN)."""
    preset = {"architecture": "conv", "conditional": False}
    return _build(num_classes, in_channels, preset, arguments)


@register_model
def resgan_32(num_classes: int = 10, in_channels: int = 3, **arguments: Any) -> AdversarialPair:
    """Residual networks, unconditional (Table 8, row WGAN-GP)."""
    return _build(num_classes, in_channels, {"conditional": False}, arguments)


@register_model
def projgan_32(num_classes: int = 10, in_channels: int = 3, **arguments: Any) -> AdversarialPair:
    """Residual networks with conditional batch norm and projection (Table 8, row ProjGAN)."""
    return _build(num_classes, in_channels, {}, arguments)


@register_model
def sagan_32(num_classes: int = 10, in_channels: int = 3, **arguments: Any) -> AdversarialPair:
    """SAGAN: spectral norm and self-attention (Table 8, row SAGAN)."""
    return _build(num_classes, in_channels, _SELF, arguments)


@register_model
def eagan_32(num_classes: int = 10, in_channels: int = 3, **arguments: Any) -> AdversarialPair:
    """EAGAN: SAGAN with external attention in the place of self-attention (Table 8)."""
    return _build(num_classes, in_channels, _EXTERNAL, arguments)


@register_model
def resgan_64(num_classes: int = 200, in_channels: int = 3, **arguments: Any) -> AdversarialPair:
    """Residual networks, unconditional (Table 9, rows DCGAN and LSGAN)."""
    preset = {"image_size": 64, "conditional": False}
    return _build(num_classes, in_channels, preset, arguments)


@register_model
def projgan_64(num_classes: int = 200, in_channels: int = 3, **arguments: Any) -> AdversarialPair:
    """Residual networks with conditional batch norm and projection (Table 9, row ProjGAN)."""
    return _build(num_classes, in_channels, {"image_size": 64}, arguments)


@register_model
def sagan_64(num_classes: int = 200, in_channels: int = 3, **arguments: Any) -> AdversarialPair:
    """SAGAN: spectral norm and self-attention (Table 9, row SAGAN)."""
    return _build(num_classes, in_channels, {"image_size": 64, **_SELF}, arguments)


@register_model
def eagan_64(num_classes: int = 200, in_channels: int = 3, **arguments: Any) -> AdversarialPair:
    """EAGAN: SAGAN with external attention in the place of self-attention (Table 9)."""
    return _build(num_classes, in_channels, {"image_size": 64, **_EXTERNAL}, arguments)


@register_model
def eagan_tiny(num_classes: int = 10, in_channels: int = 3, **arguments: Any) -> AdversarialPair:
    """EAGAN for images of 16 pixels, narrow."""
    return _build(num_classes, in_channels, {**_TINY, **_EXTERNAL, "num_slots": 16}, arguments)


@register_model
def sagan_tiny(num_classes: int = 10, in_channels: int = 3, **arguments: Any) -> AdversarialPair:
    """SAGAN for images of 16 pixels, narrow."""
    return _build(num_classes, in_channels, {**_TINY, **_SELF}, arguments)


@register_model
def resgan_tiny(num_classes: int = 10, in_channels: int = 3, **arguments: Any) -> AdversarialPair:
    """Unconditional residual networks for images of 16 pixels, narrow, with batch norm."""
    return _build(num_classes, in_channels, {**_TINY, "conditional": False}, arguments)
