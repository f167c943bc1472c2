"""`sdo reward list|show|check`."""

import json
import math
from dataclasses import asdict
from typing import Annotated, Any

import typer

from sdo_cli.cli.options import ForMachines, RewardPlugins
from sdo_cli.errors import PluginFault, RecipeFault
from sdo_cli.plugins import load_plugins

app = typer.Typer(help="List, show and check rewards.", no_args_is_help=True, rich_markup_mode=None)


@app.command("list")
def list_rewards(
    plugin: RewardPlugins = None,
    costs: Annotated[
        bool, typer.Option("--costs", help="Also what each costs, counted from its architecture; takes a while.")
    ] = False,
    as_json: ForMachines = False,
) -> None:
    """The rewards recipes can name."""
    import rewards
    from sdo_cli.weights.needs import size_text

    load_plugins(plugin or ())
    rows = [row_of(name) for name in rewards.known_names() if name not in rewards.SHORT]
    if costs:
        rows = [row | {"costs": costs_of(row["name"])} for row in rows]
    if as_json:
        typer.echo(json.dumps(rows))
        return
    for row in rows:
        size = size_text(row["weights"]) if row["weights"] else weightless(row["name"])
        typer.echo(f"{row['name']:<22} {row['short']:<12} {row['use']:<14} {size:<11} {row['licence']}")
        typer.echo(f"    {row['summary']}")
        told = [f"sees {row['sees']}"] if row["sees"] else []
        told += [f"reads {row['reads']} tokens"] if row["reads"] else []
        if told:
            typer.echo(f"    {', '.join(told)}")
        if costs:
            typer.echo(f"    {cost_line(row['costs'])}")


def weightless(name: str) -> str:
    """Of a reward whose weights are not fetched: it has none, or they are given."""
    import rewards

    return "a folder" if name in rewards.LATENT else "no weights"


def row_of(name: str) -> dict[str, Any]:
    """What a list says of a reward. Listing an installed package's runs none of its code."""
    import rewards

    short = {full: name for name, full in rewards.SHORT.items()}.get(name, "")
    weights = sum(file.size for file in rewards.WEIGHTS.get(name, ()))
    row: dict[str, Any] = {"name": name, "short": short, "weights": weights}
    if name not in rewards.TABLE and name not in rewards.FOREIGN:
        told = {"summary": "of an installed package; sdo reward show loads it", "licence": ""}
        return {**row, **told, "sees": "", "reads": None, "use": "installed", "differentiable": None, "trainable": None}
    info = rewards.info(name)
    row |= {key: getattr(info, key) for key in ("summary", "licence", "differentiable", "trainable")}
    return {**row, **seen_by(name), "use": "trains" if info.trainable else "measures only"}


# of pictures whose score and gradient are counted
COST_SIZE = 512


def costs_of(name: str) -> dict[str, float | str]:
    """FLOPs and bytes of one picture's score and gradient, and bytes of weights, all in fp32; ``unknown`` says why not.

    Counted on tensors without data, of the published architecture. A prompt is read once, which is not among it.
    """
    import rewards

    if name not in rewards.TABLE and name not in rewards.FOREIGN:
        return {"unknown": "an installed package's code is not run for it"}
    if name == "mixture":
        return {"unknown": "those of its parts"}
    if not rewards.info(name).differentiable:
        return {"unknown": "it leaves torch"}
    needed = rewards.REQUIRED.get(name, frozenset())
    if needed and name not in rewards.LATENT:
        return {"unknown": f"it needs options: {', '.join(sorted(needed))}"}
    from sdo_cli.estimate.scoring import RewardSetup, gradient_cost, reward_bytes

    setup = RewardSetup.of(name, {})
    try:
        cost = gradient_cost(setup, "no", (COST_SIZE, COST_SIZE))
        return {"flops": cost.flops, "bytes": cost.peak, "weights": reward_bytes(setup, "no")}
    # a plug-in's code may do what tensors without data cannot
    except Exception as fault:
        return {"unknown": f"{type(fault).__name__} where tensors have no data"}


def cost_line(costs: dict[str, float | str]) -> str:
    if "unknown" in costs:
        return f"costs: not counted, {costs['unknown']}"
    flops, there, weights = (float(costs[key]) for key in ("flops", "bytes", "weights"))
    each = f"{flops / 1e9:,.0f} GFLOP and {there / 1e6:,.0f} MB a picture of {COST_SIZE} pixels with its gradient"
    return f"costs: {each}; weights {weights / 1e9:.2f} GB in fp32"


def seen_by(name: str) -> dict[str, Any]:
    """What a known reward is told of: a plug-in's code does not say."""
    import rewards

    if rewards.sees_latents(name):
        reads = rewards.READS.get(name)
        return {"sees": "latent and prompt" if reads else "the latent", "reads": reads}
    if name in rewards.FOREIGN:
        return {"sees": "", "reads": None}
    if name == "mixture":
        return {"sees": "what its parts see", "reads": None}
    reads = rewards.READS.get(name)
    return {"sees": "picture and prompt" if reads else "the picture alone", "reads": reads}


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="A reward.")], plugin: RewardPlugins = None, as_json: ForMachines = False
) -> None:
    """What a reward is, its options and weights."""
    import rewards
    from sdo_cli.weights.needs import size_text

    load_plugins(plugin or ())
    full = known(name)
    info = rewards.info(full)
    # JSON knows no infinity
    ends = [end if math.isfinite(end) else None for end in info.range]
    if as_json:
        weights = [asdict(file) for file in rewards.WEIGHTS.get(full, ())]
        typer.echo(json.dumps({**asdict(info), "range": ends, "options": options_of(full), "weights": weights}))
        return
    typer.echo(f"{full}: {info.summary}\nsource: {info.source or 'not said'}\nlicence: {info.licence or 'not said'}")
    typer.echo("usually between {} and {}".format(*("any number" if end is None else f"{end:g}" for end in ends)))
    for option, told in options_of(full).items():
        typer.echo(
            f"option {option}: {told['type']}, {'needed' if told['needed'] else 'default ' + str(told['default'])}"
        )
    for file in rewards.WEIGHTS.get(full, ()):
        typer.echo(f"weights {file}  about {size_text(file.size)}  {file.licence}")
    place = "rewards" if info.trainable else "validation.rewards"
    typer.echo(f"in a recipe:  {place}: [{{name: {name}}}]")


def options_of(full: str) -> dict[str, dict[str, Any]]:
    """Type, default and need of each option of a known reward."""
    from importlib import import_module

    import rewards

    foreign = full in rewards.FOREIGN
    taken = rewards.parameters(rewards.FOREIGN[full].make if foreign else import_module(rewards.TABLE[full]).build)
    needed = rewards.REQUIRED.get(full, frozenset())
    return {
        option: {
            "type": rewards.TYPES.get((full, option), str).__name__,
            "default": None if option in needed else taken[option].default,
            "needed": option in needed,
        }
        for option in sorted(rewards.OPTIONS[full])
    }


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
    plugin: RewardPlugins = None,
    as_json: ForMachines = False,
) -> None:
    """Try a reward against the contract: shape, range, gradient, finite differences, batches, types."""
    if not 8 <= size <= 4096:
        raise RecipeFault([f"--size: must be between 8 and 4096, not {size}"], what="command line")
    import rewards

    load_plugins(plugin or ())
    name = loaded_name(what)
    reward = rewards.build(name, read_options(name, option or []))
    from sdo_cli.device import pick_device
    from sdo_cli.scoring.contract import check_contract

    found = []
    for finding in check_contract(reward, size=size, device=pick_device()):
        found.append(finding)
        if not as_json:
            word = {True: "pass", False: "FAIL", None: "  - "}[finding.passed]
            remedy = f"\n      {finding.remedy}" if finding.remedy else ""
            typer.echo(f"{word}  {finding.item:<20} {finding.figure}{remedy}")
    if as_json:
        typer.echo(json.dumps([asdict(finding) for finding in found]))
    failed = [finding.item for finding in found if finding.passed is False]
    if failed:
        raise PluginFault(
            f"{name} breaks the contract: {', '.join(failed)}", remedy="docs/plugins.md says what each asks"
        )


def read_options(name: str, pairs: list[str]) -> dict[str, Any]:
    """``key=value`` words as recipes' overrides are read, checked as recipes' options are; raises RecipeFault."""
    from sdo_cli.recipe.document import read_document
    from sdo_cli.recipe.reward_check import check_reward
    from sdo_cli.recipe.schema import RewardSpec

    document = read_document("{}", "command line", pairs)
    problems = list(document.problems)
    spec = RewardSpec(name=name, options=document.tree)
    check_reward(spec, (), lambda key, text: problems.append(f"--option {'.'.join(key[1:]) or '…'}: {text}"))
    if problems:
        raise RecipeFault(problems, what="command line")
    return document.tree


def loaded_name(what: str) -> str:
    """The name of a reward; a ``file.py:Class`` is loaded first."""
    import rewards

    file, colon, cls = what.partition(":")
    if what.endswith(".py"):
        raise RecipeFault([f"{what}: name the class as well, like {what}:MyReward"], what="command line")
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
