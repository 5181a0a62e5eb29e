"""The twelve numbers equal those of the protocol written down plainly, to 1e-6."""

import json

import numpy as np
import pytest
from tasks.detection import slow_coco

from eanet.cli import main
from eanet.errors import UserError
from eanet.tasks.detection.coco_scores import NUMBERS, coco_scores, evaluate_files
from eanet.tasks.detection.mask_codes import decode_mask, encode_mask
from eanet.tasks.detection.metrics import DetectionMetrics
from eanet.tasks.detection.samples import Instance, Sample

HEIGHT, WIDTH = 150, 180


def ellipse(box):
    x, y, width, height = box
    rows, columns = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    across, down = (columns - x - width / 2) / width, (rows - y - height / 2) / height
    return across**2 + down**2 <= 0.25


def scene(seed, *, many=False):
    """Objects of all sizes, crowds, ties of scores, images without objects, gaps in numbers."""
    rng = np.random.default_rng(seed)
    images = [{"id": number, "height": HEIGHT, "width": WIDTH} for number in (2, 5, 9, 14)]
    categories = [{"id": number, "name": f"class {number}"} for number in (1, 3, 90)]
    annotations, results = [], []
    for image in images[:-1]:
        for _ in range(7):
            size = rng.choice([12, 40, 110], 2) * rng.uniform(0.8, 1.2, 2)
            corner = rng.uniform(0, [WIDTH - size[0], HEIGHT - size[1]])
            box = [float(value) for value in (*corner, *size)]
            category = int(rng.choice([1, 3]))
            mask = ellipse(box)
            annotations.append(
                {"id": len(annotations) + 1, "image_id": image["id"], "category_id": category,
                 "bbox": box, "area": float(mask.sum()), "iscrowd": int(rng.random() < 0.2),
                 "segmentation": encode_mask(mask)}
            )  # fmt: skip
            for _ in range(20 if many else 3):
                moved = np.array(box) + rng.normal(0, 0.06, 4) * np.array([*size, *size])
                moved[2:] = moved[2:].clip(3)
                results.append(
                    {"image_id": image["id"], "bbox": [float(v) for v in moved],
                     "category_id": category if rng.random() < 0.8 else 90,
                     "score": float(np.round(rng.random(), 1)),
                     "segmentation": encode_mask(ellipse(moved))}
                )  # fmt: skip
    truth = {"images": images, "annotations": annotations, "categories": categories}
    return truth, results


def box_measure(found, truth):
    return slow_coco.overlap(found["bbox"], truth["bbox"], truth["iscrowd"])


def mask_measure(found, truth):
    masks = (decode_mask(x["segmentation"], (HEIGHT, WIDTH)) > 0 for x in (found, truth))
    return slow_coco.mask_overlap(*masks, truth["iscrowd"])


def box_area(found):
    return found["bbox"][2] * found["bbox"][3]


def mask_area(found):
    return int(decode_mask(found["segmentation"], (HEIGHT, WIDTH)).sum())


@pytest.mark.parametrize("class_agnostic", [False, True])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_boxes_equal_the_protocol(seed, class_agnostic):
    # seed 2: more detections of a category in an image than are looked at
    truth, results = scene(seed, many=seed == 2)
    found = coco_scores(truth, results, "bbox", class_agnostic=class_agnostic)
    expected = slow_coco.numbers(
        truth, results, measure=box_measure, area_of=box_area, class_agnostic=class_agnostic
    )
    assert list(found.numbers) == list(NUMBERS)
    np.testing.assert_allclose(list(found.numbers.values()), expected, rtol=0, atol=1e-6)
    assert 0.05 < found.numbers["AP"] < 0.9


@pytest.mark.parametrize("area_of", [box_area, mask_area])
def test_masks_equal_the_protocol(area_of):
    truth, results = scene(3)
    found = coco_scores(truth, results, "segm", mask_area=area_of is mask_area)
    expected = slow_coco.numbers(truth, results, measure=mask_measure, area_of=area_of)
    np.testing.assert_allclose(list(found.numbers.values()), expected, rtol=0, atol=1e-6)
    without_boxes = [{k: v for k, v in entry.items() if k != "bbox"} for entry in results]
    same = coco_scores(truth, without_boxes, "segm")
    assert (same.numbers == found.numbers) == (area_of is mask_area)


def test_categories_are_scored_by_themselves():
    truth, results = scene(4)
    found = coco_scores(truth, results, "bbox")
    for number, values in found.per_class.items():
        own = {**truth, "categories": [{"id": number, "name": "x"}]}
        own["annotations"] = [a for a in truth["annotations"] if a["category_id"] == number]
        entries = [r for r in results if r["category_id"] == number]
        alone = coco_scores(own, entries, "bbox").numbers
        for name, value in values.items():
            assert value == pytest.approx(alone[name], abs=1e-9)
    assert found.per_class[90]["AP"] == -1  # no object is of it
    assert found.precision.shape == (101, 3)


def test_nothing_found_and_nothing_there():
    truth, results = scene(5)
    assert coco_scores(truth, [], "bbox").numbers["AP"] == 0
    empty = {**truth, "annotations": []}
    assert set(coco_scores(empty, results, "bbox").numbers.values()) == {-1.0}
    assert set(coco_scores(empty, [], "segm").numbers.values()) == {-1.0}


def test_inputs_are_left_as_they_are():
    truth, results = scene(6)
    before = json.dumps([truth, results])
    coco_scores(truth, results, "segm", mask_area=True)
    assert json.dumps([truth, results]) == before


def test_metrics_of_a_run_are_those_of_its_files():
    truth, results = scene(7)
    metrics = DetectionMetrics({1: "a", 3: "b", 90: "c"}, masks=True)
    labels = {1: 0, 3: 1, 90: 2}
    for image in reversed(truth["images"]):
        instances = tuple(
            Instance(labels[a["category_id"]], tuple(a["bbox"]), a["area"], bool(a["iscrowd"]),
                     a["segmentation"])
            for a in truth["annotations"] if a["image_id"] == image["id"]
        )  # fmt: skip
        sample = Sample(None, instances, "", image["id"], (HEIGHT, WIDTH))
        own = [r for r in results if r["image_id"] == image["id"]]
        metrics.update(sample, [{k: v for k, v in r.items() if k != "image_id"} for r in own])
    values = metrics.compute()
    for name, kind in (("box", "bbox"), ("mask", "segm")):
        expected = coco_scores(truth, results, kind, mask_area=True).numbers
        for number, value in expected.items():
            assert values[f"{name}_{number}"] == pytest.approx(value, abs=1e-12)
    assert values["box_AP_class_agnostic"] > 0


# the command


@pytest.fixture
def files(tmp_path):
    truth, results = scene(8)
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    (tmp_path / "results.json").write_text(json.dumps(results))
    return tmp_path / "truth.json", tmp_path / "results.json"


def test_command_prints_the_numbers(files, capsys):
    words = ["evaluate-coco", *map(str, files)]
    assert main([*words, "--json", "--per-class"]) == 0
    printed = json.loads(capsys.readouterr().out)
    truth, results = (json.loads(file.read_text()) for file in files)
    assert printed["AP"] == coco_scores(truth, results, "bbox").numbers["AP"]
    assert set(printed["per_class"]) == {"1", "3", "90"}
    assert main([*words, "--segm", "--per-class"]) == 0
    text = capsys.readouterr().out
    assert f"{coco_scores(truth, results, 'segm').numbers['AP75']:8.4f}" in text
    assert "class 90" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_id": 77}, "entry 0: .*no image 77"),
        ({"image_id": [1]}, "detections, place 0 .*image_id must be a number"),
        ({"score": float("nan")}, "entry 0: score"),
        ({"bbox": [1, 2, 3]}, "entry 0: bbox"),
        ({"segmentation": {"size": [1, 2], "counts": "11"}}, "entry 0: .*run-length"),
    ],
)
def test_broken_results_are_named(files, change, message):
    truth, results = files
    entries = json.loads(results.read_text())
    entries[0].update(change)
    results.write_text(json.dumps(entries))
    with pytest.raises(UserError, match=f"results.json: {message}"):
        evaluate_files(truth, results, kind="segm")


def test_broken_files_are_named(files):
    truth, results = files
    with pytest.raises(UserError, match=r"gone\.json: there is no such file"):
        evaluate_files(truth, truth.with_name("gone.json"), kind="bbox")
    results.write_text("{}")
    with pytest.raises(UserError, match=r"results\.json.*list"):
        evaluate_files(truth, results, kind="bbox")
    results.write_text(json.dumps([{"image_id": 2, "score": 1, "category_id": 4, "bbox": [0] * 4}]))
    with pytest.warns(UserWarning, match="count nowhere"):
        evaluate_files(truth, results, kind="bbox")
    content = json.loads(truth.read_text())
    del content["annotations"][0]["area"]
    truth.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"truth\.json: annotation 1: needs an area"):
        evaluate_files(truth, results, kind="bbox")
