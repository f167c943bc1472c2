"""What pictures a folder holds and which prompts it states for them, by the layouts people have."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from sdo_cli.errors import RecipeFault, SdoError
from sdo_cli.evaluation.pairing import bare, natural
from sdo_cli.evaluation.picture_text import fooocus_log, is_parameters, prompt_inside, prompt_of_parameters
from sdo_cli.pixels import begins_as_picture
from sdo_cli.prompt_sets.entries import lines_of, read_text
from sdo_cli.prompt_sets.read import STYLES
from sdo_cli.prompt_sets.tables import read_table

SUFFIXES = {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".tif", ".tiff"}
# pictures by their name, which sdo does not read
OTHER_SUFFIXES = {
    ".avif", ".gif", ".heic", ".heif", ".jxl", ".exr", ".hdr", ".jp2", ".tga", ".ppm", ".pgm", ".pbm", ".svg", ".psd",
    ".ico", ".dng",
}  # fmt: skip
# sheets of several pictures: sdo's own, A1111's, GenEval's
SHEET = re.compile(r"(?:xyz_)?grid(?:-\d+.*)?|prompt_matrix-.*|reward_curve")
# what A1111 and Forge save beside a picture: as it was before the second pass, and what was done to it
STAGES = re.compile(r"(.+)-before-(?:highres-fix|face-restoration|color-correction)|(.+)-(?:mask|mask-composite)")
METADATA = ("metadata.jsonl", "metadata.csv")
# names of the prompt in metadata files people have
PROMPT_KEYS = ("prompt", "text", "caption")
BESIDE = (".txt", ".caption")
BESIDE_EACH = tuple(f"the {suffix} beside each" for suffix in BESIDE)
# T2I-CompBench's names: the prompt, and six digits that count pictures
SAID_BY_NAME = re.compile(r"(\S+(?: \S+){2,})_\d{6}")


@dataclass
class Row:
    """A picture.

    Attributes:
        file: its path inside the folder.
        prompt: stated for it; empty where nothing is.
        how: where that was found.
        certain: False for what a program wrote inside: it may hold words of a style beside the user's.
        unclear: why the text inside it is no prompt.
        more: category, seed, prompt_index, seed_index, as a metadata file has them.
    """

    file: str
    prompt: str = ""
    how: str = ""
    certain: bool = True
    unclear: str = ""
    more: dict[str, Any] = field(default_factory=dict)


def look(folder: Path, categories: list[str]) -> tuple[list[Row], list[str]]:
    """Every picture of a folder, in natural order, and sentences about what is left out.

    Args:
        categories: of the prompts given; a folder for each of some is read as one.

    Raises:
        RecipeFault: no pictures, or a metadata file that cannot be read.
    """
    files, notes = _pictures(folder)
    metadata = [folder / name for name in METADATA if (folder / name).is_file()]
    if any(_states_files(path) for path in metadata):
        if len(metadata) > 1:
            notes.append(f"{folder}: {metadata[0].name} is read, {metadata[1].name} is not")
        rows = list(_listed(metadata[0], folder))
        if not rows:
            raise _fault(f"{folder}: {metadata[0].name} lists no picture; take it away, or write file_name and prompt")
        every = [path for path in folder.rglob("*") if _is_picture(path)]
        known = {(folder / row.file).resolve() for row in rows}
        if others := sorted(str(p.relative_to(folder)) for p in every if p.resolve() not in known):
            notes.append(
                f"{folder}: {counted(len(others), 'picture')} not in {metadata[0].name} and not scored, "
                f"{others[0]} first"
            )
        return rows, notes
    samples = _geneval(folder)
    if samples:
        scored = {folder / row.file for row in samples}
        beside = [path for path in folder.rglob("*") if _is_picture(path) and path not in scored]
        if left := sorted(str(path.relative_to(folder)) for path in beside):
            notes.append(f"{folder}: {counted(len(left), 'picture')} outside samples/ not scored, {left[0]} first")
        return samples, notes
    inside = _inside(folder)
    if not files:
        named = [name for name in inside if name in categories]
        if named and len(named) == len(inside):
            files = [path for name in named for path in inside[name]]
        elif inside:
            name, pictures = next(iter(inside.items()))
            if set(inside) == set(STYLES):
                raise _fault(f"{folder}: its folders are HPSv2's styles; give its prompts: --prompts hpsv2")
            raise _fault(
                f"{folder}: its pictures are in folders inside it ({', '.join(list(inside)[:4])}); give one of them, "
                f"as in --images {folder / name} with {len(pictures)}, or the --prompts whose categories they are"
            )
        else:
            raise _fault("; ".join([f"{folder}: holds no images ({', '.join(sorted(SUFFIXES))})", *notes]))
    elif inside:
        count = sum(_is_picture(path) for path in folder.rglob("*")) - len(_pictures(folder)[0])
        notes.append(
            f"{folder}: {counted(count, 'picture')} in folders inside it ({', '.join(list(inside)[:4])}) not scored"
        )
    log = folder / "log.html"
    logged = fooocus_log(log) if log.is_file() else {}
    rows = [_stated(path, folder, logged) for path in files]
    return rows, [*notes, *_other_inside(rows, folder)]


def _other_inside(rows: list[Row], folder: Path) -> list[str]:
    """Captions beside pictures that were drawn from other words."""
    other = []
    for row in rows:
        if row.how not in BESIDE_EACH:
            continue
        try:
            inside = prompt_inside(folder / row.file)
        except (ValueError, SdoError):
            continue
        here, there = (f" {bare(text)} " for text in (row.prompt, inside))
        if inside and here not in there and there not in here:
            other.append((row, inside))
    if not other:
        return []
    row, inside = other[0]
    return [
        f"{folder}: {counted(len(other), 'picture')} with other words beside than inside, the ones beside taken; "
        f"{row.file} first: {short(row.prompt)} / {short(inside)}"
    ]


def short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 60 else f"{line[:60]}…"


def counted(count: int, noun: str) -> str:
    plural = f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}s"
    return f"{count} {noun if count == 1 else plural}"


def _fault(sentence: str) -> RecipeFault:
    return RecipeFault([f"--images {sentence}"], what="command line")


def _is_picture(path: Path) -> bool:
    return has_picture(path) and not is_sheet(path)


def has_picture(path: Path) -> bool:
    """By a file's name; where that has no suffix, by how it begins."""
    if path.suffix or path.name[0] == ".":
        return path.suffix.lower() in SUFFIXES and path.is_file()
    return path.is_file() and begins_as_picture(path)


def is_sheet(path: Path) -> bool:
    return SHEET.fullmatch(path.stem) is not None


def _pictures(folder: Path) -> tuple[list[Path], list[str]]:
    """Those to score, and what is said of others."""
    seen = sorted((path for path in folder.iterdir() if path.name[0] != "."), key=lambda path: natural(path.name))
    pictures = [path for path in seen if has_picture(path)]
    sheets = [path.name for path in pictures if is_sheet(path)]
    nowhere = [path.name for path in seen if path.suffix.lower() in SUFFIXES and not path.exists()]
    unread = [path.name for path in seen if path.suffix.lower() in OTHER_SUFFIXES or _is_oddly_called(path)]
    pictures = [path for path in pictures if not is_sheet(path)]
    stems = {path.stem: path for path in pictures if path.suffix.lower() == ".png"}
    twins = [path.name for path in pictures if stems.get(path.stem, path) != path]
    every = {path.stem for path in pictures}
    stages = [p.name for p in pictures if (m := STAGES.fullmatch(p.stem)) and (m[1] or m[2]) in every]
    notes = []
    if twins:
        notes.append(f"{folder}: {counted(len(twins), 'copy')} of PNG files not scored, {twins[0]} first")
    if stages:
        notes.append(f"{folder}: {counted(len(stages), 'unfinished stage')} of pictures not scored, {stages[0]} first")
    if nowhere:
        notes.append(f"{folder}: {counted(len(nowhere), 'link')} to no file not scored, {nowhere[0]} first")
    if sheets:
        notes.append(f"{folder}: {counted(len(sheets), 'sheet')} of several pictures not scored, {sheets[0]} first")
    if unread:
        notes.append(
            f"{folder}: {counted(len(unread), 'file')} of kinds that sdo does not read not scored, {unread[0]} first"
        )
    return [path for path in pictures if path.name not in {*twins, *stages}], notes


def _is_oddly_called(path: Path) -> bool:
    """A picture whose name ends as in ``cat 1.5``: that is no suffix, and what is before it no name."""
    return path.suffix[1:].isdigit() and path.is_file() and begins_as_picture(path)


def _inside(folder: Path) -> dict[str, list[Path]]:
    """Pictures of the folders inside, by name."""
    folders = sorted(path for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")
    return {path.name: pictures for path in folders if (pictures := _pictures(path)[0])}


def _states_files(path: Path) -> bool:
    """GenEval's own ``metadata.jsonl`` names a prompt and no file."""
    return path.suffix != ".jsonl" or _geneval_prompt(path) is None


def _listed(metadata: Path, folder: Path) -> Iterator[Row]:
    """Rows of Hugging Face's image folders, in JSON or CSV."""
    if metadata.suffix == ".csv":
        try:
            rows = list(enumerate(read_table(metadata), 2))
        except ValueError as fault:
            raise RecipeFault([str(fault)], what="image folder") from fault
    else:
        rows = list(_json_rows(metadata))
    seen: set[str] = set()
    for number, row in rows:
        name = row.get("file_name") if isinstance(row, dict) else None
        name = PurePosixPath(name).as_posix() if isinstance(name, str) and name else name
        if not isinstance(name, str) or not name:
            raise RecipeFault([f"{metadata}:{number}: has no file_name"], what="image folder")
        if name in seen:
            raise RecipeFault([f"{metadata}:{number}: names {name} a second time"], what="image folder")
        seen.add(name)
        if not (folder / name).is_file():
            raise RecipeFault([f"{metadata}: names {name}, which is not in {folder}"], what="image folder")
        prompt = next((row[key].strip() for key in PROMPT_KEYS if isinstance(row.get(key), str)), "")
        yield Row(name, prompt, metadata.name, more=row)


def _json_rows(metadata: Path) -> Iterator[tuple[int, Any]]:
    try:
        text = read_text(metadata)
    except ValueError as fault:
        raise RecipeFault([str(fault)], what="image folder") from fault
    for number, line in enumerate(lines_of(text), 1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except json.JSONDecodeError as fault:
            raise RecipeFault([f"{metadata}:{number}: is not JSON: {fault.msg}"], what="image folder") from fault


def _geneval_prompt(metadata: Path) -> str | None:
    try:
        tree = json.loads(metadata.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError):
        return None
    prompt = tree.get("prompt") if isinstance(tree, dict) and "file_name" not in tree else None
    return prompt if isinstance(prompt, str) and (metadata.parent / "samples").is_dir() else None


def _geneval(folder: Path) -> list[Row]:
    """``00000/samples/0000.png …`` with the prompt in ``00000/metadata.jsonl``; or one such folder."""
    inside = sorted((path for path in folder.iterdir() if path.is_dir()), key=lambda path: natural(path.name))
    found, without = [], []
    for place in (folder, *inside):
        prompt = _geneval_prompt(place / "metadata.jsonl")
        if prompt is not None:
            for path in _pictures(place / "samples")[0]:
                found.append(Row(path.relative_to(folder).as_posix(), prompt.strip(), "GenEval's metadata.jsonl"))
        elif (place / "samples").is_dir():
            without.append(place)
    if found and without:
        raise _fault(
            f"{folder}: {without[0].name}/ has samples/ and no metadata.jsonl that can be read with a prompt; "
            "put it back, or take the folder away"
        )
    return found


def _stated(path: Path, folder: Path, logged: dict[str, str]) -> Row:
    """By a text file of its name, Fooocus's log, or what is inside it."""
    row = Row(path.relative_to(folder).as_posix())
    beside = next((side for suffix in BESIDE if (side := path.with_suffix(suffix)).is_file()), None)
    try:
        if beside is not None:
            text = beside.read_text(encoding="utf-8-sig").strip()
            row.prompt = prompt_of_parameters(text) if is_parameters(text) else text
            row.how = BESIDE_EACH[BESIDE.index(beside.suffix)]
        elif path.name in logged:
            row.prompt, row.how, row.certain = logged[path.name], "Fooocus's log.html", False
        else:
            row.prompt, row.how, row.certain = prompt_inside(path), "the text inside them", False
        if not row.prompt and (named := SAID_BY_NAME.fullmatch(path.stem)):
            row.prompt, row.how = named[1], "the prompt in their names"
    except UnicodeDecodeError:
        row.unclear = f"{beside} is not UTF-8 text"
    except ValueError as fault:
        row.unclear = str(fault)
    return row
