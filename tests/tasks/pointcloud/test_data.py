"""Data sets, files and what is wrong with them."""

import json

import h5py
import numpy as np
import pytest
import torch
import trimesh

from eanet import registry
from eanet.data.splits import open_splits
from eanet.errors import UserError
from eanet.recipe import DataSpec
from eanet.tasks.pointcloud.builtin import CATEGORIES, build_solid
from eanet.tasks.pointcloud.datasets import ModelNet, PointFolder, ShapeNetPart, labels_of
from eanet.tasks.pointcloud.hdf5_files import read_hdf5
from eanet.tasks.pointcloud.point_files import read_points
from eanet.tasks.pointcloud.transforms import normalize_to_unit_sphere


def cloud(points=40, channels=3):
    return np.random.default_rng(points).normal(size=(points, channels)).astype(np.float32)


def write_hdf5(path, labels, *, parts=None, points=16):
    with h5py.File(path, "w") as file:
        file["data"] = np.stack([cloud(points) + number for number in range(len(labels))])
        file["label"] = np.array(labels, dtype=np.uint8)[:, None]
        if parts is not None:
            file["pid"] = np.array(parts, dtype=np.uint8)


# built-in solids


def test_solids_are_as_stated():
    splits = registry.dataset("pointcloud", "solids")(per_category=(2, 1, 1), num_points=200).splits
    facts = splits.facts
    assert len(facts["class_names"]) == len(CATEGORIES) >= 8
    assert [len(split) for split in splits.named().values()] == [20, 10, 10]
    for split in splits.named().values():
        for index, label in enumerate(labels_of(split)):
            sample = split[index]
            assert sample.points.shape == (200, 3)
            assert sample.points.dtype == torch.float32
            assert float(sample.points.norm(dim=1).max()) == pytest.approx(1, abs=1e-5)
            assert float(sample.points.mean(0).abs().max()) < 1e-5
            start, end = facts["part_ranges"][label]
            assert 2 <= end - start <= 4
            assert set(sample.parts.tolist()) <= set(range(start, end))
    assert not torch.equal(splits.train[0].points, splits.test[0].points)


@pytest.mark.parametrize("category", CATEGORIES)
def test_every_solid_shows_all_its_parts_and_repeats(category):
    points, parts = build_solid(category, (0, 5), 1024)
    assert set(parts) == set(range(len(CATEGORIES[category][1])))
    again, _ = build_solid(category, (0, 5), 1024)
    assert np.array_equal(points, again)


def test_points_are_spread_by_area():
    from eanet.tasks.pointcloud.builtin import box, tube

    random = np.random.default_rng(0)
    points = box(0, (2, 1, 1), (0, 0, 0)).points(20000, random)
    on_ends = np.isclose(np.abs(points[:, 0]), 1).mean()
    assert on_ends == pytest.approx(2 / 10, abs=0.02)  # two of ten unit squares
    cone = tube(0, 1.0, 1e-6, (0, 0, 0), top_radius=0.0, open_ends=True)  # a flat disk
    radii = np.hypot(*cone.points(20000, random)[:, [0, 2]].T)
    assert (radii < 0.5).mean() == pytest.approx(0.25, abs=0.02)


# files


def test_every_format_gives_its_points(tmp_path):
    points = cloud()
    np.save(tmp_path / "a.npy", points)
    np.savez(tmp_path / "b.npz", points=points, parts=np.zeros(40))
    np.savez(tmp_path / "c.npz", anything=points.astype(np.float64))
    np.savetxt(tmp_path / "d.xyz", points)
    np.savetxt(tmp_path / "e.csv", points, delimiter=",")
    (tmp_path / "f.pts").write_text("40\n" + (tmp_path / "d.xyz").read_text())
    (tmp_path / "g.txt").write_text("# x y z\n" + (tmp_path / "d.xyz").read_text())
    trimesh.PointCloud(points).export(tmp_path / "h.ply")
    for path in sorted(tmp_path.iterdir()):
        found = read_points(path)
        assert found.dtype == torch.float32
        np.testing.assert_allclose(found.numpy(), points, atol=1e-6, err_msg=path.name)


@pytest.mark.parametrize("suffix", ["off", "ply", "obj", "stl"])
def test_meshes_are_sampled_on_their_surface(suffix, tmp_path):
    path = tmp_path / f"box.{suffix}"
    trimesh.creation.box((2, 1, 1)).export(path)
    points = read_points(path, mesh_points=3000).numpy()
    assert points.shape == (3000, 3)
    on_surface = np.isclose(np.abs(points), [1, 0.5, 0.5], atol=1e-5).any(axis=1)
    assert on_surface.all()
    assert np.isclose(np.abs(points[:, 0]), 1, atol=1e-5).mean() == pytest.approx(0.2, abs=0.03)
    assert torch.equal(torch.from_numpy(points), read_points(path, mesh_points=3000))
    normals = read_points(path, in_channels=6, mesh_points=50)[:, 3:]
    assert torch.allclose(normals.norm(dim=1), torch.ones(50), atol=1e-5)


def test_the_header_of_modelnet_is_read(tmp_path):
    path = tmp_path / "x.off"
    text = trimesh.creation.box().export(file_type="off")
    path.write_text("OFF" + text.removeprefix("OFF").lstrip("\n"))
    assert len(read_points(path)) == 2048


def test_materials_of_a_mesh_are_not_opened(tmp_path):
    path = tmp_path / "x.obj"
    path.write_text(
        "mtllib /etc/passwd\nusemtl a\n" + trimesh.creation.box().export(file_type="obj")
    )
    assert len(read_points(path)) == 2048


BAD = {
    "nan.npy": (np.array([[0, 0, 0], [1, np.nan, 0], [2, 0, 0]]), "point 1 is NaN"),
    "one.npy": (np.zeros((1, 3)), r"has 1 point\(s\)"),
    "same.npy": (np.ones((9, 3)), "all 9 points are the same$"),
    "far.npy": (cloud(9).astype(float) * 1e-3 + 1e9, "all 9 points are the same in float32"),
    "columns.npy": (np.ones((9, 2)), "has 2 columns, 3 are needed"),
    "integers.npy": (np.ones((9, 3), dtype=int), "coordinates are int64"),
    "layout.npy": (np.ones((3, 90)), "transposed"),
    "flat.npy": (np.ones(9), r"expected \(points, columns\)"),
    "huge.npy": (np.array([[0, 0, 0], [1e300, 0, 0]]), "range of float32"),
    "objects.npy": (np.array([{}, 1], dtype=object), "not a readable NumPy file"),
    "words.xyz": ("a b c\n", "rows must be numbers"),
    "uneven.xyz": ("1 2 3\n1 2\n", "rows must be numbers"),
    "empty.xyz": ("", "has 0 bytes"),
    "comments.xyz": ("# nothing\n", "holds no points"),
    "broken.npz": ("PK nonsense", "not a readable NumPy file"),
    "broken.ply": ("ply\nnonsense", "not a readable PLY file"),
    "broken.off": ("OFF\n8 6 0\n1 2", "not a readable OFF file"),
    "flat.obj": ("v 0 0 0\nv 1 0 0\nv 2 0 0\nf 1 2 3\n", "no surface"),
    "face.obj": ("v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 9\n", "not a readable OBJ"),
    "picture.png": ("x", "not a point cloud or mesh by its ending"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_answered(name, tmp_path):
    content, message = BAD[name]
    path = tmp_path / name
    if isinstance(content, str):
        path.write_text(content)
    else:
        np.save(path, content, allow_pickle=True)
    with pytest.raises(UserError, match=message) as answer:
        read_points(path)
    assert str(path) in str(answer.value)
    assert "\n" not in str(answer.value)


def test_missing_files_are_answered(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read_points(tmp_path / "none.xyz")


# HDF5


def test_hdf5_in_the_layout_of_modelnet(tmp_path):
    write_hdf5(tmp_path / "ply_data_train10.h5", [1])
    write_hdf5(tmp_path / "ply_data_train2.h5", [0, 1, 2])
    write_hdf5(tmp_path / "ply_data_test0.h5", [2])
    splits = ModelNet(str(tmp_path)).splits
    assert labels_of(splits.train) == [0, 1, 2, 1]  # 2 before 10
    assert splits.facts["num_classes"] == 3
    (tmp_path / "shape_names.txt").write_text("a\nb\nc\nd\n")
    (tmp_path / "train_files.txt").write_text("data/elsewhere/ply_data_train10.h5\n")
    splits = ModelNet(str(tmp_path)).splits
    assert labels_of(splits.train) == [1]
    assert splits.facts["class_names"] == ["a", "b", "c", "d"]
    (tmp_path / "shape_names.txt").write_text("a\n")
    with pytest.raises(UserError, match=r"label 1 is outside 0\.\.0"):
        ModelNet(str(tmp_path))


def test_hdf5_in_the_layout_of_shapenet_part(tmp_path):
    parts = [[0] * 8 + [1] * 8, [2] * 16, [3] * 16]
    for split in ("train", "val", "test"):
        write_hdf5(tmp_path / f"ply_data_{split}0.h5", [0, 1, 1], parts=parts)
    splits = ShapeNetPart(str(tmp_path)).splits
    assert splits.facts["part_ranges"] == [[0, 2], [2, 4]]
    assert splits.train[1].parts.tolist() == [2] * 16
    (tmp_path / "all_object_categories.txt").write_text("Bag 01\nCap 02\n")
    table = {"0": ["01", 0], "1": ["01", 1], "2": ["02", 0], "3": ["02", 1], "4": ["02", 2]}
    (tmp_path / "overallid_to_catid_partid.json").write_text(json.dumps(table))
    splits = ShapeNetPart(str(tmp_path), train_on_validation=True).splits
    assert splits.facts["part_ranges"] == [[0, 2], [2, 5]]
    assert splits.facts["part_names"][4] == "Cap part 3"
    assert len(splits.train) == 6
    assert splits.validation is None
    write_hdf5(tmp_path / "ply_data_train0.h5", [0, 1, 0], parts=parts)
    with pytest.raises(UserError, match="'Bag' but has a point of part 3"):
        ShapeNetPart(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("all_object_categories.txt", "", "all_object_categories.txt: names no categories"),
        ("all_object_categories.txt", "Bag\t01\n", "label 1 is outside 0..0"),
        ("part_names.json", "{", "part_names.json: not a readable JSON"),
        ("part_names.json", "[1]", "part_names.json: must give for each category"),
        ("part_names.json", '{"Bag": {"strap": 9}}', "part_names.json: .* below 4"),
        ("part_names.json", '{"Bag": {"strap": "first"}}', "part_names.json: must give"),
        ("overallid_to_catid_partid.json", "3", "overallid_to_catid_partid.json: does not name"),
        ("overallid_to_catid_partid.json", '[["09", 0]]', "partid.json: does not name categories"),
        ("overallid_to_catid_partid.json", '[["01", 0], ["02", 0]]', "'Bag' but has a point of"),
    ],
)
def test_bad_tables_beside_parts_are_answered(name, text, message, tmp_path):
    write_hdf5(tmp_path / "ply_data_train0.h5", [0, 1], parts=[[0, 1] * 8, [2, 3] * 8])
    (tmp_path / "all_object_categories.txt").write_text("Bag\t01\nCap\t02\n")
    assert len(ShapeNetPart(str(tmp_path)).splits.train) == 2
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        ShapeNetPart(str(tmp_path))


@pytest.mark.parametrize("text", ["", "cup\n"])
def test_lists_without_classes_are_answered(text, tmp_path):
    (tmp_path / "modelnet40_train.txt").write_text(text)
    with pytest.raises(UserError, match=r"modelnet40_train.txt: must list clouds as"):
        ModelNet(str(tmp_path))


def test_hdf5_that_refers_elsewhere_is_refused(tmp_path):
    write_hdf5(tmp_path / "real.h5", [0, 1])
    (tmp_path / "raw").write_bytes(bytes(4096))

    def external_link(file):
        file["data"] = h5py.ExternalLink("real.h5", "data")

    def soft_link(file):
        file["data"] = h5py.SoftLink("/label")

    def external_storage(file):
        file.create_dataset("data", (2, 16, 3), "f4", external=[(tmp_path / "raw", 0, 384)])

    def virtual(file):
        layout = h5py.VirtualLayout((2, 16, 3), "f4")
        layout[:] = h5py.VirtualSource(tmp_path / "real.h5", "data", (2, 16, 3))
        file.create_virtual_dataset("data", layout)

    for number, (write, message) in enumerate(
        [(external_link, "link"), (soft_link, "link"), (external_storage, "other files"),
         (virtual, "other files")]
    ):  # fmt: skip
        path = tmp_path / f"bad{number}.h5"
        with h5py.File(path, "w") as file:
            file["label"] = np.array([[0], [1]], dtype=np.uint8)
            write(file)
        with pytest.raises(UserError, match=message):
            read_hdf5(path, parts=False)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"label": np.zeros((2, 1), int)}, "has no 'data'"),
        ({"data": np.ones((2, 16, 3), int), "label": np.zeros(2, int)}, "floating point"),
        ({"data": np.ones((2, 3, 16)), "label": np.zeros(2, int)}, "floating point"),
        ({"data": np.full((2, 16, 3), np.nan), "label": np.zeros(2, int)}, "NaN"),
        ({"data": np.ones((2, 16, 3)), "label": np.zeros(2, int)}, "cloud 0 are the same"),
        ({"data": np.stack([cloud(16)] * 2), "label": np.zeros(3, int)}, "2 whole numbers"),
        ({"data": np.stack([cloud(16)] * 2), "label": np.array([0, -1])}, "negative"),
    ],
)
def test_bad_hdf5_is_answered(content, message, tmp_path):
    path = tmp_path / "x.h5"
    with h5py.File(path, "w") as file:
        for name, value in content.items():
            file[name] = value
    with pytest.raises(UserError, match=message):
        read_hdf5(path, parts=False)
    path.write_text("nonsense")
    with pytest.raises(UserError, match="not a readable HDF5"):
        read_hdf5(path, parts=False)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_clouds_of_any_size_come_to_the_unit_sphere(scale):
    points = torch.from_numpy(cloud(50)).double()
    expected = normalize_to_unit_sphere(points)
    found = normalize_to_unit_sphere((points * scale).float())
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="differ by more than"):
        normalize_to_unit_sphere(torch.tensor([[3e38, 0, 0], [-3e38, 0, 0], [-3e38, 0, 0]]))


# text and folders


def test_resampled_text_files(tmp_path):
    for kind in ("cup", "night_stand"):
        (tmp_path / kind).mkdir()
        for number in (1, 2):
            rows = cloud(30 + number, 6) + 5
            np.savetxt(tmp_path / kind / f"{kind}_000{number}.txt", rows, delimiter=",")
    (tmp_path / "modelnet40_train.txt").write_text("cup_0001\nnight_stand_0001\n")
    (tmp_path / "modelnet40_test.txt").write_text("night_stand_0002\n")
    splits = ModelNet(str(tmp_path), in_channels=6, max_points=20).splits
    assert splits.facts["class_names"] == ["cup", "night_stand"]
    assert labels_of(splits.test) == [1]
    sample = splits.train[1]
    assert sample.points.shape == (20, 6)
    assert float(sample.points[:, :3].norm(dim=1).max()) == pytest.approx(1, abs=1e-6)


def test_part_text_files(tmp_path):
    (tmp_path / "train_test_split").mkdir()
    (tmp_path / "synsetoffset2category.txt").write_text("Bag\t01\nCap\t02\n")
    for synset, first in (("01", 0), ("02", 2)):
        (tmp_path / synset).mkdir()
        for name in "ab":
            rows = np.hstack([cloud(20, 6), (first + np.arange(20) % 2)[:, None]])
            np.savetxt(tmp_path / synset / f"{name}.txt", rows)
    for split, name in (("train", "a"), ("val", "b"), ("test", "b")):
        listed = json.dumps([f"shape_data/{synset}/{name}" for synset in ("01", "02")])
        (tmp_path / "train_test_split" / f"shuffled_{split}_file_list.json").write_text(listed)
    splits = ShapeNetPart(str(tmp_path), in_channels=6).splits
    assert splits.facts["part_ranges"] == [[0, 2], [2, 4]]
    sample = splits.test[1]
    assert sample.points.shape == (20, 6)
    assert sample.parts.tolist() == [2, 3] * 10
    for text in ("3", "[]", "[1, 2]", '["a"]', '{"a": 1}'):
        (tmp_path / "train_test_split" / "shuffled_test_file_list.json").write_text(text)
        with pytest.raises(UserError, match=r"shuffled_test_file_list.json: must be a list"):
            ShapeNetPart(str(tmp_path))


@pytest.mark.parametrize("layout", ["{split}/{kind}", "{kind}/{split}", "{kind}"])
def test_folders_of_files(layout, tmp_path):
    for kind in ("ball", "box"):
        for split in ("train", "test"):
            folder = tmp_path / layout.format(kind=kind, split=split)
            folder.mkdir(parents=True, exist_ok=True)
            for number in range(4):
                np.save(folder / f"{split}{number}.npy", cloud(20 + number))
    splits = PointFolder(str(tmp_path)).splits
    assert splits.facts["class_names"] == ["ball", "box"]
    assert len(splits.train) == (12 if layout == "{kind}" else 8)
    assert sorted(labels_of(splits.test)) == sorted([0, 1] * (len(splits.test) // 2))
    assert splits.train[0].points.shape[1] == 3


def test_missing_folders_are_answered(tmp_path):
    for source in (ModelNet, ShapeNetPart, PointFolder):
        with pytest.raises(UserError, match="needs a folder"):
            source(None)
        with pytest.raises(UserError, match="does not exist"):
            source(str(tmp_path / "none"))
        with pytest.raises(UserError, match=r"layout|folder per class"):
            source(str(tmp_path))


@pytest.mark.realdata
@pytest.mark.parametrize(
    ("task", "name", "folder"),
    [
        ("pointcloud", "modelnet40", "psb28_hdf5_2048"),
        ("pointcloud_parts", "shapenet_part", "labeledpsb_part_hdf5_2048"),
    ],
)
def test_real_data(task, name, folder, data_dir):
    root = data_dir / folder
    if not root.is_dir():
        pytest.skip(f"no {folder} in {data_dir}")
    splits = open_splits(DataSpec(name=name, root=str(root)), task=task, seed=0)
    assert set(splits.named()) == {"train", "validation", "test"}
    assert splits.train[0].points.shape == (2048, 3)
    names = (root / "shape_names.txt", root / "all_object_categories.txt")
    lines = next(path for path in names if path.exists()).read_text().split("\n")
    assert splits.facts["num_classes"] == len([line for line in lines if line])
