"""Training curves: which number goes where, and records that are damaged."""

import json

import numpy as np
import pytest

from eanet.errors import UserError
from eanet.report.curves import read_records, training_curves
from eanet.report.figures import MUTED, picture


def lines_of(figure, title: str) -> dict[str, tuple[list, list]]:
    for axes in figure.axes:
        if axes.get_title(loc="left") == title:
            return {
                line.get_gid(): (list(line.get_xdata()), list(line.get_ydata()))
                for line in axes.lines
                if line.get_gid()
            }
    raise AssertionError(f"no panel {title!r}")


def legend_of(axes) -> dict[str, str]:
    legend = axes.get_legend()
    labels = [text.get_text() for text in legend.get_texts()]
    return dict(zip(labels, [line.get_color() for line in legend.get_lines()], strict=True))


def panels(figure) -> list[str]:
    return [axes.get_title(loc="left") for axes in figure.axes]


@pytest.fixture
def records() -> list[dict]:
    train = [
        {"step": s, "kind": "train", "loss": 100 / s, "lr": 1e-3 * s, "seconds": 9.0, "epoch": 1}
        for s in (1, 2, 3, 4)
    ]
    validation = [
        {"step": s, "kind": "validation", "accuracy": s / 10, "ema/accuracy": s / 5, "loss": 50 / s}
        for s in (2, 4)
    ]
    return train + validation


def test_numbers_go_to_their_panels(records):
    figure = training_curves(records, best_step=2)
    assert panels(figure) == ["Loss", "Metrics", "Learning rate"]
    losses = lines_of(figure, "Loss")
    assert losses["train loss"] == ([1, 2, 3, 4], [100, 50, 100 / 3, 25])
    assert losses["validation loss"] == ([2, 4], [25, 12.5])
    assert list(figure.axes[0].lines[-1].get_xdata()) == [2, 2]  # the kept weights
    metrics = lines_of(figure, "Metrics")
    assert metrics["validation accuracy"] == ([2, 4], [0.2, 0.4])
    assert metrics["validation ema/accuracy"] == ([2, 4], [0.4, 0.8])
    assert lines_of(figure, "Learning rate")["train lr"][1] == [1e-3, 2e-3, 3e-3, 4e-3]
    drawn = [line.get_gid() or "" for axes in figure.axes for line in axes.lines]
    assert not any("seconds" in name or "epoch" in name for name in drawn)
    assert len(picture(figure, "c").data) > 5000


def test_raw_and_averaged_weights_share_a_color_and_differ_in_dashes(records):
    figure = training_curves(records)
    axes = figure.axes[1]
    raw, averaged = axes.lines
    assert raw.get_color() == averaged.get_color()
    assert (raw.get_linestyle(), averaged.get_linestyle()) == ("--", "-")
    assert legend_of(axes) == {
        "accuracy": averaged.get_color(),
        "dashed: without averaging of weights": MUTED,
    }


def test_the_legend_names_every_color(records):
    records.append({"step": 4, "kind": "train", "accuracy": 0.5, "a_b$": 0.2})
    figure = training_curves(records, best_step=2)
    losses, metrics, rates = figure.axes
    assert list(legend_of(losses)) == ["loss, train", "loss, validation", "kept weights"]
    assert set(legend_of(metrics)) == {
        "accuracy, train",
        "a_b$, train",
        "accuracy, validation",
        "dashed: without averaging of weights",
        "kept weights",
    }
    assert rates.get_legend() is None
    for axes in (losses, metrics):
        for line in axes.lines:
            if line.get_gid():
                assert line.get_color() in legend_of(axes).values()


def test_large_numbers_do_not_press_metrics_flat(records):
    records.append(
        {"step": 5, "kind": "train", "gradient_norm": 0.4, "extra": 40.0, "flag": True, "note": "x"}
    )
    figure = training_curves(records)
    assert panels(figure) == ["Loss", "Metrics", "Other numbers", "Learning rate"]
    assert lines_of(figure, "Other numbers") == {
        "train gradient_norm": ([5], [0.4]),
        "train extra": ([5], [40.0]),
    }


def test_losses_of_several_networks_and_their_rates():
    records = [
        {
            "step": s,
            "kind": "train",
            "critic/hinge_loss": 1.0,
            "generator/loss": -2.0,
            "lr/critic": 1.0,
        }
        for s in range(3)
    ]
    figure = training_curves(records)
    assert panels(figure) == ["Loss", "Learning rate"]
    assert set(lines_of(figure, "Loss")) == {"train critic/hinge_loss", "train generator/loss"}
    assert figure.axes[0].get_yscale() == "linear"  # one of them is negative


@pytest.mark.parametrize("key", ["cross_entropy", "critic/gradient_penalty", "ema/loss", "hinge"])
def test_what_a_loss_is_called(key):
    records = [{"step": 1, "kind": "validation", key: 0.5}]
    assert panels(training_curves(records)) == ["Loss"]


def test_scale_of_losses():
    def scale(values):
        records = [{"step": i, "kind": "train", "loss": v} for i, v in enumerate(values)]
        return training_curves(records).axes[0].get_yscale()

    assert scale([2.0, 0.1]) == "linear"
    assert scale([2.0, 0.01]) == "log"
    assert scale([2.0, 0.0]) == "linear"


def test_values_that_are_not_finite_leave_gaps():
    values = [1.0, float("nan"), None, 2.0]
    records = [{"step": i, "kind": "train", "loss": v} for i, v in enumerate(values)]
    drawn = lines_of(training_curves(records), "Loss")["train loss"][1]
    np.testing.assert_array_equal(drawn, [1.0, np.nan, np.nan, 2.0])


def test_long_series_are_smoothed_with_their_values_behind():
    generator = np.random.default_rng(0)
    values = 1 + 0.1 * generator.normal(size=400)
    values[17] = np.nan
    records = [{"step": i, "kind": "train", "loss": float(v)} for i, v in enumerate(values)]
    faint, smooth = training_curves(records).axes[0].lines
    np.testing.assert_array_equal(faint.get_ydata(), values)
    smoothed = np.asarray(smooth.get_ydata())
    assert np.isfinite(smoothed).all()
    np.testing.assert_allclose(smoothed[200], values[195:206].mean())
    np.testing.assert_allclose(smoothed[0], values[:6].mean())
    np.testing.assert_allclose(smoothed[17], np.nanmean(values[12:23]))


def test_a_panel_says_when_it_cannot_show_all():
    records = [{"step": 1, "kind": "validation", **{f"iou/{i}": 0.5 for i in range(20)}}]
    assert panels(training_curves(records)) == ["Metrics (7 of 20)"]


@pytest.mark.parametrize("records", [[], [{"step": 1, "kind": "train", "seconds": 2.0}]])
def test_nothing_to_draw_is_said(records):
    with pytest.raises(ValueError, match="no numbers to draw"):
        training_curves(records)


def test_records_are_read_without_the_unfinished_line(tmp_path, records):
    path = tmp_path / "metrics.jsonl"
    text = "".join(json.dumps(record) + "\n" for record in records)
    path.write_text(text + "\n" + '{"step": 5, "lo', encoding="utf-8")
    assert read_records(path) == records


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"step": 1}\nnonsense\n', "line 2: not JSON"),
        ("[1]\n", "line 1: not an object"),
        ('{"loss": 1}\n', "line 1: not an object with a whole number 'step'"),
    ],
)
def test_damaged_records_are_named(tmp_path, text, message):
    path = tmp_path / "metrics.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        read_records(path)


def test_a_missing_or_binary_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*gone\.jsonl: No such file"):
        read_records(tmp_path / "gone.jsonl")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8"):
        read_records(tmp_path / "binary")
