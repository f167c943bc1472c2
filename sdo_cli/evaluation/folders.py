"""Image folders made by anything: which prompt each picture is scored under, shown, and refused where it is a guess."""

from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

from sdo_cli.errors import RecipeFault
from sdo_cli.evaluation.job import EvalPrompt, Item, Prompts, digest
from sdo_cli.evaluation.layouts import Row, counted, look, short
from sdo_cli.evaluation.pairing import bare, pair
from sdo_cli.pixels import perhaps_unfinished, transparent


class ImageFolder(NamedTuple):
    """Attributes:
    prompts: of its pictures; indices without a picture keep their place, empty.
    items: its pictures.
    notes: how pictures and prompts were put together, and what was left out; a sentence each.
    """

    prompts: Prompts
    items: list[Item]
    notes: list[str]


def read_folder(folder: Path, given: Prompts | None, *, limit: int | None = None) -> ImageFolder:
    """The pictures of a folder and their prompts.

    A metadata file, GenEval's layout and text files beside the pictures state prompts for certain; ``given`` has to
    hold them. Without one of these, pictures belong to ``given`` by their names, else to the prompt inside them.

    Args:
        limit: only pictures of the first so many prompts.

    Raises:
        RecipeFault: no images, one without a prompt, or one whose prompt would be a guess.
    """
    if not folder.is_dir():
        raise RecipeFault([f"--images {folder}: no such folder"], what="command line")
    rows, notes = look(folder, given.categories if given is not None else [])
    hows = Counter(row.how for row in rows if row.prompt)
    by = ", ".join(f"{how} ({count})" if len(hows) > 1 else how for how, count in hows.items())
    if given is None:
        _all_stated(folder, rows)
    else:
        by = _given_to(folder, rows, given, by, limit)
    prompts, items = _numbered(rows, folder)
    if limit is not None:
        items = [item for item in items if item.prompt < limit]
        prompts = Prompts(prompts.name, prompts.source, prompts.prompts[:limit])
    return ImageFolder(
        prompts, items, [_shown(folder, items, by), *notes, *_alpha(folder, items), *_zeros(folder, items)]
    )


def _shown(folder: Path, items: list[Item], by: str) -> str:
    if not items:
        raise RecipeFault([f"--images {folder}: no picture of the prompts asked for"], what="command line")
    some = [items[0], items[-1]] if len(items) > 1 else items
    pairs = "; ".join(f"{item.file}: {short(item.text)}" for item in some)
    counts = f"{counted(len(items), 'picture')} of {counted(len({item.prompt for item in items}), 'prompt')}"
    return f"{folder.name}: {counts}, by {by}; {'first and last ' if len(some) > 1 else ''}{pairs}"


def _all_stated(folder: Path, rows: list[Row]) -> None:
    if unclear := next((row for row in rows if row.unclear), None):
        raise RecipeFault(
            [f"--images {folder}: {unclear.file}: {unclear.unclear}; write its prompt into a .txt beside it"],
            what="command line",
        )
    without = [row.file for row in rows if not row.prompt]
    if without:
        raise RecipeFault(
            [
                f"--images {folder}: no prompt for {without[0]}{f' and {len(without) - 1} more' * (len(without) > 1)}; "
                "write metadata.jsonl with file_name and prompt, a .txt beside each image, or give --prompts"
            ],
            what="command line",
        )


def _given_to(folder: Path, rows: list[Row], given: Prompts, by: str, limit: int | None) -> str:
    """Rows get their prompt among ``given``; how, in words.

    Raises:
        RecipeFault: a guess, or a contradiction.
    """
    prompts = given.prompts
    texts: dict[str, int] = {}
    again = set()
    for index, prompt in enumerate(prompts):
        if texts.setdefault(words := " ".join(prompt.text.split()), index) != index:
            again.add(words)
    stated = [texts.get(" ".join(row.prompt.split())) for row in rows]
    for k, row in enumerate(rows):
        own = row.more.get("prompt_index")
        if isinstance(own, int) and 0 <= own < len(prompts) and prompts[own].text == row.prompt:
            stated[k] = own
        if row.certain and row.prompt and stated[k] is None:
            raise _guess(
                folder,
                f"{row.how} says of {row.file}: {short(row.prompt)}, which --prompts does not hold",
                "leave --prompts out, or give the set they were drawn from",
            )
    if all(place is not None for place in stated):
        places = [place for place in stated if place is not None]
        if again & {" ".join(row.prompt.split()) for row in rows if not isinstance(row.more.get("prompt_index"), int)}:
            places, by = _told_apart(folder, rows, prompts, places, by, limit)
    else:
        try:
            places, by = _by_names(rows, prompts, limit)
        except ValueError as fault:
            raise _guess(
                folder,
                f"which prompt belongs to which picture would be a guess: {fault}",
                "write metadata.jsonl with file_name and prompt, a .txt beside each picture, or --limit where they are "
                "the first of the set",
            ) from fault
        bares = [bare(prompt.text) for prompt in prompts]
        for row, place, place_stated in zip(rows, places, stated, strict=True):
            _agree(folder, row, place, place_stated, prompts, bares, by)
        others = [
            row for row, place in zip(rows, places, strict=True) if row.prompt and row.prompt != prompts[place].text
        ]
        if unclear := [row for row in rows if row.unclear]:
            by += f" ({len(unclear)} of them hold text of no one prompt, {unclear[0].file}: {unclear[0].unclear})"
        if others:
            by += f" (inside {len(others)} of them are other words, {short(others[0].prompt)} first)"
    for row, place in zip(rows, places, strict=True):
        row.prompt, row.more = prompts[place].text, {**row.more, "prompt_index": place}
        row.more["category"] = prompts[place].category
        row.more.setdefault("seed_index", None)
    return by


def _told_apart(
    folder: Path, rows: list[Row], prompts: list[EvalPrompt], places: list[int], by: str, limit: int | None
) -> tuple[list[int], str]:
    """Prompts of the same words, in several categories or several times, by the names of their pictures.

    Raises:
        RecipeFault: the names do not tell, and the categories differ.
    """
    try:
        named, how = _by_names(rows, prompts, limit)
    except ValueError as fault:
        named, how, why = [], "", str(fault)
    else:
        why = "names and words contradict each other"
    if named and all(prompts[a].text == prompts[b].text for a, b in zip(named, places, strict=True)):
        return named, f"{by}, and {how} where words come twice"
    kinds = {prompts[k].text: {p.category for p in prompts if p.text == prompts[k].text} for k in set(places)}
    if text := next((text for text, categories in kinds.items() if len(categories) > 1), None):
        raise _guess(
            folder,
            f"{short(text)} is in several categories, and which picture is of which would be a guess: {why}",
            "write metadata.jsonl with file_name, prompt and category, or leave --prompts out",
        )
    return places, by


def _guess(folder: Path, sentence: str, remedy: str) -> RecipeFault:
    return RecipeFault([f"--images {folder}: {sentence}; {remedy}"], what="command line")


def _by_names(rows: list[Row], prompts: list[EvalPrompt], limit: int | None) -> tuple[list[int], str]:
    files = [row.file for row in rows]
    try:
        found = pair(files, prompts)
    except ValueError:
        if limit is None or limit >= len(prompts):
            raise
        found = pair(files, prompts[:limit])
    return found.places, found.how


def _agree(
    folder: Path, row: Row, place: int, stated: int | None, prompts: list[EvalPrompt], bares: list[str], by: str
) -> None:
    """What is written inside may be longer than the prompt given, but not another of the same set."""
    words = bare(row.prompt)
    held = [] if stated is not None else [k for k, text in enumerate(bares) if text and f" {text} " in f" {words} "]
    # of several the longest: `a cat` is in `a cat on a mat`, too
    other = stated if stated is not None else max(held, key=lambda k: len(bares[k]), default=None)
    if other is not None and prompts[other].text != prompts[place].text:
        raise _guess(
            folder,
            f"{row.file} is {short(prompts[place].text)} by {by}, but {row.how} says {short(prompts[other].text)}",
            "leave --prompts out, or write metadata.jsonl",
        )


def _numbered(rows: list[Row], folder: Path) -> tuple[Prompts, list[Item]]:
    """Rows with their place: as the metadata says, else prompts in order of appearance, their images as seeds."""
    indices = [row.more.get("prompt_index") for row in rows]
    if all(
        isinstance(row.more.get("seed_index"), int) and isinstance(i, int) for row, i in zip(rows, indices, strict=True)
    ):
        places = [(row.more["prompt_index"], row.more["seed_index"]) for row in rows]
    else:
        numbers: dict[str, int] = {}
        texts: dict[int, str] = {}
        seen: dict[int, int] = defaultdict(int)
        places = []
        for row, index in zip(rows, indices, strict=True):
            prompt = index if isinstance(index, int) else numbers.setdefault(row.prompt, len(numbers))
            if texts.setdefault(prompt, row.prompt) != row.prompt:
                raise RecipeFault(
                    [f"{folder}: prompt_index {prompt} stands for {short(texts[prompt])} and for {short(row.prompt)}"],
                    what="image folder",
                )
            places.append((prompt, seen[prompt]))
            seen[prompt] += 1
    if len(set(places)) < len(places):
        raise RecipeFault([f"{folder}: two images have the same prompt_index and seed_index"], what="image folder")
    items = [
        Item(
            row.file,
            *place,
            row.prompt,
            str(row.more.get("category") or ""),
            row.more.get("seed") if isinstance(row.more.get("seed"), int) else None,
        )
        for place, row in sorted(zip(places, rows, strict=True), key=lambda pair: pair[0])
    ]
    by_index = {item.prompt: EvalPrompt(item.text, item.category) for item in items}
    # holes keep their place, so that indices mean the same in every folder of one set
    prompts = [by_index.get(i, EvalPrompt("")) for i in range(max(by_index, default=-1) + 1)]
    return Prompts(folder.name, str(folder.resolve()), prompts), items


def _alpha(folder: Path, items: list[Item]) -> list[str]:
    clear = [item.file for item in items if transparent(folder / item.file)]
    if not clear:
        return []
    return [f"{folder.name}: {counted(len(clear), 'picture')} partly transparent and put on white, {clear[0]} first"]


def _zeros(folder: Path, items: list[Item]) -> list[str]:
    black = [item.file for item in items if perhaps_unfinished(folder / item.file)]
    if not black:
        return []
    what = f"{counted(len(black), 'picture')} black from a disk's block on, as a copy that was interrupted is"
    return [f"{folder.name}: {what}; look at {black[0]}"]


def folder_hash(folder: Path, items: list[Item]) -> str:
    """Changes when an image is replaced: names, sizes and times of all."""
    stats = [(folder / item.file).stat() for item in items]
    return digest([[item.file, stat.st_size, stat.st_mtime_ns] for item, stat in zip(items, stats, strict=True)])
