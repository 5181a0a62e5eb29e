"""Blocks inside a network leave the padding of a batch out, whatever follows their branch."""

import copy
import pickle

import pytest
import torch
from torch import nn

from eanet.nn.channel_norms import ChannelAffine, ValidGroupNorm
from eanet.nn.fusion import fuse
from eanet.nn.insertion import insert_external_attention
from eanet.nn.padding import ImageSizes, find_image_sizes, image_sizes

SIZES = [(64, 96), (33, 96), (50, 20)]
PADDED = (64, 96)


def network(**options):
    """Feature maps at stride 16 whose every cell sees one patch, so padding acts in the block."""
    layers = nn.Sequential(nn.Conv2d(3, 8, 16, stride=16), nn.ReLU())
    model = nn.Sequential(layers).double()
    insert_external_attention(
        model, after="0", channels=8, num_slots=4, inner_channels=6, activation="relu", **options
    )
    block = model[0].external_attention
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.fixture
def images():
    padded = torch.zeros(3, 3, *PADDED, dtype=torch.float64)
    for image, (height, width) in zip(padded, SIZES, strict=True):
        image[:, :height, :width] = torch.randn(3, height, width)
    return padded


def valid_cells(height, width):
    return (slice(None), slice(-(-height // 16)), slice(-(-width // 16)))


@pytest.mark.parametrize("branch_norm", ["affine", "batch", "group", "none"])
@pytest.mark.parametrize("folded", [False, True])
def test_padding_never_changes_a_result(images, branch_norm, folded):
    model = network(branch_norm=branch_norm).eval()
    if folded:
        model = fuse(model)
    with image_sizes(model, SIZES, PADDED):
        together = model(images)
    assert find_image_sizes(model).sizes is None
    for index, size in enumerate(SIZES):
        cells = valid_cells(*size)
        height, width = (16 * part.stop for part in cells[1:])
        alone = model(images[index : index + 1, :, :height, :width])
        torch.testing.assert_close(together[index][cells], alone[0], rtol=0, atol=1e-12)
    cells = valid_cells(*SIZES[2])
    assert (model(images)[2][cells] - together[2][cells]).abs().max() > 1e-3  # without the sizes


def test_batch_norm_is_not_polluted_by_padding(images):
    model = network(branch_norm="batch")
    norm = model[0].external_attention.norm
    assert type(norm) is nn.BatchNorm2d
    with image_sizes(model, SIZES, PADDED):
        model(images)
    learned = norm.running_mean.clone()
    norm.reset_running_stats()
    garbage = images.clone()
    for image, (height, width) in zip(garbage, SIZES, strict=True):
        rows, columns = 16 * -(-height // 16), 16 * -(-width // 16)
        image[:, rows:] = 1e3
        image[:, :, columns:] = 1e3
    with image_sizes(model, SIZES, PADDED):
        model(garbage)
    torch.testing.assert_close(norm.running_mean, learned, rtol=1e-10, atol=1e-12)


def test_masks_follow_from_sizes():
    record = ImageSizes()
    features = torch.zeros(2, 1, 4, 6)
    assert record.mask(features) is None
    record.set([(64, 96), (64, 96)], (64, 96))
    assert record.mask(features) is None
    record.set([(64, 96), (17, 1)], (64, 96))
    mask = record.mask(features)
    assert mask[0].all()
    assert mask[1].nonzero().tolist() == [[0, 0], [1, 0]]
    with pytest.raises(ValueError, match="2 image sizes for a batch of 1"):
        record.mask(features[:1])


def test_copies_have_their_own_record(images):
    model = network().eval()
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert find_image_sizes(copied) is not find_image_sizes(model)
        with image_sizes(copied, SIZES, PADDED):
            expected = copied(images)
        with image_sizes(model, SIZES, PADDED):
            assert torch.equal(model(images), expected)
        assert not torch.equal(model(images), expected)


def test_group_norm_without_mask_is_pytorchs():
    ours, theirs = ValidGroupNorm(2, 8), nn.GroupNorm(2, 8)
    x = torch.randn(2, 8, 3, 4)
    assert torch.equal(ours(x), theirs(x))
    everywhere = torch.ones(2, 3, 4, dtype=torch.bool)
    torch.testing.assert_close(ours(x, everywhere), theirs(x))


def test_affine_learns_and_folds_exactly(images):
    model = network(branch_norm="affine")
    block = model[0].external_attention
    assert isinstance(block.norm, ChannelAffine)
    model(images).square().sum().backward()
    for name, parameter in block.named_parameters():
        assert parameter.grad is not None, name
    explicit = block.norm(torch.ones(1, 8, 2, 2, dtype=torch.float64))
    weight, bias = block.norm.fold(torch.ones(8, 1, dtype=torch.float64))
    torch.testing.assert_close(explicit[0, :, 0, 0], weight[:, 0] + bias)
    block.norm.reset_parameters()
    x = torch.randn(1, 8, 2, 2, dtype=torch.float64)
    assert torch.equal(block.norm(x), x)
