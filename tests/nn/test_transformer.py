"""Parts of a transformer block: batch norm over tokens, masked, in half precision, synchronized."""

import copy

import pytest
import torch
from torch import nn

from eanet.nn.external_attention import MultiHeadExternalAttention
from eanet.nn.transformer import TokenBatchNorm, TransformerBlock


def _block(channels=6):
    attention = MultiHeadExternalAttention(channels, 4, num_heads=2)
    return TransformerBlock(channels, attention, hidden_channels=8, norm2="batch").double()


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float64])
def test_masked_tokens_are_left_out_of_the_statistics(half):
    norm, alone = TokenBatchNorm(6), nn.BatchNorm1d(6)
    nn.init.normal_(norm.weight)
    alone.load_state_dict(norm.state_dict())
    tokens = (torch.randn(4, 701, 6) + 5).to(half)
    mask = torch.rand(4, 701) > 0.3
    tokens[~mask] *= 100
    assert mask.sum() % 8, "a number of tokens that bfloat16 does not hold"
    wide = torch.float64 if half == torch.float64 else torch.float32
    norm, alone = norm.to(wide), alone.to(wide)
    actual = norm(tokens, mask)
    expected = alone(tokens[mask].to(wide))
    assert actual.dtype == half
    tolerance = 1e-12 if half == torch.float64 else 1e-2
    torch.testing.assert_close(actual[mask].to(wide), expected, rtol=tolerance, atol=tolerance)
    tolerance = 1e-12 if half == torch.float64 else 1e-5
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(
            getattr(norm, name), getattr(alone, name), rtol=tolerance, atol=tolerance
        )


def test_a_block_hands_the_mask_to_its_batch_norm():
    block = _block().train()
    tokens = torch.randn(2, 7, 6, dtype=torch.float64)
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[1, 4:] = False
    other = tokens.clone()
    other[1, 4:] = 50.0
    first, second = (copy.deepcopy(block)(x, mask) for x in (tokens, other))
    torch.testing.assert_close(first[mask], second[mask], rtol=0, atol=1e-12)


@pytest.mark.parametrize("tokens", [6, 9])
@pytest.mark.parametrize("training", [False, True])
def test_conversion_to_synchronized_batch_norm_changes_nothing(tokens, training):
    # with as many tokens as channels, the wrong dimension would go unnoticed
    block = _block().train()
    block(torch.randn(3, tokens, 6, dtype=torch.float64))
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(block))
    assert isinstance(converted.norm2, nn.SyncBatchNorm)
    x = torch.randn(3, tokens, 6, dtype=torch.float64)
    block.train(training)
    converted.train(training)
    torch.testing.assert_close(converted(x), block(x), rtol=0, atol=1e-12)


def test_synchronized_batch_norm_refuses_a_mask_in_training():
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(_block().train())
    x, mask = torch.randn(1, 4, 6, dtype=torch.float64), torch.ones(1, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match="cannot leave masked tokens out"):
        converted(x, mask)
    assert converted.eval()(x, mask).isfinite().all()
