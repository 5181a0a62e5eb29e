"""How the work of the kernels is cut."""

import pytest
import torch

from eanet.ops.attention.tiling import Parts, is_long, split_tokens


@pytest.mark.parametrize(
    ("num_tokens", "strides", "expected"),
    [
        (1 << 20, (1, 512, 1), False),
        (1 << 20, (1, 1, 1 << 24), True),  # the last channel of a tile
        ((1 << 31) - 64, (1, 1, 0), True),  # the end of the last tile
        ((1 << 31) - 65, (1, 1, 0), False),
    ],
)
def test_what_32_bits_cannot_count(num_tokens, strides, expected):
    assert is_long(num_tokens, 64, 128, strides) == expected


@pytest.mark.parametrize(("tokens", "wanted", "expected"), [
    (16_384, 33, (32, 512)),  # the fewest parts of as many tiles
    (100, 1000, (2, 64)),
    (100, 0, (1, 128)),
])  # fmt: skip
def test_tokens_are_split_into_whole_tiles(tokens, wanted, expected):
    assert split_tokens(tokens, wanted, 64) == expected


@pytest.mark.parametrize("joined", [True, False])
def test_parts_are_counted_where_they_are_joined(joined):
    statistics = torch.empty(2, 6, 5)
    parts = Parts.of(statistics, 1000, 24, 64, joined=joined)
    assert (parts.number, parts.tokens_of_part) == (4, 256)
    assert parts.statistics.shape == (2, 24, 5)
    assert (parts.done is not None) == joined
    if parts.done is not None:
        assert parts.done.tolist() == [0] * 6
