"""From a name to a prompt set: shipped, a local file or folder, or a dataset on the hub."""

from dataclasses import dataclass
from pathlib import Path

from sdo_cli.hub import WeightFile, find_file, list_files
from sdo_cli.prompt_sets.entries import Columns, PromptSet
from sdo_cli.prompt_sets.files import SUFFIXES, read_noted, together


@dataclass(frozen=True)
class Benchmark:
    """Where a benchmark of the field lies on the hub.

    Attributes:
        repo: of a dataset.
        files: inside it; the stem is the category where there are several. Empty: the one readable file.
        column: of the prompts; None finds it.
    """

    summary: str
    repo: str
    files: tuple[str, ...] = ()
    column: str | None = None


STYLES = ("anime", "concept-art", "paintings", "photo")
BENCHMARKS = {
    "partiprompts": Benchmark("PartiPrompts: 1,632 prompts", "nateraw/parti-prompts", ("PartiPrompts.tsv",)),
    "drawbench": Benchmark("DrawBench: 200 prompts", "sayakpaul/drawbench", ("DrawBench Prompts - Sheet1.csv",)),
    "hpsv2": Benchmark(
        "HPSv2's benchmark: 800 prompts in each of four styles",
        "zhwang/HPDv2",
        tuple(f"benchmark/{style}.json" for style in STYLES),
    ),
}
SHIPPED = {
    "emoji-eval": "held-out words and colours of the embedded model, by kind of thing",
    "emoji-heldout": "the same, as recipes use them",
    "emoji-train": "what recipes on the embedded model train on",
    "emoji-train-guarded": "emoji-train without emoji-guard",
    "emoji-guard": "64 of emoji-train, for checks during training",
    "animals": "simple animals, none of animals-train, by kind",
    "animals-train": "names of simple animals, as used since DDPO's aesthetic task",
    "animals-heldout": "animals no recipe trains on",
    "animals-guard": "other animals, for checks during training",
    "varied-eval": "200 prompts of all lengths in ten categories",
    "varied-train": "people, things, animals and places in several styles",
    "varied-heldout": "other subjects, places and styles than varied-train",
    "varied-guard": "others again, for checks during training",
}


def shipped_folder() -> Path:
    """Where the recipes lie: inside the package when installed from a wheel, beside it in a checkout."""
    package = Path(__file__).parent.parent
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


def shipped_file(name: str) -> Path | None:
    """The file behind the name of a shipped set, with or without its suffix."""
    folder = shipped_folder() / "prompts"
    places = [folder / name, folder / f"{name}.txt", folder / f"{name}.csv"]
    return next((place for place in places if place.is_file()), None)


def read_prompt_set(
    name: str, *, column: str | None = None, category_column: str | None = None, revision: str | None = None
) -> PromptSet:
    """A shipped set, a benchmark's short name, a local file or folder, or ``owner/name[:file]`` on the hub.

    Raises:
        ValueError: one sentence with the reason.
        MissingWeights: a dataset of the hub that is not here and cannot be fetched.
    """
    path, columns = Path(name).expanduser(), Columns(column, category_column)
    if path.exists():
        return PromptSet(path.stem, str(path.resolve()), *read_noted(path, columns))
    if (shipped := shipped_file(name)) is not None:
        return PromptSet(shipped.stem, f"shipped:{shipped.stem}", *read_noted(shipped, columns))
    if (known := BENCHMARKS.get(name.lower())) is not None:
        return _from_hub(name.lower(), known.repo, known.files, column or known.column, category_column, revision)
    repo, _, file = name.partition(":")
    if repo.count("/") == 1 and not name.startswith((".", "/", "~")) and Path(repo).suffix not in SUFFIXES:
        return _from_hub(repo, repo, (file,) if file else (), column, category_column, revision)
    raise ValueError(
        f"no prompt set {name}; there are {', '.join([*SHIPPED, *BENCHMARKS])}, or give a file or a dataset of the hub"
    )


def _from_hub(
    name: str,
    repo: str,
    files: tuple[str, ...],
    column: str | None,
    category_column: str | None,
    revision: str | None,
) -> PromptSet:
    if files and Path(files[0]).suffix.lower() not in SUFFIXES:
        # a folder: every piece of it
        inside = f"{files[0].rstrip('/')}/"
        files = tuple(f for f in list_files(repo, revision, kind="dataset") if f.startswith(inside))
    files = files or (_only_file(repo, revision),)
    parts, notes = [], []
    for file in files:
        path = find_file(WeightFile(repo, file, 0, "", revision, kind="dataset"))
        prompts, said = read_noted(path, Columns(column, category_column))
        parts.append((file, prompts))
        notes += said
    every = together(parts) if len(parts) > 1 else parts[0][1]
    return PromptSet(name, f"hub:{repo}@{revision or 'main'}/{','.join(files)}", every, notes)


def _only_file(repo: str, revision: str | None) -> str:
    """The one file of a dataset that can hold its prompts.

    Raises:
        ValueError: none or several.
    """
    readable = [
        file
        for file in list_files(repo, revision, kind="dataset")
        if Path(file).suffix.lower() in SUFFIXES
        and Path(file).stem.lower() not in ("readme", "requirements", "license")
    ]
    if len(readable) == 1:
        return readable[0]
    if not readable:
        raise ValueError(f"the dataset {repo} holds no file sdo reads ({', '.join(SUFFIXES)})")
    shown = ", ".join(readable[:6]) + (" …" if len(readable) > 6 else "")
    raise ValueError(f"the dataset {repo} holds several files; name one, as in {repo}:{readable[0]}. There are {shown}")
