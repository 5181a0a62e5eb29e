"""List the models, or those whose names match a pattern.

Examples:
  eanet models
  eanet models 'eamlp*'
  eanet models --json
"""

import argparse
import json

from eanet import registry
from eanet.errors import unknown_name


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of this subcommand."""
    parser.add_argument("pattern", nargs="?", default="*", help="a shell pattern, such as 'eamlp*'")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def execute(arguments: argparse.Namespace) -> None:
    """Print the models."""
    known = registry.models()
    names = registry.list_models(arguments.pattern)
    if not names:
        raise unknown_name(
            "model", arguments.pattern, known, where="a pattern such as 'eamlp*' works too"
        )
    if arguments.json:
        rows = [
            {"name": name, "task": known[name].task, "summary": known[name].summary}
            for name in names
        ]
        print(json.dumps(rows, indent=2))
        return
    width = max(map(len, names))
    task = ""
    for name in sorted(names, key=lambda name: (known[name].task, name)):
        if known[name].task != task:
            task = known[name].task
            print(f"\n{task}" if name != names[0] else task)
        print(f"  {name:<{width}}  {known[name].summary}")
