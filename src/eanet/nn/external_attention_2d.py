"""External attention for feature maps: the block of the authors' segmentation network.

Mathematics, numerics and speed: ``ops/attention/README.md`` and ``docs/explanation/numerics.md``.
"""

import math
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from eanet.nn.batch_statistics import (
    fold_running_statistics,
    update_running_statistics,
    uses_batch_statistics,
)
from eanet.nn.channel_norms import ChannelAffine, ValidGroupNorm
from eanet.nn.dead_parameters import attach_zero_gradient
from eanet.nn.fused_attention import FusedExternalAttention2d
from eanet.nn.initialization import initialize_fan_out_
from eanet.nn.memories import (
    MemoryInit,
    MemoryModule,
    autocast_input,
    bias_of,
    check_positive,
    flat_view,
    full_precision,
    project_values,
)
from eanet.ops.attention import Norm, check_mask
from eanet.ops.attention.attention_rows import attention_rows, block_logits
from eanet.ops.attention.block import BatchNormArguments

__all__ = ["ExternalAttention2d"]


class ExternalAttention2d(MemoryModule):
    """External attention for feature maps, (batch, channels, height, width).

    The authors' block: ``relu(x + batch_norm(projection(A M_v)))`` with ``A = norm(M_k query(x))``
    over all positions (Figure 3 and Eq. 7-11, arXiv 2105.02358); each part can be left out.
    Deviation: the products of weights are formed first (``K = M_k W_query``,
    ``V = W_projection M_v^T``) and the statistics of the batch norm come from the S attention
    rows; the result is the same up to rounding, at about a sixth of the time.

    Args:
        channels: C, width of the feature map.
        num_slots: S, number of memory rows.
        inner_channels: d, width of queries and memory rows, if it is not ``channels``.
        query: project x to queries with a 1x1 convolution.
        query_bias: with a bias; under "double" it cancels and gets a gradient of zeros.
        projection: project the result with a 1x1 convolution.
        projection_bias: with a bias; only without batch norm, which would remove it.
        batch_norm: normalize the branch; its module is ``norm``.
        residual: "input" adds x, "none" does not.
        activation: "relu" or "none", after the residual.
        norm: "double" (Eq. 10-11) or "softmax" over the slots (row 6 of Table 1).
        eps: of the double normalization; 0 is the exact form.
        memory_init: "shared" starts M_v as a copy of M_k, "independent" draws both.
        tie_memory: one memory for both roles (Eq. 5-6).

    Raises:
        ValueError: an argument is outside its range, or parts do not fit together.

    >>> block = ExternalAttention2d(16, 8)
    >>> block(torch.zeros(2, 16, 5, 4)).shape, block.attention_map(torch.zeros(2, 16, 5, 4)).shape
    (torch.Size([2, 16, 5, 4]), torch.Size([2, 8, 5, 4]))
    """

    def __init__(
        self,
        channels: int,
        num_slots: int = 64,
        *,
        inner_channels: int | None = None,
        query: bool = True,
        query_bias: bool = True,
        projection: bool = True,
        projection_bias: bool = False,
        batch_norm: bool = True,
        residual: Literal["none", "input"] = "input",
        activation: Literal["relu", "none"] = "relu",
        norm: Norm = "double",
        eps: float = 1e-9,
        memory_init: MemoryInit = "shared",
        tie_memory: bool = False,
    ) -> None:
        width = channels if inner_channels is None else inner_channels
        super().__init__(
            num_slots,
            width,
            norm=norm,
            eps=eps,
            memory_init=memory_init,
            tie_memory=tie_memory,
            key_bias=False,
            value_bias=False,
        )
        check_positive(channels=channels)
        if residual not in ("none", "input"):
            raise ValueError(f"residual must be 'none' or 'input', got {residual!r}")
        if activation not in ("relu", "none"):
            raise ValueError(f"activation must be 'relu' or 'none', got {activation!r}")
        if width != channels and not (query and projection):
            raise ValueError(
                f"inner_channels {width} other than channels {channels} needs query and projection"
            )
        if projection_bias and batch_norm:
            raise ValueError("projection_bias=True needs batch_norm=False, which removes a bias")
        self.channels = channels
        self.residual = residual
        self.activation = activation
        self.query = nn.Conv2d(channels, width, 1, bias=query_bias) if query else None
        self.projection = (
            nn.Conv2d(width, channels, 1, bias=projection_bias) if projection else None
        )
        # may be replaced, by a synchronized batch norm or one of eanet.nn.channel_norms
        self.norm: Any = nn.BatchNorm2d(channels) if batch_norm else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters as the authors do: Normal(0, sqrt(2 / fan_out)), biases default."""
        for layer in (self.query, self.projection):
            if layer is not None:
                layer.reset_parameters()
                initialize_fan_out_(layer.weight)
        if self.norm is not None:
            self.norm.reset_parameters()
        self.initialize_memories_(math.sqrt(2 / self.memory_key.shape[1]))

    def _key_side(self) -> tuple[Tensor, Tensor | None]:
        """Return K (slots, channels) and its bias."""
        if self.query is None:
            return self.memory_key, None
        key, key_bias = self.memory_key, None
        bias = bias_of(self.query)
        if self.normalization == "double":
            key = attach_zero_gradient(key, bias)
        elif bias is not None:
            key_bias = key @ bias
        return key @ self.query.weight.flatten(1), key_bias

    def _value_side(self) -> tuple[Tensor, Tensor | None]:
        """Return V (channels, slots) and the bias of the projection."""
        return project_values(self.values, None, self.projection)

    def forward(
        self,
        x: Float[Tensor, "batch channels height width"],
        mask: Bool[Tensor, "batch height width"] | None = None,
        *,
        out: Float[Tensor, "batch channels height width"] | None = None,
    ) -> Float[Tensor, "batch channels height width"]:
        """Attend from every position to the memories.

        Args:
            x: feature maps.
            mask: True for positions that take part; to others the branch adds 0, and the batch
                norm leaves them out of its statistics.
            out: a buffer for the result where no gradients are recorded; it may be x itself. It
                saves the pages of a fresh result, which take about as long as the computation.

        Raises:
            ValueError: the shape of x, of the mask or of the buffer does not fit.
        """
        self._check(x, mask)
        x = autocast_input(x)
        flat_mask = None if mask is None else mask.flatten(1)
        with full_precision(x):
            key, key_bias = self._key_side()
            value, bias = self._value_side()
            if self.norm is not None and type(self.norm) not in (nn.BatchNorm2d, ChannelAffine):
                if out is not None:
                    raise ValueError(
                        f"out needs batch norm or none, got {type(self.norm).__name__}"
                    )
                return self._forward_other_norm(x, key, value, key_bias, mask)
            batch_norm = None
            if isinstance(self.norm, ChannelAffine):
                value, bias = self.norm.fold(value)
            elif self.norm is not None and uses_batch_statistics(self.norm):
                if mask is None and x.shape[0] * x.shape[2] * x.shape[3] == 1:
                    raise ValueError(f"batch norm needs more than one position to train on, "
                                     f"got input of shape {tuple(x.shape)}")  # fmt: skip
                batch_norm = BatchNormArguments(self.norm.weight, self.norm.bias, self.norm.eps)
            elif self.norm is not None:
                value, bias = fold_running_statistics(self.norm, value)
            result, statistics = self.attention_block(
                x.flatten(2),
                key,
                value,
                key_bias=key_bias,
                bias=bias,
                batch_norm=batch_norm,
                norm=self.normalization,
                eps=self.eps,
                mask=flat_mask,
                residual=self.residual == "input",
                relu=self.activation == "relu",
                out=flat_view(out),
            )
            if isinstance(self.norm, nn.BatchNorm2d) and statistics is not None:
                update_running_statistics(self.norm, statistics)
        return result.reshape(*result.shape[:2], *x.shape[2:]) if out is None else out

    def _forward_other_norm(
        self,
        x: Tensor,
        key: Tensor,
        value: Tensor,
        key_bias: Tensor | None,
        mask: Tensor | None,
    ) -> Tensor:
        """Return the result where ``norm`` was replaced, by a synchronized batch norm or others."""
        assert self.norm is not None
        if mask is not None and isinstance(self.norm, nn.SyncBatchNorm) and self.norm.training:
            raise ValueError("SyncBatchNorm cannot leave masked positions out; pass mask=None")
        branch, _ = self.attention_block(
            x.flatten(2),
            key,
            value,
            key_bias=key_bias,
            norm=self.normalization,
            eps=self.eps,
            mask=None if mask is None else mask.flatten(1),
            residual=False,
            relu=False,
        )
        branch = branch.reshape(x.shape)
        knows_masks = isinstance(self.norm, ValidGroupNorm)
        out = self.norm(branch, mask) if knows_masks else self.norm(branch)
        if mask is not None:
            out = out.masked_fill(~mask.unsqueeze(1), 0.0)
        if self.residual == "input":
            out = out + x
        return torch.relu(out) if self.activation == "relu" else out

    def attention_map(
        self,
        x: Float[Tensor, "batch channels height width"],
        mask: Bool[Tensor, "batch height width"] | None = None,
    ) -> Float[Tensor, "batch slots height width"]:
        """Return A, at least in float32, as one map for each slot (Figure 4)."""
        self._check(x, mask)
        x = autocast_input(x)
        with full_precision(x):
            key, key_bias = self._key_side()
            rows = attention_rows(
                x.flatten(2),
                key,
                key_bias=key_bias,
                norm=self.normalization,
                eps=self.eps,
                mask=None if mask is None else mask.flatten(1),
            )
        return rows.reshape(*rows.shape[:2], *x.shape[2:])

    def saliency_map(
        self,
        x: Float[Tensor, "batch channels height width"],
        mask: Bool[Tensor, "batch height width"] | None = None,
    ) -> Float[Tensor, "batch slots height width"]:
        """Return the softmax over the positions alone (Eq. 10): where each slot looks.

        At least in float32; each map sums to 1. What :meth:`attention_map` returns under "double"
        is this divided by its sum over the slots.
        """
        self._check(x, mask)
        x = autocast_input(x)
        with full_precision(x):
            key, key_bias = self._key_side()
            logits = block_logits(x.flatten(2), key, key_bias)
            if mask is not None:
                valid = mask.flatten(1).unsqueeze(1)
                logits = logits.masked_fill(~valid, torch.finfo(logits.dtype).min)
                maps = logits.softmax(dim=-1).masked_fill(~valid, 0.0)
            else:
                maps = logits.softmax(dim=-1)
        return maps.reshape(*maps.shape[:2], *x.shape[2:])

    def _check(self, x: Tensor, mask: Tensor | None) -> None:
        """Refuse inputs and masks of another shape."""
        if x.ndim != 4 or x.shape[1] != self.channels:
            hint = "; for (batch, tokens, channels) use ExternalAttention" if x.ndim == 3 else ""
            raise ValueError(
                f"ExternalAttention2d takes (batch, {self.channels}, height, width), "
                f"got {tuple(x.shape)}{hint}"
            )
        check_mask(mask, (x.shape[0], *x.shape[2:]))

    @torch.no_grad()
    def fused(self) -> nn.Module:
        """Return an inference module of two thin matrices with the batch norm inside.

        Where ``norm`` has no running statistics to fold, a copy of this module is returned.
        """
        key, key_bias = self._key_side()
        value, bias = self._value_side()
        if isinstance(self.norm, ChannelAffine):
            value, bias = self.norm.fold(value)
        elif self.norm is not None:
            if type(self.norm) not in (nn.BatchNorm2d, nn.SyncBatchNorm):
                return self
            if self.norm.running_mean is None:
                return self
            value, bias = fold_running_statistics(self.norm, value)
        return FusedExternalAttention2d(
            key,
            value,
            key_bias=key_bias,
            bias=bias,
            norm=self.normalization,
            eps=self.eps,
            residual=self.residual == "input",
            relu=self.activation == "relu",
        )
