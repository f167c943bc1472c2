"""Which prompt of a set belongs to which picture, by the pictures' names; what would be a guess is refused."""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import PurePosixPath, PureWindowsPath

from sdo_cli.evaluation.job import EvalPrompt

# sdo's own: prompt 12, image 0
OWN = re.compile(r"(\d{5})_(\d{2})")
# what programs put behind a name to tell pictures of one prompt apart
COUNTED = re.compile(r"[ _-]+(?:seed|s)?\d+$")
# what stands before a number and says what it counts; training's and sampling's own numbers count no prompts
LABEL = re.compile(
    r"(?:^|[^a-z])(?:(?P<prompt>prompt)|(?P<perhaps>p)|(?:seed|s|epochs?|ep|e|steps?|iter|iteration|ckpt|checkpoint|batch|"
    r"cfg|scale|guidance|strength|rank|version|ver|v))[^a-z0-9]*$"
)
# a name that was cut is taken for the beginning of a prompt from this length on
CUT = 20


@dataclass(frozen=True)
class Pairing:
    """Attributes:
    places: the index of each picture's prompt, in the order of the pictures.
    how: words for the user.
    """

    places: list[int]
    how: str
    numbers: list[int] | None = None


def natural(name: str) -> list[tuple[int, str]]:
    """For sorting: numbers inside names by what they are worth."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)] + [(-1, name)]


def pair(files: list[str], prompts: Sequence[EvalPrompt]) -> Pairing:
    """By every way that fits: sdo's own names, names of prompts, prompts in names, numbers that count the set.

    Args:
        files: paths inside the folder, in natural order.

    Raises:
        ValueError: one sentence: no way fits, or two that contradict each other.
    """
    if len(prompts) == 1:
        return Pairing([0] * len(files), "the set's only prompt")
    names = [str(PurePosixPath(file).with_suffix("")) for file in files]
    if twice := next((name for name, after in pairwise(sorted(names)) if name == after), None):
        raise ValueError(f"two pictures are called {twice}")
    if listed := _listed(files, prompts):
        return listed
    stems = [PurePosixPath(file).stem for file in files]
    columns = range(max(len(prompt.names) for prompt in prompts))
    named = [_named(stems, prompts, column) for column in columns]
    found = [way for way in (_own(stems, prompts), *named, _in_the_name(stems, prompts)) if way]
    why = ""
    try:
        found.append(_by_style(files, prompts) or _counted(stems, len(prompts)))
    except ValueError as fault:
        why = str(fault)
    if not found:
        raise ValueError(why)
    first = found[0]
    if first.numbers is not None:
        _agree_with_ids(files, first, prompts, columns)
    for other in found[1:]:
        for file, a, b in zip(files, first.places, other.places, strict=True):
            if prompts[a].text != prompts[b].text:
                raise ValueError(f"{file} is prompt {a + 1} by {first.how}, and prompt {b + 1} by {other.how}")
    return first


def _own(stems: list[str], prompts: Sequence[EvalPrompt]) -> Pairing | None:
    found = [OWN.fullmatch(stem) for stem in stems]
    places = [int(match[1]) for match in found if match]
    # what sdo left unfinished lacks the last prompts, never the first
    if len(places) < len(stems) or max(places) >= len(prompts) or 0 not in places:
        return None
    return Pairing(places, "sdo's own names (00012_00)")


def _all(stems: list[str], place: Callable[[str], int | None], how: str) -> Pairing | None:
    places = [found for stem in stems if (found := place(stem)) is not None]
    return Pairing(places, how) if len(places) == len(stems) else None


def _listed(files: list[str], prompts: Sequence[EvalPrompt]) -> Pairing | None:
    """A table that names the picture of each prompt, wherever it lay then.

    Raises:
        ValueError: it names some of the pictures and not others, or one picture twice.
    """
    for key in (_path, lambda name: PurePosixPath(_path(name)).name):
        places: dict[str, int] = {}
        twice = set()
        for index, prompt in enumerate(prompts):
            if prompt.picture and prompts[places.setdefault(key(prompt.picture), index)].text != prompt.text:
                twice.add(key(prompt.picture))
        found = [places.get(key(file)) for file in files]
        if None not in found:
            break
    if all(place is None for place in found):
        # pictures of something else, as a caption's own photograph
        return None
    if missing := next((file for file, place in zip(files, found, strict=True) if place is None), None):
        raise ValueError(f"the prompts name the picture of each, and {missing} is in none of their rows")
    if two := next((file for file in files if key(file) in twice), None):
        raise ValueError(f"two prompts name {two} as their picture")
    return Pairing([place for place in found if place is not None], "the picture that each prompt's row names")


def _path(name: str) -> str:
    """Of either system, without suffix: pictures are saved again as another kind."""
    return PureWindowsPath(name.strip()).with_suffix("").as_posix().casefold()


def _ids(prompts: Sequence[EvalPrompt], column: int) -> dict[str, int] | None:
    """Prompts by their id in one column; None where two share one."""
    names: dict[str, int] = {}
    for index, prompt in enumerate(prompts):
        name = prompt.names[column] if column < len(prompt.names) else ""
        if name and names.setdefault(_number(name), index) != index:
            return None
    return names


def _agree_with_ids(files: list[str], way: Pairing, prompts: Sequence[EvalPrompt], columns: range) -> None:
    """Numbers that count the set, and are at the same time the ids of other prompts, say nothing."""
    for ids in (_ids(prompts, column) or {} for column in columns):
        for file, place, number in zip(files, way.places, way.numbers or (), strict=True):
            other = ids.get(str(number), place)
            if prompts[other].text != prompts[place].text:
                raise ValueError(
                    f"{file} is prompt {place + 1} by {way.how}, and prompt {other + 1} by the ids of the prompts"
                )


def _named(stems: list[str], prompts: Sequence[EvalPrompt], column: int) -> Pairing | None:
    """Pictures named as their prompts are: by the prompt's file (DPG-Bench) or an id in its table."""
    names = _ids(prompts, column)
    if not names:
        return None

    def place(stem: str) -> int | None:
        return names.get(_number(stem), names.get(_number(COUNTED.sub("", stem))))

    return _all(stems, place, "the names of the prompts")


def _number(name: str) -> str:
    return str(int(name)) if name.isdecimal() else name.strip().casefold()


def _in_the_name(stems: list[str], prompts: Sequence[EvalPrompt]) -> Pairing | None:
    """T2I-CompBench's ``<prompt>_000000``; letters that a file's name cannot hold count for nothing."""
    texts: dict[str, int] = {}
    alike = set()
    for index, prompt in enumerate(prompts):
        text = bare(prompt.text)
        if prompts[texts.setdefault(text, index)].text != prompt.text:
            alike.add(text)

    cuts = set()

    def place(stem: str) -> int | None:
        whole, counted = bare(stem), bare(COUNTED.sub("", stem))
        hits = {texts[text] for text in (whole, counted) if text and text in texts}
        if not hits and len(counted) >= CUT:
            hits = {index for text, index in texts.items() if text.startswith(counted)}
            cuts.add(len(COUNTED.sub("", stem)))
        return hits.pop() if len(hits) == 1 and not hits & {texts[text] for text in alike} else None

    found = _all(stems, place, "the prompt in their names")
    # programs cut at one length (a blank at the end is lost); names of other lengths are whole, and of other prompts
    return found if not cuts or max(cuts) - min(cuts) <= 1 else None


def bare(text: str) -> str:
    """Letters and digits alone, small; words with one space between."""
    return " ".join(re.findall(r"[^\W_]+", text.casefold()))


def _by_style(files: list[str], prompts: Sequence[EvalPrompt]) -> Pairing | None:
    """A folder per category, pictures numbered inside it, as HPSv2's benchmark asks for."""
    folders = [PurePosixPath(file).parent.name for file in files]
    if not all(folders):
        return None
    of_category: dict[str, list[int]] = defaultdict(list)
    for index, prompt in enumerate(prompts):
        of_category[prompt.category].append(index)
    places = [-1] * len(files)
    for folder in dict.fromkeys(folders):
        which = [k for k, other in enumerate(folders) if other == folder]
        indices = of_category.get(folder)
        if not indices:
            raise ValueError(f"{folder}/ is no category of the prompts")
        try:
            inside = _counted([PurePosixPath(files[k]).stem for k in which], len(indices))
        except ValueError as fault:
            raise ValueError(f"in {folder}/, {fault}") from None
        for k, place in zip(which, inside.places, strict=True):
            places[k] = indices[place]
    return Pairing(places, "folder (category) and number")


def _counted(stems: list[str], count: int) -> Pairing:
    """By the one number in names of one pattern that counts ``count`` prompts, from 0 or from 1, without a gap."""
    parts = [re.split(r"(\d+)", stem) for stem in stems]
    if len({tuple(part[0::2]) for part in parts}) > 1:
        raise ValueError(
            f"names of several patterns ({stems[0]}, {_other(stems, parts)}) say nothing of {count} prompts"
        )
    columns = list(zip(*([int(digits) for digits in part[1::2]] for part in parts), strict=True))
    labels = [LABEL.search(text.casefold()) for text in parts[0][0:-1:2]]
    says = {k: label.lastgroup or "other" for k, label in enumerate(labels) if label}
    changing = [k for k, values in enumerate(columns) if len(set(values)) > 1]
    varying = [k for k in changing if says.get(k) != "other"]
    said = [k for k in varying if says.get(k) == "prompt"]
    # `p` may be the prompt or a picture's number
    perhaps = [k for k in varying if says.get(k) == "perhaps" and _start(columns[k], count) is not None]
    if not said and len(perhaps) == 1 and sum(_start(columns[k], count) is not None for k in varying) == 1:
        said = perhaps
    fitting = [k for k in said or varying if _start(columns[k], count) is not None]
    if not fitting:
        numbers = sorted(set(columns[varying[0]])) if varying else []
        counts = (
            f"numbers {numbers[0]} to {numbers[-1]}, {len(numbers)} of them" if numbers else "no number that counts"
        )
        raise ValueError(f"the names hold {counts}, and there are {count} prompts")
    # several numbers are told apart by labels, by the first one, or because each picture has its own
    pairings = [[value - (_start(columns[k], count) or 0) for value in columns[k]] for k in fitting]
    if len(fitting) > 1 and any(other != pairings[0] for other in pairings):
        raise ValueError(f"two numbers in names like {stems[0]} count {count} prompts")
    k = fitting[0]
    alone = len(set(columns[k])) == len(stems)
    if not said and k != varying[0] and not alone:
        raise ValueError(
            f"the first number in names like {stems[0]} does not count the {count} prompts, a later one does"
        )
    sizes = set(Counter(columns[k]).values())
    if not said and not alone and len(sizes) > 1:
        # so do the numbers of batches, whose last one is not full
        raise ValueError(f"the first number in names like {stems[0]} has {min(sizes)} to {max(sizes)} pictures each")
    if not said and not alone and sizes == {count}:
        raise ValueError(f"names like {stems[0]} have {count} pictures for each of {count}, so either number may count")
    if len(changing) == 1 and not alone:
        raise ValueError(f"two names hold the same number, as {stems[0]} does")
    return Pairing(pairings[0], f"the number in their names, from {_start(columns[k], count)}", list(columns[k]))


def _other(stems: list[str], parts: list[list[str]]) -> str:
    return next(stem for stem, part in zip(stems, parts, strict=True) if part[0::2] != parts[0][0::2])


def _start(values: Sequence[int], count: int) -> int | None:
    """0 or 1 where ``values`` are every number of so many from there; else None."""
    found = sorted(set(values))
    return next((start for start in (0, 1) if found == list(range(start, start + count))), None)
