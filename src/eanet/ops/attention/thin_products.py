"""Products of a feature map with a thin matrix, the only large work of external attention.

Three shapes make up forward and backward pass: from a map to rows, from rows to a map, and the sum
over tokens of a map times rows. A map is (batch, channels, tokens) and lies either way: channels
first, or *token-major*, with the channels of a token side by side, as in (batch, tokens, channels)
and channels_last. Rows are (batch, slots, tokens), a small fraction of a map, and lie as the map
they were made from.

On a CPU a map does not fit a cache, so work goes tile by tile and whatever follows a product is
applied to its tile before the next. And products go to the library that is fastest at their shape:
oneDNN, which PyTorch uses for convolutions, rather than the BLAS behind ``torch.mm``, which on some
processors leaves half of their width unused. The operator is the one that inductor emits; where it
is missing, ``torch.mm`` gives the same up to rounding (``docs/decisions/0013-thin-products.md``).
"""

import math
import platform
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "empty_map",
    "is_token_major",
    "map_from_rows",
    "multiply",
    "parts",
    "rows_from_map",
    "sum_over_tokens",
    "tail",
    "uses_onednn",
]

#: multiply-adds of one product below which the call costs more than oneDNN saves
_LEAST_MACS_OF_ONEDNN = 1 << 20
#: multiply-adds with a sample below which all samples are multiplied at once
_LEAST_MACS_BY_SAMPLE = 1 << 20
#: entries of a tile of a map: 1 MiB of float32, for which no allocator asks the system twice
_TILE_ENTRIES = 1 << 18
#: entries of a map that is worked on at once
_ENTRIES_AT_ONCE = 1 << 20
#: most tokens of a tile whose tokens lie side by side
_TILE_TOKENS = 1 << 11
#: most tokens of rows that are read as they lie, side by side; longer rows meet in the same lines
#: of the cache
_ROW_TOKENS = 1 << 14
#: tokens that are copied together at once: 4 MiB of 512 channels
_COPIED_TOKENS = 1 << 11
#: tokens that are summed at once where the channels of a token lie side by side
_SUM_TOKENS = 1 << 12


def is_token_major(tensor: Tensor) -> bool:
    """Tell whether the channels of a token in (..., channels, tokens) lie side by side."""
    return tensor.shape[-2] > 1 and tensor.stride(-2) == 1


def empty_map(like: Tensor, num_rows: int, dtype: torch.dtype | None = None) -> Tensor:
    """Return an empty (batch, num_rows, tokens) that lies as a map does."""
    batch, _, tokens = like.shape
    if is_token_major(like):
        return like.new_empty((batch, tokens, num_rows), dtype=dtype).transpose(1, 2)
    return like.new_empty((batch, num_rows, tokens), dtype=dtype)


def tail(out: Tensor, num_rows: int) -> Tensor | None:
    """Return rows (batch, num_rows, tokens) in the last memory of a map that is still empty.

    Whoever computes the map from these rows, tokens in order, never writes over rows that are still
    to be read: the first t tokens end no later than where the rows of token t begin. Large fresh
    memory costs more on a CPU than what is done with it; this needs none.

    Args:
        out: (batch, channels, tokens).
        num_rows: at most as many as the channels.

    Returns:
        The rows, lying as the map does; or nothing if the map is not token-major, has gaps or is
        too small.
    """
    batch, channels, tokens = out.shape
    tokens_of = out.transpose(1, 2)
    if num_rows > channels or not is_token_major(out) or not tokens_of.is_contiguous():
        return None
    last = tokens_of.view(-1)[batch * tokens * (channels - num_rows) :]
    return last.view(batch, tokens, num_rows).transpose(1, 2)


def parts(length: int, most: int) -> Iterator[slice]:
    """Yield slices that cut a length into parts of at most ``most``."""
    for start in range(0, length, most):
        yield slice(start, min(start + most, length))


def uses_onednn(*operands: Tensor | None) -> bool:
    """Tell whether large products of tensors go to oneDNN, whose operator has no gradient."""
    given = [tensor for tensor in operands if tensor is not None]
    recorded = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given)
    return (
        not recorded
        and all(tensor.device.type == "cpu" for tensor in given)
        and all(tensor.dtype == torch.float32 for tensor in given)
        and platform.machine() in ("x86_64", "AMD64")
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def multiply(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return the product of two matrices, by the library that is fastest at their shape.

    Args:
        left: (rows, inner).
        right: (inner, columns).
        bias: (columns) to add to every row.

    Returns:
        (rows, columns), with the entries of a row side by side.
    """
    macs = left.shape[0] * left.shape[1] * right.shape[1]
    # an operand with gaps would take a path of oneDNN that is orders of magnitude slower
    dense = left.is_contiguous() and (right.is_contiguous() or right.t().is_contiguous())
    if macs >= _LEAST_MACS_OF_ONEDNN and dense and uses_onednn(left, right, bias):
        return torch.ops.mkldnn._linear_pointwise(left, right.t(), bias, "none", [], "")
    return torch.mm(left, right) if bias is None else torch.addmm(bias, left, right)


def _by_sample(weight_rows: int, tensor: Tensor) -> bool:
    """Tell whether the samples of a map are multiplied one by one."""
    macs = weight_rows * tensor.shape[1] * tensor.shape[2]
    return tensor.device.type == "cpu" and macs >= _LEAST_MACS_BY_SAMPLE


def _in_tiles(rows: Tensor, num_entries: int) -> bool:
    """Tell whether a map of so many entries is worked on in tiles."""
    return rows.device.type == "cpu" and num_entries > _ENTRIES_AT_ONCE


def rows_from_map(weight: Tensor, source: Tensor) -> Tensor:
    """Return ``weight @ source``: a thin matrix (slots, channels) times a map, as fresh rows.

    Args:
        weight: (slots, channels), in the type of the map.
        source: (batch, channels, tokens).
    """
    if is_token_major(source):
        tokens_of = source.transpose(1, 2)
        if tokens_of.is_contiguous():
            rows = multiply(tokens_of.flatten(0, 1), weight.t())
            rows = rows.view(*tokens_of.shape[:2], weight.shape[0])
        else:
            rows = torch.stack([multiply(sample, weight.t()) for sample in tokens_of.unbind()])
        return rows.transpose(1, 2)
    weight = weight.contiguous()
    # oneDNN copies what it reads into its own order; to a BLAS, long rows stand in each other's way
    as_it_lies = source.shape[2] <= _ROW_TOKENS or uses_onednn(weight, source)
    if source.shape[0] == 1 and as_it_lies and source.is_contiguous():
        return multiply(weight, source[0]).unsqueeze(0)
    if not _by_sample(weight.shape[0], source):
        return torch.bmm(weight.expand(source.shape[0], *weight.shape), source)
    out = empty_map(source, weight.shape[0])
    for sample, target in zip(source, out, strict=True):
        if as_it_lies and sample.is_contiguous():
            target.copy_(multiply(weight, sample))
            continue
        for tokens, part in _copied_together(sample, _COPIED_TOKENS):
            target[:, tokens] = multiply(weight, part)
    return out


def _copied_together(sample: Tensor, most: int) -> Iterator[tuple[slice, Tensor]]:
    """Yield parts of (channels, tokens) without gaps: rows far apart meet in the same cache lines.

    All parts take the same memory, one after the other: what is asked for anew for every part comes
    from the system every time, page by page.
    """
    channels, num_tokens = sample.shape
    memory = sample.new_empty(channels * min(most, num_tokens))
    for tokens in parts(num_tokens, most):
        length = tokens.stop - tokens.start
        yield tokens, memory[: channels * length].view(channels, length).copy_(sample[:, tokens])


def map_from_rows(
    weight: Tensor,
    rows: Tensor,
    *,
    like: Tensor,
    base: Tensor | None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    relu: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Return ``base + weight @ rows + bias``, rectified where wanted.

    Args:
        weight: (channels, slots), in the type of the map.
        rows: (batch, slots, tokens), in the type of the map.
        like: (batch, any channels, tokens), which the result lies as.
        base: (batch, channels, tokens) to add, or nothing.
        bias: (channels) to add, in the type of the map.
        mask: (batch, tokens), True for tokens that get the bias.
        relu: whether to rectify.
        out: (batch, channels, tokens) for the result; it may be the same tensor as ``base``, and
            the rows may lie in its :func:`tail`.
    """
    shape = (rows.shape[0], weight.shape[0], rows.shape[2])
    at_once = base is None and not relu and out is None and is_token_major(rows)
    if at_once or not _in_tiles(rows, math.prod(shape)):
        product = _product(weight, rows, bias, mask)
        if out is None and is_token_major(product) == is_token_major(like):
            out = product if base is None else product.add_(base)
        else:
            out = empty_map(like, weight.shape[0]) if out is None else out
            out = out.copy_(product) if base is None else torch.add(product, base, out=out)
        return out.relu_() if relu else out
    if out is None:
        out = empty_map(like, weight.shape[0])
    for sample in range(out.shape[0]):
        valid = None if mask is None else mask[sample]
        tiles = _tiles(weight, rows[sample], bias, valid, is_token_major(out))
        for channels, tokens, tile in tiles:
            target = out[sample, channels, tokens]
            if base is None:
                target.copy_(tile)
            else:
                torch.add(tile, base[sample, channels, tokens], out=target)
            if relu:
                target.relu_()
    return out


def _tiles(
    weight: Tensor, rows: Tensor, bias: Tensor | None, mask: Tensor | None, token_major: bool
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield channels, tokens and entries of the tiles of one sample of ``weight @ rows + bias``."""
    num_channels, num_tokens = weight.shape[0], rows.shape[1]
    if token_major:
        for tokens in parts(num_tokens, max(1, _TILE_ENTRIES // num_channels)):
            tile = multiply(rows[:, tokens].t(), weight.t(), bias)
            if bias is not None and mask is not None:
                tile.masked_fill_(~mask[tokens].unsqueeze(1), 0.0)
            yield slice(None), tokens, tile.t()
        return
    if bias is not None:  # the value of one more slot, whose attention is 1
        weight = torch.cat([weight, bias.unsqueeze(1)], dim=1)
    for tokens in parts(num_tokens, _TILE_TOKENS):
        of_tokens = rows[:, tokens].contiguous()
        if bias is not None:
            of_tokens = _with_row_of_ones(of_tokens, None if mask is None else mask[tokens])
        for channels in parts(num_channels, max(1, _TILE_ENTRIES // of_tokens.shape[1])):
            yield channels, tokens, multiply(weight[channels], of_tokens)


def _with_row_of_ones(rows: Tensor, mask: Tensor | None) -> Tensor:
    """Return rows (slots, tokens) and one more that is 1, or 0 where the mask is False."""
    longer = F.pad(rows, (0, 0, 0, 1), value=1.0)
    if mask is not None:
        longer[-1] = mask
    return longer


def _product(weight: Tensor, rows: Tensor, bias: Tensor | None, mask: Tensor | None) -> Tensor:
    """Return ``weight @ rows + bias`` for all samples at once, lying as the rows do."""
    if is_token_major(rows):
        tokens_of = rows.transpose(1, 2)
        if tokens_of.is_contiguous():
            product = multiply(tokens_of.flatten(0, 1), weight.t(), bias)
            product = product.view(*tokens_of.shape[:2], weight.shape[0])
        else:
            product = F.linear(tokens_of, weight, bias)
        product = product.transpose(1, 2)
    else:
        if rows.shape[0] == 1:
            product = multiply(weight.contiguous(), rows[0]).unsqueeze(0)
        else:
            product = torch.bmm(weight.expand(rows.shape[0], *weight.shape), rows)
        if bias is not None:
            product += bias.unsqueeze(1)
    if bias is not None and mask is not None:
        # rows are 0 there, so the bias is all there is
        product.masked_fill_(~mask.unsqueeze(1), 0.0)
    return product


def sum_over_tokens(
    rows: Tensor, source: Tensor, *, with_total: bool = False, mask: Tensor | None = None
) -> Tensor:
    """Return ``rows @ source^T`` (slots, channels), summed over tokens and samples.

    Args:
        rows: (batch, slots, tokens), in the type of the map.
        source: (batch, channels, tokens), lying as the rows do.
        with_total: append the sum of the source, as if one more row were 1 everywhere.
        mask: (batch, tokens), True for tokens that are part of that sum.
    """
    num_rows, num_channels = rows.shape[1], source.shape[1]
    if not _by_sample(num_rows, source):
        total = torch.bmm(rows, source.transpose(1, 2)).sum(0)
        if not with_total:
            return total
        valid = source if mask is None else source * mask.unsqueeze(1)
        return torch.cat([total, valid.sum((0, 2)).unsqueeze(0)])
    total = source.new_zeros((num_rows + with_total, num_channels))
    # sums of parts round less than one long sum
    for sample, (left, right) in enumerate(zip(rows, source, strict=True)):
        for tokens, of_tokens in _parts_of_sum(right):
            weights = left[:, tokens]
            if with_total:
                valid = None if mask is None else mask[sample, tokens]
                weights = _with_row_of_ones(weights, valid)
            total += multiply(weights.contiguous(), of_tokens.t())
    return total


def _parts_of_sum(sample: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield parts of (channels, tokens) whose channels or tokens lie side by side."""
    if not is_token_major(sample) and not (
        sample.shape[1] <= _ROW_TOKENS and sample.is_contiguous()
    ):
        yield from _copied_together(sample, _SUM_TOKENS)
        return
    for tokens in parts(sample.shape[1], _SUM_TOKENS if is_token_major(sample) else _ROW_TOKENS):
        yield tokens, sample[:, tokens]
