"""`sdo recipe list|show|copy|check`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from sdo_cli.errors import RecipeFault
from sdo_cli.files import write_text
from sdo_cli.plugins import load_plugins
from sdo_cli.recipe.load import find_recipe, load_recipe, read_recipe, shipped_recipes

app = typer.Typer(help="List, show, copy and check recipes.", no_args_is_help=True, rich_markup_mode=None)


@app.command("list")
def list_recipes(
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """The recipes that ship with sdo."""
    table = {name: load_recipe(name).recipe for name in shipped_recipes()}
    if as_json:
        typer.echo(json.dumps([{"name": n, "model": r.model, "description": r.description} for n, r in table.items()]))
        return
    for name, recipe in table.items():
        typer.echo(f"{name:<14} {recipe.model:<12} {recipe.description}")


@app.command()
def show(name: Annotated[str, typer.Argument(help="A recipe file or shipped name.")]) -> None:
    """Print a recipe as it is written."""
    typer.echo(read_recipe(find_recipe(name)).rstrip())


@app.command()
def copy(
    name: Annotated[str, typer.Argument(help="A shipped recipe.")],
    to: Annotated[Path | None, typer.Argument(help="Target file; default ./<name>.yaml.")] = None,
) -> None:
    """Copy a shipped recipe to edit it."""
    source = find_recipe(name)
    target = to or Path(source.name)
    if target.is_dir():
        target = target / source.name
    if target.exists():
        raise RecipeFault([f"{target}: exists already; give another name"])
    write_text(target, read_recipe(source))
    typer.echo(f"{target}; run it with: sdo finetune --recipe {target}")


@app.command()
def check(
    name: Annotated[str, typer.Argument(help="A recipe file or shipped name.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Recipe overrides.")] = None,
    plugin: Annotated[list[Path] | None, typer.Option(help="A Python file with gradient rules of your own.")] = None,
) -> None:
    """Check a recipe and report every problem at once."""
    load_plugins(plugin or ())
    loaded = load_recipe(name, overrides)
    typer.echo(f"{loaded.name}: no problems; {len(loaded.prompts(loaded.recipe.prompts))} training prompts")
