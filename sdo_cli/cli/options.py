"""Options that commands of several kinds share."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Recipe overrides.")]
RulePlugins = Annotated[list[Path] | None, typer.Option(help="A Python file with gradient rules of your own.")]
RewardPlugins = Annotated[list[Path] | None, typer.Option(help="A Python file with rewards of your own.")]
ForMachines = Annotated[bool, typer.Option("--json", help="For machines.")]


@dataclass(frozen=True)
class RecipeOptions:
    """A recipe as it is named and changed on the command line."""

    overrides: Overrides = None
    recipe: Annotated[str, typer.Option("--recipe", "-r", help="A recipe file, or the name of a shipped one.")] = ""
