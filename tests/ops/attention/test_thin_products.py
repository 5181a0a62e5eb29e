"""Products of maps and thin matrices: every layout, tile and library gives the same."""

import pytest
import torch

from eanet.ops.attention import thin_products
from eanet.ops.attention.thin_products import (
    empty_map,
    is_token_major,
    map_from_rows,
    rows_from_map,
    sum_over_tokens,
)

LAYOUTS = ["channels first", "token-major", "strided"]
#: (batch, channels, tokens): one matrix; one tile; several, the last one short, of two samples
SHAPES = [(1, 3, 1), (2, 24, 50), (1, 40, 16384), (2, 40, 17001)]


def feature_map(shape, layout, dtype=torch.float32):
    batch, channels, tokens = shape
    if layout == "token-major":
        return torch.randn(batch, tokens, channels, dtype=dtype).transpose(1, 2)
    if layout == "strided":
        return torch.randn(batch, channels, 2 * tokens, dtype=dtype)[..., ::2]
    return torch.randn(shape, dtype=dtype)


def assert_close(actual, expected):
    torch.testing.assert_close(actual.double(), expected, rtol=2e-6, atol=2e-6 * expected.std())


@pytest.mark.parametrize("library", ["onednn", "blas"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_products_equal_those_in_float64(shape, layout, library, monkeypatch):
    if library == "blas":
        monkeypatch.setattr(thin_products, "uses_onednn", lambda *tensors: False)
    torch.manual_seed(0)
    source, weight = feature_map(shape, layout), torch.randn(7, shape[1])
    rows = rows_from_map(weight, source)
    assert_close(rows, weight.double() @ source.double())
    summed = sum_over_tokens(rows, source)
    assert_close(summed, (rows.double() @ source.double().mT).sum(0))

    back = weight.t().contiguous()
    for base, relu in ((None, False), (source, False), (source, True)):
        expected = back.double() @ rows.double() + (0 if base is None else base.double())
        out = empty_map(source, shape[1])
        assert is_token_major(out) == is_token_major(source) or shape[2] == 1
        given = map_from_rows(back, rows, like=source, base=base, relu=relu, out=out)
        assert given is out
        fresh = map_from_rows(back, rows, like=source, base=base, relu=relu)
        assert is_token_major(fresh) == is_token_major(out)
        for result in (given, fresh):
            assert_close(result, expected.relu() if relu else expected)
    own = source.clone(memory_format=torch.preserve_format)
    map_from_rows(back, rows, like=own, base=own, relu=True, out=own)
    assert_close(own, expected.relu())


def test_large_products_go_to_onednn(monkeypatch):
    if not thin_products.uses_onednn(*torch.zeros(2, 1)):
        pytest.skip("PyTorch without oneDNN, or another processor than x86-64")
    monkeypatch.setattr(torch, "mm", None)
    for layout in LAYOUTS[:2]:
        source = feature_map((1, 64, 20_000), layout)
        rows = rows_from_map(torch.randn(16, 64), source)
        sum_over_tokens(rows, source)
        map_from_rows(torch.randn(64, 16), rows, like=source, base=source)
