"""A run folder as the recipe it was: what everything that goes on from one starts with. Imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from sdo_cli.errors import PluginFault, RecipeFault
from sdo_cli.installed import sdo
from sdo_cli.recipe.load import LoadedRecipe, load_recipe, read_recipe
from sdo_cli.recipe.schema import Recipe
from sdo_cli.runs.read import AS_GIVEN, RECIPE, manifest_of, recipe_of

# what an image looks like, beside model and LoRA
SAMPLING = (
    "solver",
    "num_inference_steps",
    "timesteps",
    "eta",
    "guidance_scale",
    "negative_prompt",
    "height",
    "width",
)


def load_run(folder: Path, overrides: Sequence[str] = (), *, checked: bool = True) -> LoadedRecipe:
    """The recipe of a run, its prompts beside it, with what is given by hand laid over.

    Args:
        checked: False for those who only draw: rewards and rules need not be known.

    Raises:
        RecipeFault: no run, or one that names files which are not on this machine.
    """
    path = recipe_of(folder)
    if path is None:
        raise RecipeFault([f"{folder}: is no run: it holds no {RECIPE}"], what="command line")
    loaded = load_recipe(str(path), list(overrides), checked=checked)
    tree = manifest_of(folder)
    given = folder / AS_GIVEN
    text = read_recipe(given) if given.is_file() else loaded.text
    before = tuple(tree.get("overrides", ()))
    return replace(loaded, name=tree.get("recipe", folder.name), text=text, overrides=(*before, *loaded.overrides))


def missing_places(recipe: Recipe, *, for_training: bool = True) -> list[str]:
    """Keys of a recipe whose file or folder is not on this machine, each with the path.

    Args:
        for_training: also of what drawing alone does not need.
    """
    places: list[tuple[str, Any]] = [(key, getattr(recipe, key)) for key in ("model", "vae", "text_encoders")]
    if for_training:
        places += [("tiny_decoder", recipe.tiny_decoder), ("lora.start_from", recipe.lora.start_from)]
        places += [("rollout.lora", recipe.rollout.lora)]
        for part, specs in (("rewards", recipe.rewards), ("validation.rewards", recipe.validation.rewards)):
            for index, spec in enumerate(specs):
                places += [(f"{part}.{index}.options.{key}", value) for key, value in spec.options.items()]
    return [f"{key}: {value}" for key, value in places if isinstance(value, str) and _is_gone(value)]


def _is_gone(value: str) -> bool:
    """Names of the hub, of embedded models and plain words are no places."""
    place = Path(value).expanduser()
    return place.is_absolute() and not place.exists()


def check_places(recipe: Recipe, folder: Path, *, how: str, for_training: bool = True) -> None:
    """Raises RecipeFault for a folder that came from another machine without what it names; ``how`` to give a place."""
    if gone := missing_places(recipe, for_training=for_training):
        raise RecipeFault([f"{line} is not on this machine; {how}" for line in gone], what=f"run {folder}")


@dataclass(frozen=True)
class RecordedPlugin:
    """A plug-in's file as a run's manifest has it.

    Attributes:
        doubt: why it is not run unasked; empty when it is the same file at the same place.
    """

    path: Path
    doubt: str


def plugins_of(folder: Path, given: Sequence[Path] = ()) -> list[RecordedPlugin]:
    """The files of foreign code a run was made with, but those that are given by hand again, known by their names.

    A file inside the run's folder is never beyond doubt: it came with the folder, and so did its hash.

    Raises:
        PluginFault: one is not there.
    """
    by_hand, found = {path.name for path in given}, []
    for entry in manifest_of(folder).get("plugins", ()):
        path = Path(entry["path"])
        # those of installed packages are imported when their names are used
        if entry.get("package") or path.name in by_hand:
            continue
        if not path.is_file():
            raise PluginFault(
                f"the run {folder} was made with the plug-in {path}, which is not there",
                remedy=f"give its place: --plugin …/{path.name}",
            )
        doubt = ""
        if sha256(path.read_bytes()).hexdigest() != entry["sha256"]:
            doubt = "has changed since the run began"
        elif path.resolve().is_relative_to(folder.resolve()):
            doubt = "lies in the run's own folder"
        found.append(RecordedPlugin(path, doubt))
    return found


def resume_line(folder: Path, *more: object) -> str:
    """What to type to go on with a run."""
    return sdo("finetune", "--resume", folder, *more)
