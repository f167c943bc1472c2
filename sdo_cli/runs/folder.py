"""What lies in a run folder beside weights and pictures: the recipe, the manifest, the metrics."""

import json
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any

from omegaconf import OmegaConf

from sdo_cli.device import pick_device
from sdo_cli.drawing.rollouts import rollout_plan
from sdo_cli.files import write_text
from sdo_cli.models.load import source_of
from sdo_cli.plugins import loaded_plugins
from sdo_cli.provenance import command, now, versions
from sdo_cli.recipe.load import LoadedRecipe
from sdo_cli.recipe.schema import PromptSource
from sdo_cli.runs.read import AS_GIVEN, RECIPE
from sdo_cli.weights.needs import revisions_of

# keys of a recipe that may name files and folders
PLACES = ("model", "vae", "text_encoders", "tiny_decoder", "lora", "rollout", "rewards")
SKIP_PLAN = "skip_plan.json"


def new_run_folder(loaded: LoadedRecipe, out: Path | None) -> Path:
    """``<output_dir>/<recipe>-<time>``, or ``out``, which must not hold a run yet.

    Raises:
        FileExistsError: ``out`` is not empty.
    """
    stamp = time.strftime("%Y%m%d-%H%M%S")
    folder = out or Path(loaded.recipe.output_dir) / f"{loaded.name}-{stamp}"
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(str(folder))
    return folder


def manifest(
    loaded: LoadedRecipe, family: str, status: str, started: str, before: Mapping[str, Any] = MappingProxyType({})
) -> dict[str, Any]:
    """What ran, with which versions; ``status`` is running, finished, interrupted or failed.

    Args:
        before: the manifest of the run that is gone on with.
    """
    return {
        "status": status,
        "command": before.get("command", command()),
        # how it was gone on with
        "resumed": [*before.get("resumed", []), *([command()] if before else [])],
        "recipe": loaded.name,
        "overrides": list(loaded.overrides),
        "seed": loaded.recipe.seed,
        "family": family,
        **asdict(source_of(loaded.recipe)),
        "weights": revisions_of(loaded.recipe),
        "device": str(pick_device()),
        "versions": versions(),
        "plugins": [asdict(plugin) for plugin in loaded_plugins()],
        "started": started,
        "written": now(),
    }


def write_recipe(loaded: LoadedRecipe, folder: Path) -> None:
    """The recipe as given, and one that runs again from this folder alone: its prompts lie beside it."""
    write_text(folder / AS_GIVEN, loaded.text)
    tree = loaded.resolved()
    sources = {"train": (tree, loaded.prompts(loaded.recipe.prompts))}
    if loaded.recipe.validation.prompts != PromptSource():
        # all of them: num_prompts says how many count
        sources["heldout"] = (tree["validation"], loaded.prompts(loaded.recipe.validation.prompts))
    if loaded.recipe.guard.steps:
        sources["guard"] = (tree["guard"], loaded.prompts(loaded.recipe.guard.prompts))
    for name, (place, prompts) in sources.items():
        # in a text file a # begins a comment
        kind = "jsonl" if any(prompt.startswith("#") for prompt in prompts) else "txt"
        lines = [json.dumps(prompt, ensure_ascii=False) if kind == "jsonl" else prompt for prompt in prompts]
        write_text(folder / f"{name}_prompts.{kind}", "".join(f"{line}\n" for line in lines))
        place["prompts"] = {"file": f"{name}_prompts.{kind}"}
    if (plan := rollout_plan(loaded.recipe, loaded.folder)) is not None:
        plan.save(folder / SKIP_PLAN)
        tree["rollout"]["skip_plan"] = SKIP_PLAN
    absolute_paths(tree)
    write_text(folder / RECIPE, OmegaConf.to_yaml(OmegaConf.create(tree)))


def absolute_paths(tree: dict[str, Any]) -> None:
    """Files and folders the recipe names are looked up from where the command runs: in place, they no longer are."""

    def absolute(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: absolute(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [absolute(inner) for inner in value]
        is_path = isinstance(value, str) and "/" in value and Path(value).expanduser().exists()
        return str(Path(value).expanduser().resolve()) if is_path else value

    for key in PLACES:
        tree[key] = absolute(tree[key])
    for part in ("validation", "guard"):
        tree[part]["rewards"] = absolute(tree[part]["rewards"])
