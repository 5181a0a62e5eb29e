"""Self-attention on feature maps: the two normalizations and masks."""

import pytest
import torch

from eanet.nn.compared import SelfAttention2d


def by_the_equations(layer, x):
    """Return the result with every step written out, in float64."""
    query, key, value = (
        getattr(layer, name)(x).flatten(2).double() for name in ("query", "key", "value")
    )
    logits = torch.einsum("bci,bcj->bij", query, key)
    if layer.norm == "softmax":
        attention = logits.softmax(dim=2)
    else:
        attention = logits.softmax(dim=1)
        attention = attention / (layer.eps + attention.sum(dim=2, keepdim=True))
    attended = torch.einsum("bij,bcj->bci", attention, value).to(x.dtype)
    return layer.projection(attended.unflatten(2, x.shape[2:]))


@pytest.mark.parametrize("norm", ["softmax", "double"])
@pytest.mark.parametrize("scale", [1.0, 8.0])
def test_equals_the_equations(norm, scale):
    layer = SelfAttention2d(12, norm=norm).double()
    x = scale * torch.randn(2, 12, 5, 4, dtype=torch.float64)
    torch.testing.assert_close(layer(x), by_the_equations(layer, x), rtol=1e-9, atol=1e-10)


def test_the_normalizations_differ():
    layer = SelfAttention2d(12)
    x = torch.randn(1, 12, 5, 4)
    single = layer(x)
    layer.norm = "double"
    assert not torch.allclose(layer(x), single, atol=1e-3)


@pytest.mark.parametrize(
    "options",
    [{"norm": "softmax"}, {"norm": "double"}, {"implementation": "fused"}],
    ids=["softmax", "double", "fused"],
)
def test_padding_under_a_mask_changes_nothing(options):
    layer = SelfAttention2d(8, **options).double()
    x = torch.randn(2, 8, 4, 3, dtype=torch.float64)
    padded = torch.full((2, 8, 6, 7), 9.0, dtype=torch.float64)
    padded[:, :, :4, :3] = x
    mask = torch.zeros(2, 6, 7, dtype=torch.bool)
    mask[:, :4, :3] = True
    out = layer(padded, mask)
    torch.testing.assert_close(out[:, :, :4, :3], layer(x), rtol=1e-9, atol=1e-10)
    assert out[~mask.unsqueeze(1).expand_as(out)].abs().max() == 0
    assert not torch.allclose(layer(padded)[:, :, :4, :3], layer(x), atol=1e-3)


@pytest.mark.parametrize("norm", ["softmax", "double"])
def test_large_logits_stay_finite_with_gradients(norm):
    layer = SelfAttention2d(8, norm=norm)
    x = (100 * torch.randn(1, 8, 5, 5)).requires_grad_()
    layer(x).sum().backward()
    assert torch.isfinite(x.grad).all()


def test_refused_options():
    with pytest.raises(ValueError, match="explicit"):
        SelfAttention2d(8, norm="double", implementation="fused")
    with pytest.raises(ValueError, match="eps"):
        SelfAttention2d(8, norm="double", eps=0.0)
