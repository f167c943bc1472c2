"""What a weight file of open_clip was trained with, which its architecture's name does not say.

Mean, standard deviation, resizing, interpolation and QuickGELU belong to the weights: `ViT-L-14` was published with two
means and both activations; SigLIP, CLIPA, PE, MobileCLIP and DFN have preprocessing of their own. open_clip keeps them
with its tags (``open_clip/pretrained.py``) and in the ``open_clip_config.json`` of a folder; of an architecture and a
file it takes OpenAI's preprocessing and the architecture's activation, without a word.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdo_cli.errors import EnvironmentFault

CONFIG = "open_clip_config.json"
# the answer for weights of one's own, trained with what open_clip does unless told otherwise
DEFAULT = "default"
# published files whose names end in the beginning of their hash can be of one origin only
NAMED_BY_HASH = re.compile(r"-[0-9a-f]{8}\.pth?$")
# where these differ, weights are of another architecture even if they fit; the others say where parts come from
NO_ARCHITECTURE = ("hf_", "timm_model_pretrained", "tokenizer_")


@dataclass(frozen=True)
class Trained:
    """How pictures were prepared, and the activation, when weights were trained."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    resize_mode: str
    quick_gelu: bool

    @classmethod
    def of(cls, preprocess: Mapping[str, Any], *, quick_gelu: bool) -> "Trained":
        """From open_clip's table of preprocessing; what it lacks is open_clip's default."""
        from open_clip.transform import PreprocessCfg

        given = {key: value for key, value in preprocess.items() if value is not None}
        plain = PreprocessCfg()
        mean, std = (tuple(map(float, given.get(key, getattr(plain, key)))) for key in ("mean", "std"))
        interpolation, resize = (str(given.get(key, getattr(plain, key))) for key in ("interpolation", "resize_mode"))
        return cls(mean, std, interpolation, resize, quick_gelu)

    @property
    def preprocess(self) -> dict[str, Any]:
        """As open_clip's ``force_preprocess_cfg``."""
        return {key: getattr(self, key) for key in ("mean", "std", "interpolation", "resize_mode")}

    def differences(self, other: "Trained") -> str:
        """What differs, in words: ``resize_mode is squash, not shortest``."""
        pairs = [(key, getattr(self, key), getattr(other, key)) for key in self.__dataclass_fields__]
        return ", ".join(f"{key} is {mine}, not {theirs}" for key, mine, theirs in pairs if mine != theirs)


@dataclass(frozen=True)
class Origin:
    """Attributes:
    trained: what the weights were trained with.
    source: what says so, in words.
    folder: holds the ``open_clip_config.json`` that says so; None where something else does.
    """

    trained: Trained
    source: str
    folder: Path | None = None


def origin_of(architecture: str, pretrained: str, tag: str | None) -> Origin:
    """Where weights come from: a tag; a file's ``open_clip_config.json`` beside it; its place in the hub's cache or a
    published name; what the user says; or an architecture whose tags all say the same.

    Args:
        architecture: a name open_clip knows.
        pretrained: a tag of it, or a weight file.
        tag: what the user says the file is: a tag, or ``default``.

    Raises:
        EnvironmentFault: the origin cannot be known, or what the user says contradicts it.
    """
    import open_clip

    path = Path(pretrained)
    # open_clip, too, looks for a tag first
    if open_clip.get_pretrained_cfg(architecture, pretrained):
        found: Origin | None = Origin(of_tag(architecture, pretrained), f"the tag {pretrained}")
    else:
        found = _of_config(architecture, path.parent) or _of_place(architecture, path)
    if tag is not None:
        said = _said(architecture, tag)
        if found is not None and found.trained != said.trained:
            raise EnvironmentFault(
                f"{said.source} contradicts {found.source}: {found.trained.differences(said.trained)}",
                remedy="leave `tag` out",
            )
        found = found or said
    found = found or _of_all_tags(architecture, path)
    if architecture.endswith("-quickgelu") and not found.trained.quick_gelu:
        raise EnvironmentFault(
            f"by {found.source}, {path.name} was trained without QuickGELU",
            remedy=f"name the architecture {architecture.removesuffix('-quickgelu')}",
        )
    return found


def of_tag(architecture: str, tag: str) -> Trained:
    """What open_clip keeps with a tag. Where the architecture itself says QuickGELU, the tag need not."""
    import open_clip

    told = open_clip.get_pretrained_cfg(architecture, tag)
    return Trained.of(told, quick_gelu=bool(told.get("quick_gelu")) or _is_quick(architecture))


def _is_quick(architecture: str) -> bool:
    import open_clip

    return bool((open_clip.get_model_config(architecture) or {}).get("quick_gelu"))


def _said(architecture: str, tag: str) -> Origin:
    import open_clip

    if tag == DEFAULT:
        return Origin(Trained.of({}, quick_gelu=_is_quick(architecture)), f"`tag: {tag}`")
    if not open_clip.get_pretrained_cfg(architecture, tag):
        raise EnvironmentFault(f"{architecture} has no tag {tag!r}", remedy=f"write {_choices(architecture)}")
    return Origin(of_tag(architecture, tag), f"`tag: {tag}`")


def _choices(architecture: str) -> str:
    import open_clip

    tags = open_clip.list_pretrained_tags_by_model(architecture)
    return f"`tag` with one of {', '.join([*tags, DEFAULT])}"


def _of_config(architecture: str, folder: Path) -> Origin | None:
    """What the file beside the weights says, which is what open_clip reads of a folder."""
    import open_clip

    if not (folder / CONFIG).is_file():
        return None
    try:
        told = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        model, preprocess = told["model_cfg"], told.get("preprocess_cfg") or {}
        trained = Trained.of(preprocess, quick_gelu=bool(model.get("quick_gelu")))
        other = _other_part(open_clip.get_model_config(architecture), model)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as fault:
        raise EnvironmentFault(f"cannot read {folder / CONFIG}", remedy="copy it again, or move it away") from fault
    if other:
        raise EnvironmentFault(
            f"{folder / CONFIG} describes another architecture than {architecture}: {other}",
            remedy=f"write `model: {folder}` and leave `pretrained` out, or move the weights away from it",
        )
    return Origin(trained, f"the {CONFIG} beside it", folder)


def _other_part(named: Mapping[str, Any], told: Mapping[str, Any]) -> str:
    """The first size or setting in which two tables of an architecture differ; empty where they agree."""
    for part in ("vision_cfg", "text_cfg"):
        mine, theirs = named[part], told[part]
        for key in mine.keys() & theirs.keys():
            if mine[key] != theirs[key] and not key.startswith(NO_ARCHITECTURE):
                return f"{part}.{key} is {theirs[key]}, not {mine[key]}"
    if named["embed_dim"] != told["embed_dim"]:
        return f"embed_dim is {told['embed_dim']}, not {named['embed_dim']}"
    return ""


def _of_place(architecture: str, path: Path) -> Origin | None:
    """By the hub's cache, a folder named after a repository, or a published name with a hash."""
    published = _published(path)
    if not published:
        return None
    tags = [tag for name, tag, _ in published if name == architecture]
    if not tags:
        of = " and ".join(dict.fromkeys(name for name, _, _ in published))
        raise EnvironmentFault(
            f"{path.name} is {published[0][2]}, which is of {of}, not of {architecture}",
            remedy=f"name the architecture {published[0][0]}",
        )
    return Origin(of_tag(architecture, tags[0]), f"its place, as {published[0][2]}")


def _published(path: Path) -> list[tuple[str, str, str]]:
    """Architecture, tag and a name for what the file was published as."""
    import open_clip

    # a link into the cache tells by what it points at
    repository = next((repo for place in (path.absolute(), path.resolve()) if (repo := _repository(place))), None)
    found = []
    for architecture, tag in open_clip.list_pretrained():
        told = open_clip.get_pretrained_cfg(architecture, tag)
        repo = "/".join(told.get("hf_hub", "").split("/")[:2])
        if repo and (repository == repo or (repository is None and path.absolute().parent.name == repo.split("/")[1])):
            found.append((architecture, tag, f"of the repository {repo}"))
        elif NAMED_BY_HASH.search(path.name) and told.get("url", "").endswith(f"/{path.name}"):
            found.append((architecture, tag, "a published file"))
    return found


def _repository(path: Path) -> str | None:
    """``owner/name`` of a file in the hub's cache (``models--owner--name/…``)."""
    parts = (part.split("--") for part in path.parts if part.startswith("models--"))
    return next(("/".join(words[1:]) for words in parts if len(words) == 3), None)


def _of_all_tags(architecture: str, path: Path) -> Origin:
    """What every tag says; of an architecture that nobody published, open_clip's defaults are all there is."""
    import open_clip

    tags = open_clip.list_pretrained_tags_by_model(architecture)
    plain = Trained.of({}, quick_gelu=_is_quick(architecture))
    ways = list(dict.fromkeys(of_tag(architecture, tag) for tag in tags)) or [plain]
    if len(ways) > 1:
        raise EnvironmentFault(
            f"{path.name} may have been trained in {len(ways)} ways, and {architecture} does not tell which: "
            f"{ways[1].differences(ways[0])}, for example",
            remedy=f"write {_choices(architecture)}, or put its {CONFIG} beside it",
        )
    return Origin(ways[0], f"every tag of {architecture}")
