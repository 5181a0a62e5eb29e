"""The benchmark of a segmentation network's parts: its figures are those of the parts."""

import json

import pytest

from eanet.bench.segmentation import main
from eanet.errors import UserError


def test_report_holds_every_part(tmp_path, capsys):
    path = tmp_path / "report.json"
    options = ["--model", "eanet_tiny", "--output-stride", "4", "--size", "32", "--rounds", "2"]
    assert main([*options, "--json", str(path)]) == 0
    report = json.loads(path.read_text())
    seconds = report["seconds"]
    assert min(seconds.values()) > 0
    light = seconds["block"] + seconds["classifier"] + seconds["resize"]
    share = report["share_of_head_without_3x3"]
    assert share["block"] == pytest.approx(light / seconds["whole"])
    ahead = report["loader_images_per_second"] / report["network_images_per_second"]
    assert report["times_loader_is_ahead"] == pytest.approx(ahead)
    assert report["environment"]["commit"]
    assert "head without its 3x3 convolutions, block, folded" in capsys.readouterr().out


def test_other_networks_are_refused():
    with pytest.raises(UserError, match="no segmentation network with external attention"):
        main(["--model", "fcn_tiny", "--output-stride", "4", "--rounds", "1", "--size", "32"])
    with pytest.raises(UserError, match="--size"):
        main(["--size", "0"])
