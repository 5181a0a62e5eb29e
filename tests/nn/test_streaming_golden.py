"""The authors' values again, with every attention layer in chunks of a few tokens."""

import pytest
from nn.test_attention_golden import (  # noqa: F401 (collected here once more)
    test_block_equals_the_original,
    test_mea_equals_the_original,
    test_multi_head_equals_the_original,
    test_token_attention_equals_the_original,
    test_token_block_equals_the_original,
)

from eanet.nn.streaming import StreamedModule
from eanet.ops.attention import chunked

pytestmark = pytest.mark.golden


@pytest.fixture(autouse=True)
def chunks_of_seven_tokens(monkeypatch):
    """Stream for good, and see that it happens, lest the comparison be an empty one."""
    monkeypatch.setattr(StreamedModule, "chunk_tokens", 7)
    calls = []
    gradients = chunked._Backward.gradients
    monkeypatch.setattr(
        chunked._Backward, "gradients", lambda self: calls.append(self) or gradients(self)
    )
    yield
    assert calls
