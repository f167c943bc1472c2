"""`sdo fetch`."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sdo_cli.cli.options import ForMachines, Overrides
from sdo_cli.recipe.load import load_recipe
from sdo_cli.recipe.schema import Recipe
from sdo_cli.recipe.steering import is_steering, load_steering

if TYPE_CHECKING:
    from sdo_cli.weights.needs import Need


def fetch(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or the name of a shipped one.")],
    overrides: Overrides = None,
    only_list: Annotated[bool, typer.Option("--list", help="Say what is needed; download nothing.")] = False,
    as_json: ForMachines = False,
) -> None:
    """Download the weights a recipe needs, of `sdo finetune` or `sdo optimize`."""
    asked = needed_by(recipe, overrides)
    from sdo_cli.weights.fetch import fetch as run
    from sdo_cli.weights.needs import needs_of

    needs = needs_of(asked)
    if not as_json:
        show(needs)
    fetched = []
    if not only_list:
        for need in run(needs, variant=asked.variant, t5=asked.t5):
            fetched.append(need.source)
            if not as_json:
                typer.echo(f"fetched {need.source}")
    if as_json:
        typer.echo(json.dumps({"needs": [as_record(need) for need in needs], "fetched": fetched}))


def needed_by(name: str, overrides: list[str] | None) -> Recipe:
    """What names the weights."""
    if is_steering(name):
        return load_steering(name, {}, overrides or []).spec.as_recipe()
    return load_recipe(name, overrides).recipe


def as_record(need: "Need") -> dict[str, Any]:
    record = asdict(need)
    del record["file"]
    return record


def show(needs: "list[Need]") -> None:
    from sdo_cli.weights.needs import size_text

    if not needs:
        typer.echo("nothing to fetch: everything this recipe needs ships with sdo")
        return
    width = max(len(need.source) for need in needs)
    for need in needs:
        state = "here" if need.present else "missing"
        size = "local" if need.is_local else size_text(need.size)
        pinned = f" @ {need.revision}" if need.revision else ""
        typer.echo(f"{state:<8}{need.source:<{width}}  {size:>14}  {need.licence or '-'}  ({need.what}{pinned})")
    missing = sum(need.size for need in needs if not need.present)
    if missing:
        from huggingface_hub.constants import HF_HUB_CACHE

        place = next(p for p in (Path(HF_HUB_CACHE), *Path(HF_HUB_CACHE).parents) if p.exists())
        free = size_text(shutil.disk_usage(place).free)
        typer.echo(f"about {size_text(missing)} to download (published sizes) into {HF_HUB_CACHE}; {free} free there")
