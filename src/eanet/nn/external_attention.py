"""External attention as layers: for tokens, for feature maps, and with several heads.

Mathematics, numerics and speed: ``ops/attention/README.md`` and ``docs/explanation/numerics.md``.
"""

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from eanet.nn.batch_statistics import (
    fold_running_statistics,
    update_running_statistics,
    uses_batch_statistics,
)
from eanet.nn.channel_norms import ChannelAffine, ValidGroupNorm
from eanet.nn.dead_parameters import attach_zero_gradient
from eanet.nn.fused_attention import FusedExternalAttention, FusedExternalAttention2d
from eanet.nn.initialization import initialize_fan_out_
from eanet.nn.memories import (
    MemoryInit,
    MemoryModule,
    autocast_input,
    bias_of,
    cast,
    check_positive,
    check_tokens,
    flat_view,
    full_precision,
    project_values,
)
from eanet.nn.multi_head_external_attention import MultiHeadExternalAttention
from eanet.ops.attention import Norm, check_mask
from eanet.ops.attention.attention_rows import attention_rows, block_logits
from eanet.ops.attention.block import BatchNormArguments

__all__ = ["ExternalAttention", "ExternalAttention2d", "MultiHeadExternalAttention"]

Residual = Literal["none", "input", "query"]


class ExternalAttention(MemoryModule):
    """External attention for tokens, (batch, tokens, channels).

    Eq. 7-11 and Algorithm 1, arXiv 2105.02358::

        q = query(x);  A = norm(q M_k^T);  y = residual + projection(A M_v + value bias)

    Products of weights are formed first wherever that is cheaper: ``K = M_k W_query`` and
    ``V = W_projection M_v^T``, with the same result and the same gradients.

    Args:
        channels: d, width of memory rows and of the result.
        num_slots: S, number of memory rows; 64 in most of the paper.
        in_channels: width of x, if it is not ``channels``.
        query: project x to queries first (Algorithm 1; Eq. 7 has none).
        query_bias: with a bias; under "double" it cancels and gets a gradient of zeros, except
            with ``residual="query"``.
        projection: project the result with a linear layer.
        projection_bias: with a bias.
        value_bias: add a bias before the projection.
        residual: what is added to the result: nothing, x, or the query.
        norm: "double" (Eq. 10-11) or "softmax" over the slots (row 6 of Table 1).
        eps: of the double normalization; 0 is the exact form.
        attention_dropout: probability to drop an entry of A in training.
        projection_dropout: probability to drop an entry of the result in training, before the
            residual.
        memory_init: "shared" starts M_v as a copy of M_k, "independent" draws both.
        tie_memory: one memory for both roles (Eq. 5-6).

    Raises:
        ValueError: an argument is outside its range, or a residual has another width.

    >>> layer = ExternalAttention(32, 8)
    >>> layer(torch.zeros(2, 10, 32)).shape, layer.attention_map(torch.zeros(2, 10, 32)).shape
    (torch.Size([2, 10, 32]), torch.Size([2, 10, 8]))
    """

    def __init__(
        self,
        channels: int,
        num_slots: int = 64,
        *,
        in_channels: int | None = None,
        query: bool = True,
        query_bias: bool = True,
        projection: bool = True,
        projection_bias: bool = True,
        value_bias: bool = False,
        residual: Residual = "none",
        norm: Norm = "double",
        eps: float = 1e-9,
        attention_dropout: float = 0.0,
        projection_dropout: float = 0.0,
        memory_init: MemoryInit = "shared",
        tie_memory: bool = False,
    ) -> None:
        super().__init__(
            num_slots,
            channels,
            norm=norm,
            eps=eps,
            memory_init=memory_init,
            tie_memory=tie_memory,
            key_bias=False,
            value_bias=value_bias,
        )
        in_channels = channels if in_channels is None else in_channels
        check_positive(in_channels=in_channels)
        if residual not in ("none", "input", "query"):
            raise ValueError(f"residual must be 'none', 'input' or 'query', got {residual!r}")
        if in_channels != channels and (not query or residual == "input"):
            needed = "query=False" if not query else "residual='input'"
            raise ValueError(f"{needed} needs in_channels equal to {channels}, got {in_channels}")
        self.channels = channels
        self.in_channels = in_channels
        self.residual: Residual = "input" if residual == "query" and not query else residual
        self.query = nn.Linear(in_channels, channels, bias=query_bias) if query else None
        self.projection = (
            nn.Linear(channels, channels, bias=projection_bias) if projection else None
        )
        self.attention_dropout = attention_dropout
        self.projection_dropout = projection_dropout
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters: linear layers as PyTorch does, memories with std sqrt(2 / d)."""
        for layer in (self.query, self.projection):
            if layer is not None:
                layer.reset_parameters()
        self.initialize_memories_(math.sqrt(2 / self.channels))

    def _key_side(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return what is compared with keys, the keys, and their bias."""
        if self.query is None:
            return x, self.memory_key, None
        weight = self.query.weight
        bias = bias_of(self.query)
        folding_pays = self.num_slots * (self.in_channels - self.channels) <= (
            self.in_channels * self.channels
        )
        if self.residual == "query":
            return F.linear(x, weight.to(x.dtype), cast(bias, x.dtype)), self.memory_key, None
        key, key_bias = self.memory_key, None
        if self.normalization == "double":
            key = attach_zero_gradient(key, bias)
        elif bias is not None:
            key_bias = key @ bias
        if folding_pays:
            return x, key @ weight, key_bias
        return F.linear(x, weight.to(x.dtype)), key, key_bias

    def _value_side(self) -> tuple[Tensor, Tensor | None]:
        """Return V (channels, slots) and the bias of the result."""
        return project_values(self.values, self.memory_value_bias, self.projection)

    def forward(
        self,
        x: Float[Tensor, "batch tokens in_channels"],
        mask: Bool[Tensor, "batch tokens"] | None = None,
        *,
        out: Float[Tensor, "batch tokens channels"] | None = None,
    ) -> Float[Tensor, "batch tokens channels"]:
        """Attend from every token to the memories.

        Args:
            x: tokens.
            mask: True for tokens that take part; to others the branch adds 0.
            out: a buffer for the result where no gradients are recorded; it may be x itself.
        """
        check_tokens(x, self.in_channels, type(self).__name__)
        check_mask(mask, tuple(x.shape[:2]))
        x = autocast_input(x)
        with full_precision(x):
            return self._attend(*self._key_side(x), mask, out)

    def attend(
        self,
        queries: Float[Tensor, "batch tokens channels"],
        mask: Bool[Tensor, "batch tokens"] | None = None,
    ) -> Float[Tensor, "batch tokens channels"]:
        """Go on from ``query(x)``, for callers that compute it themselves.

        Args:
            queries: what the query layer returns; also what ``residual="query"`` adds.
            mask: as in :meth:`forward`.

        Raises:
            ValueError: another residual than the query, or queries or a mask of another shape.
        """
        if self.residual != "query":
            raise ValueError(f"attend() needs residual='query', this module has {self.residual!r}")
        check_tokens(queries, self.channels, type(self).__name__)
        check_mask(mask, tuple(queries.shape[:2]))
        queries = autocast_input(queries)
        with full_precision(queries):
            return self._attend(queries, self.memory_key, None, mask)

    def _attend(
        self,
        base: Tensor,
        key: Tensor,
        key_bias: Tensor | None,
        mask: Tensor | None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Return the result for what is compared with the keys."""
        self.refuse_dropout(
            attention_dropout=self.attention_dropout, projection_dropout=self.projection_dropout
        )
        value, bias = self._value_side()
        if self.training and (self.attention_dropout > 0 or self.projection_dropout > 0):
            if out is not None:
                raise ValueError("out is not for training with dropout")
            return self._forward_with_dropout(base, key, key_bias, value, bias, mask)
        result, _ = self.attention_block(
            base.transpose(1, 2),
            key,
            value,
            key_bias=key_bias,
            bias=bias,
            norm=self.normalization,
            eps=self.eps,
            mask=mask,
            residual=self.residual != "none",
            relu=False,
            out=None if out is None else out.transpose(1, 2),
        )
        return result.transpose(1, 2) if out is None else out

    def _forward_with_dropout(
        self,
        base: Tensor,
        key: Tensor,
        key_bias: Tensor | None,
        value: Tensor,
        bias: Tensor | None,
        mask: Tensor | None,
    ) -> Tensor:
        """Return the result with entries of the attention and of the branch dropped."""
        attention = attention_rows(
            base.transpose(1, 2),
            key,
            key_bias=key_bias,
            norm=self.normalization,
            eps=self.eps,
            mask=mask,
        )
        attention = F.dropout(attention, self.attention_dropout).to(base.dtype)
        branch = F.linear(attention.transpose(1, 2), value.to(base.dtype), cast(bias, base.dtype))
        branch = F.dropout(branch, self.projection_dropout)
        if mask is not None:
            branch = branch.masked_fill(~mask.unsqueeze(-1), 0.0)
        return branch if self.residual == "none" else base + branch

    def attention_map(
        self,
        x: Float[Tensor, "batch tokens in_channels"],
        mask: Bool[Tensor, "batch tokens"] | None = None,
    ) -> Float[Tensor, "batch tokens slots"]:
        """Return A, at least in float32, without dropout."""
        check_tokens(x, self.in_channels, type(self).__name__)
        x = autocast_input(x)
        with full_precision(x):
            base, key, key_bias = self._key_side(x)
            rows = attention_rows(
                base.transpose(1, 2),
                key,
                key_bias=key_bias,
                norm=self.normalization,
                eps=self.eps,
                mask=mask,
            )
        return rows.transpose(1, 2)

    @torch.no_grad()
    def fused(self) -> FusedExternalAttention:
        """Return an inference module that holds the products of the weights."""
        empty = self.memory_key.new_zeros(1, 1, self.in_channels)
        _, key, key_bias = self._key_side(empty)
        value, bias = self._value_side()
        keeps_query = key.shape[1] != self.in_channels or self.residual == "query"
        return FusedExternalAttention(
            key,
            value,
            key_bias=key_bias,
            bias=bias,
            query=self.query if keeps_query else None,
            norm=self.normalization,
            eps=self.eps,
            residual=self.residual != "none",
        )


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
