"""From a recipe, `key=value` and options of `sdo optimize` to checked settings; imports no torch."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from sdo_cli.errors import RecipeFault
from sdo_cli.recipe.document import read_document
from sdo_cli.recipe.load import read_recipe
from sdo_cli.recipe.prompts import prompt_notes, read_prompts, shipped_folder
from sdo_cli.recipe.steering_check import check_steering
from sdo_cli.recipe.steering_schema import Steering
from sdo_cli.recipe.toys import steering_with_toys_named
from sdo_cli.recipe.typed import BROKEN, Reader, suggestion


@dataclass(frozen=True)
class LoadedSteering:
    """Attributes:
    name: of the recipe, ``optimize`` without one.
    text: of the recipe as given.
    folder: where files named in it are looked for first.
    prompts: one per entry, before ``num_images``.
    given: what other commands take for it.
    """

    spec: Steering
    name: str
    text: str
    folder: Path
    prompts: list[str]
    given: str = "RECIPE.yaml   (write it with --dry-run > RECIPE.yaml)"

    def resolved(self) -> dict[str, Any]:
        return asdict(self.spec)

    def prompt_notes(self) -> list[str]:
        """What the prompt file leaves out, a sentence each."""
        return prompt_notes(self.spec.prompts, self.folder)


def steering_folder() -> Path:
    return shipped_folder() / "optimize"


def shipped_steerings() -> list[str]:
    return sorted(path.stem for path in steering_folder().glob("*.yaml"))


def find_steering(name: str) -> Path:
    """A path, or the name of a shipped recipe of `sdo optimize`; raises RecipeFault for neither."""
    path, shipped = Path(name).expanduser(), steering_folder() / f"{name}.yaml"
    if path.is_file() or shipped.is_file():
        return path if path.is_file() else shipped
    raise RecipeFault([f"--recipe {name}: no such file or shipped recipe; {suggestion(name, shipped_steerings())}"])


def load_steering(recipe: str | None, options: dict[str, Any], overrides: list[str]) -> LoadedSteering:
    """Recipe (the embedded model without one), then ``key=value``, then the options of the command line.

    Raises:
        RecipeFault: with every problem found, each with its origin and remedy.
    """
    path = find_steering(recipe) if recipe is not None else None
    text = read_recipe(path) if path else "model: embedded\n"
    document = read_document(text, str(path) if path else "command line", overrides)
    if document.unreadable:
        raise RecipeFault(document.problems)
    for name, value in options.items():
        document.tree[name] = value
        document.origins = {key: origin for key, origin in document.origins.items() if key[:1] != (name,)}
        document.origins[(name,)] = "command line"
    reader = Reader(document)
    spec = reader.read(document.tree, Steering, ())
    folder = path.parent if path else Path()
    if spec is not BROKEN:
        spec = _with_found_files(spec, folder)
        check_steering(spec, folder, reader.follow_up)
    if document.problems:
        raise RecipeFault(document.problems)
    spec = steering_with_toys_named(spec)
    prompts, more = read_prompts(spec.prompts, folder), {"given": recipe} if recipe else {}
    return LoadedSteering(spec, path.stem if path else "optimize", text, folder, prompts, **more)


def is_steering(name: str) -> bool:
    """Whether a name or path is a recipe of `sdo optimize`: those have objectives."""
    path = Path(name).expanduser()
    if not path.is_file():
        return name in shipped_steerings()
    try:
        tree = yaml.safe_load(read_recipe(path))
    except yaml.YAMLError:
        return False
    return isinstance(tree, dict) and "objectives" in tree


def _with_found_files(spec: Steering, beside: Path) -> Steering:
    """Pictures beside the recipe, as given, or shipped, by their path."""

    def found(name: str) -> str:
        places = [beside / name, Path(name).expanduser(), steering_folder() / name]
        return str(next((place for place in places if place.is_file()), places[1]))

    objectives = [
        replace(item, name=f"{item.kind}:{found(item.value)}") if item.kind in ("style", "image") else item
        for item in spec.objectives
    ]
    return replace(spec, objectives=objectives, images=[found(name) for name in spec.images])
