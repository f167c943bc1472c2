"""From a path or shipped name, and command-line overrides, to a checked recipe."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sdo_cli.errors import RecipeFault
from sdo_cli.recipe.check import check_recipe
from sdo_cli.recipe.document import read_document
from sdo_cli.recipe.fitting import fitted
from sdo_cli.recipe.prompts import prompt_notes, read_prompts, shipped_folder
from sdo_cli.recipe.rule_choice import AUTO, with_rule_chosen
from sdo_cli.recipe.schema import PromptSource, Recipe
from sdo_cli.recipe.toys import with_toys_named
from sdo_cli.recipe.typed import BROKEN, Reader, suggestion


@dataclass(frozen=True)
class LoadedRecipe:
    """Attributes:
    recipe: typed and checked.
    name: of the file, without suffix.
    text: of the file, as given.
    folder: of the file; prompt files are looked up beside it.
    given: name or path as the user typed it, for the commands sdo proposes.
    overrides: ``key=value`` from the command line.
    notes: what was chosen for the user, to be said once.
    """

    recipe: Recipe
    name: str
    text: str
    folder: Path
    overrides: tuple[str, ...]
    given: str
    notes: tuple[str, ...] = ()

    def resolved(self) -> dict[str, Any]:
        """Every field with its value, defaults included."""
        return asdict(self.recipe)

    def prompts(self, source: PromptSource) -> list[str]:
        return read_prompts(source, self.folder)

    def prompt_notes(self) -> list[str]:
        """What the prompt files leave out, a sentence each."""
        recipe = self.recipe
        sources = [recipe.prompts, recipe.validation.prompts, *([recipe.guard.prompts] if recipe.guard.steps else [])]
        return list(dict.fromkeys(note for source in sources for note in prompt_notes(source, self.folder)))


def shipped_recipes() -> list[str]:
    return sorted(path.stem for path in shipped_folder().glob("*.yaml"))


def shipped_descriptions() -> list[str]:
    """What the shipped recipes say of themselves."""
    import yaml

    trees = (yaml.safe_load(path.read_text(encoding="utf-8")) for path in shipped_folder().glob("*.yaml"))
    return [str(tree["description"]) for tree in trees if tree.get("description")]


def find_recipe(name: str) -> Path:
    """A path, or the name of a shipped recipe.

    Raises:
        RecipeFault: neither.
    """
    path = Path(name)
    if path.is_file():
        return path
    if path.is_dir():
        raise RecipeFault([f"--recipe {name}: is a folder; give a recipe file"])
    shipped = shipped_folder() / f"{name}.yaml"
    if shipped.is_file():
        return shipped
    beside = [str(found) for found in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
    known = suggestion(name, [*shipped_recipes(), *beside])
    raise RecipeFault([f"--recipe {name}: no such file or shipped recipe; {known}"])


def read_recipe(path: Path) -> str:
    """The text of a recipe file; raises RecipeFault when it is none."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as fault:
        raise RecipeFault([f"{path}: cannot be read as UTF-8 text: {fault}"]) from fault


def load_recipe(name: str, overrides: list[str] | None = None, *, checked: bool = True) -> LoadedRecipe:
    """Load, merge and check.

    Args:
        checked: False takes it as it is typed: its rewards, rules and prompts need not be here.

    Raises:
        RecipeFault: with every problem found, each with origin, key and remedy.
    """
    path = find_recipe(name)
    text = read_recipe(path)
    document = read_document(text, str(path), overrides or [])
    if document.unreadable:
        raise RecipeFault(document.problems)
    reader = Reader(document)
    recipe = reader.read(document.tree, Recipe, ())
    chosen: list[str] = []
    if recipe is not BROKEN:
        if recipe.gradient.rule == AUTO and recipe.gradient.options:
            reader.follow_up(("gradient", "options"), "belong to one rule; name that in place of auto")
        recipe, note = with_rule_chosen(recipe)
        chosen = [note] if note else []
        if overrides and (file := _alone(text, path)) is not None:
            recipe, gave_way = fitted(recipe, file, overrides)
            chosen += gave_way
        if checked:
            check_recipe(recipe, path.parent, reader.follow_up)
    if document.problems:
        raise RecipeFault(document.problems)
    recipe, toys = with_toys_named(recipe)
    notes = tuple(sentence for sentence in (*chosen, toys) if sentence)
    return LoadedRecipe(recipe, path.stem, text, path.parent, tuple(overrides or ()), name, notes)


def _alone(text: str, path: Path) -> Recipe | None:
    """What the file says without the command line; None where it cannot be read as a recipe by itself."""
    document = read_document(text, str(path), [])
    recipe = BROKEN if document.unreadable else Reader(document).read(document.tree, Recipe, ())
    return None if document.problems or recipe is BROKEN else recipe
