"""Self-attention against its equations, with masks and the double normalization."""

import pytest
import torch
from torch import nn

from eanet.nn.self_attention import SelfAttention
from eanet.ops.attention import reference

NORMS = ("double", "softmax")


def randomize(module):
    """Draw all parameters widely, biases included, so that nothing is close to uniform."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.7)
    for name, buffer in module.named_buffers():
        if name.endswith("running_var"):
            nn.init.uniform_(buffer, 0.5, 2.0)
        elif name.endswith("running_mean"):
            nn.init.normal_(buffer)
    return module.double()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("form", ["projected", "simple"])
@pytest.mark.parametrize("masked", [False, True])
def test_self_attention_equals_its_equations(norm, form, masked):
    layer = randomize(SelfAttention(12, num_heads=3, form=form, norm=norm, scale=1.0))
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    mask = torch.arange(7)[None] < torch.tensor([[7], [4]]) if masked else None
    heads = x if form == "simple" else layer.qkv(x)
    for sample, length in enumerate([7, 4] if masked else [7, 7]):
        parts = heads[sample, :length].view(length, -1, 3, 4).permute(1, 2, 0, 3)
        queries, keys, values = parts if form == "projected" else (parts[0],) * 3
        logits = queries @ keys.transpose(1, 2)
        if norm == "double":
            attention = reference.double_normalize(logits)  # queries are the tokens, keys the slots
        else:
            attention = torch.softmax(logits, dim=-1)
        out = layer.projection((attention @ values).transpose(0, 1).flatten(1))
        actual = layer(x, mask)[sample]
        torch.testing.assert_close(actual[:length], out, rtol=0, atol=1e-11)
        assert (actual[length:] == 0).all()
        map_ = layer.attention_map(x, mask)[sample]
        torch.testing.assert_close(map_[:, :length, :length], attention, rtol=0, atol=1e-12)
        assert (map_[:, :, length:] == 0).all()


def test_self_attention_residual_is_the_value_and_scale_is_free():
    layer = randomize(
        SelfAttention(4, in_channels=9, residual="value", scale=9**-0.5, projection_bias=True)
    )
    x = torch.randn(2, 5, 9, dtype=torch.float64)
    queries, keys, values = layer.qkv(x).chunk(3, dim=-1)
    attention = torch.softmax(queries @ keys.transpose(1, 2) / 3, dim=-1)
    expected = values + layer.projection(attention @ values)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12)
