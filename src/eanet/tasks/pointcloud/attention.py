"""The attention layers of PCT: offset, plain, external, and none, in the same shell.

Every layer maps (batch, points, channels) to the same shape and ends in the shell of PCT, a linear
map, a batch norm and a ReLU beside a residual. They differ in what the shell is given (equation
numbers of arXiv 2105.02358; the shell is that of arXiv 2012.09688)::

    offset    x + relu(norm(W (x - A V) + b)),   A = double_norm(Q Q^T)
    plain     x + relu(norm(W A V + b)),         A = softmax(Q Q^T / sqrt(C / 4))
    external  x + relu(norm(W (x - y) + b)),     y = double_norm(F M_k^T) M_v   (Eq. 7-11)
    none      x + relu(norm(W x + b))

Deviation: the authors released no code for point clouds. External attention takes the place of the
self-attention inside the shell ("all self-attention modules replaced", section 4.7);
``form="residual"`` gives the shell y in place of x - y, ``form="block"`` is the authors' block for
images over the points of a cloud.
"""

import math
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from eanet.nn.external_attention import ExternalAttention, ExternalAttention2d
from eanet.nn.linear import Linear
from eanet.nn.transformer import TokenBatchNorm
from eanet.ops.attention import Norm, double_normalize, slot_softmax

__all__ = [
    "AttentionKind",
    "ExternalForm",
    "ExternalLayer",
    "OffsetAttention",
    "PlainAttention",
    "PointwiseResidual",
    "attention_layer",
]

AttentionKind = Literal["external", "offset", "plain", "none"]
ExternalForm = Literal["offset", "residual", "block"]

_Cloud = Float[Tensor, "batch points channels"]
_Mask = Bool[Tensor, "batch points"]


class PointwiseResidual(nn.Module):
    """The shell alone: ``x + relu(norm(W x + b))``, no point sees another.

    Args:
        channels: width C.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.projection = Linear(channels, channels)
        self.norm = TokenBatchNorm(channels)

    def shell(self, x: _Cloud, branch: _Cloud, mask: _Mask | None) -> _Cloud:
        """Return ``x + relu(norm(W branch + b))``."""
        branch = self.projection(branch)
        masks = () if mask is None else (mask,)
        return x + torch.relu(self.norm(branch, *masks))

    def forward(self, x: _Cloud, mask: _Mask | None = None) -> _Cloud:
        """Return the features of every point after the layer."""
        return self.shell(x, x, mask)


class _SelfAttention(PointwiseResidual):
    """Attention among the points of a cloud; query and key are one projection of C / 4 channels.

    Deviation: PCT's code holds that projection twice and ties both; here it is one parameter.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        if channels % 4:
            raise ValueError(f"channels of self-attention must divide by 4, got {channels}")
        self.query_key = Linear(channels, channels // 4, bias=False)
        self.value = Linear(channels, channels)

    def attention_map(
        self, x: _Cloud, mask: _Mask | None = None
    ) -> Float[Tensor, "batch points keys"]:
        """Return how much of each point (keys) every point takes."""
        raise NotImplementedError

    def _attend(self, x: Tensor, mask: Tensor | None) -> Tensor:
        attention = self.attention_map(x, mask)
        values = self.value(x)
        return torch.bmm(attention.to(values.dtype), values)


class OffsetAttention(_SelfAttention):
    """Offset attention (arXiv 2012.09688): what attention changes, not what it finds, is used.

    Weights of the points i for a point j are a softmax over j, then divided by their sum over i:
    the double normalization of external attention, with the points as slots.
    """

    def attention_map(
        self, x: _Cloud, mask: _Mask | None = None
    ) -> Float[Tensor, "batch points keys"]:
        """Return how much of each point (keys) every point takes."""
        query = self.query_key(x)
        energy = torch.bmm(query, query.transpose(1, 2))
        return double_normalize(energy, mask=mask, slot_mask=mask)

    def forward(self, x: _Cloud, mask: _Mask | None = None) -> _Cloud:
        """Return the features of every point after the layer."""
        return self.shell(x, x - self._attend(x, mask), mask)


class PlainAttention(_SelfAttention):
    """Self-attention with a scaled softmax, as the naive PCT has it.

    As in the published code the weights of the points i for a point j are a softmax over j, the
    points that take, and nothing makes them sum to 1 over i.
    """

    def attention_map(
        self, x: _Cloud, mask: _Mask | None = None
    ) -> Float[Tensor, "batch points keys"]:
        """Return how much of each point (keys) every point takes."""
        query = self.query_key(x)
        energy = torch.bmm(query / math.sqrt(query.shape[2]), query.transpose(1, 2))
        return slot_softmax(energy, token_dim=-1, slot_dim=-2, mask=mask, slot_mask=mask)

    def forward(self, x: _Cloud, mask: _Mask | None = None) -> _Cloud:
        """Return the features of every point after the layer."""
        return self.shell(x, self._attend(x, mask), mask)


class ExternalLayer(PointwiseResidual):
    """External attention in the shell of PCT.

    Args:
        channels: width C.
        num_slots: S, rows of the memories.
        query: project the points first (Algorithm 1).
        form: "offset" gives the shell x - y, "residual" gives it y.
        norm: see :class:`eanet.ExternalAttention`.
    """

    def __init__(
        self,
        channels: int,
        num_slots: int = 64,
        *,
        query: bool = True,
        form: Literal["offset", "residual"] = "offset",
        norm: Norm = "double",
    ) -> None:
        super().__init__(channels)
        if form not in ("offset", "residual"):
            raise ValueError(f"form must be 'offset' or 'residual', got {form!r}")
        self.form = form
        self.attention = ExternalAttention(
            channels, num_slots, query=query, projection=False, norm=norm, memory_init="independent"
        )
        # fan_out of either memory as the authors draw them, Normal(0, sqrt(2 / fan_out))
        nn.init.normal_(self.attention.memory_key, std=math.sqrt(2 / num_slots))
        nn.init.normal_(self.attention.values, std=math.sqrt(2 / channels))

    def forward(self, x: _Cloud, mask: _Mask | None = None) -> _Cloud:
        """Return the features of every point after the layer."""
        masks = () if mask is None else (mask,)
        found = self.attention(x, *masks)
        return self.shell(x, found if self.form == "residual" else x - found, mask)


class ExternalBlock(ExternalAttention2d):
    """The authors' block for images, over the points of a cloud: ``relu(x + norm(W y))``."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the features of every point after the block."""
        masks = () if mask is None else (mask.unsqueeze(2),)
        return super().forward(x.transpose(1, 2).unsqueeze(3), *masks).squeeze(3).transpose(1, 2)

    def attention_map(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return A (batch, points, slots)."""
        masks = () if mask is None else (mask.unsqueeze(2),)
        maps = super().attention_map(x.transpose(1, 2).unsqueeze(3), *masks)
        return maps.squeeze(3).transpose(1, 2)


def attention_layer(
    kind: AttentionKind,
    channels: int,
    *,
    num_slots: int = 64,
    query: bool = True,
    form: ExternalForm = "offset",
    norm: Norm = "double",
) -> nn.Module:
    """Build one attention layer of a network.

    Args:
        kind: "external", "offset", "plain" or "none".
        channels: width C.
        num_slots: of external attention.
        query: of external attention.
        form: of external attention: "offset", "residual" or "block".
        norm: of external attention.

    Raises:
        ValueError: the kind is unknown, or a size does not fit.
    """
    if kind == "external":
        if form == "block":
            return ExternalBlock(channels, num_slots, query=query, norm=norm)
        return ExternalLayer(channels, num_slots, query=query, form=form, norm=norm)
    kinds = {"offset": OffsetAttention, "plain": PlainAttention, "none": PointwiseResidual}
    if kind not in kinds:
        raise ValueError(f"attention must be one of external, {', '.join(kinds)}; got {kind!r}")
    return kinds[kind](channels)
