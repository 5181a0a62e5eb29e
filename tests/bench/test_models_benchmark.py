"""The benchmark of whole networks: its forms are the same function, its figures are sound."""

import json

import pytest
import torch
from torch import nn

from eanet.bench.cost import count_cost
from eanet.bench.models import benchmark_models, main
from eanet.bench.paper_networks import PaperNetwork, has_paper_form
from eanet.errors import UserError
from eanet.nn.fusion import fuse
from eanet.registry import create_model


@pytest.mark.parametrize("stem", ["ea", "performer", "transformer"])
@pytest.mark.parametrize("name", ["eamlp_tiny", "t2t_vit_tiny"])
def test_the_papers_form_computes_the_same(name, stem):
    network = create_model(name, stem=stem, pool="avg").double().eval()
    for key, weight in network.named_parameters():
        if weight.requires_grad:
            nn.init.normal_(weight, mean=float("norm" in key and "weight" in key), std=0.3)
    images = torch.randn(2, 3, 37, 50, dtype=torch.float64)
    expected = PaperNetwork(network)(images)
    assert expected.std() > 0.01
    torch.testing.assert_close(network(images), expected, rtol=0, atol=1e-11)
    torch.testing.assert_close(fuse(network)(images), expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize(("name", "gigamacs"), [("eamlp_7", 1.465), ("eamlp_14", 6.450)])
def test_the_papers_form_costs_what_its_equations_say(name, gigamacs):
    with torch.device("meta"):
        network = create_model(name)
    counted = count_cost(PaperNetwork(network), (1, 3, 224, 224)).macs / 1e9
    assert round(counted, 3) == gigamacs


def test_only_networks_of_the_paper_have_its_form():
    assert not has_paper_form(nn.Linear(2, 2))
    assert not has_paper_form(fuse(create_model("eamlp_tiny")))
    with pytest.raises(ValueError, match="no form in the paper"):
        PaperNetwork(create_model("mlp_tiny"))


def test_report_holds_every_form(tmp_path, capsys):
    path = tmp_path / "models.json"
    names = ["eamlp_tiny", "mlp_tiny", "timm/test_resnet"]
    options = ["--batch", "2", "--size", "32", "40", "--rounds", "2", "--json", str(path)]
    assert main([*names, *options]) == 0
    report = json.loads(path.read_text())
    assert report["batch"] == 2
    assert report["size"] == [32, 40]
    shown = {
        mode: [
            (figures["model"], figures["form"])
            for figures in report["figures"]
            if figures["mode"] == mode
        ]
        for mode in ("inference", "training")
    }
    assert shown["inference"] == [
        *(("eamlp_tiny", form) for form in ("paper", "product", "fused")),
        *(("mlp_tiny", form) for form in ("product", "fused")),
        ("timm/test_resnet", "product"),
    ]
    assert shown["training"] == [
        ("eamlp_tiny", "paper"),
        ("eamlp_tiny", "product"),
        ("mlp_tiny", "product"),
        ("timm/test_resnet", "product"),
    ]
    macs = {figures["form"]: figures["gigamacs"] for figures in report["figures"][:3]}
    assert macs["fused"] < macs["paper"]
    for figures in report["figures"]:
        assert len(figures["seconds"]) == 2
        assert figures["images_per_second"] == pytest.approx(2 / figures["median_seconds"])
        assert figures["peak_bytes"] > 0
        if figures["mode"] == "inference":
            assert figures["max_difference"] < 1e-5
    table = capsys.readouterr().out
    assert "| eamlp_tiny | fused |" in table
    assert "| training | form |" in table


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eamlp_8"], "eamlp_8"),
        (["timm/no_such_network"], "no_such_network"),
        (["eamlp_tiny", "--rounds", "0"], "--rounds must be at least 1"),
        (["eamlp_tiny", "--size", "0"], "--size must be at least 1"),
        (["eamlp_tiny", "--size", "1", "2", "3"], "--size takes one or two numbers"),
        (["eamlp_7", "--size", "1"], "does not take an input of shape"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        main([*arguments, *(() if "--rounds" in arguments else ("--rounds", "1"))])


def test_forms_can_be_chosen():
    report = benchmark_models(
        ["eamlp_tiny"], forms=["fused"], modes=["inference"], batch=1, size=(32, 32), rounds=1
    )
    (figures,) = report.figures
    assert figures.form == "fused"
    assert figures.max_difference is None
    assert report.speedup(figures) is None
