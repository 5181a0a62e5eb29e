"""Train a recipe, or one changed by options; show progress, then write a page about the run.

Every field of a recipe is an option of its dotted name (`eanet recipes NAME` prints them all).
A run killed at any moment goes on with --resume and ends bit-identical to one that was not.
Under torchrun the samples of a step are divided among the processes.

Examples:
  eanet train classification_digits/eamlp_tiny
  eanet train classification_digits/eamlp_tiny --optim.lr 0.002 --train.epochs 20 --out runs/try
  eanet train --resume --out runs/try
  eanet train --config runs/try/recipe.yaml --out runs/again
  eanet train my_package.my_recipes:MINE --dry-run
  torchrun --nproc-per-node 2 -m eanet train classification_digits/eamlp_tiny --out runs/two
"""

import argparse
from pathlib import Path

from eanet.cli import _options as options
from eanet.errors import UserError

#: what argparse does not know is an override of a recipe's field
TAKES_OVERRIDES = True


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of this subcommand."""
    parser.add_argument("recipe", nargs="?", help="id of a recipe, or package.module:NAME")
    parser.add_argument("--config", type=Path, metavar="FILE", help="a recipe as YAML instead")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="run folder (default: runs/ and the recipe's name)"
    )
    parser.add_argument(
        "--resume", action="store_true", help="continue the run in --out from its last checkpoint"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="build data and network, run one batch, write nothing"
    )
    options.add_device(parser)
    options.add_threads(parser)


def execute(arguments: argparse.Namespace) -> None:
    """Train."""
    from eanet.recipe_file import load_recipe, override

    name = arguments.recipe
    if name is not None and arguments.config is not None:
        raise UserError("give a recipe or --config FILE, not both")
    if name is None and arguments.config is None:
        stored = arguments.out / "recipe.yaml" if arguments.resume and arguments.out else None
        if stored is None:
            raise UserError("name a recipe (`eanet recipes` lists all), --config, or --resume --out DIR")
        arguments.config = stored
    from eanet import registry

    recipe = load_recipe(arguments.config) if arguments.config else registry.recipe(name)
    recipe = override(recipe, arguments.overrides)

    from eanet import run

    options.use_threads(arguments)
    if arguments.dry_run:
        print(run.dry_run(recipe, device=arguments.device))
        return
    folder = arguments.out or run.default_folder(name or arguments.config.stem)
    result = run.train(recipe, folder, resume=arguments.resume, device=arguments.device)
    options.print_result(result)
