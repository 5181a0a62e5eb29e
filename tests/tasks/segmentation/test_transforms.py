"""What training does to an image and its labels, and the loss it minimizes."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from eanet.data.labeled_images import normalize
from eanet.tasks.segmentation.losses import pixel_loss
from eanet.tasks.segmentation.samples import IGNORE, Sample, collate
from eanet.tasks.segmentation.transforms import (
    CONVENTIONS,
    TrainingTransform,
    photometric,
)

PLAIN = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25), "mirror": 0.0}


def sample(height=40, width=56):
    """Return an image whose red channel is a ramp, and labels that say where it is bright."""
    ramp = np.linspace(0, 255, width).astype(np.uint8)
    image = np.zeros((height, width, 3), dtype=np.uint8)
    image[..., 0] = ramp
    labels = (image[..., 0] > 127).astype(np.uint8)
    return Sample(Image.fromarray(image), labels, "ramp")


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("mirror", [0.0, 1.0])
def test_image_and_labels_move_together(convention, mirror):
    transform = TrainingTransform(
        (33, 41), **{**PLAIN, "mirror": mirror}, ratios=(0.5, 2.0), convention=convention
    )
    for seed in range(12):
        torch.manual_seed(seed)
        out = transform(sample())
        assert out.image.shape == (3, 33, 41)
        assert out.image.dtype == torch.float32
        assert out.labels.shape == (33, 41)
        assert out.labels.dtype == torch.uint8
        valid = out.labels != IGNORE
        assert valid.any()
        # what is padding in one is padding in the other, in the mean color
        assert not (~valid).any() or out.image[:, ~valid].abs().max() == 0
        bright = (out.image[0] > 0)[valid] == (out.labels == 1)[valid]
        assert bright.float().mean() > 0.95


def test_the_authors_pad_before_they_mirror():
    for convention, side in (("authors", 0), ("mmsegmentation", -1)):
        transform = TrainingTransform((40, 80), **{**PLAIN, "mirror": 1.0}, convention=convention)
        labels = transform(sample()).labels
        assert (labels[:, side] == IGNORE).all()
        assert (labels[:, -1 - side] != IGNORE).all()


def test_without_changes_the_image_is_normalized_alone():
    given = sample()
    out = TrainingTransform((40, 56), **PLAIN)(given)
    pixels = torch.from_numpy(np.array(given.image)).permute(2, 0, 1).double()
    torch.testing.assert_close(out.image.double(), (pixels / 255 - 0.5) / 0.25, atol=1e-6, rtol=0)
    assert torch.equal(out.labels, torch.from_numpy(given.labels))


def test_ratios_on_a_grid():
    transform = TrainingTransform((8, 8), **PLAIN, ratios=(0.5, 2.0), ratio_step=0.1)
    seen = {transform._ratio(10, 10) for _ in range(400)}
    assert seen == {round(0.5 + 0.1 * step, 10) for step in range(16)}


def test_crops_full_of_one_class_are_drawn_again():
    labels = np.zeros((40, 400), dtype=np.uint8)
    labels[:, 380:] = 1
    given = Sample(Image.new("RGB", (400, 40)), labels, "rare")
    shares = {}
    for limit in (1.0, 0.75):
        transform = TrainingTransform((40, 40), **PLAIN, max_class_share=limit)
        torch.manual_seed(0)
        crops = [transform(given).labels for _ in range(150)]
        shares[limit] = sum(float((crop == 0).float().mean()) < 0.75 for crop in crops) / 150
    assert shares[0.75] > 3 * shares[1.0]


def test_colors_change_and_stay_bytes():
    torch.manual_seed(0)
    image = torch.randint(0, 256, (3, 24, 32), dtype=torch.uint8)
    results = [photometric(image) for _ in range(30)]
    assert all(out.dtype == torch.uint8 and out.shape == image.shape for out in results)
    changed = [out for out in results if not torch.equal(out, image)]
    assert len(changed) > 20
    means = torch.stack([out.float().mean() for out in changed])
    assert means.std() > 5


def test_samples_of_unlike_size_share_a_frame():
    first, second = sample(20, 30), sample(24, 16)
    batch = collate([first, second])
    assert batch.images.shape == (2, 3, 24, 30)
    assert batch.sizes == [(20, 30), (24, 16)]
    assert (batch.labels[0, 20:] == IGNORE).all()
    assert torch.equal(batch.labels[1, :, :16], torch.from_numpy(second.labels))
    with pytest.raises(ValueError, match="at least one"):
        collate([])
    with pytest.raises(ValueError, match="blank"):
        collate([first, Sample(first.image, None, "blank")])


def test_normalize_checks_channels():
    with pytest.raises(ValueError, match="channels"):
        normalize(torch.zeros(1, 4, 4, dtype=torch.uint8), (0.5,) * 3, (0.5,) * 3)


# the loss


def case():
    torch.manual_seed(0)
    logits = torch.randn(2, 4, 6, 5, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 4, (2, 6, 5), dtype=torch.uint8)
    labels[0, :2] = IGNORE
    return logits, labels


def test_reductions_by_hand():
    logits, labels = case()
    valid = labels != IGNORE
    each = F.cross_entropy(logits, labels.long().clamp(max=3), reduction="none")[valid]
    found = {
        name: pixel_loss(logits, labels, reduction=name) for name in ("all_pixels", "valid_pixels")
    }
    torch.testing.assert_close(found["all_pixels"], each.sum() / labels.numel())
    torch.testing.assert_close(found["valid_pixels"], each.mean())
    weights = torch.tensor([1.0, 2.0, 0.5, 3.0], dtype=torch.float64)
    expected = F.cross_entropy(logits, labels.long(), weight=weights, ignore_index=IGNORE)
    weighted = pixel_loss(logits, labels, reduction="valid_pixels", class_weights=weights)
    torch.testing.assert_close(weighted, expected)


def test_nothing_labeled_gives_zero_and_no_nan():
    logits, labels = case()
    labels.fill_(IGNORE)
    for options in (
        {"reduction": "all_pixels"},
        {"reduction": "valid_pixels"},
        {"reduction": "valid_pixels", "ohem_threshold": 0.7},
    ):
        logits.grad = None
        loss = pixel_loss(logits, labels, **options)
        loss.backward()
        assert float(loss.detach()) == 0
        assert logits.grad.abs().max() == 0


def test_hard_pixels_alone_count():
    logits, labels = case()
    valid = labels != IGNORE
    true = logits.softmax(1).gather(1, labels.long().clamp(max=3).unsqueeze(1)).squeeze(1)[valid]
    found = pixel_loss(
        logits, labels, reduction="valid_pixels", ohem_threshold=0.3, ohem_min_pixels=1
    )
    torch.testing.assert_close(found, -true[true <= 0.3].log().mean())
    least = pixel_loss(
        logits, labels, reduction="valid_pixels", ohem_threshold=0.0, ohem_min_pixels=7
    )
    torch.testing.assert_close(least, -true.sort().values[:7].log().mean())


def test_sizes_that_differ_are_refused():
    logits, labels = case()
    with pytest.raises(ValueError, match="do not fit"):
        pixel_loss(logits, labels[:, :5])


def test_half_precision_stays_finite():
    logits, labels = case()
    for dtype in (torch.float16, torch.bfloat16):
        loss = pixel_loss((30 * logits).to(dtype).float(), labels)
        assert math.isfinite(float(loss.detach()))
