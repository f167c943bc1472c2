"""What an evaluation draws and measures, as data: settings, variants, and the list of its images."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

from sdo_cli.drawing.draw import DrawSettings
from sdo_cli.drawing.parameters import lora_name
from sdo_cli.judges.spec import JudgeSpec
from sdo_cli.models.load import ModelSource
from sdo_cli.models.lora_files import lora_hash
from sdo_cli.models.lora_stack import exact
from sdo_cli.recipe.schema import RewardSpec
from sdo_cli.seeding import key_to_seed

BASE = "base"
# rewards that stand on a CLIP as it is, first that of published weights
EMBEDDERS = ("clip-score", "clip-embedded")


@dataclass(frozen=True)
class EvalPrompt:
    """One prompt of the set.

    Attributes:
        category: empty when the set has none.
        names: of its file or row, by which pictures may be called; one for each column that has such, maybe empty.
        picture: the file of its picture, where the set says so.
    """

    text: str
    category: str = ""
    names: tuple[str, ...] = ()
    picture: str = ""


@dataclass(frozen=True)
class Prompts:
    """The prompts of an evaluation and where they came from."""

    name: str
    source: str
    prompts: list[EvalPrompt]

    @property
    def categories(self) -> list[str]:
        return list(dict.fromkeys(p.category for p in self.prompts if p.category))

    @property
    def fingerprint(self) -> str:
        return digest([[p.text, p.category] for p in self.prompts])


@dataclass(frozen=True)
class Item:
    """One image.

    Attributes:
        file: ``00012_00.png``, or the path inside a folder that was made elsewhere.
        prompt, seed_index: its place in the table of scores.
        text, category: of its prompt.
        seed: its noise is that of ``torch.Generator("cpu").manual_seed(seed)``; None when not known.
    """

    file: str
    prompt: int
    seed_index: int
    text: str
    category: str
    seed: int | None


@dataclass(frozen=True)
class Variant:
    """What images are made by: a LoRA and its scale, the plain model, or a folder made elsewhere.

    Attributes:
        name: of its folder and in tables; ``base`` for the plain model.
        lora: run folder, file or hub id; None for the plain model.
        fingerprint: of its weight file or images; None for a hub id.
        folder: of images made elsewhere.
        items: of such a folder: under which prompt each picture is scored, settled once.
        plan: the file of a skip plan, and ``plan_fingerprint`` of what it says.
    from_step: where the LoRA comes in; the plain model draws the steps before.
    """

    name: str
    lora: str | None = None
    scale: float = 1.0
    fingerprint: str | None = None
    folder: str | None = None
    plan: str | None = None
    plan_fingerprint: str | None = None
    items: tuple[Item, ...] | None = None
    from_step: int = 0

    @property
    def whole(self) -> bool:
        """Every call is made, and with what there is: of such variants scales and checkpoints are compared."""
        return self.plan is None and self.from_step == 0


@dataclass(frozen=True)
class Settings:
    """What has to be the same for scores to be compared.

    ``batch_size`` is not among them: it changes no more than rounding.
    """

    model: ModelSource
    draw: DrawSettings
    precision: str
    seeds: int
    seed: int
    prompts: str  # their fingerprint

    def differences(self, other: "Settings") -> dict[str, tuple[Any, Any]]:
        """What differs but for the model, by name."""
        mine, theirs = self.flat(), other.flat()
        return {
            key: (mine[key], theirs[key]) for key in mine if mine[key] != theirs[key] and not key.startswith("model.")
        }

    def tree(self) -> dict[str, Any]:
        """As files hold it. Timesteps are in it only where they were chosen, so that older folders keep their hash."""
        tree = asdict(self)
        # evaluations of before there were these keep their hash
        for name in ("text_encoders", "rescale_betas_zero_snr", "timestep_spacing"):
            if tree["model"][name] is None:
                del tree["model"][name]
        if self.draw.timesteps is None:
            del tree["draw"]["timesteps"]
        # of a plan's file, which is named beside
        del tree["draw"]["multistep"]
        return tree

    def flat(self) -> dict[str, Any]:
        tree = asdict(self)
        for part in ("model", "draw"):
            inner = tree.pop(part)
            tree |= {f"{part}.{key}" if part == "model" else key: value for key, value in inner.items()}
        return tree


@dataclass(frozen=True)
class Job:
    """A whole evaluation.

    Attributes:
        settings: None when only folders made elsewhere are scored.
        rewards: by full name.
        reward_precision: what they compute in.
        embedding: measure diversity and distance, for which the model of ``embedder`` embeds the images.
        select_by: the measure a LoRA scale is recommended by.
        sources: by reward, digests of its code and local files; a reward that is missing was scored before there were
            these.
        distances: of networks that see two pictures, by kind: what their figures are by, package and weights.
        judges: outside this process, by name; with the version that their scores are by.
    """

    prompts: Prompts
    settings: Settings | None
    variants: list[Variant]
    rewards: dict[str, RewardSpec]
    reward_precision: str = "no"
    embedding: bool = True
    select_by: str = ""
    trained_on: list[str] = field(default_factory=list)
    sources: Mapping[str, Mapping[str, str]] = field(default_factory=dict, compare=False)
    judges: Mapping[str, JudgeSpec] = field(default_factory=dict)
    distances: Mapping[str, str] = field(default_factory=dict)

    @property
    def embedder(self) -> str | None:
        """The reward whose CLIP embeds the images; None where none of them does."""
        return next((name for name in EMBEDDERS if name in self.rewards), None)

    @property
    def baseline(self) -> str:
        """Every difference is taken to the first variant."""
        return self.variants[0].name


def items_of(prompts: Prompts, settings: Settings) -> list[Item]:
    """Every image of a variant, prompts outermost.

    The seed depends on the two indices only: more seeds or a longer set leave the others' images as they are.
    """
    return [
        Item(f"{i:05d}_{j:02d}.png", i, j, p.text, p.category, key_to_seed(settings.seed, "eval", i, j))
        for i, p in enumerate(prompts.prompts)
        for j in range(settings.seeds)
    ]


Place = tuple[int, int]


def pairs_by_seed(base: Iterable[Item], items: Iterable[Item]) -> dict[Place, Place]:
    """Places (prompt, seed_index) of ``items`` to those of the pictures of ``base`` with the same prompt and seed.

    A place alone says nothing: where a folder lacks a picture, the numbers of those after it move up. Empty where a
    picture of either states no seed, or two of one prompt state the same.
    """
    theirs, mine = _by_seed(base), _by_seed(items)
    return {mine[key]: theirs[key] for key in mine if key in theirs}


def _by_seed(items: Iterable[Item]) -> dict[tuple[int, int], Place]:
    found = {}
    for item in items:
        if item.seed is None or (item.prompt, item.seed) in found:
            return {}
        found[item.prompt, item.seed] = (item.prompt, item.seed_index)
    return found


def digest(value: Any) -> str:
    """SHA-256 of a JSON value; the same in any order of its keys."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def variants_of(
    loras: list[str],
    scales: list[float],
    *,
    base: bool,
    plans: Mapping[str, str] | None = None,
    from_steps: Sequence[int] = (0,),
) -> list[Variant]:
    """``base``, then every LoRA at every scale; scale 0 is ``base``, drawn once. Then all of them with every plan.

    Args:
        plans: fingerprints of skip plans by file.
        from_steps: where each LoRA comes in; each gives a variant.
    """
    found = _variants_of(loras, scales, from_steps, base=base)
    names = list(_names([str(Path(file).with_suffix("")) for file in plans or ()]))
    taken = {variant.name for variant in found}
    return found + [
        replace(variant, name=_free(f"{variant.name}+{name}", taken), plan=file, plan_fingerprint=fingerprint)
        for (file, fingerprint), name in zip((plans or {}).items(), names, strict=True)
        for variant in found
    ]


def _variants_of(loras: list[str], scales: list[float], from_steps: Sequence[int], *, base: bool) -> list[Variant]:
    wants_base = base or not loras or 0.0 in scales
    found = [Variant(BASE)] if wants_base else []
    names = list(_names(loras))
    for lora, name in zip(loras, names, strict=True):
        fingerprint = lora_hash(lora)
        for scale, step in product((scale for scale in scales if scale != 0), from_steps):
            suffix = "" if scale == 1 else f"@{exact(scale)}"
            late = f"-from-{step}" if step else ""
            found.append(Variant(name + suffix + late, lora, scale, fingerprint, from_step=step))
    return found


def _names(loras: list[str]) -> Iterator[str]:
    """Short names fit for a folder, each once."""
    # what an evaluation folder holds besides
    taken = {BASE, "embeddings", "report_images"}
    for lora in loras:
        yield _free(lora_name(lora), taken)


def _free(stem: str, taken: set[str]) -> str:
    """A name that is not taken yet; now it is."""
    name, count = stem, 1
    while name in taken:
        count += 1
        name = f"{stem}-{count}"
    taken.add(name)
    return name


def as_variant(entry: Mapping[str, Any]) -> Variant:
    """Read back what ``asdict`` made of one."""
    items = entry.get("items")
    return Variant(**{**entry, "items": None if items is None else tuple(Item(**item) for item in items)})


def as_settings(tree: Mapping[str, Any]) -> Settings:
    """Read back what :meth:`Settings.tree` wrote."""
    timesteps = tree["draw"].get("timesteps")
    return Settings(
        model=ModelSource(**tree["model"]),
        draw=DrawSettings(**{**tree["draw"], "timesteps": None if timesteps is None else tuple(timesteps)}),
        **{key: tree[key] for key in ("precision", "seeds", "seed", "prompts")},
    )
