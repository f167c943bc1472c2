"""Options of `sdo eval`, and what is wrong with each group of them; imports nothing heavy."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from sdo_cli.models.catalog import LORA_FILE, hub_lora
from sdo_cli.models.lora_paths import RUN_MARK, at_checkpoint, lora_place, what_there_is, written_out
from sdo_cli.models.lora_stack import number_of, stack_of
from sdo_cli.runs.read import pipeline_of
from sdo_cli.scoring.measure_names import LPIPS, SHORT

DEFAULT_REWARDS = "clip,aesthetic"


@dataclass(frozen=True)
class PromptOptions:
    prompts: Annotated[str | None, typer.Option("--prompts", "-p", help="A prompt set (see `sdo prompts`).")] = None
    column: Annotated[str | None, typer.Option(help="The column of the prompts in a table.")] = None
    limit: Annotated[int | None, typer.Option(help="Only the first so many prompts.")] = None
    skip: Annotated[int, typer.Option(help="Not the first so many: those a run has been chosen or measured by.")] = 0


@dataclass(frozen=True)
class RewardOptions:
    rewards: Annotated[
        str | None, typer.Option("--rewards", help=f"Separated by commas; default {DEFAULT_REWARDS}, or the recipe's.")
    ] = None
    option: Annotated[
        list[str] | None, typer.Option(metavar="REWARD.KEY=VALUE", help="An option of a reward, e.g. clip.model=….")
    ] = None


@dataclass(frozen=True)
class VariantOptions:
    """What is drawn, or scored, side by side."""

    lora: Annotated[
        list[str] | None,
        typer.Option(help="A run (RUN@20, RUN@all: its checkpoints) or LoRA file, or A:0.8+B. Again for more."),
    ] = None
    lora_scale: Annotated[str, typer.Option(help="Weights of each LoRA, separated by commas: 0,0.25,0.5,1.")] = "1"
    base: Annotated[bool, typer.Option(help="Also draw without a LoRA, to compare with.")] = True
    images: Annotated[
        list[Path] | None, typer.Option(help="Score this folder of images instead of drawing; may be given again.")
    ] = None
    lora_from_step: Annotated[
        str | None, typer.Option(metavar="K,K", help="Each LoRA from step K on, the base before: 0,10,20 of 50 steps.")
    ] = None

    @property
    def loras(self) -> list[str]:
        """By name; ``RUN@all`` is each of its checkpoints."""
        return written_out(self.lora or [])

    @property
    def folders(self) -> list[Path]:
        return self.images or []


@dataclass(frozen=True)
class NoiseOptions:
    seeds: Annotated[int, typer.Option(help="Images per prompt.")] = 1
    seed: Annotated[int, typer.Option(help="Another number, other noise.")] = 0


@dataclass(frozen=True)
class MeasureOptions:
    """What is measured beside the rewards, and what a scale is chosen by."""

    embedding: Annotated[
        bool, typer.Option(help="Also clip-score, diversity over seeds, and distance from the base.")
    ] = True
    reference: Annotated[Path | None, typer.Option(help="A folder of real images, for FID and KID.")] = None
    fid_features: Annotated[str, typer.Option(help="inception, or clip (clip-score's model).")] = "inception"
    inception_weights: Annotated[Path | None, typer.Option(help="Inception's weights as a local file.")] = None
    distance: Annotated[
        list[str] | None,
        typer.Option(help="Also diversity and distance by lpips (-alex), lpips-vgg or lpips-squeeze. Again for more."),
    ] = None
    lpips_weights: Annotated[Path | None, typer.Option(help="torchvision's weights under LPIPS as a local file.")] = (
        None
    )
    select_by: Annotated[str | None, typer.Option(help="The measure that chooses a scale; default the first.")] = None

    @property
    def kinds(self) -> list[str]:
        """The networks that see two pictures, by full name."""
        return list(dict.fromkeys(SHORT.get(name, name) for name in self.distance or []))

    def problems(self) -> list[str]:
        unknown = [name for name in self.kinds if name not in LPIPS]
        wrong = [f"--distance: {name!r} is none of {', '.join([*SHORT, *LPIPS])}" for name in unknown]
        if self.lpips_weights is not None and len(self.kinds) != 1:
            wrong.append("--lpips-weights: is of one network; give one --distance with it")
        if self.fid_features not in ("inception", "clip"):
            wrong.append(f"--fid-features: {self.fid_features!r} is neither inception nor clip")
        if self.fid_features == "clip" and self.reference and not self.embedding:
            wrong.append("--fid-features clip: needs the embeddings; leave --no-embedding out")
        if self.reference is not None and not self.reference.is_dir():
            wrong.append(f"--reference {self.reference}: no such folder")
        return wrong


def scales_of(text: str, wrong: list[str]) -> list[float]:
    scales = [number_of(part.strip()) for part in text.split(",")]
    if None in scales:
        wrong.append(f"--lora-scale: {text!r} is no list of numbers; write 0,0.5,1")
        return [1.0]
    return list(dict.fromkeys(scale for scale in scales if scale is not None))


def from_steps_of(variants: VariantOptions, steps: int, wrong: list[str], *, plans: bool) -> list[int]:
    """The steps of ``--lora-from-step``; 0 is from the first."""
    text = variants.lora_from_step
    if text is None:
        return [0]
    words = [word.strip() for word in text.split(",")]
    found = [int(word) for word in words if word.isdecimal() and int(word) <= steps]
    if len(found) < len(words):
        wrong.append(f"--lora-from-step: {text!r} is no list of steps from 0 to {steps}; write 0,{max(1, steps // 2)}")
    if not variants.lora:
        wrong.append("--lora-from-step: there is no --lora")
    if plans:
        wrong.append("--lora-from-step: not with --skip-plan, which leaves whole calls out")
    return list(dict.fromkeys(found)) or [0]


def lora_problem(text: str) -> str | None:
    """What is wrong with the path of a LoRA, or of one of several, before anything is drawn; a/b may be a hub id."""
    return next((problem for one in stack_of(text) if (problem := _path_problem(one.path))), None)


def _path_problem(path: str) -> str | None:
    place = Path(lora_place(path)).expanduser()
    if (whole := pipeline_of(place)) is not None:
        return f"--lora {path}: all weights were trained in this run; evaluate it with --model {whole}"
    # a run's own file; what else lies beside it was exported
    files = (LORA_FILE,) if (place / RUN_MARK).is_file() else ("*.safetensors", "*/*.safetensors")
    is_empty = place.is_dir() and not any(True for pattern in files for _ in place.glob(pattern))
    if not is_empty and (place.exists() or hub_lora(path) is not None):
        return None
    found = at_checkpoint(path)
    marks = what_there_is(found[0] if found else place)
    what = "no such file or folder" if not place.exists() else "holds no LoRA; the run may not be finished"
    return f"--lora {path}: {what}" + (f"; the run has {marks}" if marks else "")
