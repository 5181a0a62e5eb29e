"""Transforms are exact where nothing is random and a function of the seed where something is."""

import random

import numpy as np
import pytest
import torch
from PIL import Image

from eanet.tasks.classification.samples import Batch, Sample, collate, image_to_tensor
from eanet.tasks.classification.transforms import (
    erase,
    evaluation_transform,
    mix,
    normalize,
    training_transform,
)


def picture(height=40, width=60, channels=3):
    values = np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(values.squeeze())


def sample(**options):
    return Sample(picture(**options), 1, "x")


def seed_everything(seed):
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


@pytest.mark.parametrize("augmentation", ["none", "light", "crop_flip", "imagenet"])
@pytest.mark.parametrize("channels", [1, 3])
def test_training_transform_is_a_function_of_the_seed(augmentation, channels):
    transform = training_transform(augmentation, size=32)
    results = []
    for seed in (1, 1, 2, 3, 4):
        seed_everything(seed)
        results.append(transform(sample(channels=channels)).image)
    assert all(image.shape == (channels, 32, 32) for image in results)
    assert all(image.dtype == torch.uint8 for image in results)
    assert torch.equal(results[0], results[1])
    differs = any(not torch.equal(results[0], image) for image in results[2:])
    assert differs == (augmentation != "none")


def test_unknown_augmentation_lists_the_known():
    with pytest.raises(ValueError, match="light"):
        training_transform("strong", size=32)


def test_evaluation_of_a_fitting_image_changes_nothing():
    image = picture(32, 32)
    got = evaluation_transform(size=32)(Sample(image, None, "x")).image
    assert torch.equal(got, image_to_tensor(image))


@pytest.mark.parametrize(("size", "crop_fraction", "shorter"), [(224, 0.9, 248), (384, 0.9, 426)])
def test_evaluation_is_the_published_resize_and_crop(size, crop_fraction, shorter):
    from torchvision.transforms import v2

    expected = v2.Compose([v2.Resize(shorter, v2.InterpolationMode.BICUBIC), v2.CenterCrop(size)])
    for height, width in ((300, 401), (401, 300), (50, 49), (shorter, 500)):
        image = picture(height, width)
        transform = evaluation_transform(size=size, crop_fraction=crop_fraction)
        got = transform(Sample(image, None, "x")).image
        assert torch.equal(got, image_to_tensor(expected(image)))


def test_a_sample_is_transformed_once():
    transform = evaluation_transform(size=8)
    with pytest.raises(ValueError, match="already"):
        transform(transform(sample()))


def test_normalization_by_hand():
    images = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    mean, std = [0.1, 0.2, 0.3], [0.5, 0.25, 2.0]
    expected = torch.stack(
        [(images[:, c].double() / 255 - mean[c]) / std[c] for c in range(3)], dim=1
    )
    got = normalize(images, mean, std)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="channels"):
        normalize(images, [0.1], [0.2])


@pytest.fixture
def mixed_batch():
    images = torch.arange(4, dtype=torch.uint8).view(4, 1, 1, 1).expand(4, 1, 16, 16) * 50
    return images.contiguous(), torch.eye(4)


def test_mixup_blends_pixels_and_targets_alike(mixed_batch):
    images, targets = mixed_batch
    torch.manual_seed(0)
    mixed, soft = mix(images, targets, mixup=1.0, cutmix=0.0)
    share = float(soft[0, 0])
    assert 0 < share < 1
    expected = (share * images.double() + (1 - share) * images.flip(0).double()).round()
    assert torch.equal(mixed.double(), expected)
    torch.testing.assert_close(soft, share * targets + (1 - share) * targets.flip(0))


def test_cutmix_share_is_that_of_the_pixels(mixed_batch):
    images, targets = mixed_batch
    for seed in range(20):
        torch.manual_seed(seed)
        mixed, soft = mix(images, targets, mixup=0.0, cutmix=1.0)
        own = (mixed == images).double().mean(dim=(1, 2, 3))
        torch.testing.assert_close(soft.diagonal().double(), own, rtol=0, atol=1e-6)
        assert torch.equal(images, mixed_batch[0])


def test_mixing_switched_off_is_nothing(mixed_batch):
    images, targets = mixed_batch
    mixed, soft = mix(images, targets, mixup=0.0, cutmix=0.0)
    assert mixed is images
    assert soft is targets


def test_both_mixings_are_drawn(mixed_batch):
    images, targets = mixed_batch
    torch.manual_seed(0)
    cut = 0
    for _ in range(200):
        mixed, _soft = mix(images, targets, mixup=0.8, cutmix=1.0)
        cut += int(set(mixed[0].unique().tolist()) <= {0, 150})
    assert 60 < cut < 150


def test_erasing_probability_and_area():
    torch.manual_seed(0)
    images = erase(torch.full((400, 1, 32, 32), 9.0), 0.25)
    shares = (images != 9.0).double().mean(dim=(1, 2, 3))
    hit = shares > 0
    assert 0.17 < float(hit.double().mean()) < 0.33
    assert float(shares[hit].min()) > 0.01
    assert float(shares[hit].max()) < 0.36


def test_collate_and_move():
    transform = evaluation_transform(size=8)
    batch = collate([transform(sample()), transform(sample())])
    assert len(batch) == 2
    assert batch.images.shape == (2, 3, 8, 8)
    assert batch.labels.tolist() == [1, 1]
    moved = batch.to(torch.device("cpu"), channels_last=True)
    assert isinstance(moved, Batch)
    assert moved.images.is_contiguous(memory_format=torch.channels_last)
    unlabeled = collate([transform(Sample(picture(), None, "a"))])
    assert unlabeled.labels is None
    with pytest.raises(ValueError, match="differ in size"):
        collate([transform(sample()), evaluation_transform(size=9)(sample())])
    with pytest.raises(ValueError, match="at least one"):
        collate([])
