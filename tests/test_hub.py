"""Networks as folders, and files from elsewhere."""

import functools
import hashlib
import http.client
import http.server
import importlib.util
import json
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import eanet
from eanet import hub, registry
from eanet.errors import UserError

ROOT = Path(__file__).parent.parent
TINY = registry.list_models("*_tiny")


def small(**arguments):
    sizes = {"channels": 16, "depth": 2, "num_heads": 2, "num_classes": 3}
    model = registry.create_model("eamlp_tiny", **(sizes | arguments))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    return model.eval()


@pytest.fixture
def saved(tmp_path):
    """A saved folder and the network in it."""
    model = small()
    return hub.save_pretrained(model, tmp_path / "saved", class_names=["a", "b", "c"]), model


def same_state(one, other):
    assert one.state_dict().keys() == other.state_dict().keys()
    for name, tensor in one.state_dict().items():
        found = other.state_dict()[name]
        assert found.dtype == tensor.dtype, name
        assert torch.equal(tensor, found), name


# round trips


@pytest.mark.parametrize("name", TINY)
def test_every_small_model_comes_back(name, tmp_path):
    model = registry.create_model(name)
    found = eanet.load(hub.save_pretrained(model, tmp_path / "model"))
    same_state(model, found)
    assert found.config == model.config
    assert not found.training


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_types_of_numbers_are_kept(dtype, tmp_path):
    model = small(norm2="batch").to(dtype)
    same_state(model, hub.from_pretrained(hub.save_pretrained(model, tmp_path)))


def test_facts_stay(saved, tmp_path):
    folder, _ = saved
    model = hub.from_pretrained(folder)
    assert model.facts == {"class_names": ["a", "b", "c"]}
    again = hub.from_pretrained(hub.save_pretrained(model, tmp_path / "again", more=1))
    assert again.facts == {"class_names": ["a", "b", "c"], "more": 1}


def test_saving_leaves_random_numbers_alone(tmp_path):
    model = small()
    state = torch.get_rng_state()
    hub.save_pretrained(model, tmp_path)
    assert torch.equal(state, torch.get_rng_state())


def test_tied_parameters_are_stored_twice_and_equal(tmp_path):
    model = small()
    first, second = model.blocks[0].mlp.expand, model.blocks[1].mlp.expand
    second.weight = first.weight
    model.blocks[1].norm1.weight.data = model.blocks[0].norm1.weight.data  # one storage
    found = hub.from_pretrained(hub.save_pretrained(model, tmp_path))
    same_state(model, found)
    assert torch.equal(found.blocks[0].mlp.expand.weight, found.blocks[1].mlp.expand.weight)


def test_tied_memory_is_stored_once(tmp_path):
    attention = eanet.ExternalAttention(8, num_slots=4, tie_memory=True)
    stored = hub._separate(attention.state_dict())
    assert [name for name in stored if "memory" in name] == ["memory_key"]
    save_file(stored, tmp_path / "layer.safetensors")
    other = eanet.ExternalAttention(8, num_slots=4, tie_memory=True)
    hub.load_weights(other, tmp_path / "layer.safetensors")
    x = torch.randn(2, 5, 8)
    assert torch.equal(attention.eval()(x), other.eval()(x))


def test_views_and_transposed_tensors_are_stored(tmp_path):
    model = small()
    weight = model.head.weight.data
    model.head.weight.data = weight.t().contiguous().t()
    assert not model.head.weight.is_contiguous()
    same_state(model, hub.from_pretrained(hub.save_pretrained(model, tmp_path)))


def test_a_new_head_is_saved_with_its_size(tmp_path):
    model = small()
    model.reset_classifier(7, "none")
    found = hub.from_pretrained(hub.save_pretrained(model, tmp_path))
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(found(x), model(x))
    assert found(x).shape == (1, 64, 7)


# model card


def test_the_card_says_what_it_is(saved):
    folder, model = saved
    card = (folder / "README.md").read_text()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    config = json.loads((folder / "config.json").read_text())
    for words in ("eamlp_tiny", f"{parameters:,}", "3 x 32 x 32", config["weights_sha256"], '"a"'):
        assert words in card
    code = card.split("```text\n")[1].split("```")[0].replace("FOLDER", str(folder))
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_card_of_ones_own_is_kept(saved):
    folder, model = saved
    card = folder / "README.md"
    hub.save_pretrained(model, folder, accuracy=0.5)
    assert "accuracy" in card.read_text()  # ours is brought up to date
    card.write_text("# My model\n")
    hub.save_pretrained(model, folder)
    assert card.read_text() == "# My model\n"


def test_text_of_facts_stays_text(saved):
    folder, model = saved
    hub.save_pretrained(model, folder, note="```\n# not a title\n<script>")
    lines = (folder / "README.md").read_text().splitlines()
    (line,) = [line for line in lines if "script" in line]
    assert line.startswith("    ")
    assert "# not a title" not in lines


# refusals


@pytest.mark.faults
def test_a_changed_byte_anywhere_is_noticed(saved):
    folder, _ = saved
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    for number in range(60):
        content = bytearray(whole)
        content[number * (len(whole) - 1) // 59] ^= 4
        weights.write_bytes(content)
        with pytest.raises(UserError, match=r"model\.safetensors: damaged"):
            hub.from_pretrained(folder)
    weights.write_bytes(whole[:-1])
    with pytest.raises(UserError, match="damaged"):
        hub.from_pretrained(folder)
    weights.write_bytes(whole)
    hub.from_pretrained(folder)


@pytest.mark.faults
def test_headers_that_lie_are_refused_without_a_digest(saved):
    folder, _ = saved
    config = json.loads((folder / "config.json").read_text())
    del config["weights_sha256"]
    (folder / "config.json").write_text(json.dumps(config))
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    for damage in (
        b"",
        whole[:4],
        (2**62).to_bytes(8, "little") + whole[8:],
        whole[: len(whole) // 2],
        whole.replace(b'"F32"', b'"F33"', 1),
        whole.replace(b"[0,", b"[8,", 1),
    ):
        assert damage != whole
        weights.write_bytes(damage)
        with pytest.raises(UserError, match=r"model\.safetensors"):
            hub.from_pretrained(folder)


def test_an_interrupted_save_is_not_half_read(saved):
    folder, _ = saved
    other = small()
    hub.save_pretrained(other, folder.parent / "other")
    # killed after the weights and before the configuration
    (folder / "model.safetensors").write_bytes(
        (folder.parent / "other" / "model.safetensors").read_bytes()
    )
    with pytest.raises(UserError, match=r"not the weights that config\.json was written with"):
        hub.from_pretrained(folder)


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["weights_sha256"] = hashlib.sha256(
        (folder / "model.safetensors").read_bytes()
    ).hexdigest()
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("norm.bias"), "lacks 'norm.bias'"),
        (lambda tensors: tensors.update(extra=torch.ones(1)), "unknown tensor 'extra'"),
        (lambda tensors: tensors.update({"norm.bias": torch.ones(2)}), r"'norm.bias' has shape"),
    ],
)
def test_other_tensors_are_refused_by_name(change, message, saved):
    rewrite(saved[0], change)
    with pytest.raises(UserError, match=message):
        hub.from_pretrained(saved[0])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "expected a JSON object"),
        ("[" * 100_000, "cannot be read as JSON"),
        ('{"name": "eamlp_tiny"}', "'arguments' is missing"),
        ('{"name": 3, "arguments": {}}', "'name' must be str"),
        ('{"name": "eamlp_tiny", "arguments": []}', "'arguments' must be dict"),
        ('{"name": "eamlp_tinny", "arguments": {}}', "did you mean 'eamlp_tiny'"),
        ('{"name": "eamlp_tiny", "arguments": {"widht": 3}}', "widht"),
        ('{"name": "eamlp_tiny", "arguments": {"depth": 0}}', "depth"),
    ],
)
def test_configurations_that_build_nothing(content, message, saved):
    folder, _ = saved
    (folder / "config.json").write_text(content)
    with pytest.raises(UserError, match=rf"config\.json: .*{message}"):
        hub.from_pretrained(folder)


def test_missing_files(saved):
    folder, _ = saved
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model\.safetensors: there is no such file"):
        hub.from_pretrained(folder)
    with pytest.raises(UserError, match="there is no such folder"):
        hub.from_pretrained(folder / "none")
    with pytest.raises(UserError, match=r"config\.json: there is no such file"):
        hub.from_pretrained(folder.parent)


def test_networks_that_would_not_come_back_are_not_saved(tmp_path):
    with pytest.raises(ValueError, match=r"eanet\.create_model"):
        hub.save_pretrained(torch.nn.Linear(1, 1), tmp_path / "a")
    changed = small()
    changed.head = torch.nn.Linear(16, 9)
    with pytest.raises(ValueError, match=r"changed after it was built: 'head.bias' is \(9,\)"):
        hub.save_pretrained(changed, tmp_path / "b")
    fused = eanet.fuse(small())
    with pytest.raises(ValueError, match="changed after it was built"):
        hub.save_pretrained(fused, tmp_path / "c")
    unwritable = small()
    unwritable.config["arguments"]["image_size"] = {32}
    with pytest.raises(ValueError, match="builds no network"):
        hub.save_pretrained(unwritable, tmp_path / "d")
    for fact in ({1}, float("nan")):
        with pytest.raises(ValueError, match="facts must be JSON values"):
            hub.save_pretrained(small(), tmp_path / "e", fact=fact)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file: cannot be written"):
        hub.save_pretrained(small(), tmp_path / "file")


# torch.hub


def test_torch_hub_lists_and_builds_every_model(saved):
    folder, model = saved
    spec = importlib.util.spec_from_file_location("hubconf", ROOT / "hubconf.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    # what `torch.hub.list` shows
    names = [name for name in dir(module) if callable(getattr(module, name)) and name[0] != "_"]
    assert sorted(names) == sorted(registry.models())
    found = torch.hub.load(str(ROOT), "eamlp_tiny", source="local", num_classes=4)
    assert found.head.out_features == 4
    assert "eanet.create_model('eamlp_tiny')" in module.eamlp_tiny.__doc__
    same = torch.hub.load(str(ROOT), "eamlp_tiny", source="local", pretrained=str(folder))
    same_state(model, same)
    with pytest.raises(UserError, match="no weights come with this package"):
        torch.hub.load(str(ROOT), "eamlp_tiny", source="local", pretrained=True)
    with pytest.raises(UserError, match="holds 'eamlp_tiny', not 'mlp_tiny'"):
        torch.hub.load(str(ROOT), "mlp_tiny", source="local", pretrained=str(folder))


# downloads

CONTENT = bytes(range(256)) * 4000
DIGEST = hashlib.sha256(CONTENT).hexdigest()


class Server(http.server.BaseHTTPRequestHandler):
    """Serves one file in the ways that servers do, and notes what it was asked for."""

    def do_GET(self):
        requested = self.headers.get("Range")
        self.server.requests.append((self.path, requested))
        if self.path.endswith("/moved.bin"):
            return self.redirect("/moved/file.bin")
        if self.path.endswith("/downgraded.bin"):
            return self.redirect("http://127.0.0.1:1/file.bin")
        if self.path.endswith("/missing.bin"):
            return self.send_error(404)
        start = int(requested[6:-1]) if requested and "whole" not in self.path else 0
        if start >= len(CONTENT):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}")
        body = CONTENT[start:]
        if "chunked" not in self.path:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if "breaks" in self.path and not start:
            body = body[:100_000]
        self.wfile.write(body)

    def redirect(self, where):
        self.send_response(302)
        self.send_header("Location", where)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *words):
        pass


class WithoutTls(urllib.request.HTTPSHandler):
    """Speaks to a local server for https addresses; everything but the encryption is real."""

    def https_open(self, req):
        return self.do_open(functools.partial(http.client.HTTPConnection), req)


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as running:
        running.requests = []
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        running.base = f"https://127.0.0.1:{running.server_port}"
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture
def fetch(server, tmp_path, monkeypatch):
    monkeypatch.delenv("EANET_OFFLINE", raising=False)
    for name in ("http_proxy", "https_proxy", "HTTPS_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)

    def download(path, digest=DIGEST, **arguments):
        return hub.download(
            server.base + path, digest, tmp_path, handlers=(WithoutTls(),), **arguments
        )

    return download


@pytest.mark.parametrize("path", ["/file.bin", "/chunked/file.bin", "/moved.bin"])
def test_a_file_is_fetched_once(path, fetch, server, tmp_path):
    target = fetch(path)
    assert target.read_bytes() == CONTENT
    assert [file.name for file in tmp_path.iterdir()] == [target.name]
    count = len(server.requests)
    assert fetch(path) == target
    assert len(server.requests) == count


@pytest.mark.parametrize("way", ["breaks", "breaks-whole"])
def test_a_broken_download_is_continued(way, fetch, server, tmp_path):
    with pytest.raises(UserError, match=r"broke off at 100,000 of 1,024,000 bytes"):
        fetch(f"/{way}/file.bin")
    assert not (tmp_path / "file.bin").exists()
    if way == "breaks":
        assert fetch(f"/{way}/file.bin").read_bytes() == CONTENT
    else:  # a server that knows no ranges: the file is fetched from the beginning
        with pytest.raises(UserError, match=r"broke off at 100,000"):
            fetch(f"/{way}/file.bin")
    assert server.requests == [(f"/{way}/file.bin", None), (f"/{way}/file.bin", "bytes=100000-")]


def test_a_complete_part_is_only_checked(fetch, server, tmp_path):
    part = tmp_path / f".file.bin.{DIGEST[:16]}.partial"
    part.write_bytes(CONTENT)
    assert fetch("/file.bin").read_bytes() == CONTENT
    assert server.requests == [("/file.bin", f"bytes={len(CONTENT)}-")]


def test_another_file_is_removed(fetch, tmp_path):
    with pytest.raises(UserError, match="not the file that was meant"):
        fetch("/file.bin", digest="0" * 64)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_part_does_not_stay(fetch, tmp_path):
    (tmp_path / f".file.bin.{DIGEST[:16]}.partial").write_bytes(b"x" * 1000)
    with pytest.raises(UserError, match="not the file that was meant"):
        fetch("/file.bin")
    assert fetch("/file.bin").read_bytes() == CONTENT


@pytest.mark.parametrize("path", ["/file.bin", "/chunked/file.bin"])
def test_a_file_that_is_too_large_is_refused(path, fetch, tmp_path):
    with pytest.raises(UserError, match="larger than 1,000 bytes"):
        fetch(path, max_bytes=1000)
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) == 0


def test_what_is_there_is_not_overwritten(fetch, tmp_path):
    (tmp_path / "file.bin").write_bytes(b"mine")
    with pytest.raises(UserError, match="another content"):
        fetch("/file.bin")
    assert (tmp_path / "file.bin").read_bytes() == b"mine"


def test_offline_opens_nothing(fetch, server, monkeypatch):
    monkeypatch.setenv("EANET_OFFLINE", "1")
    with pytest.raises(UserError, match=r"EANET_OFFLINE is set: fetch .* and put it at"):
        fetch("/file.bin")
    assert server.requests == []
    monkeypatch.setenv("EANET_OFFLINE", "0")
    fetch("/file.bin")


def test_servers_that_refuse(fetch):
    with pytest.raises(UserError, match="answers 404"):
        fetch("/missing.bin")
    with pytest.raises(UserError, match=r"leads to 'http://.*', which is not https"):
        fetch("/downgraded.bin")


def test_a_server_without_a_certificate_is_refused(server, tmp_path, monkeypatch):
    monkeypatch.delenv("EANET_OFFLINE", raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with pytest.raises(UserError, match="cannot be fetched"):
        hub.download(f"{server.base}/file.bin", DIGEST, tmp_path)
    assert server.requests == []


@pytest.mark.parametrize(
    "url",
    ["http://127.0.0.1/file.bin", "file:///etc/passwd", "ftp://host/file.bin", "/etc/passwd"],
)
def test_only_https(url, tmp_path):
    with pytest.raises(UserError, match="only https"):
        hub.download(url, DIGEST, tmp_path)


@pytest.mark.parametrize("end", ["", "..", ".hidden", "a%2Fb", "x" * 300])
def test_names_that_are_no_file_names(end, tmp_path):
    with pytest.raises(UserError, match="plain file name"):
        hub.download(f"https://127.0.0.1/folder/{end}", DIGEST, tmp_path)


def test_a_digest_must_be_one(tmp_path):
    with pytest.raises(ValueError, match="64 hexadecimal digits"):
        hub.download("https://127.0.0.1/file.bin", "abc", tmp_path)
