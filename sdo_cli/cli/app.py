"""The `sdo` command and its one error boundary."""

import os
import sys
import traceback
import warnings
from typing import Annotated

import typer

from sdo_cli.cli import bench, compare, doctor, evaluate, export, fetch, finetune, prompts, recipe, reward, sample
from sdo_cli.errors import EnvironmentFault, SdoError

app = typer.Typer(
    name="sdo",
    help="Fine-tune Stable Diffusion on differentiable rewards, from one recipe file.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("finetune")(finetune.finetune)
app.command("sample")(sample.sample)
app.command("eval")(evaluate.evaluate)
app.command("compare")(compare.compare)
app.command("report")(compare.report)
app.command("fetch")(fetch.fetch)
app.command("export")(export.export)
app.command("bench")(bench.bench)
app.command("doctor")(doctor.doctor)
app.add_typer(recipe.app, name="recipe")
app.add_typer(reward.app, name="reward")
app.add_typer(prompts.app, name="prompts")


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"sdo {version('sdo-cli')}")
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
) -> None:
    """Exit codes: 0 done, 1 a fault of sdo, 2 bad input (one sentence says what), 75 stopped and saved, 130 Ctrl-C."""


def check_rewards_package() -> None:
    """``rewards`` is a common name: say so when another package of that name comes first.

    Raises:
        EnvironmentFault: it does.
    """
    import rewards

    if getattr(rewards, "BELONGS_TO", "") != "sdo-cli":
        raise EnvironmentFault(
            f"another package called `rewards` comes first on the path: {rewards.__file__}",
            remedy="run sdo from another folder, unset PYTHONPATH, or uninstall that package",
        )


def main() -> None:
    """Entry point. Every error a user can act on becomes a sentence; a traceback only with --debug."""
    debug = "--debug" in sys.argv
    if not debug:
        # read by the libraries when they are imported; their remarks are about sdo's code, not the user's input
        os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_VERBOSITY", "error")
        warnings.filterwarnings("ignore", module=r"(diffusers|transformers|huggingface_hub|peft|open_clip|torch)(\.|$)")
    # anywhere on the line, as people type it
    sys.argv = [sys.argv[0], *(a for a in sys.argv[1:] if a != "--debug")]
    try:
        check_rewards_package()
        app(standalone_mode=True)
    except SdoError as fault:
        if debug:
            traceback.print_exc()
        typer.echo(f"sdo: {fault.message}", err=True)
        if fault.remedy:
            typer.echo(f"     {fault.remedy}", err=True)
        sys.exit(fault.exit_code)
    except OSError as fault:
        if debug:
            traceback.print_exc()
        what = f"{fault.filename}: {fault.strerror}" if fault.filename else str(fault)
        typer.echo(f"sdo: {what}", err=True)
        typer.echo("     check the path, its permissions and the free disk space", err=True)
        sys.exit(2)
    except Exception as fault:
        if debug:
            traceback.print_exc()
        if type(fault).__name__ == "OutOfMemoryError":
            typer.echo("sdo: the GPU has not enough memory for this job", err=True)
            typer.echo(
                "     try gradient.score_micro_batch=1 gradient.shortcut_micro_batch=1 gradient_checkpointing=true, "
                "then a smaller train_batch_size with more gradient_accumulation_steps",
                err=True,
            )
            sys.exit(2)
        typer.echo(f"sdo: a fault of sdo itself: {type(fault).__name__}: {fault}", err=True)
        typer.echo("     run it again with --debug and report the traceback", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
