"""Draws the images of a variant, chunk by chunk; a chunk is on disk as a whole or not at all."""

import json
import shutil
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from sdo_cli.device import dtype_of, pick_device
from sdo_cli.drawing.draw import DrawSettings, draw_images, make_route, solver_of
from sdo_cli.drawing.lora_timing import LoraTiming, TimedNetwork, check_timed
from sdo_cli.drawing.notes import drawing_notes
from sdo_cli.drawing.parameters import lora_tags, parameters_text, png_note
from sdo_cli.drawing.pictures import to_pil
from sdo_cli.drawing.prompts import ENCODE_BATCH, PromptEmbeddings
from sdo_cli.drawing.pruned import other_weights, skips_of, with_plan
from sdo_cli.evaluation.job import Item, Settings, Variant
from sdo_cli.files import write_text
from sdo_cli.models.base import Family
from sdo_cli.models.load import load_family
from sdo_cli.parallel.world import SINGLE, World
from sdo_cli.progress import Reporter
from sdo_cli.skipping.skip_plan import load_plan
from sdo_cli.skipping.walking import Skips

WHOLE, PARTIAL = ".drawn-", ".partial-"


def chunks(items: list[Item], size: int) -> Iterator[tuple[int, list[Item]]]:
    """Number and images of every chunk.

    What is drawn together is a matter of index alone, so a resumed evaluation repeats the rounding of an unbroken one.
    """
    for number, start in enumerate(range(0, len(items), size)):
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
    world: World = SINGLE,
    tell: bool = True,
    others: Sequence[Variant] = (),
) -> None:
    """Draw what is missing of ``items`` into ``folder``, with ``metadata.jsonl`` once all are there.

    The processes of ``world`` share the folder; its chunks are dealt out among them in turn.

    Args:
        tell: whether to note the prompts the model does not read to their end.
        others: drawn later, whose LoRAs are held to the model before the first picture.
    """

    def look() -> list[tuple[int, list[Item]]]:
        folder.mkdir(parents=True, exist_ok=True)
        _finish_what_was_drawn(folder)
        return [(n, left) for n, part in chunks(items, batch_size) if (left := missing_items(part, folder))]

    todo = world.share(look)
    mine = [left for k, (_, left) in enumerate(todo) if world.mine(k)]
    family, embed = (None, None) if not mine else _load(settings, variant, items, [i for left in mine for i in left])
    for other in others if family is not None else ():
        assert family is not None and other.lora is not None
        if other != variant:
            family.check_lora(other.lora)
        if (timing := _timing(other)) is not None:
            check_timed(family, other.lora, timing)
    if family is not None and tell:
        for sentence in drawing_notes(family, (item.text for item in items), settings.draw):
            reporter.note(sentence)
    if family is not None and variant.plan is not None:
        told = other_weights(load_plan(Path(variant.plan)), family)
        if told:
            reporter.note(told)
    for round_ in world.rounds(len(todo)):
        for number, left in (todo[k] for k in round_ if world.mine(k)):
            assert family is not None and embed is not None
            _draw_chunk(family, embed, settings, variant, left, folder, f"{number:06d}")
        reporter.advance(sum(len(todo[k][1]) for k in round_))
    world.wait()
    if world.is_main:
        write_text(folder / "metadata.jsonl", "".join(json.dumps(row) + "\n" for row in map(metadata_row, items)))


def _draw_chunk(
    family: Family,
    embed: PromptEmbeddings,
    settings: Settings,
    variant: Variant,
    items: list[Item],
    folder: Path,
    name: str,
) -> None:
    """Images are staged; only a whole chunk is moved in."""
    plan = None if variant.plan is None else load_plan(Path(variant.plan))
    draw = settings.draw if plan is None else with_plan(settings.draw, plan)
    skips = None if plan is None else skips_of(plan, family, draw)
    timing = _timing(variant)
    images, solver = _draw(family, embed, draw, items, skips, timing), solver_of(family, draw)
    staged, whole = folder / f"{PARTIAL}{name}", folder / f"{WHOLE}{name}"
    staged.mkdir()
    lora = lora_tags(variant.lora, variant.scale)
    for image, item in zip(images, items, strict=True):
        how = parameters_text(item.text, item.seed or 0, draw, solver, settings.model.model, image, lora, plan, timing)
        to_pil(image).save(staged / item.file, pnginfo=png_note(how))
    staged.rename(whole)
    _move_in(whole, folder)


def _finish_what_was_drawn(folder: Path) -> None:
    """After a kill: a whole chunk is moved in, a partial one was never finished; also of other batch sizes."""
    for staged in sorted(folder.glob(".*-[0-9]*")):
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
        if (timing := _timing(variant)) is not None:
            check_timed(family, variant.lora, timing)
    embed = PromptEmbeddings(family)
    embed.prepare(_to_encode(items, todo), settings.draw.negative_prompt, device)
    family.to(device, dtype)
    return family, embed


def _to_encode(items: list[Item], todo: list[Item]) -> list[str]:
    """The prompts of whole encoding batches of the set: what is encoded together must not depend on what is missing."""
    every, wanted = list(dict.fromkeys(item.text for item in items)), {item.text for item in todo}
    blocks = (every[start : start + ENCODE_BATCH] for start in range(0, len(every), ENCODE_BATCH))
    return [text for block in blocks if wanted.intersection(block) for text in block]


def _timing(variant: Variant) -> LoraTiming | None:
    return LoraTiming(variant.from_step, variant.scale, variant.scale) if variant.from_step else None


def _draw(
    family: Family,
    embed: PromptEmbeddings,
    draw: DrawSettings,
    items: list[Item],
    skips: Skips | None,
    timing: LoraTiming | None,
) -> Tensor:
    def generator_for(j: int) -> torch.Generator:
        return torch.Generator("cpu").manual_seed(items[j].seed or 0)

    network_for = None
    if timing is not None:
        shares = timing.shares(draw.num_inference_steps, make_route(family, draw).calls)
        network_for = partial(TimedNetwork, family, shares)
    parts = draw_images(
        family,
        [item.text for item in items],
        generator_for,
        draw,
        batch_size=len(items),
        embed=embed,
        skips=skips,
        network_for=network_for,
    )
    return torch.cat(list(parts))


def metadata_row(item: Item) -> dict[str, object]:
    """A line of ``metadata.jsonl``, as Hugging Face's image folders have it."""
    row: dict[str, object] = {"file_name": item.file, "prompt": item.text, "category": item.category}
    return row | {"seed": item.seed, "prompt_index": item.prompt, "seed_index": item.seed_index}
