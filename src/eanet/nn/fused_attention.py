"""What the attention modules become for inference: two thin matrices and a bias."""

from jaxtyping import Bool, Float
from torch import Tensor, nn

from eanet.nn.dropout import dropout as drop
from eanet.nn.memories import autocast_input, cast, check_tokens, flat_view, full_precision
from eanet.nn.streaming import StreamedModule
from eanet.ops.attention import Norm, check_mask
from eanet.ops.attention.attention_rows import attention_rows, normalize_tokens, token_logits
from eanet.ops.attention.linear import linear

__all__ = [
    "FusedExternalAttention",
    "FusedExternalAttention2d",
    "FusedMultiHeadExternalAttention",
    "attend_heads",
    "head_attention",
]


class _FusedModule(StreamedModule):
    """Keys (S, C), values (C', S) and their biases as frozen parameters."""

    def __init__(
        self,
        key: Tensor,
        value: Tensor,
        *,
        key_bias: Tensor | None,
        bias: Tensor | None,
        norm: Norm,
        eps: float,
    ) -> None:
        super().__init__()
        self.key = _frozen(key)
        self.value = _frozen(value)
        self.key_bias = None if key_bias is None else _frozen(key_bias)
        self.bias = None if bias is None else _frozen(bias)
        self.normalization: Norm = norm
        self.eps = eps

    def extra_repr(self) -> str:
        """Return the sizes for ``print(model)``."""
        return f"key={tuple(self.key.shape)}, value={tuple(self.value.shape)}"


def _frozen(tensor: Tensor) -> nn.Parameter:
    """Return a copy as a parameter that is not trained."""
    return nn.Parameter(tensor.detach().clone().contiguous(), requires_grad=False)


class FusedExternalAttention(_FusedModule):
    """The inference form of ``ExternalAttention``; made by its ``fused()``."""

    def __init__(
        self,
        key: Tensor,
        value: Tensor,
        *,
        key_bias: Tensor | None,
        bias: Tensor | None,
        query: nn.Linear | None,
        norm: Norm,
        eps: float,
        residual: bool,
    ) -> None:
        super().__init__(key, value, key_bias=key_bias, bias=bias, norm=norm, eps=eps)
        self.residual = residual
        self.in_channels = key.shape[1] if query is None else query.in_features
        self.query_weight = None if query is None else _frozen(query.weight)
        # without the residual the bias of the query is already part of key_bias, or cancels
        query_bias: Tensor | None = query.bias if query is not None and residual else None
        self.query_bias = None if query_bias is None else _frozen(query_bias)

    def _base(self, x: Tensor) -> Tensor:
        """Return the query where it is kept, otherwise x; channels before tokens."""
        if self.query_weight is not None:
            x = linear(x, self.query_weight.to(x.dtype), cast(self.query_bias, x.dtype))
        return x.transpose(1, 2)

    def forward(
        self,
        x: Float[Tensor, "batch tokens in_channels"],
        mask: Bool[Tensor, "batch tokens"] | None = None,
        *,
        out: Float[Tensor, "batch tokens channels"] | None = None,
    ) -> Float[Tensor, "batch tokens channels"]:
        """Attend from every token to the memories; arguments as before fusion."""
        check_tokens(x, self.in_channels, "ExternalAttention")
        check_mask(mask, tuple(x.shape[:2]))
        x = autocast_input(x)
        with full_precision(x):
            result, _ = self.attention_block(
                self._base(x),
                self.key,
                self.value,
                key_bias=self.key_bias,
                bias=self.bias,
                norm=self.normalization,
                eps=self.eps,
                mask=mask,
                residual=self.residual,
                relu=False,
                out=None if out is None else out.transpose(1, 2),
            )
        return result.transpose(1, 2) if out is None else out

    def attention_map(
        self,
        x: Float[Tensor, "batch tokens in_channels"],
        mask: Bool[Tensor, "batch tokens"] | None = None,
    ) -> Float[Tensor, "batch tokens slots"]:
        """Return A, at least in float32."""
        x = autocast_input(x)
        with full_precision(x):
            rows = attention_rows(
                self._base(x),
                self.key,
                key_bias=self.key_bias,
                norm=self.normalization,
                eps=self.eps,
                mask=mask,
            )
        return rows.transpose(1, 2)


class FusedExternalAttention2d(_FusedModule):
    """The inference form of ``ExternalAttention2d``; made by its ``fused()``."""

    def __init__(
        self,
        key: Tensor,
        value: Tensor,
        *,
        key_bias: Tensor | None,
        bias: Tensor | None,
        norm: Norm,
        eps: float,
        residual: bool,
        relu: bool,
    ) -> None:
        super().__init__(key, value, key_bias=key_bias, bias=bias, norm=norm, eps=eps)
        self.residual = residual
        self.relu = relu

    def forward(
        self,
        x: Float[Tensor, "batch channels height width"],
        mask: Bool[Tensor, "batch height width"] | None = None,
        *,
        out: Float[Tensor, "batch channels height width"] | None = None,
    ) -> Float[Tensor, "batch channels height width"]:
        """Attend from every position to the memories; arguments as before fusion."""
        self._check(x, mask)
        x = autocast_input(x)
        with full_precision(x):
            result, _ = self.attention_block(
                x.flatten(2),
                self.key,
                self.value,
                key_bias=self.key_bias,
                bias=self.bias,
                norm=self.normalization,
                eps=self.eps,
                mask=None if mask is None else mask.flatten(1),
                residual=self.residual,
                relu=self.relu,
                out=flat_view(out),
            )
        return result.reshape(*result.shape[:2], *x.shape[2:]) if out is None else out

    def attention_map(
        self,
        x: Float[Tensor, "batch channels height width"],
        mask: Bool[Tensor, "batch height width"] | None = None,
    ) -> Float[Tensor, "batch slots height width"]:
        """Return A, at least in float32."""
        self._check(x, mask)
        x = autocast_input(x)
        with full_precision(x):
            rows = attention_rows(
                x.flatten(2),
                self.key,
                key_bias=self.key_bias,
                norm=self.normalization,
                eps=self.eps,
                mask=None if mask is None else mask.flatten(1),
            )
        return rows.reshape(*rows.shape[:2], *x.shape[2:])

    def _check(self, x: Tensor, mask: Tensor | None) -> None:
        """Refuse inputs and masks of another shape."""
        if x.ndim != 4 or x.shape[1] != self.key.shape[1]:
            raise ValueError(
                f"ExternalAttention2d takes (batch, {self.key.shape[1]}, height, width), "
                f"got {tuple(x.shape)}"
            )
        check_mask(mask, (x.shape[0], *x.shape[2:]))


def attend_heads(
    x: Float[Tensor, "batch tokens channels"],
    key: Float[Tensor, "rows channels"],
    value: Float[Tensor, "out_channels rows"],
    *,
    num_heads: int,
    key_bias: Float[Tensor, " rows"] | None,
    bias: Float[Tensor, " out_channels"] | None,
    norm: Norm,
    eps: float,
    mask: Bool[Tensor, "batch tokens"] | None = None,
    dropout: float = 0.0,
) -> Float[Tensor, "batch tokens out_channels"]:
    """Return ``value @ norm(key @ x + key_bias) + bias``, with a normalization for each head.

    Args:
        x: tokens.
        key: the slots of the heads, one head after the other, times the projection of the queries.
        value: the projection of the result times the values, for the same rows.
        num_heads: how many normalizations stand side by side.
        key_bias: added to the logits.
        bias: added to the result.
        norm: "double" or "softmax".
        eps: of the double normalization.
        mask: True for tokens that take part; the attention of the others is 0.
        dropout: probability to drop an entry of the attention.
    """
    attention = head_attention(
        x, key, num_heads=num_heads, key_bias=key_bias, norm=norm, eps=eps, mask=mask
    )
    if dropout > 0:
        attention = drop(attention, dropout)
    return linear(attention.to(x.dtype).flatten(2), value.to(x.dtype), cast(bias, x.dtype))


def head_attention(
    x: Float[Tensor, "batch tokens channels"],
    key: Float[Tensor, "rows channels"],
    *,
    num_heads: int,
    key_bias: Float[Tensor, " rows"] | None,
    norm: Norm,
    eps: float,
    mask: Bool[Tensor, "batch tokens"] | None,
) -> Float[Tensor, "batch tokens heads slots"]:
    """Return the attention of :func:`attend_heads`, at least in float32, without dropout."""
    logits = token_logits(x, key, key_bias)
    logits = logits.view(*x.shape[:2], num_heads, key.shape[0] // num_heads)
    return normalize_tokens(logits, norm=norm, eps=eps, mask=mask)


class FusedMultiHeadExternalAttention(_FusedModule):
    """The inference form of ``MultiHeadExternalAttention``; made by its ``fused()``."""

    def __init__(
        self,
        key: Tensor,
        value: Tensor,
        *,
        num_heads: int,
        key_bias: Tensor | None,
        bias: Tensor | None,
        norm: Norm,
        eps: float,
    ) -> None:
        super().__init__(key, value, key_bias=key_bias, bias=bias, norm=norm, eps=eps)
        self.num_heads = num_heads

    def forward(
        self,
        x: Float[Tensor, "batch tokens channels"],
        mask: Bool[Tensor, "batch tokens"] | None = None,
    ) -> Float[Tensor, "batch tokens channels"]:
        """Attend from every token to the memories, head by head; arguments as before fusion."""
        self._check(x, mask)
        x = autocast_input(x)
        with full_precision(x):
            if self.chunk_tokens is not None:
                out, _ = self.attention_block(
                    x.transpose(1, 2),
                    self.key,
                    self.value,
                    num_groups=self.num_heads,
                    key_bias=self.key_bias,
                    bias=self.bias,
                    norm=self.normalization,
                    eps=self.eps,
                    mask=mask,
                    residual=False,
                    relu=False,
                )
                return out.transpose(1, 2)
            out = attend_heads(
                x,
                self.key,
                self.value,
                num_heads=self.num_heads,
                key_bias=self.key_bias,
                bias=self.bias,
                norm=self.normalization,
                eps=self.eps,
                mask=mask,
            )
            return out if mask is None else out.masked_fill(~mask.unsqueeze(-1), 0.0)

    def attention_map(
        self,
        x: Float[Tensor, "batch tokens channels"],
        mask: Bool[Tensor, "batch tokens"] | None = None,
    ) -> Float[Tensor, "batch heads tokens slots"]:
        """Return A, at least in float32."""
        self._check(x, mask)
        x = autocast_input(x)
        with full_precision(x):
            attention = head_attention(
                x,
                self.key,
                num_heads=self.num_heads,
                key_bias=self.key_bias,
                norm=self.normalization,
                eps=self.eps,
                mask=mask,
            )
        return attention.transpose(1, 2)

    def _check(self, x: Tensor, mask: Tensor | None) -> None:
        """Refuse inputs and masks of another shape."""
        check_tokens(x, self.key.shape[1], "MultiHeadExternalAttention")
        check_mask(mask, tuple(x.shape[:2]))
