"""Train on data that needs no download, in minutes on two cores, and show what was learned.

Examples:
  eanet demo
  eanet demo --task classification --out runs/my-demo
  eanet demo --task pointcloud
  eanet demo --all
"""

import argparse
from pathlib import Path

from eanet.cli import _options as options
from eanet.errors import unknown_name


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of this subcommand."""
    parser.add_argument(
        "--task", default="classification", help="which task (default: %(default)s)"
    )
    parser.add_argument("--all", action="store_true", help="every task, one after another")
    parser.add_argument("--out", type=Path, metavar="DIR", help="run folder (default: under runs/)")
    options.add_device(parser)
    options.add_threads(parser)


def execute(arguments: argparse.Namespace) -> None:
    """Run the demo of one task or of all."""
    from eanet import registry

    demos = registry.demos()
    # a room with several tasks shows them all
    chosen = [task for task in demos if arguments.task in (task, registry.room_of(task))]
    if not arguments.all and not chosen:
        raise unknown_name("demo task", arguments.task, demos)

    from eanet import run

    options.use_threads(arguments)
    tasks = list(demos) if arguments.all else chosen
    for task in tasks:
        folder = arguments.out or run.free_folder(Path("runs") / f"demo-{task}")
        if len(tasks) > 1 and arguments.out:
            folder = arguments.out / task
        print(f"eanet demo: {demos[task]} into {folder}\n")
        result = run.train(registry.recipe(demos[task]), folder, device=arguments.device)
        options.print_result(result)
