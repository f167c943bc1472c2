"""How an image was made, as A1111 and its relatives keep it in a PNG and read it back."""

import json
import re
from pathlib import Path

from PIL.PngImagePlugin import PngInfo
from torch import Tensor

import sdo_cli
from sdo_cli.drawing.draw import DrawSettings
from sdo_cli.drawing.lora_timing import LoraTiming
from sdo_cli.models.lora_stack import exact, stack_of
from sdo_cli.skipping.skip_plan import SkipPlan

# their names of samplers and noise schedules
SAMPLERS = {
    "ddim": "DDIM",
    "pndm": "PLMS",
    "euler": "Euler",
    "dpm++2m": "DPM++ 2M",
    "dpm++2m-karras": "DPM++ 2M Karras",
    "unipc": "UniPC",
    "deis": "DEIS",
    "ipndm": "IPNDM",
    "ddpm": "DDPM",
    "euler-a": "Euler a",
    "lcm": "LCM",
    "tcd": "TCD",
    "flow-euler": "Euler",
}


def parameters_text(
    prompt: str,
    seed: int,
    settings: DrawSettings,
    solver: str,
    model: str,
    image: Tensor,
    lora: list[tuple[str, float]],
    plan: SkipPlan | None = None,
    timing: LoraTiming | None = None,
) -> str:
    """Prompt, negative prompt, and one line of settings.

    Args:
        solver: what was used, not ``auto``.
        image: ``[3, H, W]``, for its size.
        lora: names and scales.
        plan: what was left out.
        timing: where the LoRA's weight was not the same at every step.
    """
    lines = [" ".join([prompt, *(f"<lora:{name}:{scale:g}>" for name, scale in lora)])]
    if settings.negative_prompt:
        lines.append(f"Negative prompt: {settings.negative_prompt}")
    fields = {
        "Steps": settings.num_inference_steps,
        "Sampler": SAMPLERS[solver],
        "CFG scale": f"{settings.guidance_scale:g}",
        "Seed": seed,
        "Size": f"{image.shape[-1]}x{image.shape[-2]}",
        "Model": _quoted(Path(model).name),
        **({"Timesteps": _quoted(", ".join(map(str, settings.timesteps)))} if settings.timesteps else {}),
        **({"Eta": f"{settings.eta:g}"} if settings.eta else {}),
        **({"Skip plan": plan.fingerprint} if plan is not None else {}),
        **({"LoRA from step": timing.from_step} if timing is not None and timing.from_step else {}),
        **({"LoRA scale end": f"{timing.end:g}"} if timing is not None and timing.end != timing.start else {}),
        "Version": f"sdo {sdo_cli.__version__}",
    }
    return "\n".join([*lines, ", ".join(f"{key}: {value}" for key, value in fields.items())])


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if any(c in text for c in ",:\n") else text


def lora_tags(lora: str | None, scale: float) -> list[tuple[str, float]]:
    """Short name and weight of each LoRA of a stack."""
    return [(_short(one.path), scale * one.scale) for one in stack_of(lora)] if lora is not None else []


def lora_name(lora: str) -> str:
    """A short name of a LoRA, fit for a folder: of its file, or of the run it is in; of several ``a+b``.

    A ``+`` in a file's own name is a hyphen here.
    """
    names = [(_short(one.path).replace("+", "-"), one.scale) for one in stack_of(lora)]
    return "+".join(name + (f"-{exact(scale)}" if scale != 1 else "") for name, scale in names)


def _short(lora: str) -> str:
    path = Path(lora)
    stem = path.stem if path.suffix == ".safetensors" else path.name or path.resolve().name
    if stem == "pytorch_lora_weights":
        stem = path.resolve().parent.name
    return re.sub(r"[^\w.+-]+", "-", stem).strip("-.") or "lora"


def png_note(parameters: str) -> PngInfo:
    """For ``Image.save(pnginfo=…)``."""
    note = PngInfo()
    note.add_text("parameters", parameters)
    return note
