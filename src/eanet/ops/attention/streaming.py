"""External attention over more tokens than fit in memory, exactly.

Tokens come from a tensor, from an array that may be mapped from a file, or from a callable that
returns a fresh iterator of chunks each time it is called. They are read twice: first for the
softmax statistics of each slot, then to normalize and mix. The method is in
:mod:`eanet.ops.attention.chunked`.
"""

import mmap
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias, TypeGuard

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor

from eanet.ops.attention import Norm, check_mask, check_norm
from eanet.ops.attention.chunked import chunked_external_attention
from eanet.ops.attention.chunks import (
    ChunkOptions,
    Memories,
    SlotStatistics,
    normalize,
    without_autocast,
    working_dtype,
)

__all__ = [
    "DEFAULT_CHUNK_TOKENS",
    "Chunk",
    "Source",
    "check_memories",
    "external_attention_chunks",
    "external_attention_streaming",
]

Array: TypeAlias = npt.NDArray[Any]
#: a part of the tokens, (batch, tokens, channels)
Chunk: TypeAlias = Tensor | Array
#: all tokens, or a callable that returns a fresh iterator over chunks of them
Source: TypeAlias = Tensor | Array | Callable[[], Iterable[Chunk]]

#: 64 slots of so many float32 tokens take 8 MiB. Larger chunks gain nothing; in smaller ones the
#: threads wait for one another more often, which shows on a machine that is busy otherwise
DEFAULT_CHUNK_TOKENS = 32_768
#: mapped pages are handed back to the system after so many bytes of them were touched
_MAPPED_BYTES = 64 << 20


def external_attention_streaming(
    chunks: Source,
    memory_key: Float[Tensor, "slots channels"],
    memory_value: Float[Tensor, "slots value_channels"] | None = None,
    *,
    num_heads: int = 1,
    memory_key_bias: Float[Tensor, " slots"] | None = None,
    memory_value_bias: Float[Tensor, " value_channels"] | None = None,
    norm: Norm = "double",
    eps: float = 1e-9,
    mask: Chunk | None = None,
    chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
    out: Chunk | None = None,
) -> Chunk:
    """Attend from any number of tokens to two memories (Eq. 5-14, arXiv 2105.02358).

    The result equals that of :func:`eanet.ops.attention.external_attention` up to rounding; with
    several heads that of :func:`~eanet.ops.attention.multi_head_external_attention`. Beside tokens
    and result, memory is needed for one chunk of logits: ``batch * num_heads * slots *
    chunk_tokens`` numbers.

    Gradients are recorded where ``chunks`` is a tensor and ``out`` is not given; the backward pass
    computes the attention again. Results from arrays and callables carry none.

    Args:
        chunks: tokens (batch, tokens, channels), as a tensor or as a NumPy array or memory-map; or
            a callable that returns an iterator over chunks of them, along the tokens, of any
            lengths. It is called twice under "double" and must return the same chunks again.
        memory_key: M_k, (slots, channels per head).
        memory_value: M_v, (slots, value channels); ``None`` uses M_k.
        num_heads: number of heads H that share the memories.
        memory_key_bias: added to the logits of each slot.
        memory_value_bias: added to the result of each token.
        norm: "double" or "softmax" over the slots.
        eps: of the double normalization; 0 is the exact form.
        mask: True for tokens that take part, (batch, tokens); the others get 0.
        chunk_tokens: tokens in memory at a time, for tensors and arrays. A callable decides its
            own.
        out: where the result is written: a tensor, an array or a memory-map of shape (batch,
            tokens, num_heads * value channels). Needed for a callable.

    Returns:
        ``out`` where given, a new tensor otherwise: of the type of the tokens for a tensor, on the
        device and of the type of ``memory_key`` for an array.

    Raises:
        ValueError: shapes, types or options do not fit; a callable returned the same iterator
            twice, or other chunks the second time.

    >>> key = torch.ones(4, 3)
    >>> external_attention_streaming(torch.zeros(2, 5, 3), key, chunk_tokens=2).shape
    torch.Size([2, 5, 3])
    """
    check_memories(memory_key, memory_value, num_heads)
    check_norm(norm, eps)
    values = memory_key if memory_value is None else memory_value
    options = ChunkOptions(chunk_tokens=chunk_tokens, norm=norm, eps=eps)
    if isinstance(chunks, Tensor) and out is None:
        check_tokens(chunks, memory_key, num_heads)
        mask = None if mask is None else torch.as_tensor(mask, device=chunks.device)
        check_mask(mask, tuple(chunks.shape[:2]))
        return chunked_external_attention(
            chunks,
            memory_key,
            values,
            options=options,
            num_heads=num_heads,
            memory_key_bias=memory_key_bias,
            memory_value_bias=memory_value_bias,
            mask=mask,
        )
    operands = (chunks, memory_key, values, memory_key_bias, memory_value_bias)
    if isinstance(chunks, Tensor) and torch.is_grad_enabled() and _any_requires_grad(operands):
        raise ValueError("out records no gradients: leave it out, or use torch.no_grad()")
    width = num_heads * values.shape[1]
    if callable(chunks):
        if out is None:
            raise ValueError(
                "tokens from a callable need out, or external_attention_chunks, which yields"
            )
    elif out is None:
        _check_array(chunks)
        out = memory_key.new_empty((*chunks.shape[:2], width))
    else:
        _check_out(out, (*chunks.shape[:2], width))
    assert out is not None
    results = external_attention_chunks(
        chunks,
        memory_key,
        memory_value,
        num_heads=num_heads,
        memory_key_bias=memory_key_bias,
        memory_value_bias=memory_value_bias,
        norm=norm,
        eps=eps,
        mask=mask,
        chunk_tokens=chunk_tokens,
    )
    return _write(results, out, width)


def external_attention_chunks(
    chunks: Source,
    memory_key: Float[Tensor, "slots channels"],
    memory_value: Float[Tensor, "slots value_channels"] | None = None,
    *,
    num_heads: int = 1,
    memory_key_bias: Float[Tensor, " slots"] | None = None,
    memory_value_bias: Float[Tensor, " value_channels"] | None = None,
    norm: Norm = "double",
    eps: float = 1e-9,
    mask: Chunk | None = None,
    chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
) -> Iterator[Tensor]:
    """Yield the result of :func:`external_attention_streaming` chunk by chunk.

    Arguments and errors are those of that function. Nothing is read before the first result is
    asked for. That a callable returned other tokens the second time is known at the end only.

    Returns:
        An iterator over results (batch, tokens of the chunk, num_heads * value channels), which
        carry no gradients.
    """
    check_memories(memory_key, memory_value, num_heads)
    check_norm(norm, eps)
    options = ChunkOptions(chunk_tokens=chunk_tokens, norm=norm, eps=eps)
    values = memory_key if memory_value is None else memory_value
    source = _Chunks(chunks, mask, memory_key, num_heads, options.chunk_tokens)
    with torch.no_grad():
        memories = Memories.cast(
            memory_key,
            values.transpose(0, 1),
            memory_key_bias,
            memory_value_bias,
            working_dtype(memory_key.dtype),
        )
    return _results(source, memories, options, memory_key.dtype)


def _results(
    source: "_Chunks", memories: Memories, options: ChunkOptions, dtype: torch.dtype
) -> Iterator[Tensor]:
    """Yield results chunk by chunk; the caller's gradient mode holds wherever its code runs."""
    statistics = _gather(source, memories) if options.norm == "double" else None
    coverage = None
    if statistics is not None and source.is_callable:
        coverage = torch.zeros_like(statistics.total)
    for x, mask in source.read():
        with torch.no_grad(), without_autocast(x.device):
            attention, denominator = normalize(memories.logits(x), statistics, options, mask)
            if coverage is not None and denominator is not None:
                over_tokens = torch.bmm(attention, denominator.flatten(1).unsqueeze(-1))
                coverage += over_tokens.squeeze(-1)
            result = memories.mix(attention, mask, token_major=True)
            by_head = (result.shape[0] // source.num_heads, source.num_heads, *result.shape[1:])
            result = result.reshape(by_head).permute(0, 3, 1, 2).flatten(2).to(dtype)
        yield result
    if coverage is not None and statistics is not None:
        _check_coverage(coverage, statistics, memories.key.dtype)


def _any_requires_grad(operands: tuple[object, ...]) -> bool:
    """Tell whether gradients of any tensor are wanted."""
    return any(isinstance(operand, Tensor) and operand.requires_grad for operand in operands)


def _gather(source: "_Chunks", memories: Memories) -> SlotStatistics:
    """Read all tokens for the statistics of their softmax."""
    statistics = None
    for x, mask in source.read():
        if statistics is None:
            statistics = SlotStatistics(x.shape[0], memories.key.shape[0], memories.key)
        with torch.no_grad(), without_autocast(x.device):
            statistics.add(memories.logits(x), mask)
    return statistics or SlotStatistics(0, memories.key.shape[0], memories.key)


def _check_coverage(coverage: Tensor, statistics: SlotStatistics, dtype: torch.dtype) -> None:
    """Refuse a second pass whose softmax over the tokens does not sum to 1 for each slot."""
    expected = (statistics.total > 0).to(coverage.dtype)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-8
    # written so that it is false for NaN too, which finite tokens of the first pass cannot give
    same = (coverage - expected).abs() <= tolerance
    if not bool((same | ~statistics.total.isfinite()).all()):
        raise ValueError(
            "the second pass over chunks brought other tokens than the first: "
            "the callable must return an iterator over the same chunks each time"
        )


class _Chunks:
    """Tokens of any source, read as often as needed, as heads (batch * heads, channels, tokens)."""

    def __init__(
        self,
        source: Source,
        mask: Chunk | None,
        memory_key: Tensor,
        num_heads: int,
        chunk_tokens: int,
    ) -> None:
        self.is_callable = callable(source)
        if not self.is_callable:
            _check_array(source)
        self._source = source
        self._mask = mask
        self._key = memory_key
        self.num_heads = num_heads
        self._chunk_tokens = chunk_tokens
        self._batch: int | None = None
        #: tokens of one pass, once it is complete
        self._num_tokens: int | None = None
        self._last_iterator: Iterator[Chunk] | None = None
        if mask is not None and (mask.ndim != 2 or mask.dtype not in (torch.bool, np.bool_)):
            raise ValueError(
                "mask must be boolean (batch, tokens), "
                f"got shape {tuple(mask.shape)} of {mask.dtype}"
            )

    def read(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yield the tokens of each chunk and their mask (batch * heads, 1, tokens).

        Raises:
            ValueError: a chunk does not fit, or this pass has other tokens than the one before.
        """
        done = 0
        for chunk in self._iterate():
            check_tokens(chunk, self._key, self.num_heads)
            stop = done + chunk.shape[1]
            self._check_progress(chunk, stop)
            mask = self._mask_of(slice(done, stop))
            x = _to_tensor(chunk).detach().to(self._key.device, working_dtype(self._key.dtype))
            heads = x.reshape(*x.shape[:2], self.num_heads, self._key.shape[1])
            yield heads.permute(0, 2, 3, 1).flatten(0, 1), mask
            done = stop
        if self._num_tokens is not None and done != self._num_tokens:
            raise ValueError(
                f"the second pass over chunks ended after {done} of {self._num_tokens} tokens: "
                "the callable must return a fresh iterator each time it is called"
            )
        if self._mask is not None and done != self._mask.shape[1]:
            raise ValueError(f"mask has {self._mask.shape[1]} tokens, the chunks have {done}")
        self._num_tokens = done

    def _iterate(self) -> Iterator[Chunk]:
        """Yield the chunks as the source has them."""
        if not callable(self._source):
            release = _Release(self._source)
            for start in range(0, self._source.shape[1], self._chunk_tokens):
                chunk = self._source[:, start : start + self._chunk_tokens]
                yield chunk
                release.touched(chunk)
            return
        iterator = iter(self._source())
        # iter() of an iterator is itself: the very object of the first pass is exhausted
        if iterator is self._last_iterator:
            raise ValueError(
                "the callable returned the same iterator twice; it must return a fresh one each "
                "time, as a generator function does"
            )
        self._last_iterator = iterator
        yield from iterator

    def _check_progress(self, chunk: Chunk, stop: int) -> None:
        """Refuse a change of the batch size, and more tokens than expected."""
        self._batch = chunk.shape[0] if self._batch is None else self._batch
        if chunk.shape[0] != self._batch:
            raise ValueError(
                f"every chunk must have the batch size of the first, {self._batch}, "
                f"got shape {tuple(chunk.shape)}"
            )
        if self._num_tokens is not None and stop > self._num_tokens:
            raise ValueError(
                f"the second pass over chunks brought more than the {self._num_tokens} tokens of "
                "the first: the callable must return an iterator over the same chunks each time"
            )
        if self._mask is not None and (
            self._mask.shape[0] != self._batch or stop > self._mask.shape[1]
        ):
            raise ValueError(
                f"mask of shape {tuple(self._mask.shape)} does not fit chunks of batch "
                f"{self._batch} with {stop} tokens or more"
            )

    def _mask_of(self, part: slice) -> Tensor | None:
        """Return the mask of a chunk for every head."""
        if self._mask is None:
            return None
        mask = _to_tensor(self._mask[:, part]).to(self._key.device)
        return mask.repeat_interleave(self.num_heads, 0).unsqueeze(1)


class _Release:
    """Hands the pages of a memory-mapped array back after use, so that they do not pile up.

    The data stay in the file (and in the system's cache, which is not this process's memory).
    Arrays that are not mapped, and private copy-on-write maps, whose changes would be lost, are
    left alone.
    """

    def __init__(self, array: Chunk) -> None:
        self._touched = 0
        self._map: mmap.mmap | None = None
        if isinstance(array, np.memmap) and getattr(array, "mode", "c") != "c":
            base: Any = array
            while base is not None and not isinstance(base, mmap.mmap):
                base = getattr(base, "base", None)
            if hasattr(mmap, "MADV_DONTNEED"):
                self._map = base

    def touched(self, chunk: Chunk) -> None:
        """Count the bytes of a chunk, and hand pages back when there are many."""
        self._touched += chunk.nbytes
        if self._map is not None and self._touched >= _MAPPED_BYTES:
            self._map.madvise(mmap.MADV_DONTNEED)
            self._touched = 0


def _write(results: Iterator[Tensor], out: Chunk, width: int) -> Chunk:
    """Copy results to their place along the tokens; refuse an out of another length."""
    done, batch, release = 0, out.shape[0], _Release(out)
    for result in results:
        stop = done + result.shape[1]
        if out.ndim != 3 or out.shape[1] < stop or result.shape[0] != batch:
            _check_out(out, (result.shape[0], stop, width), more=True)
        if isinstance(out, Tensor):
            out[:, done:stop] = result
        else:
            place = out[:, done:stop]
            # NumPy has no bfloat16
            place[...] = result.to("cpu", working_dtype(result.dtype)).numpy()
            release.touched(place)
        done = stop
    _check_out(out, (batch, done, width))
    return out


def _check_out(out: Chunk, shape: tuple[int, ...], *, more: bool = False) -> None:
    """Refuse a buffer of another shape or of integers."""
    if tuple(out.shape) != shape:
        least = " or more tokens" if more else ""
        raise ValueError(f"out must have shape {shape}{least}, got {tuple(out.shape)}")


def _check_array(source: object) -> None:
    """Refuse what is neither tensor nor array, such as an iterator, which can be read only once."""
    if not _is_array(source):
        raise ValueError(
            "chunks must be a tensor, an array, or a callable that returns a fresh iterator of "
            f"chunks each time; got {type(source).__name__}"
        )
    if source.ndim != 3:
        raise ValueError(
            f"chunks must be (batch, tokens, channels), got shape {tuple(source.shape)}"
        )


def _to_tensor(chunk: Chunk) -> Tensor:
    """Return a chunk as a tensor; arrays are copied, for a map may be read-only."""
    return chunk if isinstance(chunk, Tensor) else torch.as_tensor(np.array(chunk))


def _is_array(value: object) -> TypeGuard[Chunk]:
    """Tell whether a value, which a caller's callable may have made, is a tensor or an array."""
    return isinstance(value, Tensor | np.ndarray)


def check_tokens(chunk: object, memory_key: Tensor, num_heads: int) -> None:
    """Refuse tokens of another shape or of integers.

    Raises:
        ValueError: they are not (batch, tokens, channels) numbers that fit the memory.
    """
    if not _is_array(chunk):
        raise ValueError(f"a chunk must be a tensor or an array, got {type(chunk).__name__}")
    width = num_heads * memory_key.shape[1]
    if chunk.ndim != 3 or chunk.shape[2] != width:
        raise ValueError(
            f"tokens must be (batch, tokens, {width}) for {num_heads} heads of "
            f"{memory_key.shape[1]} channels, got shape {tuple(chunk.shape)}"
        )
    floating = (
        chunk.is_floating_point()
        if isinstance(chunk, Tensor)
        else np.issubdtype(chunk.dtype, np.floating)
    )
    if not floating:
        raise ValueError(f"tokens must be floating-point numbers, got {chunk.dtype}")


def check_memories(memory_key: Tensor, memory_value: Tensor | None, num_heads: int) -> None:
    """Refuse memories that do not belong together.

    Raises:
        ValueError: they are not matrices with the same number of slots, or there is no head.
    """
    if num_heads < 1:
        raise ValueError(f"num_heads must be at least 1, got {num_heads}")
    if memory_key.ndim != 2:
        raise ValueError(f"memory_key must be (slots, channels), got {tuple(memory_key.shape)}")
    if memory_value is not None and (
        memory_value.ndim != 2 or memory_value.shape[0] != memory_key.shape[0]
    ):
        raise ValueError(
            f"memory_value must be ({memory_key.shape[0]} slots, channels), "
            f"got shape {tuple(memory_value.shape)}"
        )
