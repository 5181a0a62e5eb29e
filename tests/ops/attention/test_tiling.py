"""How the work of the kernels is cut."""

import pytest
import torch

from eanet.ops.attention.heuristics import choose_resident_tilings
from eanet.ops.attention.tiling import (
    HOPPER_SHARED_BYTES,
    MANY_TOKENS,
    Parts,
    TokenLayout,
    is_long,
    split_tokens,
)

pytest.importorskip("triton")
from eanet.ops.attention import resident


@pytest.mark.parametrize(
    ("strides", "expected"),
    [
        ((1, 512, 1), False),
        ((1, 1, 1 << 24), True),  # the last channel of a tile
        ((1, 1 << 25, 1), True),  # the last token
        ((1 << 40, 1 << 20, 1), False),
    ],
)
def test_what_32_bits_cannot_count(strides, expected):
    assert is_long(64, 128, strides) == expected


def test_very_many_tokens_take_no_kernel_that_counts_them_with_32_bits():
    def layout(num_tokens):
        return TokenLayout(torch.bfloat16, (1, num_tokens, 3), (0, 3, 1), 132, HOPPER_SHARED_BYTES)

    assert choose_resident_tilings(layout(MANY_TOKENS - 1), 4, 3, 1) is not None
    assert choose_resident_tilings(layout(MANY_TOKENS), 4, 3, 1) is None


@pytest.mark.parametrize(
    ("batch", "tokens", "expected"),
    [
        (8, 16_384, True),
        (1, 32_768, True),
        (1, 17_408, False),  # two tiles for some programs, and one for others
        (1, 16_384, False),  # 128 tiles for 132 programs
        (100, 4_096, False),  # a program for each sample, and 32 for none
        (128, 4_096, True),
    ],
)
def test_the_second_pass_that_holds_a_memory_needs_work_for_all_programs(batch, tokens, expected):
    x = torch.empty(1).expand(batch, 512, tokens).transpose(1, 2)
    strides = (512 * tokens, 1, tokens)
    layout = TokenLayout(torch.bfloat16, tuple(x.shape), strides, 132, HOPPER_SHARED_BYTES)
    tilings = choose_resident_tilings(layout, 64, 512, batch)
    assert tilings is not None
    assert resident.takes_mix(x, None, 1, tilings) == expected
    assert not resident.takes_mix(x, torch.zeros(1, dtype=torch.int64), 1, tilings)


@pytest.mark.parametrize(("tokens", "wanted", "expected"), [
    (16_384, 33, (32, 512)),  # the fewest parts of as many tiles
    (100, 1000, (2, 64)),
    (100, 0, (1, 128)),
])  # fmt: skip
def test_tokens_are_split_into_whole_tiles(tokens, wanted, expected):
    assert split_tokens(tokens, wanted, 64) == expected


@pytest.mark.parametrize("most_left", [0, 3, 4])
def test_parts_are_counted_where_they_are_joined(most_left):
    statistics = torch.empty(2, 6, 5)
    parts = Parts.of(statistics, 1000, 24, 64, most_left=most_left)
    assert (parts.number, parts.tokens_of_part) == (4, 256)
    assert parts.statistics.shape == (2, 24, 5)
    assert (parts.done is None) == (most_left == 4)
    if parts.done is not None:
        assert parts.done.tolist() == [0] * 6
