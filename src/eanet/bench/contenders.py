"""What ``eanet bench ops`` sets side by side: external attention and what is used in its place.

There are two groups, because a product with weights costs the same whoever does it. A *function*
gets queries, keys and values ready-made; a *layer* gets tokens or a feature map and owns its
projections.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from eanet.errors import UserError
from eanet.nn.compared import COMPARED_MODULES
from eanet.nn.external_attention import ExternalAttention, ExternalAttention2d
from eanet.nn.multi_head_external_attention import MultiHeadExternalAttention
from eanet.ops.attention import BACKENDS, GPU_BACKENDS, external_attention

__all__ = ["Contender", "Group", "contenders"]

Group = Literal["function", "layer"]

#: width of a head of self-attention and of Performer attention, as in T2T-ViT
HEAD_CHANNELS = 64
#: random features of a Performer head of 64 channels, as in T2T-ViT
PERFORMER_FEATURES = 32


@dataclass(frozen=True)
class Contender:
    """One thing to measure.

    Args:
        name: what the table calls it.
        group: what it is compared with.
        ours: whether it is external attention of this package.
        takes: tokens (1, N, C); a feature map (1, C, H, W); or queries, keys and values (1, N, C).
        build: makes the module for a number of channels, on the CPU in float32.
        time_order: the power of N that its time follows in the end.
        memory_order: the power of N that its memory follows in the end.
        trains: whether a training step is measured too.
    """

    name: str
    group: Group
    build: Callable[[int], nn.Module]
    takes: Literal["tokens", "map", "triple"] = "tokens"
    ours: bool = False
    time_order: int = 1
    memory_order: int = 1
    trains: bool = True


def contenders(channels: int, num_slots: int, device: torch.device) -> list[Contender]:
    """Return everything that can be compared at a width, functions first.

    Args:
        channels: C, a multiple of 64.
        num_slots: S of external attention.
        device: decides which kernels of self-attention there are.

    Raises:
        UserError: the width is no multiple of 64.
    """
    if channels < HEAD_CHANNELS or channels % HEAD_CHANNELS:
        raise UserError(f"--channels must be a multiple of {HEAD_CHANNELS}, got {channels}")
    if num_slots < 1:
        raise UserError(f"--slots must be at least 1, got {num_slots}")
    return [*_functions(num_slots, device), *_layers(num_slots)]


def _functions(num_slots: int, device: torch.device) -> Iterator[Contender]:
    """Yield the contenders without projections."""
    for backend in [*BACKENDS, *(GPU_BACKENDS if device.type == "cuda" else ())]:
        yield Contender(
            f"external attention, {backend}",
            "function",
            lambda channels, backend=backend: _ExternalAttentionFunction(
                channels, num_slots, backend
            ),
            ours=True,
        )
    yield Contender(
        "external attention, paper's form",
        "function",
        lambda channels: _PaperFormFunction(channels, num_slots),
    )
    kernels = [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION]
    if device.type == "cuda":
        kernels += [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]
    for kernel in kernels:
        yield Contender(
            f"scaled_dot_product_attention, {kernel.name.removesuffix('_ATTENTION').lower()}",
            "function",
            lambda _, kernel=kernel: _DotProductFunction(kernel),
            takes="triple",
            time_order=2,
            memory_order=2 if kernel is SDPBackend.MATH else 1,
        )
    yield Contender("Performer", "function", _PerformerFunction, takes="triple")


def _layers(num_slots: int) -> Iterator[Contender]:
    """Yield the contenders that own their projections."""
    yield Contender(
        "ExternalAttention",
        "layer",
        lambda channels: ExternalAttention(channels, num_slots),
        ours=True,
    )
    yield Contender(
        "ExternalAttention, fused",
        "layer",
        lambda channels: ExternalAttention(channels, num_slots).eval().fused(),
        ours=True,
        trains=False,
    )
    yield Contender(
        "ExternalAttention2d",
        "layer",
        lambda channels: ExternalAttention2d(channels, num_slots),
        takes="map",
        ours=True,
    )
    yield Contender(
        "ExternalAttention2d, fused",
        "layer",
        lambda channels: ExternalAttention2d(channels, num_slots).eval().fused(),
        takes="map",
        ours=True,
        trains=False,
    )
    yield Contender(
        "MultiHeadExternalAttention",
        "layer",
        lambda channels: MultiHeadExternalAttention(
            channels, num_slots, num_heads=4 * channels // HEAD_CHANNELS
        ),
        ours=True,
    )
    yield Contender(
        "external attention layer, paper's form",
        "layer",
        lambda channels: _PaperFormLayer(channels, num_slots),
    )
    yield Contender(
        "nn.MultiheadAttention", "layer", _SelfAttentionLayer, time_order=2, memory_order=2
    )
    yield Contender("Performer layer", "layer", _PerformerLayer)
    for name, build in COMPARED_MODULES.items():
        order = 2 if name in ("SA", "DA", "ACF") else 1
        yield Contender(name, "layer", build, takes="map", time_order=order, memory_order=order)


class _ExternalAttentionFunction(nn.Module):
    """One backend of the function, with memories as parameters."""

    def __init__(self, channels: int, num_slots: int, backend: str) -> None:
        super().__init__()
        self.backend = backend
        self.memory_key = nn.Parameter(torch.randn(num_slots, channels) * channels**-0.5)
        self.memory_value = nn.Parameter(torch.randn(num_slots, channels) * channels**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        result = external_attention(x, self.memory_key, self.memory_value, backend=self.backend)
        assert isinstance(result, Tensor)
        return result


class _PaperFormFunction(nn.Module):
    """Eq. 9-11 step by step: what a reader of the paper writes."""

    def __init__(self, channels: int, num_slots: int) -> None:
        super().__init__()
        self.key = nn.Linear(channels, num_slots, bias=False)
        self.value = nn.Linear(num_slots, channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        attention = self.key(x).softmax(dim=1)
        attention = attention / (1e-9 + attention.sum(dim=2, keepdim=True))
        return self.value(attention)


class _PaperFormLayer(nn.Module):
    """Algorithm 1 step by step: a query projection, the two memories, an output projection."""

    def __init__(self, channels: int, num_slots: int) -> None:
        super().__init__()
        self.query = nn.Linear(channels, channels)
        self.attention = _PaperFormFunction(channels, num_slots)
        self.projection = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.projection(self.attention(self.query(x)))


def _split_heads(tokens: Tensor) -> Tensor:
    """Return (1, heads, N, 64) of (1, N, C)."""
    return tokens.unflatten(2, (-1, HEAD_CHANNELS)).transpose(1, 2)


class _DotProductFunction(nn.Module):
    """Self-attention through one kernel of PyTorch, heads of 64 channels."""

    def __init__(self, kernel: SDPBackend) -> None:
        super().__init__()
        self.kernel = kernel

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = (_split_heads(tensor) for tensor in (query, key, value))
        with sdpa_kernel(self.kernel):
            attended = F.scaled_dot_product_attention(query, key, value)
        return attended.transpose(1, 2).flatten(2)


class _SelfAttentionLayer(nn.Module):
    """PyTorch's own layer, heads of 64 channels, without returning the map."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layer = nn.MultiheadAttention(channels, channels // HEAD_CHANNELS, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x, x, need_weights=False)[0]


class _PerformerFunction(nn.Module):
    """Softmax attention approximated with positive random features, heads of 64 channels.

    Choromanski et al., "Rethinking Attention with Performers", ICLR 2021, in the form of T2T-ViT::

        phi(u) = exp(W u - |u|^2 / 2) / sqrt(m);  y = phi(q) (phi(k)^T v) / (phi(q) sum of phi(k))

    with m frozen rows W, orthogonal and of length sqrt(m).
    """

    features: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        del channels  # the features belong to a head
        rows = torch.empty(PERFORMER_FEATURES, HEAD_CHANNELS)
        nn.init.orthogonal_(rows)
        self.register_buffer("features", rows * PERFORMER_FEATURES**0.5)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = (_split_heads(tensor) for tensor in (query, key, value))
        query, key = self._positive(query), self._positive(key)
        gathered = key.transpose(-2, -1) @ value
        normalizer = query @ key.sum(dim=-2).unsqueeze(-1)
        return ((query @ gathered) / (normalizer + 1e-8)).transpose(1, 2).flatten(2)

    def _positive(self, tokens: Tensor) -> Tensor:
        # a factor of 64^(-1/4) on queries and keys stands for the scale of the dot product, and
        # keeps the exponential of random inputs finite
        tokens = tokens * HEAD_CHANNELS**-0.25
        exponent = tokens @ self.features.T - tokens.square().sum(-1, keepdim=True) / 2
        return exponent.exp() * PERFORMER_FEATURES**-0.5


class _PerformerLayer(nn.Module):
    """Performer attention with the projections of a layer."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(channels, 3 * channels)
        self.attention = _PerformerFunction(channels)
        self.projection = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.projection(self.attention(*self.qkv(x).chunk(3, dim=-1)))
