"""Groups of options: what Typer sees of them, and what a command is handed."""

from dataclasses import dataclass
from typing import Annotated

import pytest
import typer
from typer.main import get_command
from typer.testing import CliRunner

from sdo_cli.cli.app import app
from sdo_cli.cli.drawing import (
    BARE,
    ModelOptions,
    PictureOptions,
    PlainModel,
    PlainPicture,
    PlainSolver,
    SolverOptions,
    laid_over,
)
from sdo_cli.cli.groups import grouped


@dataclass(frozen=True)
class Paint:
    colour: Annotated[str | None, typer.Option("--colour", "-c", help="Of the wall.")] = None
    coats: Annotated[int, typer.Option(help="How many.")] = 2
    gloss: Annotated[bool, typer.Option(help="Shiny.")] = True


@dataclass(frozen=True)
class Rooms:
    names: Annotated[list[str], typer.Argument(help="Which rooms.")]
    ceiling: Annotated[bool, typer.Option("--ceiling", help="Too.")] = False


@dataclass(frozen=True)
class ThreeCoats(Paint):
    coats: Annotated[int, typer.Option(help="How many.")] = 3


def invoked(command, *words):
    alone = typer.Typer(rich_markup_mode=None)
    alone.command()(grouped(command))
    return CliRunner().invoke(alone, words, env={"COLUMNS": "100"})


def decorated(context: typer.Context, *, paint: Paint, hours: float = 1.5, rooms: Rooms) -> None:
    """Paint the house."""
    typer.echo(f"{paint} {hours} {rooms} {sorted(context.params)}")


def test_a_command_is_handed_its_groups_and_the_context_sees_options():
    found = invoked(decorated, "hall", "attic", "-c", "red", "--coats", "1", "--no-gloss", "--ceiling", "--hours", "4")
    assert found.exit_code == 0, found.output
    assert found.output.startswith(f"{Paint('red', 1, False)} 4.0 {Rooms(['hall', 'attic'], True)} ")
    assert found.output.strip().endswith("['ceiling', 'coats', 'colour', 'gloss', 'hours', 'names']")


def test_what_is_not_typed_has_the_defaults_of_its_group():
    assert invoked(decorated, "hall").output.startswith(f"{Paint()} 1.5 {Rooms(['hall'])} ")


def test_a_subclass_changes_a_default_and_nothing_else():
    def thick(*, paint: ThreeCoats) -> None:
        typer.echo(f"{paint}")

    assert invoked(thick).output.strip() == str(ThreeCoats(None, 3, True))
    assert invoked(thick, "--coats", "5").output.strip() == str(ThreeCoats(coats=5))
    shown = invoked(thick, "--help").output
    assert shown.index("--colour") < shown.index("--coats") < shown.index("--gloss") and "default: 3" in shown


def test_help_has_the_options_in_the_order_of_the_groups():
    shown = invoked(decorated, "--help").output
    places = [shown.index(word) for word in ("Paint the house.", "--colour", "--coats", "--gloss", "--hours", "--ceil")]
    assert places == sorted(places)
    assert "-c, --colour" in shown and "Of the wall." in shown and "default: 2" in shown and "names" in shown.lower()


def test_bad_input_is_told_as_by_any_command():
    assert "Missing argument" in invoked(decorated).output
    wrong = invoked(decorated, "hall", "--coats", "many")
    assert wrong.exit_code == 2 and "--coats" in wrong.output and "valid integer" in wrong.output


def test_two_options_of_one_name_are_refused():
    def twice(*, paint: Paint, coats: int = 1) -> None: ...

    with pytest.raises(TypeError, match="twice: coats stands in more than one group"):
        grouped(twice)


def commands(command):
    if not hasattr(command, "commands"):
        yield command
    for below in getattr(command, "commands", {}).values():
        yield from commands(below)


@pytest.mark.parametrize("command", commands(get_command(app)), ids=lambda command: command.name)
def test_no_command_has_a_word_for_two_options(command):
    words = [word for p in command.params for word in (*p.opts, *p.secondary_opts)]
    assert len(words) == len(set(words))


def test_values_are_laid_over_a_recipe_where_they_were_given():
    plain = laid_over(BARE, PlainModel(), PlainSolver(), PlainPicture(), eta=0.0)
    assert (plain.model, plain.num_inference_steps, plain.guidance_scale) == ("embedded", 50, 7.5)
    given = ModelOptions("mine", t5=False, precision="bf16"), SolverOptions(steps=3), PictureOptions("fog", width=64)
    found = laid_over(plain, *given, eta=None, reward_precision="fp16")
    assert (found.model, found.t5, found.mixed_precision, found.reward_precision) == ("mine", False, "bf16", "fp16")
    assert (found.num_inference_steps, found.guidance_scale, found.eta) == (3, 7.5, 0.0)
    assert (found.negative_prompt, found.height, found.width) == ("fog", None, 64)
