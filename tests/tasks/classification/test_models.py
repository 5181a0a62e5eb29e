"""T2T-ViT and EAMLP beyond the reference values: sizes, masks, choices, refusals."""

import math

import pytest
import torch

from eanet.nn.capture import capture_attention
from eanet.tasks.classification import models
from eanet.tasks.classification.positions import SinusoidPositions, sinusoid_table
from eanet.tasks.classification.t2t_vit import T2TViT
from eanet.tasks.classification.tokens_to_token import SoftSplit, TokensToToken

STEMS = ["ea", "performer", "transformer", "mlp"]
MIXERS = ["self", "external", "mlp"]


def small(stem="ea", mixer="external", **changes):
    arguments = {
        "image_size": 32, "channels": 24, "depth": 2, "num_heads": 4, "num_slots": 8,
        "expansion": 2, "stem_channels": 12, "stem_num_slots": 10,
    }  # fmt: skip
    return T2TViT(5, 3, stem=stem, mixer=mixer, **(arguments | changes))


def noisy(model):
    """Move every parameter away from its start, so that attention is far from uniform."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * (0.1 if parameter.ndim == 1 else 0.3))
            assert torch.isfinite(parameter).all(), name
    return model


# sizes


@pytest.mark.parametrize(
    ("length", "grid"), [(224, 14), (384, 24), (32, 2), (200, 12), (225, 14), (33, 2), (17, 1)]
)
def test_grid_is_that_of_the_formula(length, grid):
    stem = TokensToToken(8)
    expected = length
    expected = (expected - 3) // 4 + 1
    for _ in range(2):
        expected = (expected - 1) // 2 + 1
    assert stem.grid(length, 64) == (expected, 4)
    assert expected == grid or length % 16 or length // 16 == grid


@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("size", [(32, 32), (33, 47), (64, 16)])
def test_any_image_size(stem, mixer, size):
    model = small(stem, mixer).eval()
    images = torch.randn(2, 3, *size)
    assert model(images).shape == (2, 5)
    tokens, grid, _ = model.stem(images)
    assert tokens.shape[1] == math.prod(grid)
    assert grid == model.stem.grid(*size)


def test_too_small_an_image_is_refused():
    with pytest.raises(ValueError, match="2 x 64 pixels is too small"):
        small()(torch.randn(1, 3, 2, 64))


def test_wrong_channels_are_refused():
    with pytest.raises(ValueError, match=r"\(batch, 3, height, width\), got \(1, 1, 32, 32\)"):
        small()(torch.randn(1, 1, 32, 32))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"stem": "conv"}, "stem must be"),
        ({"mixer": "conv"}, "mixer must be"),
        ({"pool": "max"}, "pool must be"),
        ({"initialization": "zero"}, "initialization must be"),
        ({"other_grids": "crop"}, "other_grids must be"),
        ({"num_heads": 5}, "heads"),
        ({"stem_strides": (4, 2)}, "stem_strides"),
        ({"stem_strides": (4, 2, 5)}, "stride"),
        ({"depth": 0}, "depth"),
        ({"image_size": (1, 2, 3)}, "image_size"),
    ],
)
def test_refused_arguments(arguments, words):
    with pytest.raises(ValueError, match=words):
        small(**arguments)


# positions


def test_sinusoid_by_hand():
    table = sinusoid_table(3, 4)
    assert table[0].tolist() == [0, 1, 0, 1]
    expected = [math.sin(2), math.cos(2), math.sin(0.02), math.cos(0.02)]
    assert table[2].tolist() == pytest.approx(expected, abs=1e-7)


def test_table_is_frozen_and_stored():
    positions = SinusoidPositions((2, 3), 8)
    assert not positions.table.requires_grad
    assert positions.table.shape == (1, 7, 8)
    assert "table" in positions.state_dict()


def test_other_grids_are_regenerated_or_resized():
    tokens = torch.zeros(1, 10, 8)
    regenerated = SinusoidPositions((2, 2), 8)(tokens, (3, 3))
    assert torch.equal(regenerated[0], sinusoid_table(10, 8))
    resizing = SinusoidPositions((2, 2), 8, other_grids="resize")
    with torch.no_grad():
        resizing.table[0, 1:] = 3.0
    resized = resizing(tokens, (3, 3))
    assert torch.equal(resized[0, 0], sinusoid_table(1, 8)[0])
    torch.testing.assert_close(resized[0, 1:], torch.full((9, 8), 3.0))


def test_a_stored_table_of_its_own_is_used():
    positions = SinusoidPositions((1, 2), 4)
    with torch.no_grad():
        positions.table.fill_(7.0)
    assert torch.equal(positions(torch.zeros(1, 3, 4), (1, 2)), torch.full((1, 3, 4), 7.0))


# masks


def padded(images, size):
    batch = torch.zeros(len(images), 3, *size)
    mask = torch.zeros(len(images), *size, dtype=torch.bool)
    for row, image in enumerate(images):
        height, width = image.shape[1:]
        batch[row, :, :height, :width] = image
        mask[row, :height, :width] = True
    return batch, mask


@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("pool", ["cls", "avg"])
def test_padded_with_a_mask_equals_one_by_one(stem, mixer, pool):
    model = noisy(small(stem, mixer, pool=pool)).double().eval()
    images = [torch.randn(3, *size) for size in ((32, 32), (33, 20), (19, 45), (36, 29))]
    batch, mask = padded(images, (45, 48))
    together = model(batch.double(), mask)
    alone = torch.cat([model(image[None].double()) for image in images])
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-9)
    if mixer != "mlp" and pool == "avg":
        assert not torch.allclose(model(batch.double()), alone, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("kernel", "stride"), [(7, 4), (3, 2), (3, 1), (4, 4), (5, 2), (2, 2)])
def test_mask_of_a_split_is_the_grid_of_the_image_by_itself(kernel, stride):
    split = SoftSplit(kernel, stride)
    for height in range(kernel, 30):
        mask = torch.zeros(1, 40, 40, dtype=torch.bool)
        mask[:, :height, :20] = True
        got = split.mask_grid(mask)
        assert got.shape[1:] == split.grid(40, 40)
        rows, columns = split.grid(height, 20)
        assert int(got.sum()) == rows * columns
        assert got[0, :rows, :columns].all()


# what carries information


def test_mlp_with_class_token_is_blind_and_with_mean_is_not():
    images = torch.randn(3, 3, 32, 32)
    blind = noisy(small("mlp", "mlp")).eval()(images)
    assert torch.equal(blind[0], blind[1])
    assert torch.equal(blind[0], blind[2])
    seeing = noisy(small("mlp", "mlp", pool="avg")).eval()(images)
    assert not torch.allclose(seeing[0], seeing[1], atol=1e-3)


def test_class_token_takes_part_in_the_softmax_over_tokens():
    model = noisy(small()).double().eval()
    with capture_attention(model) as maps:
        model(torch.randn(1, 3, 32, 32).double())
    attention = maps["blocks.1.attention"]
    assert attention.shape == (1, 4, 1 + 4, 8)
    torch.testing.assert_close(attention.sum(-1), torch.ones(1, 4, 5).double(), rtol=0, atol=1e-6)
    stem = maps["stem.blocks.0.attention"]
    assert stem.shape == (1, 64, 10)


def test_batch_composition_changes_nothing_in_evaluation():
    model = noisy(small(norm2="batch")).double().eval()
    images = torch.randn(3, 3, 32, 32).double()
    torch.testing.assert_close(model(images)[1:2], model(images[1:2]), rtol=1e-10, atol=1e-10)


def test_drop_path_grows_linearly_from_zero():
    model = models.t2t_vit_14()
    rates = [block.drop_path.probability for block in model.blocks]
    assert rates == pytest.approx([0.1 * number / 13 for number in range(14)])


def test_published_initialization():
    model = models.eamlp_7()
    block = model.blocks[3]
    for weight in (block.mlp.expand.weight, block.attention.query.weight, model.head.weight):
        assert float(weight.detach().std()) == pytest.approx(0.02, rel=0.03)
    for memory in (block.attention.memory_key, block.attention.memory_value):
        assert float(memory.detach().std()) == pytest.approx(0.02, rel=0.06)
    assert not torch.equal(block.attention.memory_key, block.attention.memory_value)
    stem = model.stem.blocks[0].attention
    assert torch.equal(stem.memory_key, stem.memory_value)
    assert stem.memory_key.data_ptr() != stem.memory_value.data_ptr()
    assert float(block.mlp.expand.bias.detach().abs().max()) == 0
    assert float(model.class_token.detach().std()) == pytest.approx(0.02, rel=0.2)


def test_stem_dropout_is_on_in_training_alone():
    model = small().train()
    images = torch.randn(1, 3, 32, 32)
    first, second = model.stem(images)[0], model.stem(images)[0]
    assert not torch.equal(first, second)
    off = small(stem_dropout=0.0).train()
    assert torch.equal(off.stem(images)[0], off.stem(images)[0])
