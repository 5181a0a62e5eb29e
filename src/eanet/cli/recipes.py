"""List the recipes, or show one; with --table N, a table of the paper beside what was measured.

Examples:
  eanet recipes
  eanet recipes classification_digits/eamlp_tiny
  eanet recipes --table 2
"""

import argparse

from eanet import registry


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of this subcommand."""
    parser.add_argument("recipe", nargs="?", help="the id of a recipe to print as YAML")
    parser.add_argument(
        "--table", type=int, metavar="N", help="a table of the paper: published, ours, difference"
    )


def execute(arguments: argparse.Namespace) -> None:
    """Print recipes."""
    if arguments.table is not None:
        from eanet.recipes.paper import format_table

        print(format_table(arguments.table))
        return
    if arguments.recipe:
        from eanet.recipe_file import dump_recipe

        print(dump_recipe(registry.recipe(arguments.recipe)), end="")
        return
    known = registry.recipes()
    width = max(map(len, known))
    for name, recipe in known.items():
        print(f"  {name:<{width}}  {recipe.model.name} on {recipe.data.name}")
