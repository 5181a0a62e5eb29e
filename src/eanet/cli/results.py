"""List what was measured, or record a finished run among it.

Examples:
  eanet results
  eanet results "classification_small/*"
  eanet results --record runs/classification_digits-eamlp_tiny
"""

import argparse
from pathlib import Path


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of this subcommand."""
    parser.add_argument(
        "recipes", nargs="?", default="*", help="ids to list, as a pattern (default: all)"
    )
    parser.add_argument("--record", type=Path, metavar="RUN", help="a finished run to add")
    parser.add_argument(
        "--folder", type=Path, default=Path("results"), help="of the results (default: results)"
    )


def execute(arguments: argparse.Namespace) -> None:
    """List or record."""
    from eanet.results import format_results, record_run

    if arguments.record is not None:
        print(f"  recorded in {record_run(arguments.record, arguments.folder)}")
        return
    print(format_results(arguments.folder, arguments.recipes))
