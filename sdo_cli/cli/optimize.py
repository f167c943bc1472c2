"""`sdo optimize`."""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import typer

from sdo_cli.cli.from_run import WEIGHTS, by_hand, first_prompts, start_from
from sdo_cli.cli.groups import grouped
from sdo_cli.cli.output import OutputOptions, unwritable
from sdo_cli.cli.recorded import load_plugins_for
from sdo_cli.cli.several import ProcessOptions, in_several_processes, stopped_well
from sdo_cli.errors import EnvironmentFault, RecipeFault
from sdo_cli.files import without_nan
from sdo_cli.parallel.launch import launched
from sdo_cli.plugins import load_plugins
from sdo_cli.recipe.document import read_document
from sdo_cli.recipe.steering import LoadedSteering, load_steering, shipped_steerings
from sdo_cli.recipe.steering_schema import KINDS, VARIABLES, Steering
from sdo_cli.runs.again import SAMPLING


@dataclass(frozen=True)
class SteeringOptions:
    """What is to become of what; None is "as in the recipe"."""

    prompt: Annotated[list[str] | None, typer.Option(help="What is drawn. Again for more images.")] = None
    prompts_file: Annotated[str | None, typer.Option(help="A file with a prompt a line, or a shipped list.")] = None
    objective: Annotated[
        list[str] | None,
        typer.Option(
            "--objective",
            "-o",
            metavar="[WEIGHT*]WHAT",
            help=f"A reward, or {', '.join(f'{k}:…' for k in KINDS)}. Again for a mixture; a weight below 0 lowers it.",
        ),
    ] = None
    variables: Annotated[str | None, typer.Option(help=f"Of {', '.join(VARIABLES)}; commas between.")] = None
    steps: Annotated[int | None, typer.Option(help="Optimisation steps; 100.")] = None
    start: Annotated[int | None, typer.Option(help="Solver step whose latent is optimised; 0 is the noise.")] = None
    image: Annotated[list[str] | None, typer.Option(help="A picture to begin from. Again: one per prompt.")] = None
    rule: Annotated[str | None, typer.Option(help="sdo, sdo-0, draft-k:k=2, full, …")] = None
    learning_rate: Annotated[float | None, typer.Option("--lr", help="0.01.")] = None

    def keys(self) -> dict[str, Any]:
        """As keys of a recipe."""
        return {
            "prompts": _prompts(self.prompt, self.prompts_file),
            "objectives": [_objective(text) for text in self.objective] if self.objective else None,
            "variables": [name.strip() for name in self.variables.split(",")] if self.variables else None,
            "images": self.image or None,
            "steps": self.steps,
            "start": self.start,
            "learning_rate": self.learning_rate,
            **_rule(self.rule),
        }


@dataclass(frozen=True)
class ImageOptions:
    """How the images are drawn; None is "as in the recipe"."""

    model: Annotated[str | None, typer.Option("--model", "-m", help="As in `sdo sample`; embedded.")] = None
    lora: Annotated[str | None, typer.Option(help="A run folder or a LoRA file.")] = None
    inference_steps: Annotated[int | None, typer.Option(help="num_inference_steps; 50.")] = None
    guidance: Annotated[float | None, typer.Option("--guidance", help="guidance_scale; 5.")] = None
    seed: Annotated[int | None, typer.Option(help="Image j starts from manual_seed(seed + j), as in sample.")] = None
    num_images: Annotated[int | None, typer.Option("--num-images", "-n", help="Images per prompt; 1.")] = None

    def keys(self) -> dict[str, Any]:
        """As keys of a recipe."""
        renamed = {"inference_steps": "num_inference_steps", "guidance": "guidance_scale"}
        return {renamed.get(name, name): value for name, value in asdict(self).items()}


@grouped
def optimize(
    *,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Anything else, as in a recipe.")
    ] = None,
    steering: SteeringOptions,
    images: ImageOptions,
    recipe: Annotated[str | None, typer.Option("--recipe", "-r", help="A file, or a shipped one: --list.")] = None,
    show: Annotated[bool, typer.Option("--list", help="Show the shipped recipes of this command.")] = False,
    plugin: Annotated[list[Path] | None, typer.Option(help="A Python file with rewards or rules of your own.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder; default steered/<recipe>-<time>.")] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Go on in --out: finished batches of images stay, one in the middle begins anew."
        ),
    ] = False,
    processes: ProcessOptions,
    dry_run: Annotated[bool, typer.Option(help="Check everything and show the settings; run nothing.")] = False,
    output: OutputOptions,
) -> None:
    """Steer single images: optimise their latent, prompt embedding, guidance or noise (nothing is made faster)."""
    if show:
        for name in shipped_steerings():
            typer.echo(f"{name:<14} {load_steering(name, {}, []).spec.description}")
        return
    load_plugins(plugin or ())
    given = {name: value for name, value in (steering.keys() | images.keys()).items() if value is not None}
    own, notes = ({}, []) if recipe is not None else from_run(given, overrides or [], plugin or ())
    if recipe is None:
        _require(own | given, overrides or [])
    loaded = load_steering(recipe, own | given, overrides or [])
    if dry_run:
        typer.echo(_shown(loaded, output.as_json))
        return
    if resume and out is None:
        raise RecipeFault(["--resume: says to go on with --out FOLDER; name it"], what="command line")
    folder = out or Path(loaded.spec.output_dir) / f"{loaded.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    # of several processes one may have begun already
    if not launched() and not resume:
        refuse_full(folder)
    in_several_processes(processes)
    carry_out(loaded, folder, output, notes, resume=resume)


def from_run(
    given: dict[str, Any], overrides: list[str], plugins: Sequence[Path] = ()
) -> tuple[dict[str, Any], list[str]]:
    """What the run behind ``--lora`` says of its model, sampling and prompts, as keys, and sentences on it.

    Its plug-ins are loaded where a reward or rule is asked for that only they have.

    Args:
        given: keys by option; ``overrides`` those by ``key=value``.
    """
    asked = read_document("{}", "command line", overrides).tree | given
    lora, model = asked.get("lora"), asked.get("model")
    start = start_from([lora], model) if isinstance(lora, str) else None
    if start is None:
        return {}, []
    recipe = start.loaded.recipe
    load_plugins_for(_named(asked), start.folder, recipe, plugins)
    keys = [f.name for f in fields(Steering) if f.name in (*WEIGHTS, *SAMPLING, "mixed_precision")]
    own = {key: getattr(recipe, key) for key in keys if key not in asked}
    said = by_hand(
        {
            key: asked[key]
            for key in keys
            if key in asked and key != "model" and key not in own and asked[key] != getattr(recipe, key)
        }
    )
    lines, note = first_prompts(start.loaded) if not asked.keys() & {"prompts", "images"} else ([], "")
    if lines:
        own["prompts"] = {"lines": lines}
    return own, [sentence for sentence in (*start.notes, said, note) if sentence]


def _named(asked: dict[str, Any]) -> list[object]:
    """Rewards and rules in the keys of a command, well-typed or not."""
    lists = [asked[key] for key in ("objectives", "measures") if isinstance(asked.get(key), list)]
    items = [item.get("name") if isinstance(item, dict) else item for entry in lists for item in entry]
    return [word for word in (asked.get("rule"), *items) if isinstance(word, str)]


def carry_out(loaded: LoadedSteering, folder: Path, output: OutputOptions, notes: list[str], *, resume: bool) -> None:
    """Together with the other processes; the first one shows the result."""
    from sdo_cli.parallel.stopping import Stopping
    from sdo_cli.parallel.world import joined
    from sdo_cli.steering.run import is_finished
    from sdo_cli.steering.run import optimize as run

    with stopped_well(lambda: folder, "--resume"), joined() as world:
        folder = Path(world.share(lambda: str(folder)))
        if not resume:
            world.share(lambda: refuse_full(folder))
        elif world.share(lambda: is_finished(loaded, folder)):
            if world.is_main:
                typer.echo(f"{folder}/ is finished already")
            return
        reporter = output.reporter(talks=world.is_main)
        for sentence in notes:
            reporter.note(sentence)
        try:
            with Stopping(None, reporter.note, world) as stopping:
                rows = run(loaded, folder, reporter, stopping=stopping, world=world)
        finally:
            reporter.close()
        if world.is_main and output.as_json:
            typer.echo(json.dumps(without_nan({"folder": str(folder), "images": rows})))
        elif world.is_main:
            typer.echo(_summary(rows, folder))


def refuse_full(folder: Path) -> None:
    """Raises RecipeFault for a folder with something in it, and one that cannot be made."""
    if wrong := unwritable(folder):
        raise RecipeFault(wrong, what="command line")
    if folder.exists() and any(folder.iterdir()):
        raise RecipeFault(
            [f"--out {folder}: is not empty; give another folder, or go on with it by --resume"], what="command line"
        )


def _require(given: dict[str, Any], overrides: list[str]) -> None:
    """Raises RecipeFault for what only a recipe could say instead."""
    named = {*given, *(word.replace("=", ".").partition(".")[0] for word in overrides)}
    asked = {"prompts": '--prompt is missing; write what is drawn: --prompt "a tiger on a teal background"'}
    asked["objectives"] = "--objective is missing; name a reward or text:…, or try a whole recipe: --recipe style"
    if wrong := [text for name, text in asked.items() if name not in named]:
        raise RecipeFault(wrong, what="command line")


def _prompts(words: list[str] | None, file: str | None) -> dict[str, Any] | None:
    if words and file:
        raise RecipeFault(["--prompt and --prompts-file: give one of them"], what="command line")
    if file:
        return {"file": file}
    return {"lines": words} if words else None


def _objective(text: str) -> dict[str, Any]:
    """``0.5*clip`` to name and weight; a star further back belongs to a text."""
    weight, star, name = text.partition("*")
    try:
        return {"name": name.strip(), "weight": float(weight)} if star else {"name": text}
    except ValueError:
        return {"name": text}


def _rule(text: str | None) -> dict[str, Any]:
    """``draft-k:k=2`` to rule and options."""
    if text is None:
        return {}
    import yaml

    name, _, rest = text.partition(":")
    pairs = [word.partition("=") for word in rest.split(",") if word]
    if wrong := [key for key, equals, _ in pairs if not equals]:
        raise RecipeFault([f"--rule {text}: {wrong[0]!r} is not option=value; write draft-k:k=2"], what="command line")
    return {"rule": name, "rule_options": {key: yaml.safe_load(value) for key, _, value in pairs}}


def _shown(loaded: LoadedSteering, as_json: bool) -> str:
    from omegaconf import OmegaConf

    tree = loaded.resolved() | {"prompts": {"lines": loaded.prompts}}
    return json.dumps(tree) if as_json else OmegaConf.to_yaml(OmegaConf.create(tree)).rstrip()


def _summary(rows: list[dict[str, Any]], folder: Path) -> str:
    """Means over the images, and where everything lies."""
    if not rows:
        raise EnvironmentFault("no image was drawn", remedy="give at least one prompt")
    lines = []
    width = max(len(name) for name in rows[0]["after"])
    for name in rows[0]["after"]:
        before, after = (sum(row[when][name] for row in rows) / len(rows) for when in ("before", "after"))
        lines.append(f"{name:<{width}}  {before:.4f} before  {after:.4f} after  {after - before:+.4f}")
    lines.append(f"{folder}/: {len(rows)} image{'s' * (len(rows) != 1)}, before/, strips/, grid.png, curve.png, ")
    lines[-1] += "variables.safetensors, report.html"
    return "\n".join(lines)
