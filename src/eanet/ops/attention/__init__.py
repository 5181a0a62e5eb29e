"""External attention and the double normalization, as functions.

Arguments are checked here; the work is done by a backend. ``reference`` holds the equations line
by line, ``eager`` is the fast path in plain PyTorch, ``triton`` runs kernels of our own and is the
default for tensors on a GPU.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from eanet.ops.attention import block, custom_op, eager, reference

__all__ = [
    "BACKENDS",
    "DEFAULT_BACKEND",
    "GPU_BACKENDS",
    "Backend",
    "Norm",
    "double_normalize",
    "external_attention",
    "multi_head_external_attention",
    "slot_softmax",
]

#: how logits become attention: the double normalization, or a softmax over the slots
Norm = Literal["double", "softmax"]


@dataclass(frozen=True)
class Backend:
    """The functions that one implementation offers; signatures as in :mod:`.reference`.

    ``result_only`` computes the result of any number of heads without an attention map; a backend
    has it where that saves something.
    """

    double_normalize: Callable[..., Tensor]
    slot_softmax: Callable[..., Tensor]
    external_attention: Callable[..., tuple[Tensor, Tensor]]
    multi_head_external_attention: Callable[..., tuple[Tensor, Tensor]]
    result_only: Callable[..., Tensor] | None = None


def _backend_of(module: Any) -> Backend:
    """Collect the functions of a backend's module."""
    return Backend(
        double_normalize=module.double_normalize,
        slot_softmax=module.slot_softmax,
        external_attention=module.external_attention,
        multi_head_external_attention=module.multi_head_external_attention,
        result_only=getattr(module, "result_only", None),
    )


#: backends that run on any device
BACKENDS: Final[dict[str, Backend]] = {
    "reference": _backend_of(reference),
    "eager": replace(_backend_of(eager), result_only=block.result_only),
}
#: backends that need a GPU; they refuse other tensors when they are called
GPU_BACKENDS: Final[dict[str, Backend]] = {"triton": _backend_of(custom_op)}
DEFAULT_BACKEND: Final = "eager"


def _backend(name: str | None, x: Tensor | None = None, num_slots: int = 0) -> Backend:
    """Return a backend by name; for ``None`` the kernels where they suit x, else the default."""
    if name is None:
        by_kernels = x is not None and custom_op.suits(x, num_slots)
        name = "triton" if by_kernels else DEFAULT_BACKEND
    known = BACKENDS | GPU_BACKENDS
    if name not in known:
        raise ValueError(f"backend must be one of {sorted(known)}, got {name!r}")
    return known[name]


def check_norm(norm: str, eps: float) -> None:
    """Refuse an unknown norm or an eps that is no small number.

    Raises:
        ValueError: norm is neither "double" nor "softmax", or eps is outside [0, 1).
    """
    if norm not in ("double", "softmax"):
        raise ValueError(f"norm must be 'double' or 'softmax', got {norm!r}")
    if not 0 <= eps < 1:
        raise ValueError(f"eps must be within [0, 1), got {eps}")


def check_mask(mask: Tensor | None, shape: tuple[int, ...], name: str = "mask") -> None:
    """Refuse a mask that is not boolean or has another shape.

    Raises:
        ValueError: dtype or shape differ from what is expected.
    """
    if mask is None:
        return
    if mask.dtype != torch.bool:
        raise ValueError(f"{name} must be boolean (True = takes part), got {mask.dtype}")
    if tuple(mask.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(mask.shape)}")


def _check_dims(
    logits: Tensor, token_dim: int, slot_dim: int, mask: Tensor | None, slot_mask: Tensor | None
) -> None:
    """Refuse dimensions that do not exist or coincide, and masks that do not fit them."""
    for name, dim in (("token_dim", token_dim), ("slot_dim", slot_dim)):
        if not -logits.ndim <= dim < logits.ndim:
            raise ValueError(f"{name} {dim} is outside logits of shape {tuple(logits.shape)}")
    if token_dim % logits.ndim == slot_dim % logits.ndim:
        raise ValueError(f"token_dim {token_dim} and slot_dim {slot_dim} are the same dimension")
    if (mask is not None or slot_mask is not None) and (
        logits.ndim < 3 or 0 in (token_dim % logits.ndim, slot_dim % logits.ndim)
    ):
        raise ValueError(
            "a mask needs logits whose first dimension is the batch, "
            f"got shape {tuple(logits.shape)} with token_dim {token_dim}, slot_dim {slot_dim}"
        )
    check_mask(mask, (logits.shape[0], logits.shape[token_dim]))
    check_mask(slot_mask, (logits.shape[0], logits.shape[slot_dim]), "slot_mask")


def double_normalize(
    logits: Float[Tensor, "..."],
    *,
    token_dim: int = -2,
    slot_dim: int = -1,
    eps: float = 1e-9,
    mask: Bool[Tensor, "batch tokens"] | None = None,
    slot_mask: Bool[Tensor, "batch slots"] | None = None,
    backend: str | None = None,
) -> Float[Tensor, "..."]:
    """Turn logits into attention: a softmax over the tokens, then division by the sum over slots.

    Eq. 10-11, arXiv 2105.02358, with the eps of the authors' code::

        P[n, s] = exp(l[n, s]) / sum over n' of exp(l[n', s])
        A[n, s] = P[n, s] / (eps + sum over s' of P[n, s'])

    Args:
        logits: any number of dimensions, two of which are tokens and slots.
        token_dim: the dimension of the tokens.
        slot_dim: the dimension of the memory slots.
        eps: 1e-9 as in published weights; 0 gives rows that sum to 1 exactly.
        mask: True for tokens that take part. The others are left out of the softmax and get 0.
            The first dimension of the logits is the batch then.
        slot_mask: True for slots that take part, for attention among tokens, where a padded token
            is a slot as well.
        backend: a key of :data:`BACKENDS` or :data:`GPU_BACKENDS`; the default is
            :data:`DEFAULT_BACKEND`.

    Returns:
        Attention of the shape and type of the logits, within [0, 1]. A sample whose tokens are all
        masked gets zeros.

    Raises:
        ValueError: a dimension, eps, a mask or the backend does not fit.

    >>> import torch
    >>> double_normalize(torch.zeros(1, 2, 4), eps=0.0)[0]
    tensor([[0.2500, 0.2500, 0.2500, 0.2500],
            [0.2500, 0.2500, 0.2500, 0.2500]])
    """
    check_norm("double", eps)
    _check_dims(logits, token_dim, slot_dim, mask, slot_mask)
    return _backend(backend).double_normalize(
        logits, token_dim=token_dim, slot_dim=slot_dim, eps=eps, mask=mask, slot_mask=slot_mask
    )


def slot_softmax(
    logits: Float[Tensor, "..."],
    *,
    token_dim: int = -2,
    slot_dim: int = -1,
    mask: Bool[Tensor, "batch tokens"] | None = None,
    slot_mask: Bool[Tensor, "batch slots"] | None = None,
    backend: str | None = None,
) -> Float[Tensor, "..."]:
    """Turn logits into attention by a softmax over the slots of each token.

    This is ``norm="softmax"``: Eq. 1 for attention among tokens, row 6 of Table 1 for external
    attention. Arguments as for :func:`double_normalize`; masked tokens get 0.
    """
    _check_dims(logits, token_dim, slot_dim, mask, slot_mask)
    return _backend(backend).slot_softmax(
        logits, token_dim=token_dim, slot_dim=slot_dim, mask=mask, slot_mask=slot_mask
    )


def external_attention(
    x: Float[Tensor, "batch tokens channels"],
    memory_key: Float[Tensor, "slots channels"],
    memory_value: Float[Tensor, "slots value_channels"] | None = None,
    *,
    memory_key_bias: Float[Tensor, " slots"] | None = None,
    memory_value_bias: Float[Tensor, " value_channels"] | None = None,
    norm: Norm = "double",
    eps: float = 1e-9,
    mask: Bool[Tensor, "batch tokens"] | None = None,
    return_attention: bool = False,
    backend: str | None = None,
    out: Float[Tensor, "batch tokens value_channels"] | None = None,
) -> (
    Float[Tensor, "batch tokens value_channels"]
    | tuple[Float[Tensor, "batch tokens value_channels"], Float[Tensor, "batch tokens slots"]]
):
    """Attend from each token to the rows of two memories (Eq. 5-11, arXiv 2105.02358).

    Args:
        x: tokens, already projected to queries where that is wanted.
        memory_key: M_k; one row for each slot.
        memory_value: M_v; ``None`` uses M_k for both, the single memory of Eq. 5-6.
        memory_key_bias: added to the logits of each slot; without effect under "double".
        memory_value_bias: added to the result of each token.
        norm: "double" (Eq. 10-11) or "softmax" over the slots.
        eps: see :func:`double_normalize`.
        mask: True for tokens that take part; the others get 0.
        return_attention: return the map as well.
        backend: a key of :data:`BACKENDS` or :data:`GPU_BACKENDS`; by default "triton" for tensors
            on a GPU that the kernels can take, :data:`DEFAULT_BACKEND` otherwise.
        out: a contiguous buffer for the result, where no gradients are recorded; the matter of
            "eager" alone. Fresh memory of many MiB costs as much as the computation.

    Returns:
        The result, or the result and the attention map.

    Raises:
        ValueError: shapes, mask, norm, eps, backend or buffer do not fit.

    >>> import torch
    >>> external_attention(torch.zeros(2, 5, 3), torch.ones(4, 3)).shape
    torch.Size([2, 5, 3])
    """
    _check_operands(x, memory_key, memory_value, 1)
    check_norm(norm, eps)
    check_mask(mask, tuple(x.shape[:2]))
    chosen = _backend(backend, x, memory_key.shape[0])
    if out is not None:
        chosen = _eager_into(out, backend, return_attention)
    if chosen.result_only is not None and not return_attention:
        return chosen.result_only(
            x,
            memory_key,
            memory_value,
            memory_key_bias=memory_key_bias,
            memory_value_bias=memory_value_bias,
            norm=norm,
            eps=eps,
            mask=mask,
        )
    output, attention = chosen.external_attention(
        x,
        memory_key,
        memory_value,
        memory_key_bias=memory_key_bias,
        memory_value_bias=memory_value_bias,
        norm=norm,
        eps=eps,
        mask=mask,
    )
    return (output, attention) if return_attention else output


def multi_head_external_attention(
    x: Float[Tensor, "batch tokens channels"],
    memory_key: Float[Tensor, "slots head_channels"],
    memory_value: Float[Tensor, "slots value_channels"] | None = None,
    *,
    num_heads: int,
    memory_key_bias: Float[Tensor, " slots"] | None = None,
    memory_value_bias: Float[Tensor, " value_channels"] | None = None,
    norm: Norm = "double",
    eps: float = 1e-9,
    mask: Bool[Tensor, "batch tokens"] | None = None,
    return_attention: bool = False,
    backend: str | None = None,
    out: Float[Tensor, "batch tokens width"] | None = None,
) -> (
    Float[Tensor, "batch tokens width"]
    | tuple[Float[Tensor, "batch tokens width"], Float[Tensor, "batch heads tokens slots"]]
):
    """Attend head by head with memories that all heads share (Eq. 12-14, without W_o).

    Head h takes the channels ``h * d`` to ``(h + 1) * d`` of x, with d the width of a memory row,
    and the results stand side by side in the same order. Other arguments and errors are those of
    :func:`external_attention`.

    Args:
        x: projected tokens, ``num_heads * d`` channels.
        memory_key: M_k, (slots, d).
        memory_value: M_v, (slots, value channels); ``None`` uses M_k.
        num_heads: number of heads H.
        memory_key_bias: see :func:`external_attention`.
        memory_value_bias: see :func:`external_attention`.
        norm: see :func:`external_attention`.
        eps: see :func:`external_attention`.
        mask: see :func:`external_attention`.
        return_attention: return the map as well.
        backend: a key of :data:`BACKENDS` or :data:`GPU_BACKENDS`.
        out: see :func:`external_attention`.

    >>> import torch
    >>> multi_head_external_attention(torch.zeros(2, 5, 6), torch.ones(4, 3), num_heads=2).shape
    torch.Size([2, 5, 6])
    """
    _check_operands(x, memory_key, memory_value, num_heads)
    check_norm(norm, eps)
    check_mask(mask, tuple(x.shape[:2]))
    chosen = _backend(backend, x, memory_key.shape[0])
    if out is not None:
        chosen = _eager_into(out, backend, return_attention)
    if chosen.result_only is not None and not return_attention:
        return chosen.result_only(
            x,
            memory_key,
            memory_value,
            num_heads=num_heads,
            memory_key_bias=memory_key_bias,
            memory_value_bias=memory_value_bias,
            norm=norm,
            eps=eps,
            mask=mask,
        )
    output, attention = chosen.multi_head_external_attention(
        x,
        memory_key,
        memory_value,
        num_heads=num_heads,
        memory_key_bias=memory_key_bias,
        memory_value_bias=memory_value_bias,
        norm=norm,
        eps=eps,
        mask=mask,
    )
    return (output, attention) if return_attention else output


def _eager_into(out: Tensor, backend: str | None, return_attention: bool) -> Backend:
    """Return the eager backend with a buffer for its result.

    Raises:
        ValueError: the map is wanted too, or another backend is asked for.
    """
    if return_attention:
        raise ValueError("out takes the result alone: leave out, or return_attention=False")
    if backend not in (None, "eager"):
        raise ValueError(f"out is for backend='eager', got {backend!r}")
    return replace(BACKENDS["eager"], result_only=partial(block.result_only, out=out))


def _check_operands(
    x: Tensor, memory_key: Tensor, memory_value: Tensor | None, num_heads: int
) -> None:
    """Refuse tokens and memories whose shapes do not belong together."""
    if num_heads < 1:
        raise ValueError(f"num_heads must be at least 1, got {num_heads}")
    if x.ndim != 3:
        raise ValueError(f"x must be (batch, tokens, channels), got shape {tuple(x.shape)}")
    if memory_key.ndim != 2 or memory_key.shape[1] * num_heads != x.shape[2]:
        heads = f" = {num_heads} heads of {x.shape[2] / num_heads:g}" if num_heads > 1 else ""
        raise ValueError(
            f"memory_key must be (slots, channels per head) for x with {x.shape[2]} channels"
            f"{heads}, got shape {tuple(memory_key.shape)}"
        )
    if memory_value is not None and (
        memory_value.ndim != 2 or memory_value.shape[0] != memory_key.shape[0]
    ):
        raise ValueError(
            f"memory_value must be ({memory_key.shape[0]} slots, channels), "
            f"got shape {tuple(memory_value.shape)}"
        )
