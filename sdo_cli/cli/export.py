"""`sdo export`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from sdo_cli.cli.options import ForMachines
from sdo_cli.cli.output import unwritable
from sdo_cli.device import PRECISIONS
from sdo_cli.errors import RecipeFault

FORMS = ("kohya", "peft", "diffusers", "merged", "checkpoint")
OTHER_PROGRAMS = ("comfyui", "comfy", "a1111", "webui", "automatic1111", "forge", "sd-scripts")
USE = {
    "kohya": "ComfyUI: copy it to models/loras; A1111 (not for SD 3): to models/Lora",
    "peft": "peft.PeftModel.from_pretrained(pipe.unet, '{out}/unet')",
    "diffusers": "pipe.load_lora_weights('{out}')",
    "checkpoint": "ComfyUI: copy it to models/checkpoints; A1111: to models/Stable-diffusion; sdo: --model {out}",
    "merged": "diffusers.DiffusionPipeline.from_pretrained('{out}')",
}


def export(
    source: Annotated[Path, typer.Argument(help="A run folder or a LoRA file.")],
    form: Annotated[str, typer.Option("--format", "-f", help=f"One of {', '.join(FORMS)}.")] = "kohya",
    out: Annotated[Path | None, typer.Option(help="File (kohya) or folder; default beside the source.")] = None,
    model: Annotated[str | None, typer.Option(help="Base model; default the run's own.")] = None,
    family: Annotated[str | None, typer.Option(help="sd, sdxl or sd3, for a file that does not show it.")] = None,
    lora_scale: Annotated[float, typer.Option(help="Weight of a merged LoRA.")] = 1.0,
    precision: Annotated[str, typer.Option(help=f"Of what is written: {', '.join(PRECISIONS)}.")] = "no",
    as_json: ForMachines = False,
) -> None:
    """Write a LoRA for A1111, ComfyUI, peft, or merged into its model (a folder, or one checkpoint file)."""
    wrong = problems_of(form, out, family, lora_scale, precision)
    if wrong:
        raise RecipeFault(wrong, what="command line")
    from sdo_cli.exporting.export import ExportJob, default_out
    from sdo_cli.exporting.export import export as run
    from sdo_cli.models.load import ModelSource

    target = out or default_out(source, form)
    if target.exists():
        raise RecipeFault([f"{target}: exists already; give another name with --out"], what="command line")
    job = ExportJob(source, ModelSource(model) if model else None, family, lora_scale, precision)
    note = run(job, form, target)
    use = USE[form].format(out=target)
    if as_json:
        typer.echo(json.dumps({"format": form, "out": str(target)} | ({"note": note} if note else {})))
    else:
        typer.echo("\n".join([str(target), f"  {use}", *([f"  {note}"] if note else [])]))


def problems_of(form: str, out: Path | None, family: str | None, lora_scale: float, precision: str) -> list[str]:
    """Everything that is wrong with the options."""
    wrong = []
    if form not in FORMS:
        hint = "; ComfyUI and A1111 read kohya" if form.lower() in OTHER_PROGRAMS else ""
        wrong.append(f"--format: {form!r} is not one of {', '.join(FORMS)}{hint}")
    if precision not in PRECISIONS:
        wrong.append(f"--precision: {precision!r} is not one of {', '.join(PRECISIONS)}")
    if family not in (None, "sd", "sdxl", "sd3"):
        wrong.append(f"--family: {family!r} is not one of sd, sdxl, sd3")
    if not -1000 <= lora_scale <= 1000:
        wrong.append(f"--lora-scale: must be between -1000 and 1000, not {lora_scale}")
    if lora_scale != 1 and form not in ("merged", "checkpoint"):
        wrong.append(
            f"--lora-scale: is for --format merged and checkpoint; of {form} the program that loads it sets it"
        )
    if out is not None and out.exists():
        wrong.append(f"--out {out}: exists already; give another name, nothing is overwritten")
    elif out is not None:
        wrong += unwritable(out)
    return wrong
