"""The Inception network that FID and Inception Score are defined by, from a file of weights.

It is the 2015 TensorFlow graph in PyTorch's terms: torchvision's layers under torchvision's names,
1008 outputs, average pooling that does not count its padding, and a maximum in the last block. The
weights (about 95 MB) are in circulation as ``pt_inception-2015-12-05-6726825d.pth``; nothing here
downloads them.
"""

from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torchvision.models import inception as blocks

from eanet.errors import UserError

__all__ = [
    "FidInception",
    "Preparation",
    "inception_of",
    "prepare_images",
    "resize_without_centers",
]

#: how images are made ready: float values and pixel centers that agree at any size, as the code
#: behind the paper's tables; or bytes and TensorFlow 1's resizing, as torch-fidelity
Preparation = Literal["float", "bytes"]

_SIZE = 299


def _average(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, kernel_size=3, stride=1, padding=1, count_include_pad=False)


class _BlockA(blocks.InceptionA):
    """35 x 35 positions; padding is not averaged."""

    def _forward(self, x: Tensor) -> list[Tensor]:
        return [
            self.branch1x1(x),
            self.branch5x5_2(self.branch5x5_1(x)),
            self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x))),
            self.branch_pool(_average(x)),
        ]


class _BlockC(blocks.InceptionC):
    """17 x 17 positions; padding is not averaged."""

    def _forward(self, x: Tensor) -> list[Tensor]:
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        return [
            self.branch1x1(x),
            self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x))),
            self.branch7x7dbl_5(self.branch7x7dbl_4(double)),
            self.branch_pool(_average(x)),
        ]


class _BlockE(blocks.InceptionE):
    """8 x 8 positions; padding is not averaged, or a maximum is taken."""

    pools_maximum = False

    def _forward(self, x: Tensor) -> list[Tensor]:
        single, double = self.branch3x3_1(x), self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = F.max_pool2d(x, 3, stride=1, padding=1) if self.pools_maximum else _average(x)
        return [
            self.branch1x1(x),
            torch.cat([self.branch3x3_2a(single), self.branch3x3_2b(single)], 1),
            torch.cat([self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double)], 1),
            self.branch_pool(pooled),
        ]


class FidInception(nn.Module):
    """The network; without weights of the file it is of no use.

    Its layers bear the names of torchvision's ``inception_v3``.
    """

    def __init__(self) -> None:
        super().__init__()
        convolution = blocks.BasicConv2d
        self.Conv2d_1a_3x3 = convolution(3, 32, kernel_size=3, stride=2)
        self.Conv2d_2a_3x3 = convolution(32, 32, kernel_size=3)
        self.Conv2d_2b_3x3 = convolution(32, 64, kernel_size=3, padding=1)
        self.Conv2d_3b_1x1 = convolution(64, 80, kernel_size=1)
        self.Conv2d_4a_3x3 = convolution(80, 192, kernel_size=3)
        self.Mixed_5b = _BlockA(192, pool_features=32)
        self.Mixed_5c = _BlockA(256, pool_features=64)
        self.Mixed_5d = _BlockA(288, pool_features=64)
        self.Mixed_6a = blocks.InceptionB(288)
        self.Mixed_6b = _BlockC(768, channels_7x7=128)
        self.Mixed_6c = _BlockC(768, channels_7x7=160)
        self.Mixed_6d = _BlockC(768, channels_7x7=160)
        self.Mixed_6e = _BlockC(768, channels_7x7=192)
        self.Mixed_7a = blocks.InceptionD(768)
        self.Mixed_7b = _BlockE(1280)
        self.Mixed_7c = _BlockE(2048)
        self.Mixed_7c.pools_maximum = True
        self.fc = nn.Linear(2048, 1008)

    def forward(
        self, images: Float[Tensor, "batch 3 299 299"]
    ) -> tuple[Float[Tensor, "batch 2048"], Float[Tensor, "batch 1008"]]:
        """Return pooled features and logits of images within [-1, 1]."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(images)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, stride=2)))
        x = F.max_pool2d(x, 3, stride=2)
        for block in (
            self.Mixed_5b, self.Mixed_5c, self.Mixed_5d, self.Mixed_6a, self.Mixed_6b,
            self.Mixed_6c, self.Mixed_6d, self.Mixed_6e, self.Mixed_7a, self.Mixed_7b,
            self.Mixed_7c,
        ):  # fmt: skip
            x = block(x)
        features = x.mean(dim=(2, 3))
        return features, self.fc(features)


def resize_without_centers(
    images: Float[Tensor, "batch channels height width"], size: int
) -> Float[Tensor, "batch channels size size"]:
    """Resize bilinearly as TensorFlow 1 did: pixel i comes from i * old / new, without a shift.

    Args:
        images: any size.
        size: edge of the result.
    """
    for dim in (2, 3):
        length = images.shape[dim]
        place = torch.arange(size, device=images.device, dtype=images.dtype) * (length / size)
        low = place.floor().long().clamp(max=length - 1)
        share = place - low.to(images.dtype)
        high = (low + 1).clamp(max=length - 1)
        shape = [1, 1, 1, 1]
        shape[dim] = size
        share = share.reshape(shape)
        before, after = images.index_select(dim, low), images.index_select(dim, high)
        images = before + share * (after - before)
    return images


def prepare_images(
    images: Float[Tensor, "batch channels height width"], preparation: Preparation
) -> Float[Tensor, "batch 3 299 299"]:
    """Return images as the network takes them.

    Args:
        images: within [-1, 1]; one channel is repeated for the three.
        preparation: "float" resizes bilinearly with half-pixel centers and rounds nothing;
            "bytes" rounds to 8 bits first, resizes as TensorFlow 1 did and scales by 128.
    """
    if images.shape[1] == 1:
        images = images.expand(-1, 3, -1, -1)
    if preparation == "float":
        return F.interpolate(images, size=(_SIZE, _SIZE), mode="bilinear", align_corners=False)
    levels = ((images + 1) * 127.5).round().clamp(0, 255)
    return (resize_without_centers(levels, _SIZE) - 128) / 128


def inception_of(tensors: Mapping[str, Tensor], *, source: str) -> FidInception:
    """Return the network with weights, in evaluation mode.

    Args:
        tensors: by torchvision's names; those of the auxiliary head are left out.
        source: where they come from, for messages.

    Raises:
        UserError: they are of another network.
    """
    network = FidInception()
    state = {key: value for key, value in tensors.items() if not key.startswith("AuxLogits.")}
    for key, own in network.state_dict().items():
        if key.endswith("num_batches_tracked"):
            state.setdefault(key, own)
    try:
        network.load_state_dict(state, strict=True)
    except RuntimeError as error:
        first = " ".join(str(error).split())[:200]
        raise UserError(f"{source}: not weights of FID's Inception network: {first}") from error
    return network.eval()
