"""`sdo runs`."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from sdo_cli.cli.options import ForMachines
from sdo_cli.errors import RecipeFault
from sdo_cli.files import without_nan


def runs(
    folders: Annotated[
        list[Path] | None, typer.Argument(metavar="[FOLDER]...", help="Of runs, or runs themselves; default runs/.")
    ] = None,
    sort: Annotated[
        str | None, typer.Option(help="A reward: the largest held-out gain first. Never the judge.")
    ] = None,
    report: Annotated[Path | None, typer.Option(help="Also write the table as a page, runs.html say.")] = None,
    as_json: ForMachines = False,
) -> None:
    """List runs: status, steps, rewards before and after, the guard's verdict, and what their recipes differ in."""
    from sdo_cli.runs.read import recipe_of
    from sdo_cli.runs.table import differences, run_row, runs_in, runs_page, sorted_by, table_of

    asked = folders or [Path("runs")]
    if missing := [path for path in asked if not path.is_dir()]:
        raise RecipeFault([f"{path}: no such folder" for path in missing], what="command line")
    found = [run for path in asked for run in ([path] if recipe_of(path) else runs_in(path))]
    rows = [run_row(run) for run in dict.fromkeys(found)]
    if sort is not None:
        rows = sorted_by(rows, sort)
    if as_json:
        differs = differences(rows)
        records = [
            {**asdict(row), "folder": str(row.folder), "differs": d} for row, d in zip(rows, differs, strict=True)
        ]
        typer.echo(json.dumps(without_nan(records), default=str))
        return
    if not rows:
        typer.echo(f"no runs in {', '.join(map(str, asked))}")
        return

    def named(path: Path) -> str:
        alone = len(asked) == 1 and path != asked[0]
        return str(path.relative_to(asked[0])) if alone else str(path)

    typer.echo(in_columns(*table_of(rows, named)))
    if sort is not None:
        typer.echo("\nsorted by the gain on held-out prompts: state the first one's on others (sdo eval --prompts …)")
    if report is not None:
        from sdo_cli.reports.page import write_report

        write_report(runs_page(rows, f"Runs in {', '.join(map(str, asked))}", named), report)
        typer.echo(str(report))


def in_columns(head: list[str], body: list[list[str]]) -> str:
    """Left-aligned, two spaces apart."""
    widths = [max(len(row[i]) for row in (head, *body)) for i in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (head, *body)]
    return "\n".join(line.rstrip() for line in lines)
