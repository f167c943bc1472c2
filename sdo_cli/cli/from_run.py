"""Drawing with a run's LoRA begins with what the run's folder says; what was typed wins, and both are said."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import typer

from sdo_cli.cli.drawing import BARE, KEYS, PictureOptions, SolverOptions, WeightOptions
from sdo_cli.models.load import ModelSource
from sdo_cli.models.lora_paths import lora_place, written_out
from sdo_cli.models.lora_stack import stack_of
from sdo_cli.recipe.load import LoadedRecipe
from sdo_cli.recipe.schema import PromptSource, Recipe
from sdo_cli.runs.again import SAMPLING, check_places, load_run
from sdo_cli.runs.read import pipeline_of, recipe_of, run_of

WEIGHTS = tuple(field.name for field in fields(ModelSource))


@dataclass(frozen=True)
class FromRun:
    """Attributes:
    folder: the run.
    loaded: its recipe, unchecked: rewards and rules need not be known.
    notes: what is to be said of it.
    """

    folder: Path
    loaded: LoadedRecipe
    notes: tuple[str, ...]


def runs_behind(loras: Sequence[str]) -> list[Path]:
    """Run folders that the LoRAs of ``--lora`` come from, each once."""
    words = written_out(list(loras))
    found = [run_of(lora_place(one.path)) for word in words for one in stack_of(word)]
    return list(dict.fromkeys(run for run in found if run is not None and recipe_of(run) is not None))


def start_from(loras: Sequence[str], model: str | None) -> FromRun | None:
    """The recipe of the first run among the LoRAs; None where none is of a run.

    Args:
        model: typed by hand; what the run says of its own weights is then left out.

    Raises:
        RecipeFault: the run's model is not on this machine, and no other was typed.
    """
    if not (runs := runs_behind(loras)):
        return _of_pipeline(model)
    folder, loaded = runs[0], load_run(runs[0], checked=False)
    notes = [f"model and sampling as in {folder / 'resolved.yaml'}"]
    if model is None or model == loaded.recipe.model:
        check_places(loaded.recipe, folder, how="give another place by hand, as --model PLACE", for_training=False)
    else:
        plain = {name: getattr(BARE, name) for name in WEIGHTS}
        loaded = replace(loaded, recipe=replace(loaded.recipe, **plain))
        notes = [f"sampling as in {folder / 'resolved.yaml'}"]
    for other in runs[1:]:
        theirs = load_run(other, checked=False).recipe
        names = ("model", *SAMPLING) if model is None else SAMPLING
        if differs := [name for name in names if getattr(theirs, name) != getattr(loaded.recipe, name)]:
            said = ", ".join(f"{name} {getattr(theirs, name)}" for name in differs)
            notes.append(f"{other} was trained with another {said}; drawn like {folder} all the same")
    return FromRun(folder, loaded, tuple(notes))


def _of_pipeline(model: str | None) -> FromRun | None:
    """A run that trained all weights, where its ``pipeline/`` is the model."""
    run = run_of(model) if model is not None and (Path(model) / "model_index.json").is_file() else None
    if run is None or model is None or pipeline_of(run) is None:
        return None
    loaded = load_run(run, checked=False)
    plain = {name: getattr(BARE, name) for name in WEIGHTS if name != "t5"} | {"model": model}
    loaded = replace(loaded, recipe=replace(loaded.recipe, **plain))
    return FromRun(run, loaded, (f"sampling as in {run / 'resolved.yaml'}",))


def typed_in(context: typer.Context) -> list[str]:
    """Names of the command's parameters that stand on its command line."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return [name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"]


def laid_over_run(
    recipe: Recipe,
    typed: Sequence[str] | None,
    groups: Sequence[WeightOptions | SolverOptions | PictureOptions],
    **more: Any,
) -> tuple[Recipe, str]:
    """The run's settings with those of the options that were typed, and a sentence on these.

    Args:
        typed: names of the command's parameters that stand on the command line; None where options not given are None.
        more: options outside the groups, by name.
    """
    values = {field.name: getattr(group, field.name) for group in groups for field in fields(group)} | more
    given = {
        KEYS.get(name, name): value
        for name, value in values.items()
        if (typed is None or name in typed) and value is not None
    }
    other = {key: value for key, value in given.items() if getattr(recipe, key) != value and key != "model"}
    return replace(recipe, **given), by_hand(other)


def by_hand(other: Mapping[str, Any]) -> str:
    """A sentence on what was typed that the run has otherwise; empty for nothing."""
    said = ", ".join(f"{key} {value}" for key, value in other.items())
    return f"by hand in place of the run's: {said}" if said else ""


def first_prompts(recipe: LoadedRecipe) -> tuple[list[str], str]:
    """What a run is looked at by where no prompt is named, and a sentence on it; none without held-out ones."""
    spec = recipe.recipe.validation
    if spec.prompts == PromptSource():
        return [], ""
    lines = recipe.prompts(spec.prompts)[: min(spec.num_prompts, spec.grid_prompts or spec.num_prompts)]
    return lines, f"no prompt was given: the first {len(lines)} of the run's held-out ones"
