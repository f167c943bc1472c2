"""`sdo reward list|show|check`."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from sdo_cli.errors import PluginFault, RecipeFault
from sdo_cli.plugins import load_plugins

app = typer.Typer(help="List, show and check rewards.", no_args_is_help=True, rich_markup_mode=None)
PluginOption = Annotated[list[Path] | None, typer.Option(help="A Python file with rewards of your own.")]


@app.command("list")
def list_rewards(
    plugin: PluginOption = None, as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False
) -> None:
    """The rewards recipes can name."""
    import rewards
    from sdo_cli.weights.needs import size_text

    load_plugins(plugin or ())
    short = {full: name for name, full in rewards.SHORT.items()}
    rows: list[dict[str, Any]] = []
    for name in [name for name in rewards.known_names() if name not in rewards.SHORT]:
        size = sum(file.size for file in rewards.WEIGHTS.get(name, ()))
        use = "measures only" if rewards.resolve(name) and rewards.is_measure_only(name) else "trains"
        rows.append({"name": name, "short": short.get(name, ""), "use": use, "weights": size})
    if as_json:
        typer.echo(json.dumps(rows))
        return
    for row in rows:
        weights = size_text(row["weights"]) if row["weights"] else "none to fetch"
        typer.echo(f"{row['name']:<22} {row['short']:<12} {row['use']:<14} {weights}")


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="A reward.")],
    plugin: PluginOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """What a reward is, its options and weights."""
    import rewards
    from sdo_cli.weights.needs import size_text

    load_plugins(plugin or ())
    full = known(name)
    if full in rewards.FOREIGN:
        described = {k: v for k, v in asdict(rewards.FOREIGN[full]).items() if k != "make"}
    else:
        from importlib import import_module

        described = asdict(import_module(rewards.TABLE[full]).INFO)
    record: dict[str, Any] = {**described, "name": full, "options": sorted(rewards.OPTIONS[full])}
    record["weights"] = [asdict(file) for file in rewards.WEIGHTS.get(full, ())]
    if as_json:
        typer.echo(json.dumps(record))
        return
    typer.echo(f"{full}: {record['summary']}\nsource: {record['source']}\nlicence: {record['licence']}")
    low, high = record["range"]
    typer.echo(f"usually between {low:g} and {high:g}; options: {', '.join(record['options']) or 'none'}")
    for file in rewards.WEIGHTS.get(full, ()):
        typer.echo(f"  {file}  about {size_text(file.size)}  {file.licence}")
    typer.echo(f"in a recipe:  rewards: [{{name: {name}}}]")


def known(name: str) -> str:
    """The full name; raises RecipeFault for one nobody knows."""
    import rewards
    from sdo_cli.recipe.typed import suggestion

    if not rewards.resolve(name):
        raise RecipeFault([f"unknown reward {name!r}; {suggestion(name, rewards.known_names())}"], what="command line")
    return rewards.full_name(name)


@app.command()
def check(
    what: Annotated[str, typer.Argument(help="my.py:MyReward, or the name of a reward.")],
    option: Annotated[list[str] | None, typer.Option("--option", "-o", help="key=value of the reward.")] = None,
    size: Annotated[int, typer.Option(help="Height and width of the test images.")] = 64,
    plugin: PluginOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Try a reward against the contract: shape, range, gradient, finite differences, batches, types."""
    if not 8 <= size <= 4096:
        raise RecipeFault([f"--size: must be between 8 and 4096, not {size}"], what="command line")
    options = read_options(option or [])
    load_plugins(plugin or ())
    name = loaded_name(what)
    import rewards
    from sdo_cli.device import pick_device
    from sdo_cli.scoring.contract import check_contract

    unknown = sorted(set(options) - rewards.OPTIONS[name])
    if unknown:
        text = f"--option {unknown[0]}: unknown; {name} has {', '.join(sorted(rewards.OPTIONS[name])) or 'none'}"
        raise RecipeFault([text], what="command line")
    found = []
    for finding in check_contract(rewards.build(name, options), size=size, device=pick_device()):
        found.append(finding)
        if not as_json:
            word = {True: "pass", False: "FAIL", None: "  - "}[finding.passed]
            typer.echo(f"{word}  {finding.item:<20} {finding.figure}")
    if as_json:
        typer.echo(json.dumps([asdict(finding) for finding in found]))
    failed = [finding.item for finding in found if finding.passed is False]
    if failed:
        raise PluginFault(
            f"{name} breaks the contract: {', '.join(failed)}", remedy="docs/plugins.md says what each asks"
        )


def read_options(pairs: list[str]) -> dict[str, Any]:
    """``key=value`` words, their values read as YAML reads them."""
    from omegaconf import OmegaConf

    wrong = [pair for pair in pairs if "=" not in pair]
    if wrong:
        raise RecipeFault([f"--option {wrong[0]}: not of the form key=value"], what="command line")
    tree = OmegaConf.to_container(OmegaConf.create("\n".join(pair.replace("=", ": ", 1) for pair in pairs) or "{}"))
    return {str(key): value for key, value in tree.items()} if isinstance(tree, dict) else {}


def loaded_name(what: str) -> str:
    """The name of a reward; a ``file.py:Class`` is loaded first."""
    import rewards

    file, colon, cls = what.partition(":")
    if not colon or not file.endswith(".py"):
        return known(what)
    before = set(rewards.FOREIGN)
    load_plugins([file])
    named = [name for name, foreign in rewards.FOREIGN.items() if getattr(foreign.make, "__name__", "") == cls]
    new = [name for name in named if name not in before] or named
    if not new:
        raise PluginFault(
            f"{file} registers no reward class {cls}", remedy='write @reward("my-name", summary="…") above the class'
        )
    return new[0]
