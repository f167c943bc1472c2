"""Draws what a grid shows, each picture once and as it is drawn alone, and puts the files together on sheets."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sdo_cli.device import described, dtype_of, pick_device
from sdo_cli.drawing.axes import VARIANTS, Cell, Layout, Sheet, Values
from sdo_cli.drawing.draw import DrawSettings, draw_images, solver_of
from sdo_cli.drawing.notes import drawing_notes
from sdo_cli.drawing.parameters import lora_tags, parameters_text, png_note
from sdo_cli.drawing.pictures import save_image
from sdo_cli.drawing.prompts import PromptEmbeddings
from sdo_cli.drawing.pruned import other_weights, skips_of, with_plan
from sdo_cli.drawing.sheet import Words, write_sheet
from sdo_cli.models.base import Family
from sdo_cli.models.load import ModelSource, load_family
from sdo_cli.models.lora_stack import exact
from sdo_cli.models.lora_variants import LoraVariants
from sdo_cli.parallel.world import SINGLE, World
from sdo_cli.progress import Reporter
from sdo_cli.skipping.skip_plan import SkipPlan


@dataclass(frozen=True)
class GridJob:
    """Attributes:
    values: what varies, and what does not.
    layout: of the sheets, None for pictures alone.
    settings: of every picture; steps and guidance are the cell's.
    plan: what is left out of the network; it is for one number of steps.
    """

    model: ModelSource
    values: Values
    layout: Layout | None
    batch_size: int
    settings: DrawSettings
    precision: str = "no"
    plan: SkipPlan | None = None

    def settings_of(self, cell: Cell) -> DrawSettings:
        settings = replace(self.settings, num_inference_steps=cell.steps, guidance_scale=cell.guidance)
        return settings if self.plan is None else with_plan(settings, self.plan)


class _Drawing:
    """The model with every LoRA, of which the one of a cell is switched on; prompts are encoded."""

    def __init__(self, job: GridJob) -> None:
        self.job, device, dtype = job, pick_device(), dtype_of(job.precision)
        self.family: Family = load_family(job.model, dtype=dtype)
        variants = job.values.variants
        wanted = [(lora, scale) for lora, scale in variants if lora is not None]
        self.loras = LoraVariants(self.family, wanted) if wanted else None
        self.skips = None
        if job.plan is not None:
            self.skips = skips_of(job.plan, self.family, with_plan(job.settings, job.plan))
        self.family.text_to(device)
        # text encoders that a LoRA changes read prompts otherwise; all others share what they read
        readers = {v: v if self.loras and self.loras.reads_text(v[0]) else (None, 0.0) for v in variants}
        read = {reader: self._encoded(*reader) for reader in dict.fromkeys(readers.values())}
        self._embed = {variant: read[reader] for variant, reader in readers.items()}
        self.family.free_text_encoders()
        self.family.to(device, dtype)
        self._on: tuple[str | None, float] | None = None

    def _encoded(self, lora: str | None, scale: float) -> PromptEmbeddings:
        if self.loras:
            self.loras.switch(lora, scale)
        embed = PromptEmbeddings(self.family)
        for prompt in self.job.values.prompts:
            # one by one, as it is encoded where it is drawn alone
            embed([prompt])
        embed.negative(self.job.settings.negative_prompt, 1)
        return embed

    def draw(self, cells: list[Cell]) -> torch.Tensor:
        """Of cells that differ in prompt and seed alone."""
        variant = cells[0].lora, cells[0].scale
        if self.loras and variant != self._on:
            self.loras.switch(*variant)
            self._on = variant

        def generator_for(j: int) -> torch.Generator:
            return torch.Generator("cpu").manual_seed(cells[j].seed)

        parts = draw_images(
            self.family,
            [cell.prompt for cell in cells],
            generator_for,
            self.job.settings_of(cells[0]),
            batch_size=len(cells),
            embed=self._embed[variant],
            skips=self.skips,
        )
        return torch.cat(list(parts))


def draw_cells(job: GridJob, out: Path, *, reporter: Reporter, world: World = SINGLE) -> tuple[list[Path], list[Path]]:
    """Write ``00000.png`` …, each with A1111's text, and the layout's sheets; return the pictures and the sheets.

    The processes of ``world`` draw batches in turn into the folder they share.
    """
    cells = job.values.cells()
    for sentence in overview(job, len(cells)):
        reporter.note(sentence)
    drawing = _Drawing(job)
    for sentence in _notes(job, drawing.family):
        reporter.note(sentence)
    solver = solver_of(drawing.family, job.settings)
    reporter.phase("images", len(cells))
    files = {cell: out / f"{number:05d}.png" for number, cell in enumerate(cells)}
    batches = list(batches_of(cells, job.batch_size))
    for round_ in world.rounds(len(batches)):
        for number in filter(world.mine, round_):
            for cell, image in zip(batches[number], drawing.draw(batches[number]), strict=True):
                lora, how = lora_tags(cell.lora, cell.scale), job.settings_of(cell)
                text = parameters_text(cell.prompt, cell.seed, how, solver, job.model.model, image, lora, job.plan)
                save_image(image, files[cell], png_note(text))
        reporter.advance(sum(len(batches[number]) for number in round_))
    # another process's may not be written yet
    world.wait()
    sheets = [] if job.layout is None else _write_sheets(job.layout, files, out, world)
    return list(files.values()), sheets


def batches_of(cells: list[Cell], size: int) -> Iterator[list[Cell]]:
    """Cells drawn together: of one LoRA, scale, guidance and number of steps."""

    groups: dict[tuple[Any, ...], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.lora, cell.scale, cell.steps, cell.guidance), []).append(cell)
    for some in groups.values():
        yield from (some[start : start + size] for start in range(0, len(some), size))


def overview(job: GridJob, count: int) -> list[str]:
    """Model and device and how much is drawn; what the rows and columns are."""
    steps = ", ".join(map(str, job.values.steps))
    said = [f"{job.model.model} on {described()}; {count} image{'s' * (count != 1)} of {steps} steps"]
    if (layout := job.layout) is None:
        return said
    sides = [f"{side} {axis} ({len(layout.line(axis))})" for side, axis in _sides(layout)]
    sheets = layout.sheet_count
    if sheets > 1:
        sides.append(f"{sheets} sheets, one for each of {' and '.join(layout.others)}")
    seeds = job.values.seeds
    noise = f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {seeds[0]} to {seeds[-1]}"
    return [*said, f"grid: {', '.join([*sides, f'the same {noise} throughout'])}"]


def _sides(layout: Layout) -> list[tuple[str, str]]:
    return [(side, axis) for side, axis in (("rows", layout.rows), ("columns", layout.columns)) if axis is not None]


def _notes(job: GridJob, family: Family) -> list[str]:
    found = []
    for steps in job.values.steps:
        for guidance in job.values.guidance:
            settings = replace(job.settings, num_inference_steps=steps, guidance_scale=guidance)
            found += drawing_notes(family, job.values.prompts, settings)
    if job.plan is not None and (told := other_weights(job.plan, family)):
        found.append(told)
    return list(dict.fromkeys(found))


def _write_sheets(layout: Layout, files: dict[Cell, Path], out: Path, world: World) -> list[Path]:
    sheets = list(layout.sheets())
    paths = [out / ("grid.png" if len(sheets) == 1 else f"grid-{n + 1:02d}.png") for n in range(len(sheets))]
    for number, (sheet, path) in enumerate(zip(sheets, paths, strict=True)):
        if world.mine(number):
            write_sheet(words_of(layout, sheet), [[files[cell] for cell in row] for row in sheet.cells], path)
    world.wait()
    return paths


def words_of(layout: Layout, sheet: Sheet) -> Words:
    """Heads of rows and columns; the title has all else that pictures are made of."""
    names = lora_labels([lora for lora in layout.values.get("loras", ()) if lora is not None])
    names |= lora_labels([lora for lora, _ in layout.values.get(VARIANTS, ()) if lora is not None])
    sides = {axis for _, axis in _sides(layout)}
    rest = [
        head(axis, sheet.shown.get(axis, some[0]), names) for axis, some in layout.values.items() if axis not in sides
    ]
    heads = [[head(axis, value, names) for value in layout.line(axis)] for axis in (layout.rows, layout.columns)]
    return Words(" · ".join(rest), *heads)


def head(axis: str | None, value: Any, names: dict[str, str]) -> str:
    """What stands beside a row, above a column or in a title."""
    if axis is None:
        return ""
    if axis == VARIANTS:
        lora, scale = value
        return "no LoRA" if lora is None else f"{names[lora]} at {exact(scale)}"
    if axis == "prompts":
        return str(value)
    if axis == "loras":
        return names[value]
    if axis == "scales":
        return "scale 0 (no LoRA)" if value == 0 else f"scale {exact(value)}"
    if axis == "steps":
        return f"{value} step{'s' * (value != 1)}"
    return f"seed {value}" if axis == "seeds" else f"guidance {exact(value)}"


def lora_labels(loras: list[str]) -> dict[str, str]:
    """Short names; where two would be the same, as they were typed."""
    labels = {
        lora: " + ".join(name + (f":{exact(weight)}" if weight != 1 else "") for name, weight in lora_tags(lora, 1.0))
        for lora in loras
    }
    every = list(labels.values())
    return {lora: lora if every.count(label) > 1 else label for lora, label in labels.items()}
