"""`sdo recipe list|show|copy|check|explain`."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from sdo_cli.cli.options import ForMachines, Overrides, RulePlugins
from sdo_cli.errors import RecipeFault
from sdo_cli.files import write_text
from sdo_cli.installed import sdo
from sdo_cli.plugins import load_plugins
from sdo_cli.recipe.load import find_recipe, load_recipe, read_recipe, shipped_recipes
from sdo_cli.recipe.steering import find_steering, is_steering, load_steering, shipped_steerings

app = typer.Typer(
    help="List, show, copy and check recipes; explain their keys.", no_args_is_help=True, rich_markup_mode=None
)


@app.command("list")
def list_recipes(
    as_json: ForMachines = False,
) -> None:
    """The recipes that ship with sdo."""
    table = {name: load_recipe(name).recipe for name in shipped_recipes()}
    if as_json:
        typer.echo(json.dumps([{"name": n, "model": r.model, "description": r.description} for n, r in table.items()]))
        return
    for name, recipe in table.items():
        typer.echo(f"{name:<14} {recipe.model:<12} {recipe.description}")
    typer.echo("\nof sdo optimize:")
    for name in shipped_steerings():
        spec = load_steering(name, {}, []).spec
        typer.echo(f"{name:<14} {spec.model:<12} {spec.description}")


def _find(name: str) -> Path:
    """A recipe of `sdo finetune`, else a shipped one of `sdo optimize`."""
    return find_steering(name) if name in shipped_steerings() and not Path(name).is_file() else find_recipe(name)


@app.command()
def show(name: Annotated[str, typer.Argument(help="A recipe file or shipped name.")]) -> None:
    """Print a recipe as it is written."""
    typer.echo(read_recipe(_find(name)).rstrip())


@app.command()
def copy(
    name: Annotated[str, typer.Argument(help="A shipped recipe.")],
    to: Annotated[Path | None, typer.Argument(help="Target file; default ./<name>.yaml.")] = None,
) -> None:
    """Copy a shipped recipe to edit it."""
    source = _find(name)
    target = to or Path(source.name)
    if target.is_dir():
        target = target / source.name
    if target.exists():
        raise RecipeFault([f"{target}: exists already; give another name"])
    write_text(target, read_recipe(source))
    verb = "optimize" if name in shipped_steerings() else "finetune"
    typer.echo(f"{target}; run it with: {sdo(verb, '--recipe', target)}")


@app.command()
def check(
    name: Annotated[str, typer.Argument(help="A recipe file or shipped name.")],
    overrides: Overrides = None,
    plugin: RulePlugins = None,
) -> None:
    """Check a recipe and report every problem at once."""
    load_plugins(plugin or ())
    if is_steering(name):
        steering = load_steering(name, {}, overrides or [])
        typer.echo(f"{steering.name}: no problems; {len(steering.prompts)} prompts to steer")
        return
    loaded = load_recipe(name, overrides)
    from sdo_cli.doctor.at_hand import problems_of

    if wrong := problems_of(loaded.recipe):
        raise RecipeFault(wrong)
    typer.echo(f"{loaded.name}: no problems; {len(loaded.prompts(loaded.recipe.prompts))} training prompts")


@app.command()
def explain(
    key: Annotated[str, typer.Argument(help="Like gradient.rule, guard, or a last part like rank; without: all.")] = "",
    plugin: Annotated[list[Path] | None, typer.Option(help="Explain its rules and rewards too.")] = None,
    as_json: ForMachines = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="All of it as a page, docs/recipe.md.")] = False,
) -> None:
    """What the keys of a recipe mean: type, default, choices, an example."""
    from sdo_cli.recipe.explain import explained, find
    from sdo_cli.recipe.explain_text import page, table, text_of

    load_plugins(plugin or ())
    if markdown:
        typer.echo(page(), nl=False)
        return
    found = find(key) if key else explained()
    if as_json:
        typer.echo(json.dumps([asdict(entry) for entry in found], ensure_ascii=False))
        return
    typer.echo("\n\n".join(text_of(entry) for entry in found) if key else table())
