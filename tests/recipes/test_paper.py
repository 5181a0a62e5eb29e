import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from eanet import registry
from eanet.errors import UserError
from eanet.recipes.paper import CAPTIONS, ROWS, PaperRow, format_table, rows
from eanet.recipes.paper_tables import QUOTED

#: printed lines and figures in a line, counted in the paper
SHAPES = {
    1: (10, 1),
    2: (23, 3),
    3: (10, 1),
    4: (4, 1),
    5: (8, 1),
    6: (11, 1),
    7: (10, 1),
    8: (6, 2),
    9: (5, 2),
    10: (13, 17),
    11: (19, 1),
    12: (8, 2),
}

TOP1 = "top-1 accuracy (%)"
EAMLP_7 = "classification_imagenet/eamlp_7"


def value(table: int, start_of_row: str, metric: str) -> float | None:
    (found,) = [
        figure.value
        for figure in rows(table)
        if figure.row.startswith(start_of_row) and figure.metric == metric
    ]
    return found


@pytest.mark.parametrize("table", SHAPES)
def test_table_has_every_line_and_figure_of_the_paper(table):
    num_lines, num_metrics = SHAPES[table]
    figures = rows(table)
    assert len({figure.row for figure in figures}) == num_lines
    assert len({figure.metric for figure in figures}) == num_metrics
    assert len({(figure.row, figure.metric) for figure in figures}) == num_lines * num_metrics
    assert len(figures) == num_lines * num_metrics


def test_no_table_beyond_those_of_the_paper():
    assert {figure.table for figure in ROWS} == set(SHAPES) == set(CAPTIONS)


@pytest.mark.parametrize(
    ("table", "start_of_row", "metric", "published"),
    [
        (1, "FCN, ResNet-50", "mIoU (%)", 75.7),
        (1, "FCN + EA, ResNet-50, Norm Softmax, #S 64", "mIoU (%)", 75.3),
        (1, "FCN + EA, ResNet-50, Norm DoubleNorm, #S 64, OS 8", "mIoU (%)", 77.8),
        (1, "FCN + EA, ResNet-101", "mIoU (%)", 78.3),
        (2, "T2T-ViT-7, Performer, Transformer, 224 x 224, #Heads 1,", TOP1, 67.4),
        (2, "EAMLP-7, EA, MEA, 224", TOP1, 68.9),
        (2, "EAMLP-7, EA, MEA, 384", "throughput (images/s)", 542.4),
        (2, "EAMLP-19", "parameters (M)", 54.6),
        (2, "EAMLP-19", TOP1, 79.4),
        (2, "EAMLP-BN-14", TOP1, None),
        (2, "MLP-7", TOP1, None),
        (3, "Cascade RCNN + 1EA", "box AP (%)", 41.4),
        (4, "Mask RCNN,", "mask AP (%)", 34.7),
        (5, "EANet (Ours)", "mIoU (%)", 84.0),
        (6, "PSPNet, ResNet-269", "mIoU (%)", 44.94),
        (6, "EANet (Ours)", "mIoU (%)", 45.33),
        (7, "EANet (Ours)", "mIoU (%)", 81.7),
        (8, "EAGAN (Ours)", "FID", 14.105),
        (8, "WGAN-GP", "IS", 7.458),
        (9, "EAGAN (Ours)", "IS", 8.673),
        (10, "Ours", "pIoU (%)", 86.5),
        (10, "Ours", "cap IoU (%)", 90.3),
        (10, "PointNet++", "skateboard IoU (%)", 76.4),
        (10, "PointConv", "airplane IoU (%)", None),
        (11, "EAT (Ours)", "overall accuracy (%)", 93.4),
        (12, "SA", "MACs (G)", 292.0),
        (12, "EA (Ours)", "parameters (M)", 0.55),
    ],
)
def test_published_value(table, start_of_row, metric, published):
    assert value(table, start_of_row, metric) == published


def test_part_segmentation_columns_average_to_the_published_mean():
    # A slip in any frequent column moves the mean over shapes away from the published one.
    num_test_shapes = {
        "airplane": 341, "bag": 14, "cap": 11, "car": 158, "chair": 704, "earphone": 14,
        "guitar": 159, "knife": 80, "lamp": 286, "laptop": 83, "motorbike": 51, "mug": 38,
        "pistol": 44, "rocket": 12, "skateboard": 31, "table": 848,
    }  # fmt: skip
    by_method: dict[str, dict[str, float | None]] = {}
    for figure in rows(10):
        by_method.setdefault(figure.row, {})[figure.metric.removesuffix(" (%)")] = figure.value
    for method, values in by_method.items():
        mean = values.pop("pIoU")
        if method == "PointConv":  # published without the categories
            assert set(values.values()) == {None}
            continue
        weighted = sum(
            values[f"{category} IoU"] * count for category, count in num_test_shapes.items()
        ) / sum(num_test_shapes.values())
        # both are rounded to 0.1
        assert weighted == pytest.approx(mean, abs=0.15), method


def test_throughput_is_32_images_over_whole_milliseconds():
    figures = [figure for figure in rows(2) if figure.metric == "throughput (images/s)"]
    timed = [figure.value for figure in figures if figure.value is not None]
    assert len(timed) == 20
    for images_per_second in timed:
        milliseconds = round(32_000 / images_per_second)
        assert round(32_000 / milliseconds, 1) == images_per_second


def test_figures_that_are_not_printed_say_what_is_printed():
    failed = [figure.row for figure in rows(2) if '"Failed"' in figure.note]
    assert [row.partition(",")[0] for row in failed] == ["MLP-7", "EAMLP-BN-14", "EAMLP-BN-19"]
    assert all("the paper prints" in figure.note for figure in ROWS if figure.value is None)


def test_doubtful_figures_carry_a_note():
    (encnet,) = [figure for figure in rows(7) if figure.row.startswith("EncNet")]
    assert "R-50 entry" in encnet.note
    (dual,) = [figure for figure in rows(12) if (figure.row, figure.metric) == ("DA", "MACs (G)")]
    assert "245.9 G" in dual.note


def test_a_row_names_a_recipe_or_says_why_not():
    for figure in ROWS:
        assert (figure.recipe is None) == bool(figure.reason), figure
    ours = [figure for figure in ROWS if "Ours" in figure.row or "EA" in figure.row.split(", ")[0]]
    assert not [figure.row for figure in ours if figure.reason == QUOTED]


def test_named_recipes_exist():
    named = {figure.recipe for figure in ROWS if figure.recipe}
    assert named
    assert named - set(registry.recipes()) == set()


def test_rows_of_the_classification_table_have_recipes_of_their_own():
    recipe_of_row = {figure.row: figure.recipe for figure in rows(2)}
    assert None not in recipe_of_row.values()
    assert len(set(recipe_of_row.values())) == len(recipe_of_row)


def test_rows_of_segmentation_have_recipes_and_the_test_server_does_not():
    recipes = [figure.recipe for figure in rows(1)]
    assert None not in recipes
    assert len(set(recipes)) == 10
    for table in (5, 6, 7):
        (ours,) = [figure for figure in rows(table) if "Ours" in figure.row]
        assert (ours.recipe is None) == (table == 5)
        assert ("test server" in ours.reason) == (table == 5)


@pytest.mark.parametrize(
    "arguments",
    [
        {"value": 1.0},
        {"value": 1.0, "recipe": "a/b", "reason": "none"},
        {"value": None, "reason": "none"},
        {"value": float("nan"), "reason": "none"},
    ],
    ids=["no recipe, no reason", "recipe and reason", "no value, no note", "not a number"],
)
def test_an_incomplete_row_is_refused(arguments):
    with pytest.raises(AssertionError):
        PaperRow(table=1, row="FCN", metric="mIoU (%)", **arguments)


def test_unknown_table_names_those_that_exist():
    with pytest.raises(UserError, match=r"no table 13; its tables are 1, 2, 3, .*12"):
        rows(13)
    with pytest.raises(UserError, match="no table 0"):
        format_table(0)


# the text


def result(**changes) -> dict:
    return {
        "recipe": EAMLP_7,
        "metric": TOP1,
        "value": 69.0,
        "seed": 0,
        "commit": "0123abc",
        "hardware": "made up",
        "seconds": 1.0,
        "command": "made up",
    } | changes


def write(folder: Path, **results) -> Path:
    for name, content in results.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def cells_of(text: str, start_of_row: str, metric: str) -> list[str]:
    """Return paper, ours and difference of a line."""
    (line,) = [
        line for line in text.splitlines() if line.startswith(start_of_row) and metric in line
    ]
    return re.split(r" {2,}", line)[2:5]


def test_without_results_ours_is_a_dash(tmp_path):
    text = format_table(2, tmp_path)
    assert cells_of(text, "EAMLP-7, EA, MEA, 224", TOP1) == ["68.9", "-", "-"]
    assert cells_of(text, "MLP-7", TOP1) == ["-", "-", "-"]


def test_results_give_mean_spread_and_difference(tmp_path):
    write(
        tmp_path,
        a=result(value=69.0, seed=0),
        b=result(value=69.4, seed=1),
        c=result(value=70.1, seed=2),
    )
    text = format_table(2, tmp_path)
    row = "EAMLP-7, EA, MEA, 224"
    # mean 69.5, squared distances 0.25 + 0.01 + 0.36, divided by 2
    assert cells_of(text, row, TOP1) == [
        "68.9",
        "69.50 ± 0.56 (3 seeds)",
        "+0.60",
    ]
    assert cells_of(text, "EAMLP-7, EA, MEA, 384", TOP1) == ["71.7", "-", "-"]
    assert cells_of(text, row, "parameters (M)") == ["6.1", "-", "-"]


def test_one_seed_has_no_spread_and_repeats_of_a_seed_count_once(tmp_path):
    write(tmp_path, a=result(value=68.0), b=result(value=68.5))
    text = format_table(2, tmp_path)
    assert cells_of(text, "EAMLP-7, EA, MEA, 224", TOP1) == ["68.9", "68.25 (1 seed)", "-0.65"]


def test_results_of_other_recipes_and_metrics_do_not_count(tmp_path):
    write(
        tmp_path,
        a=result(recipe="classification_digits/eamlp_tiny", value=99.0),
        b=result(metric="accuracy", value=0.7),
        c=result(metric="top-5 accuracy (%)", value=90.0),
    )
    (tmp_path / "empty").mkdir()
    assert format_table(2, tmp_path) == format_table(2, tmp_path / "empty")


def test_a_run_of_a_row_without_a_figure_has_no_difference(tmp_path):
    write(tmp_path, a=result(recipe="classification_imagenet/mlp_7", value=0.1))
    assert cells_of(format_table(2, tmp_path), "MLP-7", TOP1) == ["-", "0.10 (1 seed)", "-"]


@pytest.mark.parametrize("table", SHAPES)
def test_text_is_aligned_and_explains_its_notes(table, tmp_path):
    title, blank, header, rule, *rest = format_table(table, tmp_path).splitlines()
    assert title == f"Table {table}: {CAPTIONS[table]}"
    assert blank == ""
    body = rest[: rest.index("")] if "" in rest else rest
    notes = rest[len(body) + 1 :]
    num_lines, num_metrics = SHAPES[table]
    assert len(body) == num_lines * num_metrics
    gaps = [match.start() for match in re.finditer(" ", rule)]
    for line in (header, *body):
        assert all(line[gap : gap + 1] in (" ", "") for gap in gaps)
    start_of_note = rule.rindex(" ") + 1
    cited = {int(mark) for line in body for mark in re.findall(r"\d+", line[start_of_note:])}
    assert cited == set(range(1, len(notes) + 1))
    assert [note.partition(" ")[0] for note in notes] == [f"[{mark}]" for mark in sorted(cited)]


def test_digits_are_those_published(tmp_path):
    lines = [line.split() for line in format_table(8, tmp_path).splitlines()]
    assert ["DCGAN", "FID", "49.030"] in [words[:3] for words in lines]
    assert ["EAGAN", "(Ours)", "IS", "8.630"] in [words[:4] for words in lines]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not a JSON file"),
        ("[]", "JSON object, got list"),
        (json.dumps({"recipe": EAMLP_7}), "'metric' is missing"),
        (json.dumps(result(value="69")), "'value' must be a finite number, got '69'"),
        (json.dumps(result(value=float("nan"))), "'value' must be a finite number, got nan"),
        (json.dumps(result(seed=0.5)), "'seed' must be a whole number, got 0.5"),
        (json.dumps(result(seed=True)), "'seed' must be a whole number, got True"),
        (json.dumps(result(commit=None)), "'commit' must be text, got None"),
    ],
)
def test_a_file_that_is_no_result_is_named(content, message, tmp_path):
    (tmp_path / "odd.json").write_text(content)
    with pytest.raises(UserError, match=re.escape("odd.json")) as caught:
        format_table(2, tmp_path)
    assert message in str(caught.value)


def test_a_missing_results_folder_is_named(tmp_path):
    with pytest.raises(UserError, match="elsewhere: no such folder"):
        format_table(2, tmp_path / "elsewhere")


def test_default_folder_is_that_of_the_checkout():
    folder = Path(__file__).parents[2] / "results"
    if folder.is_dir():
        assert format_table(2) == format_table(2, folder)
    else:
        assert cells_of(format_table(2), "EAMLP-7, EA, MEA, 224", TOP1)[1] == "-"


def test_paper_tables_need_no_torch():
    code = (
        "import sys; from eanet.recipes.paper import format_table; format_table(2); "
        "print(*{'torch', 'numpy', 'torchvision', 'yaml'} & set(sys.modules))"
    )
    finished = subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=120
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.strip() == ""
