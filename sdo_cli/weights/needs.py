"""Which weights a recipe needs and whether they are on this machine."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import rewards
from sdo_cli import embedded
from sdo_cli.errors import EnvironmentFault
from sdo_cli.hub import MissingWeights, WeightFile, cached_file, is_offline, is_reachable
from sdo_cli.installed import sdo
from sdo_cli.models.catalog import MODELS, hub_lora, tiny_source
from sdo_cli.models.folder import has_weights, parts_of, weights_of
from sdo_cli.recipe.schema import Recipe, RewardSpec


@dataclass(frozen=True)
class Need:
    """Attributes:
    what: for people: ``model``, ``vae``, ``reward hps-v2.1``.
    source: repository, repository/file, or local path.
    size: bytes, 0 when not known.
    licence: of the weights, empty when not known.
    revision: asked for; None is the default branch.
    present: whether it is on this machine.
    file: one file of the hub; None for a whole model or a local path.
    is_local: a path, which sdo cannot fetch.
    """

    what: str
    source: str
    size: int
    licence: str
    revision: str | None
    present: bool
    file: WeightFile | None = None
    is_local: bool = False


def needs_of(recipe: Recipe) -> list[Need]:
    """Everything the recipe loads that does not ship with sdo, in the order it is loaded."""
    found = [_model("model", recipe.model, recipe.revision, recipe.variant, t5=recipe.t5)]
    if recipe.vae is not None:
        found.append(_model("vae", recipe.vae, None, None, is_vae=True))
    if recipe.decoder != "full" and recipe.tiny_decoder is not None:
        found.append(_model("tiny decoder", tiny_source(recipe.tiny_decoder), None, None, is_vae=True))
    if recipe.text_encoders is not None:
        path = Path(recipe.text_encoders).expanduser()
        found.append(Need("text encoders", recipe.text_encoders, 0, "", None, path.exists(), is_local=True))
    for what, lora in (("LoRA to start from", recipe.lora.start_from), ("LoRA that draws", recipe.rollout.lora)):
        if lora is not None:
            found.append(_lora(what, lora))
    for spec in reward_specs(recipe):
        found += _of_reward(spec, reward_options(spec, recipe))
    return _each_once(found)


def needs_of_rewards(specs: Iterable[RewardSpec]) -> list[Need]:
    """Of rewards alone, with the options they have: nothing is filled in."""
    return _each_once(need for spec in specs for need in _of_reward(spec, spec.options))


def _each_once(found: Iterable[Need]) -> list[Need]:
    unique: dict[str, Need] = {}
    for need in found:
        if embedded.is_embedded(need.source):
            continue
        # one file may serve several rewards
        other = unique.get(need.source)
        what = need.what if other is None or need.what in other.what else f"{other.what}, {need.what}"
        unique[need.source] = replace(need, what=what)
    return list(unique.values())


def reward_specs(recipe: Recipe) -> list[RewardSpec]:
    """Every reward a run loads: trained, measured, of the guard, and what embeds the guard's images."""
    found = [*recipe.rewards, *recipe.validation.rewards]
    if recipe.guard.steps:
        found += recipe.guard.rewards
        if not any(rewards.full_name(spec.name) in ("clip-score", "clip-embedded") for spec in found):
            found.append(RewardSpec("clip-score"))
    return found


def reward_options(spec: RewardSpec, recipe: Recipe) -> dict[str, Any]:
    """A reward's options as the recipe means them: an embedded model goes with embedded rewards."""
    if embedded.is_embedded(recipe.model):
        return rewards.with_embedded(spec.name, spec.options)
    return dict(spec.options)


def _of_reward(spec: RewardSpec, options: Mapping[str, Any]) -> Iterator[Need]:
    what = f"reward {rewards.full_name(spec.name)}"
    for file in rewards.needed_files(spec.name, options):
        yield Need(what, str(file), file.size, file.licence, file.revision, cached_file(file) is not None, file)
    for path in rewards.missing_paths(spec.name, options):
        yield Need(what, path, 0, "", None, False, is_local=True)


def _lora(what: str, path: str) -> Need:
    if (file := hub_lora(path)) is not None:
        return Need(what, str(file), file.size, file.licence, None, cached_file(file) is not None, file)
    return Need(what, path, 0, "", None, Path(path).expanduser().exists(), is_local=True)


def _model(
    what: str, model: str, revision: str | None, variant: str | None, *, t5: bool = True, is_vae: bool = False
) -> Need:
    looks_local = (
        model.startswith(("/", ".", "~")) or model.endswith((".safetensors", ".ckpt")) or model.count("/") != 1
    )
    if embedded.is_embedded(model) or Path(model).expanduser().exists() or looks_local:
        return Need(what, model, 0, "", None, Path(model).expanduser().exists(), is_local=True)
    known = MODELS.get(model)
    folder = snapshot(model, revision)
    if is_vae:
        present = folder is not None and bool(weights_of([path.name for path in folder.glob("*")], None))
    else:
        present = folder is not None and is_whole(folder, variant, t5=t5)
    size = known.size // (2 if variant == "fp16" else 1) if known else 0
    return Need(what, model, size, known.licence if known else "", revision, present)


def snapshot(repo: str, revision: str | None) -> Path | None:
    """The folder of a repository in the cache, None when there is none; never asks the network."""
    for name in ("model_index.json", "config.json"):
        if (found := cached_file(WeightFile(repo, name, 0, "", revision))) is not None:
            return found.parent
    return None


def is_whole(folder: Path, variant: str | None, *, t5: bool = True) -> bool:
    """Whether every part that ``model_index.json`` names has its weights, config or words."""
    index = json.loads((folder / "model_index.json").read_text())
    files = {part: [path.name for path in (folder / part).glob("*")] for part in parts_of(index, t5=t5)}
    if any(not names or (has_weights(part) and not weights_of(names, variant)) for part, names in files.items()):
        return False
    # some parts may lack the variant, not all
    return variant is None or any(f".{variant}" in name for names in files.values() for name in names)


def size_text(size: int) -> str:
    """``1.7 GB``; ``size not known`` for 0."""
    if not size:
        return "size not known"
    if size < 1e6:
        return f"{size / 1e3:.0f} kB"
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def require(recipe: Recipe, name: str, overrides: Sequence[str] = ()) -> None:
    """Before anything heavy: say at once what is missing, unless it can be fetched while loading.

    Args:
        name, overrides: of the recipe, for the line to type.

    Raises:
        MissingWeights: one screen with everything that is missing.
    """
    missing = [need for need in needs_of(recipe) if not need.present]
    if cannot_be_fetched_now(missing):
        raise MissingWeights(missing_screen(missing), remedy=remedy(missing, name, overrides))


def cannot_be_fetched_now(missing: list[Need]) -> bool:
    return bool(missing) and (any(need.is_local for need in missing) or is_offline() or not is_reachable())


@contextmanager
def explaining(recipe: Recipe, name: str, overrides: Sequence[str] = ()) -> Iterator[None]:
    """Loading that fails because weights could not be fetched says what is missing, on one screen."""
    require(recipe, name, overrides)
    try:
        yield
    except EnvironmentFault as fault:
        missing = [need for need in needs_of(recipe) if not need.present]
        if not missing:
            raise
        raise MissingWeights(
            f"{fault.message}\n{missing_screen(missing)}", remedy=remedy(missing, name, overrides)
        ) from fault


@contextmanager
def explaining_rewards(specs: list[RewardSpec], *, hint: str = "") -> Iterator[None]:
    """As ``explaining``, for rewards without a recipe: pictures made elsewhere are scored.

    Args:
        hint: one more line of the remedy.
    """

    def fault(missing: list[Need]) -> MissingWeights:
        names = ",".join(dict.fromkeys(spec.name for spec in specs if needs_of_rewards([spec])))
        toys = [rewards.TOYS[spec.name] for spec in specs if spec.name in rewards.TOYS]
        lines = ["check the paths"]
        if any(not need.is_local for need in missing):
            lines = [f"get them where there is a network:  {sdo('fetch', '--rewards', names)}"]
            lines.append("     (then copy the folder HF_HOME from there), or name local files with --option")
        if hint:
            lines.append(f"     {hint}")
        if toys:
            lines.append(f"     to try sdo without any weights, by the package's toy:  --rewards {','.join(toys)}")
        return MissingWeights(missing_screen(missing, "rewards'"), remedy="\n".join(lines))

    if cannot_be_fetched_now(missing := [need for need in needs_of_rewards(specs) if not need.present]):
        raise fault(missing)
    try:
        yield
    except EnvironmentFault as other:
        if not (missing := [need for need in needs_of_rewards(specs) if not need.present]):
            raise
        raise fault(missing) from other


def missing_screen(missing: list[Need], whose: str = "recipe's") -> str:
    width = max(len(need.source) for need in missing)
    lines = [f"{len(missing)} of the {whose} weights are not on this machine:"]
    for need in missing:
        size = "no such path" if need.is_local else f"{size_text(need.size):>8}  {need.licence}"
        lines.append(f"  {need.source:<{width}}  {size}  ({need.what})")
    total = sum(need.size for need in missing)
    return "\n".join(lines + ([f"  about {size_text(total)} in all"] if total else []))


def remedy(missing: list[Need], name: str, overrides: Sequence[str] = ()) -> str:
    fetch = []
    if any(not need.is_local for need in missing):
        # a job without a file says how to write one
        typed, gap, hint = name.partition("   ")
        fetch.append(f"get them where there is a network:  {sdo('fetch', typed, *overrides)}{gap}{hint}")
    if fetch and is_offline():
        fetch.append("     (HF_HUB_OFFLINE is set here; copy the folder HF_HOME from there, or name local folders)")
    elif fetch:
        fetch.append("     (no network here? copy the folder HF_HOME from there, or name local folders in the recipe)")
    here = [f"     try sdo now, without any weights:  {sdo('finetune', '--recipe', 'quickstart')}"]
    return "\n".join((fetch or ["check the paths in the recipe"]) + here)


def revisions_of(recipe: Recipe) -> dict[str, str]:
    """What is used, for the manifest: the commit of a repository, size and time of a local file."""
    found = {}
    for need in needs_of(recipe):
        if need.is_local:
            path = Path(need.source).expanduser()
            if path.is_file():
                stat = path.stat()
                found[need.source] = f"{stat.st_size} bytes, modified {int(stat.st_mtime)}"
            continue
        folder = cached_file(need.file) if need.file else snapshot(need.source, need.revision)
        # …/snapshots/<commit>/…
        parts = list(folder.parts) if folder else []
        if "snapshots" in parts:
            found[need.source] = parts[parts.index("snapshots") + 1]
    return found
