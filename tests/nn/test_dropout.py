"""Dropout decides by 16 bits of a random word; everything else is that of PyTorch."""

import pytest
import torch
from torch.autograd import gradcheck

from eanet.nn.dropout import Dropout, dropout


@pytest.mark.parametrize("probability", [0.01, 0.1, 0.5, 0.9])
def test_share_and_mean(probability):
    torch.manual_seed(3)
    x = torch.full((1000, 1003), 2.0, dtype=torch.float64)
    dropped = dropout(x, probability)
    share = (dropped == 0).double().mean().item()
    deviation = (probability * (1 - probability) / x.numel()) ** 0.5
    assert abs(share - probability) < 4 * deviation + 2.0**-17
    kept = dropped[dropped != 0].unique()
    assert len(kept) == 1
    # the mean is exact for the rounded probability
    level = round(probability * 65536)
    assert kept.item() == pytest.approx(2 * 65536 / (65536 - level), rel=1e-12)


def test_neighbors_are_independent():
    torch.manual_seed(4)
    dropped = dropout(torch.ones(400_000), 0.5).ne(0).double() - 0.5
    for distance in range(1, 9):  # entries that share a word of the generator, and some more
        correlation = (dropped[distance:] * dropped[:-distance]).mean().item() * 4
        assert abs(correlation) < 0.01


def test_gradient_meets_the_entries_that_were_kept():
    x = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(5)
    out = dropout(x, 0.3)
    out.sum().backward()
    torch.testing.assert_close(out, x * x.grad)

    def fixed(x):
        torch.manual_seed(5)
        return dropout(x, 0.3)

    assert gradcheck(fixed, (x,))


def test_nothing_is_dropped_without_training_and_the_seed_decides():
    x = torch.randn(6, 6)
    assert torch.equal(dropout(x, 0.5, training=False), x)
    assert torch.equal(Dropout(0.5).eval()(x), x)
    torch.manual_seed(6)
    first = Dropout(0.5)(x)
    torch.manual_seed(6)
    assert torch.equal(Dropout(0.5)(x), first)
    assert not torch.equal(Dropout(0.5)(x), first)


@pytest.mark.parametrize("probability", [0.0, 1e-9, 1.0])
def test_the_ends_are_those_of_pytorch(probability):
    x = torch.randn(6, 6)
    expected = torch.zeros_like(x) if probability == 1.0 else x
    assert torch.allclose(dropout(x, probability), expected)
    with pytest.raises(ValueError, match="probability"):
        dropout(x, 1.5)


def test_other_types_and_layouts():
    torch.manual_seed(7)
    for x in (torch.ones(3, 5).t(), torch.ones(3, 5, dtype=torch.bfloat16), torch.ones(0, 4)):
        dropped = dropout(x, 0.5)
        assert dropped.shape == x.shape
        assert dropped.dtype == x.dtype
        assert set(dropped.unique().tolist()) <= {0.0, 2.0}
