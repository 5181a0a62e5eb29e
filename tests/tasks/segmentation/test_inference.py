"""Networks and protocols: what an image gives does not depend on what shares its batch."""

import pytest
import torch
from torch import nn

from eanet import registry
from eanet.nn.fusion import fuse
from eanet.tasks.segmentation.eanet import BLOCKS, Segmenter
from eanet.tasks.segmentation.inference import Protocol, segment

SIZES = [(40, 33), (33, 48), (40, 33), (24, 56)]

SMALL = {
    "backbone": "resnet18",
    "stem_channels": (4, 4, 8),
    "backbone_width": 4,
    "output_stride": 8,
    "channels": 16,
    "refine_channels": 8,
    "num_slots": 6,
}


def network(**changes):
    torch.manual_seed(1)
    model = Segmenter(5, **{**SMALL, **changes}).double().eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.bias.normal_()
                module.running_mean.normal_()
    return model


def batch_of(sizes, fill):
    """Return images of several sizes in one frame, and each alone."""
    alone = [torch.randn(1, 3, *size, dtype=torch.float64) for size in sizes]
    height, width = (max(size[axis] for size in sizes) for axis in (0, 1))
    together = torch.full((len(sizes), 3, height, width), fill, dtype=torch.float64)
    for place, image in zip(together, alone, strict=True):
        place[:, : image.shape[2], : image.shape[3]] = image[0]
    return together, alone


PROTOCOLS = {
    "plain": Protocol(),
    "padded": Protocol(size_modulus=8),
    "several": Protocol(scales=(0.75, 1.5), mirror=True, size_modulus=8),
    "probabilities": Protocol(
        scales=(0.75, 1.0), mirror=True, merge="probabilities", convention="mmsegmentation"
    ),
    "fitted": Protocol(base_scale=(64, 40), convention="smooth"),
    "window": Protocol(window=(24, 24), window_stride=(16, 16)),
}


@pytest.mark.parametrize("block", ["ea", "none", "sa", "a2"])
@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=PROTOCOLS)
@torch.no_grad()
def test_batches_of_unlike_sizes_equal_images_one_by_one(block, protocol):
    model = network(block=block, norm="double")
    together, alone = batch_of(SIZES, fill=7.0)
    found = segment(model, together, SIZES, protocol, takes_masks=model.takes_masks)
    for scores, image, size in zip(found, alone, SIZES, strict=True):
        (expected,) = segment(model, image, [size], protocol)
        assert scores.shape == (5, *size)
        # several passes of images of one size in a batch differ in rounding alone
        torch.testing.assert_close(scores, expected, rtol=1e-7, atol=1e-7)


@torch.no_grad()
def test_without_the_mask_padding_would_change_the_result():
    model = network()
    together, alone = batch_of(SIZES, fill=0.0)
    padded = model(together)[0, :, :40, :33]
    assert (padded - model(alone[0])[0]).abs().max() > 1e-3


@torch.no_grad()
def test_a_masked_forward_pass_is_that_of_each_image():
    model = network(norm="softmax", concat=True)
    together, alone = batch_of(SIZES, fill=7.0)
    mask = torch.zeros(len(SIZES), *together.shape[2:], dtype=torch.bool)
    for place, (height, width) in zip(mask, SIZES, strict=True):
        place[:height, :width] = True
    found = model(together, mask)
    for logits, image, (height, width) in zip(found, alone, SIZES, strict=True):
        torch.testing.assert_close(
            logits[:, :height, :width], model(image)[0], rtol=1e-9, atol=1e-9
        )
    assert found.masked_select(~mask.unsqueeze(1)).abs().max() == 0


def test_masks_are_refused_where_they_cannot_be_kept():
    model = network(block="da")
    mask = torch.ones(1, 32, 32, dtype=torch.bool)
    with pytest.raises(ValueError, match="takes no mask"):
        model(torch.zeros(1, 3, 32, 32).double(), mask)


def test_windows_cover_everything_and_are_averaged():
    calls = []

    def ones(images):
        calls.append(tuple(images.shape[2:]))
        rows = torch.arange(images.shape[2]).view(1, 1, -1, 1).expand(1, 1, *images.shape[2:])
        return torch.cat([torch.ones_like(images[:, :1]), images[:, :1], rows.float()], dim=1)

    image = torch.randn(1, 3, 50, 30)
    protocol = Protocol(window=(24, 40), window_stride=(16, 16))
    (found,) = segment(ones, image, [(50, 30)], protocol)
    assert calls == [(24, 30)] * 3  # starts 0, 16, 26: the last moved back inside
    torch.testing.assert_close(found[0], torch.ones(50, 30))
    torch.testing.assert_close(found[1], image[0, 0])
    assert found[2, 20, 0] == (20 + 4) / 2


def test_sizes_of_passes():
    authors = Protocol(scales=(0.75,))
    assert authors.size_of_pass(375, 500, 0.75) == (281, 375)
    ade = Protocol(base_scale=(2048, 512), convention="mmsegmentation")
    assert ade.size_of_pass(512, 683, 1.0) == (512, 683)
    assert ade.size_of_pass(256, 341, 0.5) == (256, 341)
    camvid = Protocol(base_scale=(160, 120), convention="smooth")
    assert camvid.size_of_pass(360, 480, 1.0) == (120, 160)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"scales": ()}, "scales"),
        ({"merge": "mean"}, "merge"),
        ({"convention": "pil"}, "convention"),
        ({"window": (8, 8)}, "window_stride"),
        ({"size_modulus": 0}, "size_modulus"),
    ],
)
def test_refused_protocols(arguments, word):
    with pytest.raises(ValueError, match=word):
        Protocol(**arguments)


# networks


@pytest.mark.parametrize("block", BLOCKS)
def test_every_block_trains_a_step(block):
    model = Segmenter(5, **{**SMALL, "channels": 32}, block=block).train()
    logits = model(torch.randn(2, 3, 33, 40))
    assert logits.shape == (2, 5, 33, 40)
    logits.square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


TABLE_1 = [
    name
    for name, entry in registry.models().items()
    if entry.task == "segmentation" and "Table 1" in entry.summary
]


@pytest.mark.parametrize("name", TABLE_1)
def test_every_row_of_table_1_trains_a_step(name):
    model = registry.create_model(name, num_classes=4, backbone_width=4, channels=16, dropout=0.0)
    model.train()
    before = {key: value.clone() for key, value in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = model(torch.randn(2, 3, 33, 33)).square().mean()
    loss.backward()
    optimizer.step()
    assert torch.isfinite(loss)
    moved = [key for key, value in model.named_parameters() if not torch.equal(value, before[key])]
    assert any(key.startswith("attention") for key in moved) or name == "fcn_resnet50"
    assert len(TABLE_1) == 10


@torch.no_grad()
def test_auxiliary_head_reads_stage_three_and_is_for_training():
    model = network(auxiliary=True, auxiliary_channels=8, classifier_std=0.01)
    images = torch.randn(1, 3, 33, 40).double()
    logits, auxiliary = model(images, with_auxiliary=True)
    assert auxiliary.shape == logits.shape == (1, 5, 33, 40)
    assert torch.equal(model(images), logits)
    assert model.auxiliary["classifier"].bias.abs().max() == 0
    assert model.classifier.weight.std() < 0.02
    with pytest.raises(ValueError, match="auxiliary=True"):
        network()(images, with_auxiliary=True)


def test_frozen_norms_stay_as_they_are():
    model = Segmenter(5, **SMALL, batch_norm="frozen").train()
    before = {name: tensor.clone() for name, tensor in model.backbone.state_dict().items()}
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    norms = {name for name in before if ".bn" in name or "running" in name}
    assert norms
    after = model.backbone.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    names = {name for name, _ in model.backbone.named_parameters()}
    assert not names & norms
    plain = Segmenter(5, **SMALL)
    model.backbone.load_imagenet_weights(plain.backbone.state_dict(), source="plain")


def test_synchronized_norms():
    model = Segmenter(5, **SMALL, batch_norm="synchronized")
    kinds = {type(module) for module in model.modules() if "BatchNorm" in type(module).__name__}
    assert kinds == {nn.SyncBatchNorm}
    plain = Segmenter(5, **SMALL)
    plain.load_state_dict(model.state_dict())
    images = torch.randn(2, 3, 33, 33)
    torch.testing.assert_close(model.eval()(images), plain.eval()(images))


@torch.no_grad()
def test_folded_network_gives_the_same():
    model = network()
    images = torch.randn(1, 3, 33, 40).double()
    torch.testing.assert_close(fuse(model)(images), model(images), rtol=1e-7, atol=1e-8)


@torch.no_grad()
def test_a_permutation_of_positions_permutes_the_block():
    block = network().attention
    x = torch.randn(2, 16, 5, 7).double()
    order = torch.randperm(35)
    mixed = x.flatten(2)[:, :, order].unflatten(2, (5, 7))
    for mode in (True, False):
        block.train(mode)
        expected = block(x).flatten(2)[:, :, order]
        torch.testing.assert_close(block(mixed).flatten(2), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"backbone": "vgg"}, "backbone"),
        ({"block": "senet"}, "block"),
        ({"block": "none", "block_options": {"eps": 1e-9}}, "does not take eps"),
        ({"batch_norm": "instance"}, "batch_norm"),
        ({"dropout": 1.0}, "dropout"),
        ({"channels": 0}, "channels"),
    ],
)
def test_refused_arguments(arguments, word):
    with pytest.raises(ValueError, match=word):
        Segmenter(5, **{**SMALL, **arguments})
