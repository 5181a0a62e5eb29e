"""Folders of images and masks in the published layouts, and what is wrong with some."""

import json

import numpy as np
import pytest
from PIL import Image

from eanet import registry
from eanet.data.drawing import SHAPES
from eanet.data.splits import open_splits
from eanet.errors import UserError
from eanet.recipe import DataSpec
from eanet.tasks.segmentation.class_names import ADE20K, CAMVID, CITYSCAPES, VOC, palette
from eanet.tasks.segmentation.samples import IGNORE


def write_image(path, size=(12, 8), color=(10, 20, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)


def write_mask(path, values, *, mode="L"):
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.zeros((8, 12), dtype=np.uint8)
    array.flat[: len(values)] = values
    image = Image.fromarray(array, mode=mode)
    if mode == "P":
        image.putpalette([channel for color in palette(VOC) for channel in color])
    image.save(path)


def write_list(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def opened(name, root, **arguments):
    return registry.dataset("segmentation", name)(str(root), **arguments).splits


@pytest.fixture
def voc(tmp_path):
    root = tmp_path / "VOCdevkit" / "VOC2012"
    lists = root / "ImageSets" / "Segmentation"
    for number in range(4):
        write_image(root / "JPEGImages" / f"{number}.jpg")
        write_mask(root / "SegmentationClass" / f"{number}.png", [0, 15, 20, 255], mode="P")
    write_mask(root / "SegmentationClassAug" / "3.png", [7])
    write_list(lists / "train.txt", "01")
    write_list(lists / "trainaug.txt", "013")
    write_list(lists / "val.txt", "2")
    return tmp_path


def test_voc(voc):
    with pytest.warns(UserWarning, match=r"train 2 of 1,464, val 1 of 1,449"):
        splits = opened("voc2012", voc, train="train")
    assert len(splits.train) == 2
    assert splits.train[0].labels.ravel()[:4].tolist() == [0, 15, 20, 255]
    assert splits.test is None
    assert splits.facts["class_names"] == VOC
    assert "comparable" in splits.facts["notes"][0]
    with pytest.warns(UserWarning, match="trainaug 3 of 10,582"):
        splits = opened("voc2012", voc)
    assert splits.train[2].labels.ravel()[0] == 7  # of SegmentationClassAug


def test_voc_that_is_incomplete(voc):
    with pytest.raises(UserError, match=r"trainval\.txt"):
        opened("voc2012", voc, train="trainval")
    with pytest.raises(UserError, match="train must be"):
        opened("voc2012", voc, train="test")
    next(voc.rglob("JPEGImages/0.jpg")).unlink()
    with pytest.raises(UserError, match=r"names '0'.*0\.jpg is missing"):
        opened("voc2012", voc)


def test_ade20k_shifts_its_labels(tmp_path):
    for split in ("training", "validation"):
        write_image(tmp_path / "images" / split / "a.jpg")
        write_mask(tmp_path / "annotations" / split / "a.png", [0, 1, 150])
    with pytest.warns(UserWarning, match="training 1 of 20,210"):
        splits = opened("ade20k", tmp_path)
    assert splits.train[0].labels.ravel()[:3].tolist() == [IGNORE, 0, 149]
    assert len(splits.facts["class_names"]) == 150 == len(set(ADE20K))


@pytest.mark.parametrize("ending", ["labelIds", "labelTrainIds"])
def test_cityscapes(tmp_path, ending):
    values = [7, 26, 33, 0] if ending == "labelIds" else [0, 13, 18, 255]
    for split in ("train", "val"):
        write_image(tmp_path / "leftImg8bit" / split / "ulm" / "u_1_leftImg8bit.png")
        write_mask(tmp_path / "gtFine" / split / "ulm" / f"u_1_gtFine_{ending}.png", values)
    with pytest.warns(UserWarning, match="train 1 of 2,975"):
        splits = opened("cityscapes", tmp_path)
    assert splits.validation[0].labels.ravel()[:4].tolist() == [0, 13, 18, IGNORE]
    assert len(CITYSCAPES) == 19


def camvid(root):
    for split in ("train", "val", "test"):
        write_image(root / "CamVid" / split / "x.jpg")
        write_mask(root / "CamVid" / f"{split}annot" / "x.png", [0, 10, 11])
    return root


def test_camvid(tmp_path):
    with pytest.warns(UserWarning, match="test 1 of 233"):
        splits = opened("camvid", camvid(tmp_path))
    assert splits.test[0].labels.ravel()[:3].tolist() == [0, 10, IGNORE]
    assert splits.facts["class_names"] == CAMVID


@pytest.mark.realdata
@pytest.mark.filterwarnings("ignore:camvid")
def test_real_camvid(data_dir, tmp_path):
    import zipfile

    archive = data_dir / "camvid" / "camvid_480x360.zip"
    if not archive.exists():
        pytest.skip("no CamVid there")
    with zipfile.ZipFile(archive) as file:
        wanted = [n for n in file.namelist() if "/test" in n and n.endswith("0.jpg")][:2]
        masks = [n.replace("/test/", "/testannot/").replace(".jpg", ".png") for n in wanted]
        file.extractall(tmp_path, [*wanted, *masks])
    for split in ("train", "val"):
        for part in ("", "annot"):
            (tmp_path / "CamVid" / f"{split}{part}").symlink_to(tmp_path / f"CamVid/test{part}")
    sample = opened("camvid", tmp_path).test[0]
    assert sample.image.size == (480, 360)
    assert set(np.unique(sample.labels)) <= {*range(11), IGNORE}
    assert len(np.unique(sample.labels)) > 4


# any folder


@pytest.fixture
def folder(tmp_path):
    for name in ("a", "b", "c"):
        write_image(tmp_path / "images" / f"{name}.jpg")
        write_mask(tmp_path / "masks" / f"{name}.png", [0, 1, 2])
    (tmp_path / "classes.json").write_text(json.dumps(["ground", "tree", "sky"]))
    return tmp_path


def test_a_folder_without_splits_is_divided(folder):
    data = DataSpec(name="mask_folder", root=str(folder), validation_fraction=0.3)
    splits = open_splits(data, task="segmentation", seed=0)
    assert (len(splits.train), len(splits.validation), splits.test) == (2, 1, None)
    assert splits.facts["num_classes"] == 3


def test_split_folders_and_names_as_arguments(tmp_path):
    for split in ("train", "test"):
        write_image(tmp_path / "pictures" / split / "deep" / "a.png")
        write_mask(tmp_path / "labels" / split / "deep" / "a.png", [1, 0, 9])
    splits = opened(
        "mask_folder",
        tmp_path,
        images="pictures",
        masks="labels",
        class_names=["off", "on"],
        ignore_label=9,
    )
    assert splits.test[0].labels.ravel()[:3].tolist() == [1, 0, IGNORE]
    assert splits.validation is None


def test_masks_in_colors(folder):
    colors = {"ground": [0, 0, 0], "tree": [0, 255, 0], "ignore": [255, 255, 255]}
    (folder / "classes.json").write_text(json.dumps(colors))
    for name in ("a", "b", "c"):
        array = np.zeros((8, 12, 3), dtype=np.uint8)
        array[0, 0], array[0, 1] = (0, 255, 0), (255, 255, 255)
        Image.fromarray(array).save(folder / "masks" / f"{name}.png")
    splits = opened("mask_folder", folder)
    assert splits.facts["class_names"] == ["ground", "tree"]
    assert splits.facts["palette"][1] == [0, 255, 0]
    assert splits.train[0].labels[0, :3].tolist() == [1, IGNORE, 0]
    array[3, 3] = (1, 2, 3)
    Image.fromarray(array).save(folder / "masks" / "a.png")
    with pytest.raises(UserError, match=r"a\.png.*\(1, 2, 3\) belongs to no class"):
        _ = splits.train[0]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda f: write_image(f / "images" / "a.jpg", (13, 8)), r"12 x 8 pixels, its image"),
        (lambda f: write_image(f / "masks" / "a.png"), r"a\.png' holds colors"),
        (lambda f: write_mask(f / "masks" / "a.png", [3]), r"a\.png': label 3 is out of range"),
        (lambda f: (f / "masks" / "a.png").write_bytes(b"no"), r"a\.png' is not a readable"),
    ],
    ids=["size", "colors", "label", "damaged"],
)
def test_a_bad_pair_is_named_in_one_line(folder, spoil, words):
    spoil(folder)
    splits = opened("mask_folder", folder)
    with pytest.raises(UserError, match=words) as raised:
        _ = splits.train[0]
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda f: (f / "masks" / "b.png").unlink(), r"b\.jpg' has no mask"),
        (lambda f: [p.unlink() for p in (f / "images").iterdir()], "the split is empty"),
        (lambda f: (f / "classes.json").unlink(), "name the classes"),
        (lambda f: (f / "classes.json").write_text("{"), "cannot be read as JSON"),
        (lambda f: (f / "classes.json").write_text("3"), "must hold a list"),
        (lambda f: (f / "classes.json").write_text('["a"]'), "2 to 255 classes"),
        (lambda f: (f / "classes.json").write_text('{"a": [1, 2, 3], "b": 4}'), "color of 'b'"),
        (lambda f: (f / "classes.json").write_text('{"a": [1,1,1], "b": [1,1,1]}'), "another"),
        (lambda f: (f / "images" / "val").mkdir(), "no 'train'"),
    ],
)
def test_a_bad_folder_is_refused_when_it_is_opened(folder, spoil, words):
    spoil(folder)
    with pytest.raises(UserError, match=words) as raised:
        opened("mask_folder", folder)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["voc2012", "ade20k", "cityscapes", "camvid", "mask_folder"])
def test_a_missing_folder_is_named(name, tmp_path):
    source = registry.dataset("segmentation", name)
    with pytest.raises(UserError, match=name):
        source(None)
    with pytest.raises(UserError, match="nowhere"):
        source(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=tmp_path.name):
        source(str(tmp_path))


def test_palette_of_voc():
    assert palette(VOC)[:4] == [(0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0)]
    assert palette(VOC)[255] == (224, 224, 192)
    assert palette(CAMVID)[0] == (128, 128, 128)


def test_drawn_scenes():
    splits = opened_scenes = registry.dataset("segmentation", "drawn_scenes")(num_train=60).splits
    assert splits.facts["class_names"] == ["ground", *SHAPES]
    counts = np.zeros(256, dtype=int)
    for index in range(60):
        sample = opened_scenes.train[index]
        assert sample.labels.shape == sample.image.size[::-1] == (64, 64)
        counts += np.bincount(sample.labels.ravel(), minlength=256)
    assert (counts[:7] > 0).all()
    assert 0.02 < counts[IGNORE] / counts.sum() < 0.25
    assert counts[7:IGNORE].sum() == 0
    again = registry.dataset("segmentation", "drawn_scenes")().splits.train[3]
    assert (np.asarray(again.image) == np.asarray(splits.train[3].image)).all()
    assert (np.asarray(splits.test[3].image) != np.asarray(again.image)).any()
    with pytest.raises(UserError, match="takes no folder"):
        registry.dataset("segmentation", "drawn_scenes")("somewhere")
    with pytest.raises(UserError, match="every split"):
        registry.dataset("segmentation", "drawn_scenes")(num_test=0)
