"""`sdo fetch`."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sdo_cli.cli.options import ForMachines, Overrides
from sdo_cli.errors import RecipeFault
from sdo_cli.recipe.load import load_recipe
from sdo_cli.recipe.schema import Recipe, RewardSpec
from sdo_cli.recipe.steering import is_steering, load_steering

if TYPE_CHECKING:
    from sdo_cli.weights.needs import Need


def fetch(
    recipe: Annotated[str | None, typer.Argument(help="A recipe file, or the name of a shipped one.")] = None,
    overrides: Overrides = None,
    rewards: Annotated[
        str | None, typer.Option(help="Those of these rewards instead, separated by commas, for `sdo eval --images`.")
    ] = None,
    only_list: Annotated[bool, typer.Option("--list", help="Say what is needed; download nothing.")] = False,
    as_json: ForMachines = False,
) -> None:
    """Download the weights a recipe needs, of `sdo finetune` or `sdo optimize`, or those of rewards."""
    if (recipe is None) == (rewards is None):
        raise RecipeFault(["name a recipe, or rewards by --rewards, one of the two"], what="command line")
    asked = needed_by(recipe, overrides) if recipe is not None else None
    from sdo_cli.weights.fetch import fetch as run
    from sdo_cli.weights.needs import needs_of, needs_of_rewards

    needs = needs_of(asked) if asked else needs_of_rewards(known_rewards(rewards or ""))
    if not as_json:
        show(needs)
    fetched = []
    if not only_list:
        for need in run(needs, variant=asked.variant if asked else None, t5=asked is None or asked.t5):
            fetched.append(need.source)
            if not as_json:
                typer.echo(f"fetched {need.source}")
    if as_json:
        typer.echo(json.dumps({"needs": [as_record(need) for need in needs], "fetched": fetched}))


def known_rewards(names: str) -> list[RewardSpec]:
    """Of a list with commas; raises RecipeFault for names nobody knows."""
    from sdo_cli.recipe.reward_check import check_reward

    wrong: list[str] = []
    specs = [RewardSpec(name.strip()) for name in names.split(",") if name.strip()]
    for spec in specs:
        check_reward(spec, (), lambda key, text: wrong.append(f"--rewards: {text}"))
    if wrong:
        raise RecipeFault(wrong, what="command line")
    return specs


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
        typer.echo("nothing to fetch: everything that is needed ships with sdo")
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
