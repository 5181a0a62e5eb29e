"""Run the attention modules of a network in chunks of tokens, for images that are too large."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from eanet.ops.attention import custom_op
from eanet.ops.attention.block import BatchStatistics, external_attention_block
from eanet.ops.attention.chunked import chunked_external_attention_block
from eanet.ops.attention.streaming import DEFAULT_CHUNK_TOKENS

__all__ = ["StreamedModule", "stream"]


class StreamedModule(nn.Module):
    """Base of the attention modules that can run in chunks of tokens.

    Attributes:
        chunk_tokens: tokens whose attention is in memory at a time; ``None`` computes all at once.
        backend: "eager" or "triton"; ``None`` takes the Triton kernels on a GPU.
    """

    chunk_tokens: int | None = None
    backend: str | None = None

    def attention_block(
        self, x: Tensor, key: Tensor, value: Tensor, **arguments: Any
    ) -> tuple[Tensor, BatchStatistics | None]:
        """Compute :func:`~eanet.ops.attention.block.external_attention_block`, streamed if set."""
        if self.chunk_tokens is None:
            return external_attention_block(x, key, value, backend=self.backend, **arguments)
        if arguments.pop("out", None) is not None:
            raise ValueError("out is not for modules that run in chunks of tokens")
        return chunked_external_attention_block(
            x, key, value, chunk_tokens=self.chunk_tokens, **arguments
        )

    def uses_kernels(self, x: Tensor, num_slots: int) -> bool:
        """Tell whether the Triton kernels compute the attention of these tokens."""
        if self.chunk_tokens is not None or self.backend == "eager":
            return False
        return self.backend == "triton" or custom_op.suits(x, num_slots)

    def refuse_dropout(self, **probabilities: float) -> None:
        """Refuse to stream in training with dropout, whose choices a second pass cannot repeat.

        Raises:
            ValueError: a probability is above 0 while the module trains in chunks.
        """
        for name, probability in probabilities.items():
            if self.chunk_tokens is not None and self.training and probability > 0:
                raise ValueError(
                    f"{name} must be 0 to train in chunks of tokens, got {probability}; "
                    "set it to 0, call eval(), or leave stream()"
                )


@contextmanager
def stream(model: nn.Module, *, chunk_tokens: int = DEFAULT_CHUNK_TOKENS) -> Generator[nn.Module]:
    """Let all external attention inside a network run in chunks of tokens.

    Result and gradients are the same up to rounding; memory for the attention maps, of S numbers
    for each token and head, is needed for one chunk only. In exchange the attention is computed
    twice forward and, in training, again in the backward pass, which may also take place after the
    context. To stream for good, set ``chunk_tokens`` of the modules.

    Args:
        model: a network, or a single module of external attention, also a fused one.
        chunk_tokens: tokens of each sample that are worked on at a time.

    Yields:
        The model.

    Raises:
        ValueError: ``chunk_tokens`` is below 1, or the model holds no external attention.

    >>> import torch
    >>> from eanet.nn.external_attention import ExternalAttention2d
    >>> block = ExternalAttention2d(8, 4).eval()
    >>> with torch.no_grad(), stream(block, chunk_tokens=100):
    ...     block(torch.zeros(1, 8, 30, 50)).shape
    torch.Size([1, 8, 30, 50])
    """
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1, got {chunk_tokens}")
    before = {
        module: module.chunk_tokens
        for module in model.modules()
        if isinstance(module, StreamedModule)
    }
    if not before:
        raise ValueError(f"{type(model).__name__} holds no external attention that could stream")
    for module in before:
        module.chunk_tokens = chunk_tokens
    try:
        yield model
    finally:
        for module, previous in before.items():
            module.chunk_tokens = previous
