"""``eanet generate``: grids, single images, attention maps, and what is refused."""

import json

import numpy as np
import pytest
from PIL import Image

from eanet.cli import main


@pytest.fixture(scope="module")
def drawn_run(tmp_path_factory):
    """Return a finished run of a generator, two steps long."""
    folder = tmp_path_factory.mktemp("run") / "gan"
    words = ["--options.judge", "random", "--train.steps", "2", "--train.evaluate_every", "2"]
    words += ["--data.batch_size", "8", "--device", "cpu", "--out", str(folder)]
    assert main(["train", "generation_digits/eagan", *words]) == 0
    return folder


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image)


def test_images_are_written_and_repeat(eanet, drawn_run, tmp_path):
    for name in ("first", "second"):
        answer = eanet(
            "generate", drawn_run, "--num", "8", "--classes", "3", "7", "--seed", "5",
            "--slots", "0", "2", "--interpolate", "--device", "cpu", "--out", tmp_path / name,
        )  # fmt: skip
        assert answer.code == 0, answer.err
    records = json.loads((tmp_path / "first" / "images.json").read_text())
    assert [record["label"] for record in records] == ["3"] * 4 + ["7"] * 4
    for record in records:
        assert pixels(tmp_path / "first" / record["file"]).shape == (16, 16)
    for name in ("grid.png", "images/0.png", "interpolation.png", "attention-after-block-1.png"):
        first, second = ((tmp_path / part / name).read_bytes() for part in ("first", "second"))
        assert first == second
    # two rows of four cells, three times enlarged
    assert pixels(tmp_path / "first" / "grid.png").shape == (2 * 48 + 2, 4 * 48 + 6)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--classes", "elephant"], "elephant"),
        (["--num", "0"], "--num"),
        (["--slots", "99"], "--slots"),
    ],
)
def test_mistakes_are_answered_in_one_line(eanet, drawn_run, tmp_path, words, said):
    answer = eanet("generate", drawn_run, "--out", tmp_path / "out", "--device", "cpu", *words)
    assert answer.code == 2
    assert said in answer.err
    assert answer.err.count("\n") == 1


def test_other_runs_draw_nothing(eanet, trained, tmp_path):
    answer = eanet("generate", trained, "--out", tmp_path / "out", "--device", "cpu")
    assert answer.code == 2
    assert "classification" in answer.err


def test_critics_score_files(eanet, drawn_run, tmp_path):
    Image.new("L", (20, 16), 128).save(tmp_path / "grey.png")
    answer = eanet("predict", drawn_run, tmp_path / "grey.png", "--out", tmp_path / "out")
    assert answer.code == 0, answer.err
    (record,) = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert isinstance(record["critic_score"], float)
    assert record["label"] in "0123456789"
