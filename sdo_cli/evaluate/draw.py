"""Draws the images of a variant, chunk by chunk; a chunk is on disk as a whole or not at all."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from sdo_cli.device import dtype_of, pick_device
from sdo_cli.drawing.draw import draw_images, solver_of
from sdo_cli.drawing.parameters import parameters_text, png_note
from sdo_cli.drawing.pictures import to_pil
from sdo_cli.drawing.prompts import ENCODE_BATCH, PromptEmbeddings
from sdo_cli.evaluate.job import Item, Settings, Variant
from sdo_cli.files import write_text
from sdo_cli.models.base import Family
from sdo_cli.models.load import load_family
from sdo_cli.progress import Reporter

WHOLE, PARTIAL = ".drawn-", ".partial-"


def chunks(items: list[Item], size: int, *, rank: int = 0, world: int = 1) -> Iterator[tuple[int, list[Item]]]:
    """Number and images of the chunks that process ``rank`` of ``world`` draws.

    What is drawn together is a matter of index alone, so a resumed evaluation repeats the rounding of an unbroken one.
    """
    for number, start in enumerate(range(0, len(items), size)):
        if number % world == rank:
            yield number, items[start : start + size]


def missing_items(items: list[Item], folder: Path) -> list[Item]:
    return [item for item in items if not (folder / item.file).exists()]


def draw_variant(
    settings: Settings,
    variant: Variant,
    items: list[Item],
    folder: Path,
    reporter: Reporter,
    *,
    batch_size: int,
    rank: int = 0,
    world: int = 1,
) -> None:
    """Draw what is missing of ``items`` into ``folder``, with ``metadata.jsonl`` once all are there.

    Several processes may draw one variant into one folder, each its share of the chunks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _finish_what_was_drawn(folder, rank, world)
    mine = chunks(items, batch_size, rank=rank, world=world)
    todo = [(number, left) for number, part in mine if (left := missing_items(part, folder))]
    if todo:
        family, embed = _load(settings, variant, items, [item for _, left in todo for item in left])
        solver = solver_of(family, settings.draw)
        for number, left in todo:
            images = _draw(family, embed, settings, left)
            staged = folder / f"{PARTIAL}{number:06d}"
            staged.mkdir()
            for image, item in zip(images, left, strict=True):
                lora = (variant.name.split("@")[0], variant.scale) if variant.lora else None
                how = parameters_text(
                    item.text, item.seed or 0, settings.draw, solver, settings.model.model, image, lora
                )
                to_pil(image).save(staged / item.file, pnginfo=png_note(how))
            whole = folder / f"{WHOLE}{number:06d}"
            staged.rename(whole)
            _move_in(whole, folder)
            reporter.advance(len(left))
    if not missing_items(items, folder):
        write_text(folder / "metadata.jsonl", "".join(json.dumps(row) + "\n" for row in map(metadata_row, items)))


def _finish_what_was_drawn(folder: Path, rank: int, world: int) -> None:
    """After a kill: a whole chunk is moved in, a partial one was never finished; also of other batch sizes."""
    for staged in sorted(folder.glob(".*-[0-9]*")):
        if int(staged.name.rpartition("-")[2]) % world != rank:
            continue
        if staged.name.startswith(WHOLE):
            _move_in(staged, folder)
        elif staged.name.startswith(PARTIAL):
            shutil.rmtree(staged)


def _move_in(staged: Path, folder: Path) -> None:
    for path in sorted(staged.iterdir()):
        path.replace(folder / path.name)
    staged.rmdir()


def _load(settings: Settings, variant: Variant, items: list[Item], todo: list[Item]) -> tuple[Family, PromptEmbeddings]:
    device, dtype = pick_device(), dtype_of(settings.precision)
    family = load_family(settings.model, dtype=dtype)
    if variant.lora is not None:
        family.load_lora(variant.lora, scale=variant.scale)
    embed = PromptEmbeddings(family)
    embed.prepare(_to_encode(items, todo), settings.draw.negative_prompt, device)
    family.to(device, dtype)
    return family, embed


def _to_encode(items: list[Item], todo: list[Item]) -> list[str]:
    """The prompts of whole encoding batches of the set: what is encoded together must not depend on what is missing."""
    every, wanted = list(dict.fromkeys(item.text for item in items)), {item.text for item in todo}
    blocks = (every[start : start + ENCODE_BATCH] for start in range(0, len(every), ENCODE_BATCH))
    return [text for block in blocks if wanted.intersection(block) for text in block]


def _draw(family: Family, embed: PromptEmbeddings, settings: Settings, items: list[Item]) -> Tensor:
    def generator_for(j: int) -> torch.Generator:
        return torch.Generator("cpu").manual_seed(items[j].seed or 0)

    prompts = [item.text for item in items]
    parts = draw_images(family, prompts, generator_for, settings.draw, batch_size=len(items), embed=embed)
    return torch.cat(list(parts))


def metadata_row(item: Item) -> dict[str, object]:
    """A line of ``metadata.jsonl``, as Hugging Face's image folders have it."""
    row: dict[str, object] = {"file_name": item.file, "prompt": item.text, "category": item.category}
    return row | {"seed": item.seed, "prompt_index": item.prompt, "seed_index": item.seed_index}
