"""Real photographs in COCO's form: a run trains on them, is judged as by the file, and learns."""

import json
import zipfile
from collections import Counter
from dataclasses import replace

import pytest

from eanet import registry, run
from eanet.recipe import DataSpec, ModelSpec, TrainSpec
from eanet.tasks.detection.coco_scores import evaluate_files

pytestmark = [pytest.mark.realdata, pytest.mark.slow]


@pytest.fixture
def photographs(data_dir, tmp_path):
    """The folder of 110 photographs with their objects, crowds included."""
    archive = data_dir / "coco_mini" / "coco_mini.zip"
    if not archive.is_file():
        pytest.skip(f"there is no {archive}")
    with zipfile.ZipFile(archive) as file:
        file.extractall(tmp_path)
    return tmp_path / "coco_mini"


def annotations(folder, split):
    return folder / "annotations" / f"instances_{split}2017.json"


def recipe(folder, *, batch_size, image_size, train):
    given = registry.recipe("detection_small/nuclei_mask_rcnn_ea")
    return replace(
        given,
        # batches this small have no statistics
        model=ModelSpec(
            name="mask_rcnn_small_ea", arguments={"anchor_scale": 4.0, "norm": "group"}
        ),
        data=DataSpec(name="coco", root=str(folder), batch_size=batch_size),
        options={"image_size": image_size, "max_size": 2 * image_size, "horizontal_flip": 0.0},
        schedule=replace(given.schedule, warmup=10),
        train=train,
    )


def judged_as_by_its_file(folder, split, run_folder, results):
    """Evaluate a run, and what it wrote against the annotations; return numbers, now equal."""
    name = {"train": "train", "validation": "val"}[split]
    metrics = run.evaluate(run_folder, device="cpu", split=split, predictions=results)
    for prefix, kind in (("box", "bbox"), ("mask", "segm")):
        scores, names = evaluate_files(
            annotations(folder, name), results, kind=kind, mask_area=True
        )
        assert len(names) == 80
        for number, value in scores.numbers.items():
            assert metrics[f"{prefix}_{number}"] == pytest.approx(value, abs=1e-12)
    return metrics


def test_few_are_learned_by_heart(photographs, tmp_path):
    file = annotations(photographs, "train")
    content = json.loads(file.read_text())
    counts = Counter(annotation["image_id"] for annotation in content["annotations"])
    few = sorted(counts, key=lambda number: (counts[number], number))[:4]
    content["images"] = [image for image in content["images"] if image["id"] in few]
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in few]
    file.write_text(json.dumps(content))
    train = TrainSpec(steps=100, evaluate_every=100)
    short = recipe(photographs, batch_size=4, image_size=128, train=train)
    result = run.train(short, tmp_path / "run", device="cpu")
    found = judged_as_by_its_file(photographs, "train", result.folder, tmp_path / "found.json")
    assert found["box_AP75"] > 0.9
    assert found["mask_AP75"] > 0.9
    assert found["box_AP"] > 0.7
    assert found["mask_AP"] > 0.7
    unseen = result.metrics["validation"]
    assert unseen["box_AP50"] < 0.5  # what was learned is these photographs


@pytest.mark.filterwarnings("ignore:.*not trained on:UserWarning")
def test_all_are_trained_on_and_judged(photographs, tmp_path):
    train = TrainSpec(epochs=1, evaluate_every=1)
    short = recipe(photographs, batch_size=4, image_size=64, train=train)
    arguments = {**short.model.arguments, "min_score": 0.0, "max_detections": 20}
    short = replace(short, model=ModelSpec(name="mask_rcnn_tiny", arguments=arguments))
    result = run.train(short, tmp_path / "run", device="cpu")
    results = tmp_path / "found.json"
    found = judged_as_by_its_file(photographs, "validation", result.folder, results)
    assert found == result.metrics["validation"]
    assert found["box_AP_class_agnostic"] > 0  # something was found, however little
    assert len({entry["image_id"] for entry in json.loads(results.read_text())}) == 55
