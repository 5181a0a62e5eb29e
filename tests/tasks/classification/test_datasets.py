"""Data sets of labeled images: what they read, and what they refuse by name."""

import pickle
import struct
import zipfile

import numpy as np
import pytest
from PIL import Image

from eanet import registry
from eanet.data.cifar10 import Cifar10
from eanet.data.imagenet import ImageNet, TinyImageNet
from eanet.data.splits import Subset
from eanet.errors import UserError
from eanet.tasks.classification.builtin import Digits
from eanet.tasks.classification.datasets import (
    FashionMnist,
    ImageFolder,
    labels_of,
    pixel_statistics,
)


def write_images(folder, classes, count, *, start=0):
    for label, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for index in range(start, start + count):
            color = (40 * label, index, 200)
            Image.new("RGB", (6, 5), color).save(folder / name / f"{index:02d}.png")


def write_idx(folder, prefix, images, labels):
    head = struct.pack(">HBB3I", 0, 8, 3, *images.shape)
    (folder / f"{prefix}-images-idx3-ubyte").write_bytes(head + images.tobytes())
    head = struct.pack(">HBBI", 0, 8, 1, len(labels))
    (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(head + labels.astype(np.uint8).tobytes())


# digits


def test_digits_are_complete_and_divided_once_for_all():
    splits = Digits().splits
    assert len(splits.train) + len(splits.test) == 1797
    assert abs(len(splits.test) / 1797 - 0.2) < 0.005
    for split in (splits.train, splits.test):
        counts = np.bincount(labels_of(split), minlength=10)
        assert counts.min() >= 0.08 * len(split)
    assert labels_of(splits.test) == labels_of(Digits().splits.test)
    # every image once: the 16 levels survive the scaling to bytes
    stored = np.concatenate([splits.train.images, splits.test.images])
    from sklearn.datasets import load_digits

    original = load_digits().images
    assert np.abs(np.sort(stored.sum((1, 2))) - np.sort(original.sum((1, 2)) * 255 / 16)).max() < 32
    sample = splits.train[3]
    assert sample.image.size == (8, 8)
    assert sample.image.mode == "L"
    assert sample.label == labels_of(splits.train)[3]
    assert splits.facts["num_classes"] == 10
    assert splits.facts["in_channels"] == 1


def test_digits_statistics_are_those_of_the_training_images():
    splits = Digits().splits
    values = splits.train.images / 255.0
    assert splits.facts["mean"] == pytest.approx([values.mean()], abs=1e-6)
    assert splits.facts["std"] == pytest.approx([values.std()], abs=1e-6)


def test_digits_take_no_folder(tmp_path):
    with pytest.raises(UserError, match="takes no folder"):
        Digits(str(tmp_path))


def test_registry_finds_every_data_set():
    names = {"digits", "image_folder", "fashion_mnist", "mnist", "cifar10"}
    assert names | {"imagenet", "tiny_imagenet"} <= set(registry.datasets("classification"))
    assert registry.dataset("classification", "digits") is Digits


# folders


def test_folder_with_splits(tmp_path):
    write_images(tmp_path / "train", ["cat", "dog"], 3)
    write_images(tmp_path / "valid", ["cat", "dog"], 2, start=10)
    write_images(tmp_path / "test", ["cat", "dog"], 1, start=20)
    splits = ImageFolder(str(tmp_path)).splits
    assert [len(split) for split in splits.named().values()] == [6, 4, 2]
    assert splits.facts["class_names"] == ["cat", "dog"]
    sample = splits.validation[3]
    assert sample.label == 1
    assert sample.name.endswith("valid/dog/11.png")
    assert sample.image.getpixel((0, 0)) == (40, 11, 200)


def test_one_folder_is_divided_class_by_class_and_always_alike(tmp_path):
    write_images(tmp_path, ["a", "b", "c"], 10)
    first, second = (ImageFolder(str(tmp_path)).splits for _ in range(2))
    assert np.bincount(labels_of(first.train)).tolist() == [8, 8, 8]
    assert np.bincount(labels_of(first.test)).tolist() == [2, 2, 2]
    assert first.test.paths == second.test.paths
    assert not set(first.test.paths) & set(first.train.paths)
    assert first.validation is None


def test_folder_ignores_hidden_and_foreign_files_and_looks_deep(tmp_path):
    write_images(tmp_path, ["a", "b"], 2)
    (tmp_path / "a" / "deep").mkdir()
    Image.new("L", (3, 3)).save(tmp_path / "a" / "deep" / "x.PNG")
    (tmp_path / "a" / "._00.png").write_bytes(b"junk")
    (tmp_path / "a" / "Thumbs.db").write_bytes(b"junk")
    (tmp_path / ".cache").mkdir()
    (tmp_path / "a" / "round").symlink_to(tmp_path)  # never followed
    splits = ImageFolder(str(tmp_path)).splits
    assert len(splits.train) + len(splits.test) == 5


def test_grey_folder(tmp_path):
    write_images(tmp_path, ["a", "b"], 2)
    splits = ImageFolder(str(tmp_path), in_channels=1).splits
    assert splits.train[0].image.mode == "L"
    assert splits.facts["in_channels"] == len(splits.facts["mean"]) == 1


def refuses(words, build, *arguments, **options):
    with pytest.raises(UserError) as caught:
        build(*arguments, **options)
    for word in words:
        assert word in str(caught.value)


def test_folder_refusals(tmp_path):
    refuses(["data.root"], ImageFolder, None)
    refuses(["none", "does not exist"], ImageFolder, str(tmp_path / "none"))
    refuses(["at least two"], ImageFolder, str(tmp_path))
    whole = tmp_path / "whole"
    write_images(whole, ["a", "b"], 4)
    refuses(["in_channels", "4"], ImageFolder, str(whole), in_channels=4)
    refuses(["test_fraction", "1.5"], ImageFolder, str(whole), test_fraction=1.5)
    refuses(["mean and std"], ImageFolder, str(whole), mean=[0.5])
    (whole / "empty").mkdir()
    refuses(["empty", "no images"], ImageFolder, str(whole))
    parts = tmp_path / "parts"
    write_images(parts / "test", ["a", "b"], 1)
    refuses(["no folder 'train'"], ImageFolder, str(parts))
    write_images(parts / "train", ["a", "b", "c"], 1)
    refuses(["test", "c"], ImageFolder, str(parts))


def test_broken_image_names_its_file_when_it_is_read(tmp_path):
    write_images(tmp_path / "train", ["a", "b"], 1)
    (tmp_path / "train" / "a" / "bad.jpg").write_text("<html>")
    splits = ImageFolder(str(tmp_path)).splits
    refuses(["bad.jpg", "HTML"], splits.train.__getitem__, 1)


# IDX


@pytest.fixture
def idx_folder(tmp_path):
    folder = tmp_path / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    images = np.random.default_rng(0).integers(0, 256, (30, 28, 28), dtype=np.uint8)
    write_idx(folder, "train", images[:20], np.arange(20) % 10)
    write_idx(folder, "t10k", images[20:], np.arange(10))
    return tmp_path, folder, images


def test_fashion_mnist_layouts(idx_folder):
    root, folder, images = idx_folder
    for place in (root, root / "FashionMNIST", folder):
        splits = FashionMnist(str(place)).splits
        np.testing.assert_array_equal(np.asarray(splits.test[4].image), images[24])
        assert splits.test[4].label == 4
    assert splits.facts["mean"] == pytest.approx([(images[:20] / 255).mean()], abs=1e-6)


def test_fashion_mnist_refusals(idx_folder):
    root, folder, images = idx_folder
    write_idx(folder, "t10k", images[20:], np.arange(9))
    refuses(["9 labels for 10 images", "t10k-labels"], FashionMnist, str(root))
    write_idx(folder, "t10k", images[20:], np.arange(10) + 1)
    refuses(["label 10 of sample 9", "t10k-labels"], FashionMnist, str(root))
    (folder / "t10k-labels-idx1-ubyte").unlink()
    refuses(["t10k-labels"], FashionMnist, str(root))


# CIFAR-10


def test_cifar10_binary_version(tmp_path):
    generator = np.random.default_rng(1)
    records = generator.integers(0, 256, (6, 4, 3073), dtype=np.uint8)
    records[:, :, 0] %= 10
    for part in range(5):
        (tmp_path / f"data_batch_{part + 1}.bin").write_bytes(records[part].tobytes())
    (tmp_path / "test_batch.bin").write_bytes(records[5].tobytes())
    splits = Cifar10(str(tmp_path)).splits
    assert (len(splits.train), len(splits.test)) == (20, 4)
    sample = splits.train[6]
    expected = records[1, 2, 1:].reshape(3, 32, 32).transpose(1, 2, 0)
    np.testing.assert_array_equal(np.asarray(sample.image), expected)
    assert sample.label == records[1, 2, 0]

    (tmp_path / "data_batch_3.bin").write_bytes(records[2].tobytes()[:-1])
    refuses(["data_batch_3.bin", "3073"], Cifar10, str(tmp_path))
    (tmp_path / "data_batch_3.bin").write_bytes(b"\x0b" + records[2].tobytes()[1:])
    refuses(["data_batch_3.bin", "label 11"], Cifar10, str(tmp_path))
    (tmp_path / "data_batch_3.bin").unlink()
    refuses(["data_batch_3.bin", "No such file"], Cifar10, str(tmp_path))


@pytest.fixture
def pickled_cifar10(tmp_path):
    """The layout of the version for Python, a few images each."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    generator = np.random.default_rng(1)
    batches = {}
    for name in (*(f"data_batch_{part}" for part in range(1, 6)), "test_batch"):
        data = generator.integers(0, 256, (4, 3072), dtype=np.uint8)
        batches[name] = {b"data": data, b"labels": generator.integers(0, 10, 4).tolist()}
        (folder / name).write_bytes(pickle.dumps(batches[name], 2))
    return tmp_path, folder, batches


def test_cifar10_version_for_python(pickled_cifar10):
    root, folder, batches = pickled_cifar10
    for place in (root, folder):
        splits = Cifar10(str(place)).splits
        assert (len(splits.train), len(splits.test)) == (20, 4)
        sample, batch = splits.train[6], batches["data_batch_2"]
        expected = batch[b"data"][2].reshape(3, 32, 32).transpose(1, 2, 0)
        np.testing.assert_array_equal(np.asarray(sample.image), expected)
        assert sample.label == batch[b"labels"][2]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"cos\nsystem\n(S'false'\ntR.", ["data_batch_1", "names os.system"]),
        (pickle.dumps({"labels": [1]}), ["data_batch_1", "'data'", "3072"]),
        (
            pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [1]}),
            ["data_batch_1", "1 labels for 2 images"],
        ),
        (
            pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "labels": [10]}),
            ["data_batch_1", "label 10", "0..9"],
        ),
        (b"", ["data_batch_1", "damaged"]),
    ],
)
def test_cifar10_refuses_other_pickles(pickled_cifar10, content, words):
    root, folder, _ = pickled_cifar10
    (folder / "data_batch_1").write_bytes(content)
    refuses(words, Cifar10, str(root))


def test_cifar10_without_any_layout(tmp_path):
    refuses(["neither"], Cifar10, str(tmp_path))


# ImageNet


def write_flat(folder, names):
    folder.mkdir(parents=True)
    for name in names:
        Image.new("RGB", (6, 5), (1, 2, 3)).save(folder / name)


@pytest.fixture
def tiny_imagenet(tmp_path):
    folder = tmp_path / "tiny-imagenet-200"
    for wnid in ("n02", "n01"):
        write_flat(folder / "train" / wnid / "images", [f"{wnid}_{k}.JPEG" for k in range(3)])
    write_flat(folder / "val" / "images", ["val_0.JPEG", "val_1.JPEG"])
    (folder / "val" / "val_annotations.txt").write_text(
        "val_1.JPEG\tn01\t0\t0\t5\t5\nval_0.JPEG\tn02\t0\t0\t5\t5\n"
    )
    (folder / "words.txt").write_text("n01\tgoldfish, Carassius auratus\nn02\tnewt\nn03\tx\n")
    return tmp_path, folder


def test_tiny_imagenet(tiny_imagenet):
    for place in tiny_imagenet:
        splits = TinyImageNet(str(place)).splits
        assert splits.facts["class_names"] == ["goldfish", "newt"]
        assert (len(splits.train), len(splits.test)) == (6, 2)
        assert splits.validation is None
        assert [splits.test[0].name[-10:], splits.test[0].label] == ["val_0.JPEG", 1]
        assert labels_of(splits.test) == [1, 0]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("val_0.JPEG\tn02\n", ["val_annotations.txt", "labels of 1 images", "holds 2"]),
        ("val_0.JPEG\tn02\nval_2.JPEG\tn02\n", ["no label of", "val_1.JPEG"]),
        ("val_0.JPEG\tn02\nval_1.JPEG\tn09\n", ["'n09' of 'val_1.JPEG'", "2 training folders"]),
        ("val_0.JPEG\nval_1.JPEG\tn01\n", ["line 1", "a name and a label"]),
        ("val_0.JPEG\tn02\nval_0.JPEG\tn01\n", ["line 2", "already"]),
    ],
)
def test_labels_of_another_length_or_content_are_refused(tiny_imagenet, text, words):
    root, folder = tiny_imagenet
    (folder / "val" / "val_annotations.txt").write_text(text)
    refuses(words, TinyImageNet, str(root))


@pytest.fixture
def imagenet(tmp_path):
    top = tmp_path / "top"
    folder = top / "ILSVRC" / "Data" / "CLS-LOC"
    for wnid in ("n01", "n02"):
        write_flat(folder / "train" / wnid, [f"{wnid}_1.JPEG"])
    write_flat(folder / "val", ["ILSVRC2012_val_1.JPEG", "ILSVRC2012_val_2.JPEG"])
    return top, folder


def test_imagenet_with_labels_in_files(imagenet):
    top, folder = imagenet
    refuses(["no file with the labels"], ImageNet, str(top))
    (folder / "val.txt").write_text("ILSVRC2012_val_1.JPEG 1\nILSVRC2012_val_2.JPEG 0\n")
    splits = ImageNet(str(top)).splits
    assert labels_of(splits.validation) == [1, 0]
    assert splits.facts["class_names"] == ["n01", "n02"]
    assert splits.test is None
    (top / "LOC_val_solution.csv").write_text(
        "ImageId,PredictionString\nILSVRC2012_val_1,n01 1 2 3 4\nILSVRC2012_val_2,n02 1 2 3 4\n"
    )
    (top / "LOC_synset_mapping.txt").write_text("n01 crane\nn02 crane, machine\n")
    splits = ImageNet(str(top)).splits
    assert labels_of(splits.validation) == [0, 1]
    assert splits.facts["class_names"] == ["crane (n01)", "crane (n02)"]
    (folder / "val.txt").unlink()
    (top / "LOC_val_solution.csv").write_text("ImageId,PredictionString\nx\n")
    refuses(["LOC_val_solution.csv", "line 2"], ImageNet, str(top))


def test_imagenet_in_folders(imagenet, tmp_path):
    write_images(tmp_path / "train", ["n01", "n02"], 2)
    refuses(["val", "does not exist"], ImageNet, str(tmp_path))
    write_images(tmp_path / "val", ["n01", "n02"], 1)
    splits = ImageNet(str(tmp_path)).splits
    assert labels_of(splits.validation) == [0, 1]
    refuses(["train", "does not exist"], ImageNet, str(tmp_path / "val"))


# real files


@pytest.mark.realdata
def test_real_fashion_mnist(data_dir):
    splits = FashionMnist(str(data_dir / "fashion_mnist")).splits
    assert min(np.bincount(labels_of(splits.train), minlength=10)) > 0
    assert splits.facts["image_size"] == [28, 28]
    assert splits.facts["mean"] == pytest.approx([0.286], abs=0.01)
    assert splits.facts["std"] == pytest.approx([0.353], abs=0.01)


@pytest.mark.realdata
def test_real_cifar10(data_dir, tmp_path):
    with zipfile.ZipFile(next((data_dir / "cifar10").glob("*.zip"))) as archive:
        names = [name for name in archive.namelist() if name.endswith("5.png")]
        archive.extractall(tmp_path, names)
    root = next(path.parent for path in tmp_path.rglob("train"))
    splits = Cifar10(str(root)).splits
    assert splits.facts["class_names"] == list(Cifar10.class_names)
    images = np.stack([np.asarray(splits.train[index].image) for index in range(500)])
    assert images.shape[1:] == (32, 32, 3)
    for got, known in zip(pixel_statistics(images), (Cifar10.mean, Cifar10.std), strict=True):
        assert got == pytest.approx(known, abs=0.06)


def test_labels_of_a_subset():
    train = Digits().splits.train
    assert labels_of(Subset(train, [5, 2])) == [train.labels[5], train.labels[2]]
