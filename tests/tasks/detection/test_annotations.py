"""Annotation files: every kind of broken one gets a line with file and annotation."""

import json
import re
import zipfile

import numpy as np
import pytest
from PIL import Image

from eanet.errors import UserError
from eanet.tasks.detection.annotations import read_coco
from eanet.tasks.detection.datasets import Coco, Voc
from eanet.tasks.detection.mask_codes import decode_mask, encode_mask, segmentation_problem

POLYGON = [[10.0, 10, 30, 10, 30, 25, 10, 25]]


def content():
    return {
        "images": [
            {"id": 3, "file_name": "a.png", "height": 40, "width": 60},
            {"id": 7, "file_name": "b.png", "height": 60, "width": 40},
        ],
        "annotations": [
            {"id": 11, "image_id": 3, "category_id": 2, "bbox": [10, 10, 20, 15], "area": 300,
             "iscrowd": 0, "segmentation": POLYGON},
            {"id": 12, "image_id": 7, "category_id": 9, "bbox": [1, 2, 30, 40], "area": 1200,
             "iscrowd": 0, "segmentation": [[1.0, 2, 31, 2, 31, 42]]},
        ],
        "categories": [{"id": 9, "name": "dog"}, {"id": 2, "name": "cat"}],
    }  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    for split in ("train2017", "val2017"):
        (tmp_path / split).mkdir()
        Image.new("RGB", (60, 40), "red").save(tmp_path / split / "a.png")
        Image.new("L", (40, 60), 90).save(tmp_path / split / "b.png")
    (tmp_path / "annotations").mkdir()
    for split in ("train2017", "val2017"):
        write(tmp_path, content(), split)
    return tmp_path


def write(folder, value, split="train2017"):
    (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(value))


def test_what_is_right_is_read(folder):
    splits = Coco(str(folder)).splits
    assert splits.facts["class_names"] == ["cat", "dog"]
    assert splits.facts["category_ids"] == [2, 9]
    assert splits.facts["has_masks"]
    assert splits.test is None
    assert splits.train.batch_groups == [1, 0]
    sample = splits.train[1]
    assert sample.image.mode == "RGB"
    assert (sample.size, sample.number) == ((60, 40), 7)
    (instance,) = sample.instances
    assert (instance.label, instance.box, instance.area) == (1, (1.0, 2.0, 30.0, 40.0), 1200.0)
    as_test = Coco(str(folder), val_as="test").splits
    assert as_test.validation is None
    assert len(as_test.test) == 2


RUN_LENGTHS = {"size": [40, 60], "counts": [5, 6, 2389]}


def changed(**values):
    def change(data):
        data["annotations"][0].update(values)

    return change


def drop_categories(data):
    data["categories"] = []


def missing_file(data):
    data["images"][0]["file_name"] = "gone.png"


def repeat(data):
    data["annotations"][1]["id"] = 11


def without_category(data):
    del data["annotations"][0]["category_id"]


BROKEN = {
    "not a number": (changed(bbox=[float("nan"), 10, 20, 15]), "annotation 11 .*finite"),
    "infinite": (changed(bbox=[1, 10, float("inf"), 15]), "annotation 11 .*finite"),
    "inverted": (changed(bbox=[10, 10, -20, 15]), "annotation 11 .*negative side"),
    "unknown label": (changed(category_id=5), r"annotation 11 .*category_id 5.*\[2, 9\]"),
    "negative label": (changed(category_id=-1), "annotation 11 .*category_id -1"),
    "missing file": (missing_file, "image 3: there is no file .*gone.png"),
    "duplicate id": (repeat, "annotation 11: this id is used 2 times"),
    "no category": (without_category, "annotation 11 .*no category_id"),
    "no categories": (drop_categories, "categories"),
    "code of another size": (
        changed(segmentation={"size": [60, 40], "counts": [2400]}),
        r"annotation 11 .*\[60, 40\].*\[40, 60\]",
    ),
    "code that does not add up": (
        changed(segmentation={**RUN_LENGTHS, "counts": [5, 6]}),
        "annotation 11 .*do not add up",
    ),
    "polygon of two points": (changed(segmentation=[[1, 2, 3, 4]]), "annotation 11 .*3 points"),
    "unknown image": (changed(image_id=99), "annotation 11: there is no image 99"),
    "a list for an image": (changed(image_id=[1]), r"annotations, place 0 .*image_id .*\[1\]"),
    "an object for an id": (changed(id={"a": 1}), "annotations, place 0 .*id must be a number"),
    "negative area": (changed(area=-5), "annotation 11 .*area"),
    "no box": (changed(bbox=[1, 2, 3]), "annotation 11 .*four numbers"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_cannot_be_meant_is_refused_by_name(folder, kind):
    change, message = BROKEN[kind]
    data = content()
    change(data)
    write(folder, data)
    with pytest.raises(UserError, match=f"instances_train2017.json.*{message}"):
        Coco(str(folder))


@pytest.mark.parametrize("kind", ["not a number", "inverted", "unknown label"])
def test_it_can_be_dropped_with_a_warning(folder, kind):
    data = content()
    BROKEN[kind][0](data)
    write(folder, data)
    with pytest.warns(UserWarning, match=r"instances_train2017.json: left out.*annotation 11"):
        splits = Coco(str(folder), invalid="drop").splits
    assert [record.number for record in splits.train.records] == [7]


@pytest.mark.parametrize(
    ("box", "what"),
    [([10, 10, 0, 15], "no area"), ([10, 10, 4, 0.0], "no area"), ([70, 3, 9, 9], "outside")],
)
def test_boxes_of_nothing_are_left_out_with_a_warning(folder, box, what):
    data = content()
    changed(bbox=box)(data)
    write(folder, data)
    with pytest.warns(UserWarning, match=f"{what}.*annotation 11 .image 3, a.png"):
        splits = Coco(str(folder)).splits
    assert len(splits.train) == 1


def test_boxes_that_reach_beyond_are_kept_and_told(folder):
    data = content()
    changed(bbox=[50, 30, 20, 20])(data)
    write(folder, data)
    with pytest.warns(UserWarning, match=r"clipped.*annotation 11"):
        assert len(Coco(str(folder)).splits.train) == 2


def test_crowds_alone_are_nothing_to_train_on(folder):
    data = content()
    for annotation in data["annotations"]:
        annotation.update(iscrowd=1)
    write(folder, data)
    with pytest.raises(UserError, match=r"instances_train2017.json.*annotation 11.*crowds"):
        Coco(str(folder))


def test_an_image_of_crowds_is_told_and_not_trained_on(folder):
    data = content()
    data["annotations"][0]["iscrowd"] = 1
    write(folder, data)
    with pytest.warns(UserWarning, match=r"train2017.json: 1 image.*a.png .annotation 11"):
        splits = Coco(str(folder)).splits
    assert len(splits.train) == 1


def test_empty_images_are_trained_on_when_asked(folder):
    data = content()
    del data["annotations"][1]
    write(folder, data)
    assert len(Coco(str(folder)).splits.train) == 1
    assert len(Coco(str(folder), keep_empty=True).splits.train) == 2


def test_splits_must_share_their_categories(folder):
    data = content()
    data["categories"].append({"id": 10, "name": "bird"})
    write(folder, data, "val2017")
    with pytest.raises(UserError, match=r"val2017.*other categories"):
        Coco(str(folder))


@pytest.mark.parametrize("text", ["", "[]", '{"images": []}', "{", '{"images": 1}'])
def test_files_of_another_kind_are_refused(folder, text):
    file = folder / "annotations" / "instances_train2017.json"
    file.write_text(text)
    with pytest.raises(UserError, match=re.escape(str(file))):
        read_coco(file, folder)


def test_images_may_be_annotated_as_stored_or_upright(folder):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.new("RGB", (40, 60), "red").save(folder / "train2017" / "a.png", exif=exif)
    splits = Coco(str(folder)).splits
    assert splits.train[0].image.size == (60, 40)
    Image.new("RGB", (41, 60), "red").save(folder / "train2017" / "a.png", exif=exif)
    with pytest.raises(UserError, match=r"image 3 should have 60 x 40 .*a.png"):
        splits.train[0]


# masks


def test_masks_survive_their_codes():
    rng = np.random.default_rng(0)
    for _ in range(20):
        mask = rng.random((rng.integers(1, 30), rng.integers(1, 30))) < 0.4
        code = json.loads(json.dumps(encode_mask(mask)))
        assert segmentation_problem(code, mask.shape) is None
        assert (decode_mask(code, mask.shape) == mask).all()
        damaged = {**code, "counts": code["counts"] + "1"}
        assert "add up" in segmentation_problem(damaged, mask.shape)
    assert "add up" in segmentation_problem({"size": [4, 4], "counts": "~~"}, (4, 4))
    assert "add up" in segmentation_problem({"size": [4, 4], "counts": "P"}, (4, 4))


def test_uncompressed_codes_run_down_the_columns():
    mask = decode_mask({"size": [3, 2], "counts": [1, 2, 1, 2]}, (3, 2))
    assert mask.tolist() == [[0, 0], [1, 1], [1, 1]]


def test_polygons_are_filled_by_cocos_convention():
    (square,) = POLYGON
    mask = decode_mask([square], (40, 60))
    assert mask[10:25, 10:30].all()
    assert mask.sum() == 300
    two = decode_mask([square, [40.0, 0, 50, 0, 50, 5, 40, 5]], (40, 60))
    assert two.sum() == 350


# PASCAL VOC

XML = """<annotation><filename>{name}.jpg</filename><size><width>60</width><height>40</height>
</size>{objects}</annotation>"""
OBJECT = """<object><name>{label}</name><difficult>{difficult}</difficult><bndbox><xmin>{box[0]}
</xmin><ymin>{box[1]}</ymin><xmax>{box[2]}</xmax><ymax>{box[3]}</ymax></bndbox></object>"""


def voc(folder, **objects):
    for part in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for name, entries in objects.items():
        text = "".join(OBJECT.format(label=e[0], box=e[1], difficult=e[2]) for e in entries)
        (folder / "Annotations" / f"{name}.xml").write_text(XML.format(name=name, objects=text))
        Image.new("RGB", (60, 40)).save(folder / "JPEGImages" / f"{name}.jpg")
    (folder / "ImageSets/Main/train.txt").write_text("\n".join(objects) + "\n")
    return str(folder)


def test_voc_is_read(tmp_path):
    root = voc(tmp_path, one=[("dog", (11, 6, 31, 26), 0), ("cat", (1, 1, 9, 9), 1)])
    splits = Voc(root).splits
    assert splits.facts["class_names"] == ["cat", "dog"]
    assert not splits.facts["has_masks"]
    dog, cat = splits.train[0].instances
    assert (dog.label, dog.box, dog.is_crowd) == (1, (10.0, 5.0, 20.0, 20.0), False)
    assert cat.is_crowd
    assert Voc(root, class_names=["dog", "cat"]).splits.train[0].instances[0].label == 0


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (("dog", ("nan", 6, 31, 26), 0), "finite"),
        (("dog", ("", 6, 31, 26), 0), "bndbox"),
        (("dog", (31, 6, 11, 26), 0), "negative side"),
    ],
)
def test_broken_objects_of_voc_are_named(tmp_path, entry, message):
    root = voc(tmp_path, one=[("cat", (1, 1, 9, 9), 0), entry])
    with pytest.raises(UserError, match=f"object 2 of one.xml.*{message}"):
        Voc(root)
    with pytest.raises(UserError, match=r"object 1 of one.xml.*unknown class 'cat'"):
        Voc(root, class_names=["dog"])


def test_other_files_of_voc_are_named(tmp_path):
    root = voc(tmp_path, one=[("cat", (1, 1, 9, 9), 0)])
    annotation = tmp_path / "Annotations" / "one.xml"
    text = annotation.read_text()
    annotation.write_text('<!DOCTYPE a [<!ENTITY b "c">]>' + text)
    with pytest.raises(UserError, match=r"one.xml.*entities"):
        Voc(root)
    annotation.write_text(text[:40])
    with pytest.raises(UserError, match=r"one.xml.*XML"):
        Voc(root)
    annotation.write_text(text)
    (tmp_path / "JPEGImages" / "one.jpg").unlink()
    with pytest.raises(UserError, match="no image 'one'"):
        Voc(root)
    with pytest.raises(UserError, match=r"train\.txt"):
        Voc(str(tmp_path / "JPEGImages"))


# real data


def unpacked(archive, tmp_path):
    with zipfile.ZipFile(archive) as file:
        file.extractall(tmp_path)
    return tmp_path


@pytest.mark.realdata
def test_blood_cells_survive_their_boxes_of_no_size(data_dir, tmp_path):
    root = unpacked(data_dir / "bccd" / "bccd_voc.zip", tmp_path) / "BCCD"
    with pytest.warns(UserWarning, match="no area") as caught:
        splits = Voc(str(root)).splits
    told = " ".join(str(warning.message) for warning in caught)
    assert "BloodImage_00338.xml" in told
    assert "BloodImage_00343.xml" in told
    assert [len(split) for split in splits.named().values()] == [164, 70, 58]
    assert splits.facts["class_names"] == ["Platelets", "RBC", "WBC"]
    assert splits.train[0].image.size == (640, 480)


@pytest.mark.realdata
def test_coco_is_read_with_its_crowds_and_gaps(data_dir, tmp_path):
    root = unpacked(data_dir / "coco_mini" / "coco_mini.zip", tmp_path) / "coco_mini"
    splits = Coco(str(root)).splits
    assert splits.facts["num_classes"] == 80
    assert splits.facts["category_ids"][-1] == 90
    assert len(splits.validation) == 55
    instances = [x for record in splits.validation.records for x in record.instances]
    assert len(instances) == 415
    crowds = [instance for instance in instances if instance.is_crowd]
    assert all(isinstance(crowd.segmentation, dict) for crowd in crowds)
