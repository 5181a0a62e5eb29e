"""Write the reference pages that are made from the package itself, so that none can go stale.

    python docs/generate.py        # what `make docs` does before it builds

The pages go to ``docs/reference/generated``, which is not kept in the repository.
"""

import contextlib
import io
import json
import re
import shutil
from pathlib import Path

import eanet
from eanet import cli, registry
from eanet.recipes.paper import CAPTIONS, format_table
from eanet.results import format_results

ROOT = Path(__file__).parents[1]
GENERATED = Path(__file__).parent / "reference" / "generated"


def public_names() -> str:
    """Return the page of everything that ``import eanet`` offers."""
    lines = ["# Python: the public names", ""]
    for name in sorted(set(eanet.__all__) - {"__version__"}):
        target = getattr(eanet, name)
        kind = "autoclass" if isinstance(target, type) else "autofunction"
        options = [":members: forward", ":show-inheritance:"] if kind == "autoclass" else []
        lines += [f"```{{{kind}}} {target.__module__}.{target.__qualname__}", *options, "```", ""]
    return "\n".join(lines)


def command_line() -> str:
    """Return the page of the subcommands: what ``eanet SUBCOMMAND --help`` prints."""
    lines = ["# Command line", "", "```text", _printed("--help"), "```", ""]
    for name in cli._summaries():
        lines += [f"## eanet {name}", "", "```text", _printed(name, "--help"), "```", ""]
    return "\n".join(lines)


def _printed(*words: str) -> str:
    """Return what a command prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        cli.main(words)
    return out.getvalue().rstrip()


def models() -> str:
    """Return the page of all networks, by task."""
    known = registry.models()
    lines = ["# Networks", "", "`eanet.create_model(name)` builds them; `eanet models` lists them."]
    for task in sorted({model.task for model in known.values()}):
        lines += ["", f"## {task}", "", "| name | what it is |", "|---|---|"]
        lines += [
            f"| `{name}` | {model.summary} |"
            for name, model in sorted(known.items())
            if model.task == task
        ]
    return "\n".join([*lines, ""])


def recipes() -> str:
    """Return the page of all recipes."""
    lines = ["# Recipes", "", "`eanet train ID` carries one out; `eanet recipes ID` prints it.", ""]
    lines += ["| id | network | data |", "|---|---|---|"]
    lines += [
        f"| `{name}` | `{recipe.model.name}` | `{recipe.data.name}` |"
        for name, recipe in registry.recipes().items()
    ]
    return "\n".join([*lines, ""])


def measured() -> str:
    """Return the page of what was measured: training runs, then benchmarks."""
    lines = [
        "# Measured",
        "",
        "Each row is made from the files in `results/`, one a run, which name their command,",
        "commit, seed, hardware and library versions.",
        "",
        format_results(ROOT / "results"),
        "",
        "## Benchmarks",
        "",
        "| file in `results/benchmarks` | command | hardware | commit |",
        "|---|---|---|---|",
    ]
    for path in sorted((ROOT / "results/benchmarks").glob("*.json")):
        facts = json.loads(path.read_text(encoding="utf-8"))
        environment = facts["environment"]
        program, *options = environment["command"]
        # a module that was run by its file has the file's name
        start = (
            f"python -m eanet.bench.{Path(program).stem}" if program.endswith(".py") else "eanet"
        )
        command = " ".join([start, *options])
        hardware = ", ".join(environment["gpus"]) or (
            f"{environment['processor']}, {environment['threads']} threads"
        )
        lines.append(f"| `{path.name}` | `{command}` | {hardware} | {environment['commit'][:12]} |")
    return "\n".join([*lines, ""])


def paper() -> str:
    """Return the page of the paper's tables beside what was measured here."""
    lines = ["# The paper's tables", "", "Quoted as published; `ours` only where it was measured."]
    for number in CAPTIONS:
        title, _, table = format_table(number).partition("\n")
        lines += ["", f"## {title}", "", "```text", table.strip("\n"), "```"]
    return "\n".join([*lines, ""])


PAGES = {
    "python": public_names,
    "command-line": command_line,
    "models": models,
    "recipes": recipes,
    "measured": measured,
    "paper-tables": paper,
}


#: a table of measured runs within a page that is kept in the repository
RESULTS_TABLE = re.compile(r"(<!-- eanet results ([^ ]+) -->\n).*?(?=\n<!-- end -->)", re.DOTALL)


def refresh_tables() -> None:
    """Renew the tables of measured runs in the pages that are written by hand."""
    for path in Path(__file__).parent.rglob("*.md"):
        text = path.read_text(encoding="utf-8")
        new = RESULTS_TABLE.sub(
            lambda found: found[1] + format_results(ROOT / "results", found[2]), text
        )
        if new != text:
            path.write_text(new, encoding="utf-8")


def generate() -> None:
    """Write all pages anew."""
    shutil.rmtree(GENERATED, ignore_errors=True)
    GENERATED.mkdir(parents=True)
    refresh_tables()
    for name, page in PAGES.items():
        (GENERATED / f"{name}.md").write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    generate()
