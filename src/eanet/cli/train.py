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
        "--dry-run",
        action="store_true",
        help="build everything, run one step, write nothing",
    )
    options.add_device(parser)
    options.add_threads(parser)


def execute(arguments: argparse.Namespace) -> None:
    """Train."""
    from eanet import registry
    from eanet.recipe_file import load_recipe, override

    if arguments.recipe and arguments.config:
        raise UserError("give a recipe or --config FILE, not both")
    if arguments.recipe:
        name, recipe = arguments.recipe, registry.recipe(arguments.recipe)
    else:
        config = arguments.config
        if config is None and arguments.resume and arguments.out:
            config = arguments.out / "recipe.yaml"
        if config is None:
            raise UserError("name a recipe (`eanet recipes`), --config, or --resume --out DIR")
        name, recipe = config.stem, load_recipe(config)
    recipe = override(recipe, arguments.overrides)

    from eanet import run

    options.use_threads(arguments)
    if arguments.dry_run:
        print(run.dry_run(recipe, device=arguments.device))
        return
    folder = arguments.out or run.default_folder(name)
    result = run.train(recipe, folder, resume=arguments.resume, device=arguments.device)
    options.print_result(result)
