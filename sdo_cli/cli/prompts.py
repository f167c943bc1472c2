"""`sdo prompts list|show`."""

import json
from collections import Counter
from typing import Annotated, Any

import typer

from sdo_cli.cli.options import ForMachines
from sdo_cli.errors import RecipeFault

app = typer.Typer(help="List and show prompt sets.", no_args_is_help=True, rich_markup_mode=None)


@app.command("list")
def list_sets(as_json: ForMachines = False) -> None:
    """The sets that ship with sdo, and the benchmarks it fetches by a short name."""
    from sdo_cli.prompt_sets.read import BENCHMARKS, SHIPPED, read_prompt_set

    rows: list[dict[str, Any]] = []
    for name, summary in SHIPPED.items():
        found = read_prompt_set(name)
        rows.append({"name": name, "prompts": len(found.prompts), "categories": found.categories, "summary": summary})
    fetched = [
        {"name": name, "summary": known.summary, "dataset": known.repo, "files": list(known.files)}
        for name, known in BENCHMARKS.items()
    ]
    if as_json:
        typer.echo(json.dumps({"shipped": rows, "fetched": fetched}, ensure_ascii=False))
        return
    width = max(len(entry["name"]) for entry in (*rows, *fetched))
    for row in rows:
        kinds = f", {len(row['categories'])} categories" if row["categories"] else ""
        typer.echo(f"{row['name']:<{width}} {row['prompts']:>5} prompts{kinds}: {row['summary']}")
    typer.echo("\nfetched from the hub once, then kept:")
    for entry in fetched:
        typer.echo(f"{entry['name']:<{width}} {entry['summary']} ({entry['dataset']})")
    typer.echo(
        "\nor a file (.txt .jsonl .json .csv .tsv .parquet), a folder of them, owner/name or owner/name:file on the hub"
    )


@app.command()
def show(
    name: Annotated[str, typer.Argument(metavar="SET", help="A shipped set, a file or folder, a dataset of the hub.")],
    column: Annotated[str | None, typer.Option(help="The column of the prompts in a table.")] = None,
    category_column: Annotated[str | None, typer.Option(help="The column of the categories.")] = None,
    revision: Annotated[str | None, typer.Option(help="Revision of a dataset on the hub.")] = None,
    category: Annotated[str | None, typer.Option(help="Only prompts of this category.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many lines.")] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="All of them, a JSON object a line.")] = False,
) -> None:
    """The prompts of a set."""
    from sdo_cli.prompt_sets.read import read_prompt_set

    try:
        found = read_prompt_set(name, column=column, category_column=category_column, revision=revision)
    except ValueError as fault:
        raise RecipeFault([str(fault)], what="command line") from fault
    some = [prompt for prompt in found.prompts if category in (None, prompt.category)]
    if not some:
        raise RecipeFault(
            [f"--category: no prompt of {category!r}; there are {', '.join(found.categories) or 'no categories'}"],
            what="command line",
        )
    if as_json:
        for prompt in some:
            row = {"prompt": prompt.text, "category": prompt.category, **prompt.extra}
            typer.echo(json.dumps(row, ensure_ascii=False, default=str))
        return
    width = max(len(prompt.category) for prompt in some[:limit])
    for prompt in some[:limit]:
        typer.echo(f"{prompt.category:<{width}}  {prompt.text}" if width else prompt.text)
    if len(some) > limit:
        typer.echo(f"… and {len(some) - limit} more (--limit, --json)")
    counts = Counter(prompt.category for prompt in some if prompt.category)
    typer.echo(f"\n{found.name}: {len(some)} prompts, {found.source}")
    if counts:
        typer.echo(", ".join(f"{name} {count}" for name, count in counts.items()))
    for note in found.notes:
        typer.echo(note)
    if repeated := len(some) - len({prompt.text for prompt in some}):
        typer.echo(f"{repeated} of them repeat another")
