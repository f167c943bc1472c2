"""The `sdo` command and its one error boundary."""

import logging
import os
import re
import sys
import time
import traceback
import warnings
from typing import Annotated

import typer

import sdo_cli
from sdo_cli.cli import (
    bench,
    compare,
    doctor,
    evaluate,
    export,
    fetch,
    finetune,
    optimize,
    prompts,
    prune,
    recipe,
    reward,
    runs,
    sample,
)
from sdo_cli.errors import EXIT_BAD_INPUT, EnvironmentFault, SdoError, is_out_of_memory
from sdo_cli.installed import DISTRIBUTION
from sdo_cli.parallel.peers import current, exit_code, leave_process

# seconds in which it is heard that another process failed
NEWS = 3.0

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
app.command("optimize")(optimize.optimize)
app.command("prune")(prune.prune)
app.command("eval")(evaluate.evaluate)
app.command("compare")(compare.compare)
app.command("report")(compare.report)
app.command("runs")(runs.runs)
app.command("fetch")(fetch.fetch)
app.command("export")(export.export)
app.command("bench")(bench.bench)
app.command("doctor")(doctor.doctor)
app.add_typer(recipe.app, name="recipe")
app.add_typer(reward.app, name="reward")
app.add_typer(prompts.app, name="prompts")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"sdo {sdo_cli.__version__}")
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

    if getattr(rewards, "BELONGS_TO", "") != DISTRIBUTION:
        raise EnvironmentFault(
            f"another package called `rewards` comes first on the path: {rewards.__file__}",
            remedy="run sdo from another folder, unset PYTHONPATH, or uninstall that package",
        )


def quiet_libraries() -> None:
    """Warnings of libraries are not shown, but for one that says that scores are wrong."""
    warnings.filterwarnings("ignore", module=r"(diffusers|transformers|huggingface_hub|peft|open_clip|torch)(\.|$)")
    warnings.filterwarnings("always", message="QuickGELU mismatch")
    # peft imports it where it is installed, and it then misses a kernel that sdo never calls
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def main() -> None:
    """Entry point. Every error a user can act on becomes a sentence; a traceback only with --debug."""
    # the variable is for the processes that --gpus starts
    debug = "--debug" in sys.argv or bool(os.environ.get("SDO_DEBUG"))
    if debug:
        os.environ["SDO_DEBUG"] = "1"
    if not debug:
        # read by the libraries when they are imported; their remarks are about sdo's code, not the user's input
        os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_VERBOSITY", "error")
        quiet_libraries()
    # anywhere on the line, as people type it
    sys.argv = [sys.argv[0], *(a for a in sys.argv[1:] if a != "--debug")]
    try:
        check_rewards_package()
        app(standalone_mode=True)
    except SystemExit as done:
        sys.exit(exit_code(done.code if isinstance(done.code, int) else int(bool(done.code))))
    except Exception as fault:
        sentence, remedy, code = said(fault)
        peers = current()
        if not isinstance(fault, SdoError) and peers.news(NEWS):
            # another process is gone, and this error is only how it was noticed: the watcher ends us
            time.sleep(60)
        peers.claim()
        peers.fail("\n     ".join([sentence, remedy] if remedy else [sentence]), code)
        if debug:
            traceback.print_exception(fault)
        if peers.rank == 0:
            typer.echo(f"sdo: {sentence}", err=True)
            if remedy:
                typer.echo(f"     {remedy}", err=True)
        if peers.linked:
            leave_process(code)
        sys.exit(exit_code(code))


def said(fault: Exception) -> tuple[str, str, int]:
    """Cause, remedy and exit code."""
    if isinstance(fault, SdoError):
        return fault.message, fault.remedy, fault.exit_code
    if is_out_of_memory(fault):
        return (
            "there is not enough memory for this job",
            "try a smaller --batch-size, or --precision bf16",
            EXIT_BAD_INPUT,
        )
    # safetensors and PIL wrap what the system said
    system = re.search(r"[Nn]o space left on device|[Ff]ile too large|[Qq]uota exceeded|[Rr]ead-only file", str(fault))
    if isinstance(fault, OSError) or system:
        what = f"{fault.filename}: {fault.strerror}" if isinstance(fault, OSError) and fault.filename else str(fault)
        return what, "check the path, its permissions and the free disk space", EXIT_BAD_INPUT
    what = f"a fault of sdo itself: {type(fault).__name__}: {fault}"
    return what, "run it again with --debug and report the traceback", 1


if __name__ == "__main__":
    main()
