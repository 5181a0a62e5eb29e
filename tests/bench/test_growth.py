"""The growth benchmark: every form at every size, and a table that says what changed."""

import json

import pytest

from eanet.bench.growth import FORMS, main
from eanet.errors import UserError


def test_figures_of_every_form_and_size(tmp_path, capsys):
    path = tmp_path / "growth.json"
    arguments = ["--sizes", "64", "100", "--channels", "16", "--num-slots", "4", "--rounds", "1"]
    assert main([*arguments, "--threads", "1", "--json", str(path)]) == 0
    report = json.loads(path.read_text())
    assert list(report["nanoseconds_per_token"]) == list(FORMS)
    for form, by_size in report["nanoseconds_per_token"].items():
        assert list(by_size) == ["64", "100"]
        assert all(value > 0 for value in by_size.values())
        change = report["times_the_first_size"][form]
        assert change["64"] == 1
        assert change["100"] == pytest.approx(by_size["100"] / by_size["64"])
    table = capsys.readouterr().out
    assert "| map, out= |" in table
    assert "(+0%)" in table


def test_a_size_below_one_is_refused():
    with pytest.raises(UserError, match="at least 1"):
        main(["--sizes", "0"])
