"""Image folders: those sdo draws, and those made by anything else."""

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from sdo_cli.errors import RecipeFault
from sdo_cli.evaluate.job import EvalPrompt, Item, Prompts, digest

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
# sheets that sdo draws beside them
NOT_IMAGES = ("grid", "reward_curve")
# names of the prompt in metadata files people have
PROMPT_KEYS = ("prompt", "text", "caption")


def read_folder(folder: Path, given: Prompts | None) -> tuple[Prompts, list[Item]]:
    """The images of a folder and their prompts.

    Prompts come from ``metadata.jsonl`` (Hugging Face's image folders), else for each image from a text file of its
    name, else from ``given`` by the names ``00012_00`` or plain order, else from A1111's text inside it.

    Raises:
        RecipeFault: no images, or one without a prompt.
    """
    if not folder.is_dir():
        raise RecipeFault([f"--images {folder}: no such folder"], what="command line")
    metadata = folder / "metadata.jsonl"
    rows = list(_rows(metadata)) if metadata.is_file() else _found(folder, given)
    if not rows:
        raise RecipeFault([f"--images {folder}: holds no images ({', '.join(sorted(SUFFIXES))})"], what="command line")
    without = [row["file_name"] for row in rows if not row["prompt"]]
    if without:
        raise RecipeFault(
            [
                f"--images {folder}: no prompt for {without[0]}{f' and {len(without) - 1} more' * (len(without) > 1)}; "
                "write metadata.jsonl with file_name and prompt, a .txt beside each image, or give --prompts"
            ],
            what="command line",
        )
    missing = [row["file_name"] for row in rows if not (folder / row["file_name"]).is_file()]
    if missing:
        raise RecipeFault([f"{metadata}: names {missing[0]}, which is not in {folder}"], what="image folder")
    return _numbered(rows, folder)


def _rows(metadata: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(metadata.read_text(encoding="utf-8-sig").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as fault:
            raise RecipeFault([f"{metadata}:{number}: is not JSON: {fault.msg}"], what="image folder") from fault
        if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
            raise RecipeFault([f"{metadata}:{number}: has no file_name"], what="image folder")
        prompt = next((row[key] for key in PROMPT_KEYS if isinstance(row.get(key), str)), "")
        yield {**row, "prompt": prompt}


def _found(folder: Path, given: Prompts | None) -> list[dict[str, Any]]:
    files = sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in SUFFIXES and path.name[0] != "." and path.stem not in NOT_IMAGES
    )
    rows = []
    for position, path in enumerate(files):
        row: dict[str, Any] = {"file_name": path.name, "prompt": ""}
        sidecar = path.with_suffix(".txt")
        place = _place(path.stem, position)
        if sidecar.is_file():
            row["prompt"] = sidecar.read_text(encoding="utf-8-sig").strip()
        elif given is not None:
            if place[0] < len(given.prompts):
                prompt = given.prompts[place[0]]
                row |= {"prompt": prompt.text, "category": prompt.category}
                row |= {"prompt_index": place[0], "seed_index": place[1]}
        else:
            row["prompt"] = prompt_inside(path)
        rows.append(row)
    return rows


def _place(stem: str, position: int) -> tuple[int, int]:
    """Prompt and seed of ``00012_01``, of ``00012``, else the position in the folder."""
    parts = stem.split("_")
    if all(part.isdigit() for part in parts) and len(parts) <= 2:
        return int(parts[0]), int(parts[1]) if len(parts) == 2 else 0
    return position, 0


def prompt_inside(path: Path) -> str:
    """The prompt A1111 and its relatives keep in a PNG; empty without one."""
    with Image.open(path) as image:
        text = str(getattr(image, "text", {}).get("parameters", ""))
    lines = text.split("\nNegative prompt:")[0].splitlines()
    if lines and lines[-1].startswith("Steps: "):
        lines.pop()
    # the LoRA is none of the picture's words
    return re.sub(r"<lora:[^>]*>", "", " ".join(lines)).strip()


def _numbered(rows: list[dict[str, Any]], folder: Path) -> tuple[Prompts, list[Item]]:
    """Rows with their place: as the metadata says, else prompts in order of appearance, their images as seeds."""
    if all(isinstance(row.get("prompt_index"), int) and isinstance(row.get("seed_index"), int) for row in rows):
        places = [(row["prompt_index"], row["seed_index"]) for row in rows]
    else:
        numbers: dict[str, int] = {}
        seen: dict[int, int] = defaultdict(int)
        places = []
        for row in rows:
            prompt = numbers.setdefault(row["prompt"], len(numbers))
            places.append((prompt, seen[prompt]))
            seen[prompt] += 1
    if len(set(places)) < len(places):
        raise RecipeFault([f"{folder}: two images have the same prompt_index and seed_index"], what="image folder")
    items = [
        Item(
            row["file_name"],
            *place,
            row["prompt"],
            str(row.get("category") or ""),
            row.get("seed") if isinstance(row.get("seed"), int) else None,
        )
        for place, row in sorted(zip(places, rows, strict=True), key=lambda pair: pair[0])
    ]
    by_index = {item.prompt: EvalPrompt(item.text, item.category) for item in items}
    # holes keep their place, so that indices mean the same in every folder of one set
    prompts = [by_index.get(i, EvalPrompt("")) for i in range(max(by_index) + 1)]
    return Prompts(folder.name, str(folder.resolve()), prompts), items


def folder_hash(folder: Path, items: list[Item]) -> str:
    """Changes when an image is replaced: names, sizes and times of all."""
    stats = [(folder / item.file).stat() for item in items]
    return digest([[item.file, stat.st_size, stat.st_mtime_ns] for item, stat in zip(items, stats, strict=True)])
