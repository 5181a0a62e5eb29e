"""Assignment, drawing, losses and the cascade, against what the definitions give by hand."""

import math

import pytest
import torch
import torch.nn.functional as F
from tasks.detection.networks import detector, images, targets

from eanet.tasks.detection.anchors import Anchors
from eanet.tasks.detection.assignment import IGNORED, NEGATIVE, Matcher, sample_candidates
from eanet.tasks.detection.boxes import box_overlaps, clip_boxes, decode_boxes, encode_boxes
from eanet.tasks.detection.cascade_heads import _STAGES, CascadeHeads
from eanet.tasks.detection.heads import DrawnRegions, box_losses, draw_regions, mask_loss
from eanet.tasks.detection.instance_masks import mask_targets, paste_masks
from eanet.tasks.detection.region_features import region_features
from eanet.tasks.detection.region_heads import HeadSettings
from eanet.tasks.detection.region_proposals import ProposalSettings, RegionProposals
from eanet.tasks.detection.selection import select_detections


def test_overlaps_by_hand():
    first = torch.tensor([[0.0, 0, 2, 2], [5, 5, 5, 9]])
    second = torch.tensor([[1.0, 1, 3, 3], [0, 0, 2, 2], [9, 9, 10, 10]])
    expected = torch.tensor([[1 / 7, 1, 0], [0, 0, 0]])
    torch.testing.assert_close(box_overlaps(first, second), expected)


def test_coding_is_inverse_and_limited():
    boxes = torch.tensor([[10.0, 20, 50, 40]])
    wanted = torch.tensor([[0.0, 10, 70, 90]])
    stds = (0.1, 0.1, 0.2, 0.2)
    torch.testing.assert_close(decode_boxes(boxes, encode_boxes(boxes, wanted, stds), stds), wanted)
    for sign, factor in ((1.0, 62.5), (-1.0, 1 / 62.5)):
        grown = decode_boxes(boxes, torch.tensor([[0.0, 0, sign * 100, 0]]), (1.0,) * 4)
        assert float(grown[0, 2] - grown[0, 0]) == pytest.approx(40 * factor, rel=1e-5)
    assert clip_boxes(wanted - 30, (15, 20)).tolist() == [[0, 0, 20, 15]]


def test_later_objects_overrule_earlier_ones():
    objects = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 11]])
    candidates = torch.tensor([[0.0, 0, 10, 4], [20, 20, 30, 30], [0, 0, 10, 8.5]])
    match = Matcher(0.9, 0.3, min_best=0.3)
    # the third is the best candidate of both objects, the first lies between the thresholds
    assert match(candidates, objects).tolist() == [IGNORED, NEGATIVE, 1]
    assert Matcher(0.9, 0.3)(candidates, objects).tolist() == [IGNORED, NEGATIVE, IGNORED]
    assert match(candidates, objects[:0]).tolist() == [NEGATIVE] * 3
    assert match(candidates[:0], objects).tolist() == []


def test_drawing_keeps_shares():
    assigned = torch.cat([torch.zeros(50), torch.full((300,), -1), torch.full((9,), -2)]).long()
    positives, negatives = sample_candidates(assigned, 64, 0.25)
    assert len(positives) == 16
    assert len(negatives) == 48
    assert len(set(positives.tolist())) == 16
    assert (assigned[negatives] == NEGATIVE).all()
    positives, negatives = sample_candidates(assigned[48:60], 64, 0.25)
    assert positives.tolist() == [0, 1]
    assert len(negatives) == 10


def test_objects_are_added_to_proposals_and_known_again():
    target = targets()[0]
    proposals = torch.tensor([[11.0, 10, 40, 30], [0, 40, 20, 60]])
    drawn = draw_regions(proposals, target, Matcher(0.5, 0.5), count=32, num_classes=3)
    assert len(drawn.boxes) == 4
    order = drawn.labels.argsort(stable=True)
    assert drawn.labels[order].tolist() == [0, 0, 2, 3]
    assert drawn.is_object.sum() == 2
    assert (drawn.labels[drawn.is_object] < 3).all()
    assert drawn.objects.tolist().count(0) == 2


def test_losses_count_all_regions():
    drawn = DrawnRegions(
        torch.tensor([[10.0, 10, 40, 30], [0, 0, 5, 5], [1, 1, 9, 9]]),
        torch.tensor([0, 3, 3]),
        torch.tensor([0]),
        torch.tensor([True, False, False]),
    )
    logits, offsets = torch.randn(3, 4), torch.randn(3, 3, 4)
    losses = box_losses(
        logits, offsets, [drawn], targets()[:1],
        stds=(0.1, 0.1, 0.2, 0.2), loss="l1", num_classes=3,
    )  # fmt: skip
    torch.testing.assert_close(losses["class"], F.cross_entropy(logits, drawn.labels))
    torch.testing.assert_close(losses["box"], offsets[0, 0].abs().sum() / 3)
    masks = torch.randn(1, 3, 28, 28)
    wanted = mask_targets(targets()[0]["masks"], drawn.boxes[:1], drawn.objects)
    assert wanted.min() == 1  # the box is the object
    expected = F.binary_cross_entropy_with_logits(masks[0, 0], wanted[0])
    torch.testing.assert_close(mask_loss(masks, [drawn], targets()[:1]), expected)


def test_proposals_leave_padding_and_crossing_anchors_out():
    anchors = Anchors((4, 8), scales=(2.0,))
    sizes = [(16, 24), (8, 12)]
    image = (33, 40)  # padded by itself to 64 x 64, in a batch of 64 x 96
    for inside_only in (False, True):
        network = RegionProposals(4, anchors, ProposalSettings(inside_only=inside_only))
        grids = [anchors.grid(level, size) for level, size in enumerate(sizes)]
        usable = network._usable(grids, sizes, image)
        boxes = torch.cat(grids)
        centers = (boxes[:, :2] + boxes[:, 2:]) / 2
        expected = (centers < 64).all(1)
        if inside_only:
            expected &= (boxes[:, :2] >= 0).all(1) & (boxes[:, 2] < 40) & (boxes[:, 3] < 33)
        assert torch.equal(usable, expected)
        assert usable.any()
        assert not usable.all()


def test_class_wise_suppression():
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [30, 30, 40, 40]])
    scores = torch.tensor([[0.9, 0.3], [0.8, 0.0], [0.2, 0.01]])
    options = {"min_score": 0.05, "max_overlap": 0.5}
    found, values, labels = select_detections(boxes, scores, limit=100, **options)
    assert labels.tolist() == [0, 1, 0]
    torch.testing.assert_close(values, torch.tensor([0.9, 0.3, 0.2]))
    assert found[2].tolist() == [30, 30, 40, 40]
    own = boxes[:, None].expand(-1, 2, -1) + torch.tensor([0.0, 1.0])[:, None]
    found, _, _ = select_detections(own, scores, limit=2, **options)
    assert found.tolist() == [[0, 0, 10, 10], [1, 1, 11, 11]]


def test_regions_come_from_their_levels():
    features = [torch.full((1, 1, 100 // s, 100 // s), float(n)) for n, s in enumerate((1, 2, 4))]
    boxes = torch.tensor([[0.0, 0, 50, 50], [0, 0, 90, 90], [0, 0, 60, 60], [10, 10, 10, 10]])
    boxes = boxes * torch.tensor([1.0, 3.0, 2.0, 1.0])[:, None]
    found = region_features(features, (4, 8, 16), [boxes], 2)
    assert found[:, 0, 0, 0].tolist() == [0, 2, 1, 0]
    assert region_features(features, (4, 8, 16), [boxes[:0]], 2).shape == (0, 1, 2, 2)


def test_degenerate_boxes_paste_nothing():
    masks = torch.ones(3, 28, 28)
    boxes = torch.tensor([[5.0, 5, 5, 9], [2, 2, math.inf, 5], [-50, -50, -40, -40]])
    assert not paste_masks(masks, boxes, (20, 30)).any()
    assert paste_masks(masks[:0], boxes[:0], (20, 30)).shape == (0, 20, 30)


# the cascade


def cascade(masks=False):
    torch.manual_seed(0)
    settings = HeadSettings(3, 4, (4, 8), masks, hidden=8, mask_width=4, mask_depth=1, samples=16)
    return CascadeHeads(settings)


def test_stages_refine_what_the_one_before_left(monkeypatch):
    heads = cascade()
    seen = []

    def spy(proposals, target, match, **options):
        seen.append((proposals, match))
        return draw_regions(proposals, target, match, **options)

    monkeypatch.setattr("eanet.tasks.detection.cascade_heads.draw_regions", spy)
    features = [torch.randn(1, 4, 16, 24), torch.randn(1, 4, 8, 12)]
    proposals = [torch.tensor([[8.0, 8, 42, 33], [50, 20, 90, 60], [0, 0, 30, 30]])]
    losses = heads.losses(features, proposals, [(64, 96)], targets()[:1])
    assert [match.positive for _, match in seen] == [0.5, 0.6, 0.7]
    # boxes of objects are added at each stage and taken out after it
    assert [len(boxes) for boxes, _ in seen] == [3, 3, 3]
    assert not seen[1][0].requires_grad
    assert set(losses) == {f"stage{n}_{part}" for n in (1, 2, 3) for part in ("class", "box")}


def test_losses_of_stages_are_weighted():
    assert [stage.weight for stage in _STAGES] == [1.0, 0.5, 0.25]
    heads = cascade(masks=True)
    for head in heads.boxes:
        head.load_state_dict(heads.boxes[0].state_dict())
        torch.nn.init.zeros_(head.classes.weight)
    features = [torch.randn(1, 4, 16, 24), torch.randn(1, 4, 8, 12)]
    losses = heads.losses(features, [torch.zeros(0, 4)], [(64, 96)], targets()[:1])
    for number, stage in enumerate(_STAGES, start=1):
        # without any weight every class is as likely
        assert losses[f"stage{number}_class"].item() == pytest.approx(
            stage.weight * math.log(4), rel=1e-5
        )
        assert f"stage{number}_mask" in losses


@torch.no_grad()
def test_logits_and_masks_of_stages_are_averaged():
    heads = cascade(masks=True).eval()
    features = [torch.randn(1, 4, 16, 24), torch.randn(1, 4, 8, 12)]
    start = torch.tensor([[8.0, 8, 42, 33], [50, 20, 90, 60]])
    heads.settings = HeadSettings(**{**vars(heads.settings), "min_score": 0.0})
    (found,) = heads.detect(features, [start], [(64, 96)])
    boxes, logits = start, []
    for head, stage in zip(heads.boxes, _STAGES, strict=True):
        own, offsets = head(region_features(features, (4, 8), [boxes], 7))
        logits.append(own)
        boxes = decode_boxes(boxes, offsets[:, 0], stage.stds, clip=(64, 96))
    scores = torch.stack(logits).mean(0).softmax(1)[:, :-1]
    torch.testing.assert_close(found["scores"].sort().values, scores.flatten().sort().values)
    cut = region_features(features, (4, 8), [found["boxes"]], 14)
    masks = torch.stack([head(cut).sigmoid() for head in heads.masks]).mean(0)
    picked = masks[torch.arange(len(masks)), found["labels"]]
    torch.testing.assert_close(found["mask_probabilities"], picked)


def test_no_proposal_is_no_detection():
    heads = cascade(masks=True).eval()
    features = [torch.randn(1, 4, 16, 24), torch.randn(1, 4, 8, 12)]
    (found,) = heads.detect(features, [torch.zeros(0, 4)], [(64, 96)])
    assert found["boxes"].shape == (0, 4)
    assert found["mask_probabilities"].shape == (0, 28, 28)


# retinanet


def test_focal_and_box_loss_count_positives_of_the_batch():
    model = detector("retinanet", attention="none", norm="group")
    torch.nn.init.zeros_(model.classes.weight)
    torch.nn.init.zeros_(model.offsets.weight)
    losses = model(images(), targets(empty=True))
    anchors = torch.cat(
        [
            model.anchors.grid(level, size)
            for level, size in enumerate([(12, 12), (6, 6), (3, 3), (2, 2), (1, 1)])
        ]
    )
    match = Matcher(0.5, 0.4, min_best=0.0)
    prior, positives, negatives, moves = 0.01, 0, 0, 0.0
    for image, target in zip(((64, 96), (70, 50)), targets(empty=True), strict=True):
        padded = [-(-length // 32) * 32 for length in image]
        centers = (anchors[:, :2] + anchors[:, 2:]) / 2
        own = anchors[(centers[:, 0] < padded[1]) & (centers[:, 1] < padded[0])]
        assigned = match(own, target["boxes"])
        places = assigned >= 0
        moves += encode_boxes(
            own[places], target["boxes"][assigned[places]], (1.0,) * 4
        ).abs().sum()  # fmt: skip
        positives += int(places.sum())
        negatives += int((assigned == NEGATIVE).sum())
    hit = -0.25 * (1 - prior) ** 2 * math.log(prior)
    miss = -0.75 * prior**2 * math.log(1 - prior)
    expected = positives * (hit + 2 * miss) + negatives * 3 * miss
    assert positives > 0
    assert losses["class"].item() == pytest.approx(expected / positives, rel=1e-4)
    assert losses["box"].item() == pytest.approx(float(moves) / positives, rel=1e-4)
