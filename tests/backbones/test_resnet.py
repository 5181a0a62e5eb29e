"""The backbone: strides, dilations, counts, timm's weights, masks."""

import pytest
import torch
from torch import nn

from eanet.backbones.resnet import DEPTHS, ResNet
from eanet.errors import UserError


def dilations(network, stage):
    """Return (stride, dilation) of the 3x3 convolutions of a stage, block by block."""
    return [
        (block.conv2.stride[0], block.conv2.dilation[0])
        for block in network.get_submodule(f"layer{stage}").children()
    ]


@pytest.fixture
def meta():
    with torch.device("meta"):
        yield


def test_dilations_of_the_authors(meta):
    eight, sixteen = ResNet(50, output_stride=8), ResNet(50, output_stride=16)
    assert dilations(eight, 1) == [(1, 1)] * 3
    assert dilations(eight, 2) == [(2, 1)] + [(1, 1)] * 3
    assert dilations(eight, 3) == [(1, 1)] + [(1, 2)] * 5
    assert dilations(eight, 4) == [(1, 2), (1, 8), (1, 16)]
    assert dilations(sixteen, 3) == [(2, 1)] + [(1, 1)] * 5
    assert dilations(sixteen, 4) == [(1, 1), (1, 4), (1, 8)]
    assert dilations(ResNet(50, output_stride=32), 4) == [(2, 1), (1, 1), (1, 1)]
    plain = ResNet(101, output_stride=8, multi_grid=(1, 1, 1))
    assert dilations(plain, 4) == [(1, 2), (1, 4), (1, 4)]


@pytest.mark.parametrize(
    ("depth", "stem", "count"),
    [
        (50, (64, 64, 128), 23_631_808),
        (101, (64, 64, 128), 42_623_936),
        (152, (64, 64, 128), 58_267_584),
        (101, (32, 32, 64), 42_519_392),
    ],
)
def test_parameter_counts(meta, depth, stem, count):
    network = ResNet(depth, stem_channels=stem)
    assert sum(parameter.numel() for parameter in network.parameters()) == count


@pytest.mark.parametrize("stride", [8, 16, 32])
@pytest.mark.parametrize("size", [(65, 65), (64, 33), (37, 53)])
def test_map_is_ceil_of_size_over_stride(meta, stride, size):
    maps = ResNet(50, output_stride=stride)(torch.zeros(1, 3, *size))
    assert maps[-1].shape[2:] == tuple(-(-side // stride) for side in size)
    assert [stage.shape[1] for stage in maps] == [256, 512, 1024, 2048]


def timm_twin(depth, stride):
    from timm.models.resnet import BasicBlock, Bottleneck
    from timm.models.resnet import ResNet as TimmResNet

    blocks, is_bottleneck = DEPTHS[depth]
    return TimmResNet(
        Bottleneck if is_bottleneck else BasicBlock,
        blocks,
        stem_width=64,
        stem_type="deep",
        output_stride=stride,
        num_classes=7,
    )


@pytest.mark.parametrize(("depth", "stride"), [(18, 8), (34, 16), (50, 8), (50, 32)])
@torch.no_grad()
def test_weights_of_timm_load_by_name_and_give_the_same(depth, stride):
    twin = timm_twin(depth, stride).double().eval()
    for buffer in twin.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5)
    ours = ResNet(depth, output_stride=stride, multi_grid=(1, 1, 1)).double().eval()
    ours.load_imagenet_weights(twin.state_dict(), source="timm")
    x = torch.randn(1, 3, 33, 40, dtype=torch.float64)
    torch.testing.assert_close(ours(x)[-1], twin.forward_features(x), rtol=1e-9, atol=1e-9)


def test_wrong_weights_are_named():
    network = ResNet(18, width=8)
    tensors = dict(network.state_dict())
    weight = tensors.pop("layer1.0.conv1.weight")
    with pytest.raises(UserError, match=r"layer1\.0\.conv1\.weight"):
        network.load_imagenet_weights(tensors, source="file")
    tensors["layer1.0.conv1.weight"] = weight[:4]
    with pytest.raises(UserError, match="shape"):
        network.load_imagenet_weights(tensors, source="file")


@pytest.mark.parametrize("depth", [18, 50])
@pytest.mark.parametrize("stem_pool", [True, False])
@pytest.mark.parametrize("size", [(40, 33), (33, 24)])
@torch.no_grad()
def test_padding_under_a_mask_changes_nothing(depth, stem_pool, size):
    network = ResNet(depth, width=4, stem_channels=(4, 4, 8), output_stride=8, stem_pool=stem_pool)
    network.double().eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.bias.normal_()
            module.running_mean.normal_()
    x = torch.randn(1, 3, *size, dtype=torch.float64)
    padded = torch.full((1, 3, 65, 50), 5.0, dtype=torch.float64)
    padded[:, :, : size[0], : size[1]] = x
    mask = torch.zeros(1, 65, 50, dtype=torch.bool)
    mask[:, : size[0], : size[1]] = True
    for alone, together in zip(network(x), network(padded, mask), strict=True):
        rows, columns = alone.shape[2:]
        torch.testing.assert_close(together[:, :, :rows, :columns], alone, rtol=1e-9, atol=1e-9)
    unmasked = network(padded)[-1][:, :, :rows, :columns]
    assert not torch.allclose(unmasked, alone, atol=1e-3)


def test_masks_are_refused_in_training():
    network = ResNet(18, width=4, stem_channels=(4, 4, 8)).train()
    with pytest.raises(ValueError, match="evaluation mode"):
        network(torch.zeros(1, 3, 32, 32), torch.ones(1, 32, 32, dtype=torch.bool))


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"depth": 20}, "depth"),
        ({"output_stride": 4}, "output_stride"),
        ({"multi_grid": (1, 2)}, "multi_grid"),
        ({"width": 0}, "width"),
    ],
)
def test_refused_arguments(arguments, word):
    with pytest.raises(ValueError, match=word):
        ResNet(**({"depth": 18} | arguments))
