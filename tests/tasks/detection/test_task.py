"""The detection task: transforms, step, detections, report, baselines, and that it learns."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tasks.detection.networks import KINDS

from eanet import hub, registry, run
from eanet.data.splits import open_splits
from eanet.engine.checkpoint import CheckpointWarning
from eanet.errors import UserError
from eanet.prediction import predict
from eanet.recipe import DataSpec, ModelSpec
from eanet.report.page import Picture, Table
from eanet.starting_weights import start_from
from eanet.tasks.detection.baselines import otsu_threshold, threshold_regions
from eanet.tasks.detection.builtin import DrawnScenes
from eanet.tasks.detection.coco_scores import coco_scores
from eanet.tasks.detection.mask_codes import decode_mask, encode_mask
from eanet.tasks.detection.metrics import DetectionMetrics
from eanet.tasks.detection.pictures import drawn
from eanet.tasks.detection.samples import Instance, Sample
from eanet.tasks.detection.task import DetectionTask
from eanet.tasks.detection.transforms import (
    Augmentation,
    augment,
    prepare,
    resized_size,
    target_of,
    to_original,
)

SMALL = {"image_size": 64, "num_train": 12, "num_test": 3}
DATA = DrawnScenes(**SMALL).splits


def build(name="mask_rcnn_tiny", *, arguments=None, **options):
    model = registry.create_model(name, num_classes=6, **(arguments or {}))
    return DetectionTask(model, DATA.facts, **({"image_size": 64, "max_size": 96} | options))


# data and transforms


def test_scenes_agree_with_their_masks():
    assert len(DATA.train) == 12
    sample = DATA.train[3]
    assert sample is DATA.train[3]
    assert sample.instances
    for instance in sample.instances:
        mask = decode_mask(instance.segmentation, sample.size)
        rows, columns = np.nonzero(mask)
        x, y, width, height = instance.box
        assert (columns.min(), rows.min()) == (x, y)
        assert (columns.max() + 1 - x, rows.max() + 1 - y) == (width, height)
        assert instance.area == mask.sum()
    with pytest.raises(UserError, match="built in"):
        DrawnScenes("somewhere")


def wide_sample():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (50, 80, 3), dtype=np.uint8)
    mask = np.zeros((50, 80), dtype=np.uint8)
    mask[10:30, 5:25] = 1
    instances = (
        Instance(1, (5.0, 10.0, 20.0, 20.0), 400.0, False, encode_mask(mask)),
        Instance(0, (40.0, 5.0, 60.0, 20.0), 800.0, False, encode_mask(mask)),  # reaches beyond
        Instance(2, (0.0, 0.0, 50.0, 50.0), 99.0, True, encode_mask(mask)),  # a crowd
        Instance(2, (1.0, 1.0, 0.5, 9.0), 4.0, False, encode_mask(mask)),  # a sliver
    )
    return Sample(Image.fromarray(pixels), instances, "wide", 1, (50, 80))


def test_resizing_keeps_the_shape_within_limits():
    assert resized_size((50, 80), 100, 1000) == (100, 160)
    assert resized_size((50, 80), 100, 120) == (75, 120)
    assert resized_size((3, 1000), 100, 100) == (1, 100)
    image = prepare(wide_sample(), shorter=50, longest=80)
    assert torch.equal(image, torch.from_numpy(np.array(wide_sample().image)).permute(2, 0, 1))
    assert prepare(wide_sample(), shorter=25, longest=80).shape == (3, 25, 40)


def test_targets_follow_the_image():
    target = target_of(wide_sample().instances, (50, 80), (100, 160), masks=True)
    assert target["boxes"].tolist() == [[10, 20, 50, 60], [80, 10, 160, 50]]
    assert target["labels"].tolist() == [1, 0]
    assert target["masks"].shape == (2, 100, 160)
    assert target["masks"][0, 20:60, 10:50].all()
    assert target["masks"][0].sum() == 1600
    empty = target_of((), (50, 80), (100, 160), masks=True)
    assert empty["boxes"].shape == (0, 4)
    assert empty["masks"].shape == (0, 100, 160)


@pytest.mark.parametrize("axis", [1, 2])
def test_mirrored_targets_lie_on_the_mirrored_image(axis):
    how = Augmentation((50,), 80, 1.0 if axis == 2 else 0.0, 1.0 if axis == 1 else 0.0)
    plain = augment(wide_sample(), Augmentation((50,), 80, 0.0, 0.0), masks=True)
    mirrored = augment(wide_sample(), how, masks=True)
    assert torch.equal(mirrored.image, plain.image.flip(axis))
    assert torch.equal(mirrored.target["masks"], plain.target["masks"].flip(axis))
    rows, columns = np.nonzero(mirrored.target["masks"][0].numpy())
    edges = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    assert mirrored.target["boxes"][0].tolist() == edges


def test_sizes_are_chosen_at_random():
    how = Augmentation((40, 50, 60), 200)
    heights = {augment(wide_sample(), how, masks=False).image.shape[1] for _ in range(30)}
    assert heights == {40, 50, 60}


def test_boxes_return_to_the_stored_image():
    boxes = torch.tensor([[10.0, 20, 50, 60], [150, 90, 170, 110]])
    assert to_original(boxes, (100, 160), (50, 80)).tolist() == [[5, 10, 25, 30], [75, 45, 80, 50]]


# the task


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"image_size": 8}, "32 or more"),
        ({"max_size": 32}, "max_size"),
        ({"train_sizes": [1.5]}, "integers"),
        ({"horizontal_flip": 2.0}, "horizontal_flip"),
        ({"vertical_flip": -1.0}, "vertical_flip"),
    ],
)
def test_refused_options(options, word):
    with pytest.raises(ValueError, match=word):
        build(**options)


def test_masks_need_data_with_masks():
    facts = {**DATA.facts, "has_masks": False}
    model = registry.create_model("mask_rcnn_tiny", num_classes=6)
    with pytest.raises(ValueError, match="boxes alone"):
        DetectionTask(model, facts)
    DetectionTask(registry.create_model("retinanet_tiny", num_classes=6), facts)


def test_validation_is_set_apart_where_there_is_none(monkeypatch):
    class WithoutValidation(DrawnScenes):
        def __init__(self, root=None):
            super().__init__(root, **SMALL)
            self.splits.validation = None

    monkeypatch.setattr(registry, "dataset", lambda task, name: WithoutValidation)
    splits = open_splits(
        DataSpec(name="scenes", validation_fraction=0.25), task="detection", seed=0
    )
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (9, 3, 3)


def test_a_step_yields_one_update():
    task = build()
    batch = task.collate([task.train_transform(DATA.train[index]) for index in range(3)])
    (update,) = task.training_step([batch], 0)
    assert update.network == "model"
    assert set(update.losses) == {"proposal_class", "proposal_box", "class", "box", "mask"}
    sum(update.losses.values()).backward()


def perfect(task, monkeypatch):
    """Let the network find exactly what is annotated, in the pixels that it sees."""

    def forward(images, targets=None, sizes=None):
        found = []
        for sample, size in zip(batch.samples, sizes, strict=True):
            target = target_of(sample.instances, sample.size, size, masks=True)
            masks = torch.zeros(len(target["labels"]), 28, 28)
            for mask, box, whole in zip(masks, target["boxes"], target["masks"], strict=True):
                x0, y0, x1, y1 = box.tolist()
                columns = (x0 + (torch.arange(28) + 0.5) / 28 * (x1 - x0)).long()
                rows = (y0 + (torch.arange(28) + 0.5) / 28 * (y1 - y0)).long()
                mask.copy_(whole[rows][:, columns].float())
            found.append(
                {
                    "boxes": target["boxes"],
                    "labels": target["labels"],
                    "scores": torch.linspace(0.9, 0.5, len(masks)),
                    "mask_probabilities": masks,
                }
            )
        return found

    batch = task.collate([task.evaluation_transform(DATA.test[index]) for index in range(3)])
    monkeypatch.setattr(task.networks["model"], "forward", forward)
    return batch


@pytest.mark.parametrize("image_size", [64, 96])
def test_a_perfect_network_scores_one(monkeypatch, image_size):
    task = build(image_size=image_size)
    batch = perfect(task, monkeypatch)
    metrics = task.new_metrics(torch.device("cpu"))
    task.validation_step(batch, metrics)
    values = metrics.compute()
    assert values["box_AP"] == pytest.approx(1.0, abs=1e-6)
    assert values["mask_AP50"] == pytest.approx(1.0, abs=1e-6)
    assert values["mask_AP75"] > 0.9
    records = task.predict_batch(batch)
    first = DATA.test[0].instances[0]
    assert records[0]["detections"][0]["bbox"] == pytest.approx(first.box, abs=1e-3)
    assert records[0]["detections"][0]["label"] == DATA.facts["class_names"][first.label]


def test_pictures_show_boxes_and_masks():
    sample = wide_sample()
    mask = np.zeros((50, 80), dtype=np.uint8)
    mask[20:40, 20:40] = 1
    entry = {"bbox": [20, 20, 20, 20], "label": "thing", "class": 0, "score": 0.5,
             "segmentation": encode_mask(mask)}  # fmt: skip
    plain, marked = drawn(sample.image, []), drawn(sample.image, [entry])
    assert plain.shape == marked.shape == (300, 480, 3)
    changed = (plain != marked).any(2)
    assert changed[6 * 22 : 6 * 38, 6 * 22 : 6 * 38].mean() > 0.9
    assert not changed[6 * 45 :].any()


def test_regions_that_differ_from_the_ground_are_found():
    image = np.full((40, 50, 3), 30, dtype=np.uint8)
    image[5:15, 5:25] = 200
    image[25:35, 30:36] = 220
    assert 30 <= otsu_threshold(image[:, :, 0]) < 200
    found = threshold_regions(image)
    assert [entry["bbox"] for entry in found] == [[5, 5, 20, 10], [30, 25, 6, 10]]
    assert decode_mask(found[0]["segmentation"], (40, 50)).sum() == 200
    inverted = threshold_regions(255 - image)
    assert [entry["bbox"] for entry in inverted] == [entry["bbox"] for entry in found]
    assert threshold_regions(np.full((40, 50, 3), 7, dtype=np.uint8)) == []


# whole runs


def smoke(kind, **arguments):
    return registry.recipe("detection_coco/mask_rcnn_ea").smoke(
        model=ModelSpec(name=f"{kind}_tiny", arguments={"max_detections": 5, **arguments}),
        data=DataSpec(name="scenes", batch_size=4, arguments=SMALL),
        options=DetectionTask.smoke_options,
    )


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=[] if kind == "cascade_mask_rcnn" else pytest.mark.slow)
        for kind in KINDS
    ],
)
def test_every_detector_trains_evaluates_and_resumes_to_the_bit(tmp_path, kind):
    recipe = smoke(kind)
    whole = run.train(recipe, tmp_path / "whole", device="cpu")
    first = replace(recipe, train=replace(recipe.train, steps=1))
    run.train(first, tmp_path / "parts", device="cpu")
    with pytest.warns(CheckpointWarning, match=r"train\.steps"):
        longer = run.train(recipe, tmp_path / "parts", resume=True, device="cpu")
    assert longer.metrics["test"] == whole.metrics["test"]
    states = [run.load(folder.folder, checkpoint="last").state_dict() for folder in (whole, longer)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert 0 <= whole.metrics["test"]["box_AP"] <= 1
    assert "otsu_regions_box_AP50" in whole.metrics["baselines"]
    page = whole.page.read_text()
    for heading in ("Detections", "Scores by class", "External attention"):
        assert heading in page


def test_predictions_are_pictures_and_coco_results(tmp_path):
    result = run.train(smoke("mask_rcnn", min_score=0.0), tmp_path / "run", device="cpu")
    metrics = run.evaluate(result.folder, device="cpu", predictions=tmp_path / "results.json")
    assert metrics == result.metrics["test"]
    truth = DetectionMetrics(dict(enumerate(DATA.facts["class_names"], start=1)), masks=True)
    for index in range(3):
        truth.update(DATA.test[index], [])
    results = json.loads((tmp_path / "results.json").read_text())
    assert coco_scores(truth.truth(), results, "bbox").numbers["AP"] == metrics["box_AP"]

    DATA.test[0].image.save(tmp_path / "photo.png")
    (tmp_path / "text.png").write_text("no image")
    made = predict(
        result.folder,
        [tmp_path / "photo.png", tmp_path / "text.png"],
        out=tmp_path / "out",
        device="cpu",
    )
    assert len(made.failures) == 1
    assert "text.png" in made.failures[0]
    detections = made.records[0]["detections"]
    assert 0 < len(detections) <= 5
    results = json.loads((tmp_path / "out" / "pictures" / "photo.json").read_text())
    assert [entry["score"] for entry in results] == [entry["score"] for entry in detections]
    assert set(results[0]) == {"image_id", "category_id", "bbox", "score", "segmentation"}
    assert results[0]["image_id"] == "photo"
    with Image.open(tmp_path / "out" / "pictures" / "photo.png") as picture:
        assert picture.size == (512, 512)


def test_a_detector_takes_up_attention_later(tmp_path):
    plain = build("faster_rcnn_tiny", arguments={"attention": "none"})
    hub.save_pretrained(plain.model, tmp_path / "plain")
    task = build("faster_rcnn_tiny")
    start_from(task.model, str(tmp_path / "plain"), load=run.load)
    state = task.model.state_dict()
    for name, tensor in plain.model.state_dict().items():
        assert torch.equal(state[name], tensor), name
    with pytest.raises(UserError, match="lacks"):
        hub.copy_weights(task.model, plain.model.state_dict(), source="plain")
    with pytest.raises(UserError, match="takes no published weights"):
        start_from(torch.nn.Linear(1, 1), "published:file.pth", load=run.load)


def test_report_without_attention_has_no_maps():
    task = build("faster_rcnn_tiny", arguments={"attention": "none", "max_detections": 3})
    task.model.eval()
    sections = task.report_sections(DATA, torch.device("cpu"))
    assert [section.title for section in sections] == ["Detections", "Scores by class"]
    table, curves = sections[1].parts
    assert isinstance(table, Table)
    assert isinstance(curves, Picture)
    assert len(table.rows) == 6
