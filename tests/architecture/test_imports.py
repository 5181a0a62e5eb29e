"""What importing costs, and what may stand where: rules an import linter cannot see."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import eanet

SOURCE = Path(eanet.__file__).parent
MODULES = sorted(SOURCE.rglob("*.py"))


def _loads_torch(code: str) -> bool:
    program = f"import sys\n{code}\nprint('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    return done.stdout.splitlines()[-1] == "True"


@pytest.mark.parametrize(
    "code",
    [
        "import eanet",
        "import eanet.cli",
        "import eanet.registry as r; assert r.models() and r.tasks() and r.recipes()",
        "import eanet; assert eanet.list_models()",
        "from eanet.cli import main; main(['--help'])",
        "from eanet.cli import main\ntry: main(['train', '--help'])\nexcept SystemExit: pass",
        "from eanet.cli import main; main(['models'])",
        "from eanet.cli import main; main(['recipes'])",
        "from eanet.cli import main; main(['recipes', '--table', '2'])",
    ],
)
def test_loads_no_torch(code: str) -> None:
    assert not _loads_torch(code)


def test_the_torch_check_can_fail() -> None:
    assert _loads_torch("import eanet; eanet.ExternalAttention")


def test_every_public_name_resolves() -> None:
    for name in eanet.__all__:
        assert getattr(eanet, name) is not None
    assert set(eanet.__all__) == {"__version__", *eanet._MODULE_OF}
    assert dir(eanet) == sorted(eanet.__all__)


def test_an_unknown_public_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = eanet.nonsense


def _calls(path: Path) -> list[tuple[str, ast.Call]]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [(ast.unparse(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call)]


def test_only_the_trainer_differentiates() -> None:
    places = {
        path.relative_to(SOURCE).as_posix()
        for path in MODULES
        for name, _ in _calls(path)
        if name.endswith(".backward")
    }
    # benchmarks time a step without the loop around it; in ops, derivatives written out by hand
    # bear that name
    elsewhere = {place for place in places if not place.startswith(("bench/", "ops/"))}
    assert elsewhere == {"engine/trainer.py"}


def test_no_unsafe_calls() -> None:
    banned = {"eval", "exec", "pickle.load", "pickle.loads", "yaml.load", "os.system"}
    for path in MODULES:
        for name, call in _calls(path):
            assert name not in banned, f"{path}: {name}"
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            if name.endswith("torch.load") or (name == "load" and "weights_only" in keywords):
                assert keywords.get("weights_only") == "True", f"{path}: torch.load"
            assert keywords.get("shell") != "True", f"{path}: shell=True"
            assert keywords.get("allow_pickle") != "True", f"{path}: allow_pickle"


def test_references_stand_alone() -> None:
    references = list((SOURCE / "ops").rglob("reference.py"))
    assert references
    for path in references:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                assert not (node.module or "").startswith("eanet"), path


def test_rooms_do_not_import_one_another() -> None:
    for path in (SOURCE / "tasks").glob("*/*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("eanet.tasks."):
                assert node.module.split(".")[2] == path.parent.name, path


def test_no_catch_all_module_names() -> None:
    assert not {"utils", "helpers", "common", "misc"} & {path.stem for path in MODULES}
