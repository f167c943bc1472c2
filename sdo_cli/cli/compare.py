"""`sdo compare` and `sdo report`."""

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from sdo_cli.cli.options import ForMachines
from sdo_cli.cli.output import unwritable
from sdo_cli.errors import RecipeFault
from sdo_cli.installed import sdo
from sdo_cli.runs.read import is_run, recipe_of

ImagesOption = Annotated[
    str, typer.Option("--images", help="inline, beside (in a folder of their own), or auto: inline where they fit.")
]


def compare(
    evaluations: Annotated[
        list[Path], typer.Argument(metavar="A B [C]...", help="Evaluations, or one's variants; or finished runs.")
    ],
    select_by: Annotated[str | None, typer.Option(help="The measure said first.")] = None,
    anyway: Annotated[bool, typer.Option("--anyway", help="Also when settings differ.")] = False,
    out: Annotated[Path | None, typer.Option(help="Folder; default comparisons/<time>. Not for runs.")] = None,
    report: Annotated[bool, typer.Option(help="Write report.html.")] = True,
    as_json: ForMachines = False,
) -> None:
    """Compare evaluations picture by picture where the noise is the same, else prompt by prompt, to the first."""
    if missing := [path for path in evaluations if not path.is_dir()]:
        hint = f"; checkpoints are drawn and compared by {sdo('eval', '--lora', 'RUN@20', '--lora', 'RUN@40')}"
        lines = [f"{path}: no such folder{hint if '@' in path.name else ''}" for path in missing]
        raise RecipeFault(lines, what="command line")
    if len(evaluations) > 1 and any(recipe_of(path) for path in evaluations):
        if out is not None or not report:
            raise RecipeFault(["--out, --no-report: of runs nothing is written; leave them out"], what="command line")
        compare_trained(evaluations, anyway=anyway, as_json=as_json)
        return
    if report and (wrong := unwritable(out or Path("comparisons"))):
        raise RecipeFault(wrong, what="command line")
    import rewards as table
    from sdo_cli.evaluation.compare import compare_folders

    folder = out or Path("comparisons") / time.strftime("%Y%m%d-%H%M%S")
    chosen = table.full_name(select_by) if select_by else None
    tree = compare_folders(evaluations, folder, anyway=anyway, select_by=chosen, report=report)
    typer.echo(json.dumps({"folder": str(folder), **tree}) if as_json else as_text(tree, folder, report=report))


def compare_trained(runs: list[Path], *, anyway: bool, as_json: bool) -> None:
    """By the scores that runs keep; draws nothing and writes nothing.

    Raises:
        RecipeFault: an evaluation among them.
    """
    from sdo_cli.runs.compare import compare_runs

    if others := [path for path in runs if not recipe_of(path)]:
        text = f"is no run; compare runs with runs, or draw all anew: {sdo('eval', '--lora', 'A', '--lora', 'B')}"
        raise RecipeFault([f"{path}: {text}" for path in others], what="command line")
    tree = compare_runs(runs, anyway=anyway)
    if as_json:
        typer.echo(json.dumps(tree))
        return
    lines = [f"differs: {problem}" for problem in tree["differences_of_settings"]]
    for name, found in tree["results"].items():
        how = "same noise" if found["same_noise"] else "other noise"
        lines.append(f"{name} against {tree['baseline']}, after training ({how})")
        for measure, row in found.items():
            if measure == "same_noise":
                continue
            d, w = row["difference"], row["win_rate"]
            ends = "–" if d["low"] != d["low"] else f"[{d['low']:+.4f}, {d['high']:+.4f}]"
            won = f"higher on {100 * w['mean']:.0f} % [{100 * w['low']:.0f}, {100 * w['high']:.0f}]"
            means = f"{row['first']:.4f} → {row['mean']:.4f}"
            lines.append(f"  {measure:<20} {means}  {d['mean']:+.4f} {ends}   {won}   {d['n']} prompts")
        lines.append("")
    if tree["differ_in"]:
        lines.append("their recipes differ in " + "; ".join(tree["differ_in"]))
    lines += ["brackets are 95 % intervals over prompts; with pictures, on prompts of your own:", f"  {tree['draw']}"]
    typer.echo("\n".join(lines))


def as_text(tree: dict[str, Any], folder: Path, *, report: bool) -> str:
    from sdo_cli.evaluation.summary import ways

    lines = [f"differs: {problem}" for problem in tree["differences_of_settings"]]
    for name, found in tree["results"].items():
        lines.append(f"\n{name} against {tree['baseline']}")
        for measure, row in found.items():
            d, w = row["difference"], row["win_rate"]
            if d["mean"] is None:
                continue
            ends = "–" if d["low"] is None else f"[{d['low']:+.4f}, {d['high']:+.4f}]"
            won = f"higher on {100 * w['mean']:.0f} % [{100 * w['low']:.0f}, {100 * w['high']:.0f}]"
            lines.append(f"  {measure:<20} {d['mean']:+.4f} {ends}   {won}   {d['n']} prompts")
        chosen = found.get(tree["measure"]) or next(iter(found.values()))
        for kind in ("best", "worst"):
            shown = "; ".join(f"{row['difference']:+.3f} {row['prompt']}" for row in chosen[kind][:3])
            lines.append(f"  {kind}: {shown}")
    pairing = tree["pairing"]
    lines += ["", *(row["note"] for row in pairing.values() if row["note"])]
    lines.append(f"differences {ways(pairing)}; brackets are 95 % intervals over prompts")
    lines.append(f"{folder}/{'report.html' if report else 'comparison.json'}")
    return "\n".join(lines).lstrip("\n")


def report(
    folder: Annotated[Path, typer.Argument(help="A run folder or an evaluation.")],
    out: Annotated[Path | None, typer.Option(help="The page; default report.html in the folder.")] = None,
    images: ImagesOption = "auto",
) -> None:
    """Write the page of a run or an evaluation again, from what its folder holds."""
    if images not in ("auto", "inline", "beside"):
        raise RecipeFault([f"--images: {images!r} is none of auto, inline, beside"], what="command line")
    if not folder.is_dir():
        raise RecipeFault([f"{folder}: no such folder"], what="command line")
    if out is not None and not out.is_file() and (wrong := unwritable(out)):
        raise RecipeFault(wrong, what="command line")
    from sdo_cli.reports.page import write_report

    page = out or folder / "report.html"
    if (folder / "settings.json").is_file():
        from sdo_cli.evaluation.evaluation import Evaluation
        from sdo_cli.evaluation.report import evaluation_report
        from sdo_cli.files import read_json

        if not (folder / "summary.json").is_file():
            raise RecipeFault([f"{folder}: is not finished; run its sdo eval again"], what="command line")
        evaluation = Evaluation.open(folder)
        tree = read_json(folder / "summary.json")
        content = evaluation_report(evaluation.job, evaluation.measured(), tree, folder)
    elif is_run(folder):
        from sdo_cli.runs.report import run_report

        content = run_report(folder)
    else:
        raise RecipeFault([f"{folder}: is neither a run nor an evaluation"], what="command line")
    write_report(content, page, images=images)
    typer.echo(str(page))
