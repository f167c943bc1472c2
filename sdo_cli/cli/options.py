"""Options that commands of several kinds share."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Recipe overrides.")]
RulePlugins = Annotated[
    list[Path] | None,
    typer.Option(help="A Python file with rewards or rules of your own; its code runs. Again for more."),
]
RewardPlugins = Annotated[
    list[Path] | None, typer.Option(help="A Python file with rewards of your own; its code runs. Again for more.")
]
ForMachines = Annotated[bool, typer.Option("--json", help="For machines.")]


@dataclass(frozen=True)
class RecipeOptions:
    """A recipe as it is named and changed on the command line."""

    words: Annotated[
        list[str] | None, typer.Argument(metavar="[RECIPE] [KEY=VALUE]...", help="A recipe, and what to change in it.")
    ] = None
    recipe_option: Annotated[
        str, typer.Option("--recipe", "-r", help="A recipe file, or the name of a shipped one.")
    ] = ""

    @property
    def _bare(self) -> bool:
        """Whether the first word is the recipe: it changes nothing, and no option names one."""
        first = (self.words or [""])[0]
        return not self.recipe_option and bool(first) and ("=" not in first or Path(first).exists())

    @property
    def recipe(self) -> str:
        """File or name, empty where none is given."""
        return (self.words or [""])[0] if self._bare else self.recipe_option

    @property
    def overrides(self) -> list[str]:
        return (self.words or [])[1:] if self._bare else self.words or []
