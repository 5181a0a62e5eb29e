"""What every compared module asks of its input."""

from torch import Tensor

__all__ = ["check_feature_map"]


def check_feature_map(x: Tensor, channels: int, module: str) -> None:
    """Refuse anything but (batch, channels, height, width) of the right width.

    Raises:
        ValueError: rank or channels differ; the message names both shapes.
    """
    if x.ndim != 4 or x.shape[1] != channels:
        raise ValueError(f"{module} takes (batch, {channels}, height, width), got {tuple(x.shape)}")
