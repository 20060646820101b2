"""kvcc recipes: what can be compiled."""

import click
from rich.markup import escape
from rich.table import Table

from kvcc.cli._console import json_option, out, print_json


@click.command("recipes")
@json_option
def command(as_json: bool) -> None:
    """List the shipped recipes, and the passes a recipe can use."""
    from kvcc.passes import REGISTRY, pass_class
    from kvcc.recipe import load_recipe, shipped

    recipes = [load_recipe(name) for name in shipped()]
    passes = [pass_class(name) for name in sorted(REGISTRY)]
    if as_json:
        print_json(
            {
                "recipes": [r.as_dict() for r in recipes],
                "passes": {p.name: p.model_json_schema() for p in passes},
            }
        )
        return
    table = Table("recipe", "what it does", title="recipes")
    for recipe in recipes:
        table.add_row(recipe.name, escape(recipe.summary))
    out.print(table)
    table = Table("pass", "what it does", "parameters (defaults)", title="passes")
    for p in passes:
        first = (p.__doc__ or "").strip().split(". ")[0].replace("\n", " ")
        parameters = ", ".join(f"{n} ({f.default})" for n, f in p.model_fields.items())
        table.add_row(p.name, escape(" ".join(first.split())), escape(parameters))
    out.print(table)
