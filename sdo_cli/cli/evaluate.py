"""`sdo eval`."""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from sdo_cli.cli.drawing import drawing_problems
from sdo_cli.cli.evaluate_options import (
    BARE,
    DEFAULT_REWARDS,
    chosen_measure,
    find_prompts,
    lora_problem,
    make_job,
    reward_specs,
    scales_of,
    starting_recipe,
    with_plans,
)
from sdo_cli.cli.output import make_reporter
from sdo_cli.cli.several import in_several_processes, stopped_well
from sdo_cli.device import PRECISIONS
from sdo_cli.errors import RecipeFault
from sdo_cli.plugins import load_plugins
from sdo_cli.sampling.solvers import AUTO, SOLVERS


def evaluate(
    prompts: Annotated[str | None, typer.Option("--prompts", "-p", help="A prompt set (see `sdo prompts`).")] = None,
    column: Annotated[str | None, typer.Option(help="The column of the prompts in a table.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first so many prompts.")] = None,
    rewards: Annotated[
        str | None, typer.Option("--rewards", help=f"Separated by commas; default {DEFAULT_REWARDS}, or the recipe's.")
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option(metavar="REWARD.KEY=VALUE", help="An option of a reward, e.g. clip.model=….")
    ] = None,
    lora: Annotated[
        list[str] | None, typer.Option(help="A run folder or LoRA file; may be given several times.")
    ] = None,
    lora_scale: Annotated[str, typer.Option(help="Weights of each LoRA, separated by commas: 0,0.25,0.5,1.")] = "1",
    base: Annotated[bool, typer.Option(help="Also draw without a LoRA, to compare with.")] = True,
    images: Annotated[
        list[Path] | None, typer.Option(help="Score this folder of images instead of drawing; may be given again.")
    ] = None,
    recipe: Annotated[
        str | None, typer.Option("--recipe", "-r", help="Model, sampling and rewards as in this recipe.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Images per prompt.")] = 1,
    seed: Annotated[int, typer.Option(help="Another number, other noise.")] = 0,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="embedded, a diffusers folder, a .safetensors file, a hub id.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Revision of a model on the hub.")] = None,
    variant: Annotated[str | None, typer.Option(help="fp16: weight files of that name.")] = None,
    vae: Annotated[str | None, typer.Option(help="Another VAE: a folder or hub id.")] = None,
    t5: Annotated[bool | None, typer.Option(help="The third text encoder of SD 3.")] = None,
    prediction_type: Annotated[
        str | None, typer.Option(help="epsilon or v_prediction, if the config is wrong.")
    ] = None,
    precision: Annotated[str | None, typer.Option(help=f"What the model computes in: {', '.join(PRECISIONS)}.")] = None,
    reward_precision: Annotated[str | None, typer.Option(help="What the rewards compute in.")] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="num_inference_steps.")] = None,
    guidance: Annotated[float | None, typer.Option("--guidance", help="guidance_scale; 1 is without.")] = None,
    solver: Annotated[str | None, typer.Option(help=f"{AUTO}, or {', '.join(SOLVERS)}.")] = None,
    eta: Annotated[float | None, typer.Option(help="DDIM's noise, 0 to 1.")] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What guidance moves away from.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels; the model's own by default.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels; the model's own by default.")] = None,
    skip_plan: Annotated[
        list[Path] | None, typer.Option(help="Of `sdo prune`: also draw everything with it. Again for more.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Images at a time.")] = 16,
    embedding: Annotated[
        bool, typer.Option(help="Also clip-score, diversity over seeds, and distance from the base.")
    ] = True,
    reference: Annotated[Path | None, typer.Option(help="A folder of real images, for FID and KID.")] = None,
    fid_features: Annotated[str, typer.Option(help="inception, or clip (clip-score's model).")] = "inception",
    inception_weights: Annotated[Path | None, typer.Option(help="Inception's weights as a local file.")] = None,
    select_by: Annotated[str | None, typer.Option(help="The measure that chooses a scale; default the first.")] = None,
    plugin: Annotated[list[Path] | None, typer.Option(help="A Python file with rewards of your own.")] = None,
    report: Annotated[bool, typer.Option(help="Write report.html.")] = True,
    gpus: Annotated[int | None, typer.Option(help="So many processes on this machine, a GPU each.")] = None,
    processes: Annotated[int | None, typer.Option(help="So many processes on the CPU.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder; one that holds this evaluation is continued.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON for machines.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Draw a prompt set with and without LoRAs, score the images, and say what differs, with intervals."""
    load_plugins(plugin or ())
    loras, folders = lora or [], images or []
    start, come_from = starting_recipe(recipe, model, loras)
    given: dict[str, Any] = {
        "model": model,
        "revision": revision,
        "variant": variant,
        "vae": vae,
        "t5": t5,
        "prediction_type": prediction_type,
        "mixed_precision": precision,
        "reward_precision": reward_precision,
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "solver": solver,
        "eta": eta,
        "negative_prompt": negative_prompt,
        "height": height,
        "width": width,
    }
    asked = replace(
        start.recipe if start else BARE, **{name: value for name, value in given.items() if value is not None}
    )
    if folders and skip_plan:
        raise RecipeFault(["--skip-plan: is for drawing; --images scores what is there"], what="command line")
    wrong = [] if seeds >= 1 else [f"--seeds: must be at least 1, not {seeds}"]
    if limit is not None and limit < 1:
        wrong.append(f"--limit: must be at least 1, not {limit}")
    if not loras and folders == [] and not base:
        wrong.append("--no-base: leaves nothing to draw; give --lora")
    scales = scales_of(lora_scale, wrong)
    plans, asked = with_plans(skip_plan or [], asked, steps is not None or start is not None, wrong)
    if folders and (loras or recipe or model):
        wrong.append("--images: scores what is there; --lora, --recipe and --model are for drawing")
    if fid_features not in ("inception", "clip"):
        wrong.append(f"--fid-features: {fid_features!r} is neither inception nor clip")
    if fid_features == "clip" and reference and not embedding:
        wrong.append("--fid-features clip: needs the embeddings; leave --no-embedding out")
    if reference is not None and not reference.is_dir():
        wrong.append(f"--reference {reference}: no such folder")
    wrong += drawing_problems(
        steps=asked.num_inference_steps,
        guidance=asked.guidance_scale,
        lora_scales=scales,
        eta=asked.eta,
        batch_size=batch_size,
        seed=seed,
        count=1,
        solver=asked.solver,
        precision=asked.mixed_precision,
        prediction_type=asked.prediction_type,
        height=asked.height,
        width=asked.width,
    )
    if asked.reward_precision not in PRECISIONS:
        wrong.append(f"--reward-precision: {asked.reward_precision!r} is not one of {', '.join(PRECISIONS)}")
    wrong += [problem for path in loras if (problem := lora_problem(path))]
    specs = reward_specs(rewards, option or [], start, asked, embedding, wrong)
    chosen = chosen_measure(select_by, rewards, specs, wrong)
    prompt_set = find_prompts(prompts, column, limit, start, bool(folders), wrong)
    if wrong:
        raise RecipeFault(wrong, what="command line")

    in_several_processes(gpus, processes)
    from sdo_cli.evaluate.run import evaluate as run
    from sdo_cli.parallel.stopping import Stopping
    from sdo_cli.parallel.world import joined

    job = make_job(asked, prompt_set, loras, scales, base, folders, seeds, seed, specs, embedding, chosen, start, plans)
    stamp = time.strftime("%Y%m%d-%H%M%S")
    folder = out or Path("evals") / f"{job.prompts.name}-{stamp}"
    with stopped_well(lambda: folder), joined() as world:
        folder = Path(world.share(lambda: str(folder)))
        reporter = make_reporter(as_json=as_json, quiet=quiet or not world.is_main)
        if come_from:
            reporter.note(come_from)
        try:
            with Stopping(None, reporter.note, world) as stopping:
                tree = run(
                    job,
                    folder,
                    reporter,
                    batch_size=batch_size,
                    reference=reference,
                    features=fid_features,
                    inception_weights=inception_weights,
                    report=report,
                    stopping=stopping,
                    world=world,
                )
        finally:
            reporter.close()
        if world.is_main:
            typer.echo(json.dumps({"folder": str(folder), **tree}) if as_json else as_text(tree, folder, report=report))


def as_text(tree: dict[str, Any], folder: Path, *, report: bool) -> str:
    """A table per measure: every variant, and its difference to the first."""
    lines = []
    names = list(dict.fromkeys(name for entry in tree["variants"].values() for name in entry["measures"]))
    width = max(len(name) for name in tree["variants"])
    for name in names:
        lines.append(f"\n{name}")
        for variant, entry in tree["variants"].items():
            if name not in entry["measures"]:
                continue
            row = entry["measures"][name]
            line = f"  {variant:<{width}}  {row['mean']:.4f} ± {_said(row['standard_error'], '.4f')}"
            found = tree["differences"].get(variant, {}).get(name)
            if found:
                d, w = found["difference"], found["win_rate"]
                ends = f"[{_said(d['low'], '+.4f')}, {_said(d['high'], '+.4f')}]"
                won = f"[{100 * w['low']:.0f}, {100 * w['high']:.0f}]"
                line += f"   {d['mean']:+.4f} {ends}   higher on {100 * w['mean']:.0f} % {won}"
            lines.append(line)
    for variant, entry in tree["variants"].items():
        for key, value in entry.get("reference", {}).items():
            if key != "reference_images":
                lines.append(f"\n{key}  {variant}: {value:.4g}")
    for lora, found in tree.get("recommended_scale", {}).items():
        lines.append(
            f"\nrecommended scale of {lora}: {found['scale']:g} (smallest that {found['by']} cannot tell from the best)"
        )
    base, count = tree["baseline"], tree["prompts"]["count"]
    lines.append(f"\n{count} prompts; differences to {base}, same noise; brackets are 95 % intervals over prompts")
    lines.append(f"{folder}/{'report.html' if report else 'summary.json'}")
    return "\n".join(lines).lstrip("\n")


def _said(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
