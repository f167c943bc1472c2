"""What to change so that a recipe fits: found by trying, each change estimated like the recipe itself."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from sdo_cli.doctor.target import Target
from sdo_cli.doctor.workload import workload_of
from sdo_cli.errors import RecipeFault
from sdo_cli.estimate.stages import Estimate, estimate
from sdo_cli.recipe.load import LoadedRecipe, load_recipe
from sdo_cli.recipe.schema import Recipe

# a change that saves less is not worth a word
WORTH = 0.99
# stages that can take the batch in pieces
MICRO = {stage: f"{stage}_micro_batch" for stage in ("rollout", "score", "shortcut")}


@dataclass(frozen=True)
class Advice:
    """Attributes:
    overrides: ``key=value`` to type, in the order they were found.
    estimate: with all of them.
    fits: False when even these are not enough.
    """

    overrides: tuple[str, ...]
    estimate: Estimate
    fits: bool


def estimate_recipe(loaded: LoadedRecipe, target: Target) -> Estimate:
    """Stages of a loaded recipe on this kind of device.

    Raises:
        EnvironmentFault: an architecture that is not known on this machine.
        RecipeFault: what only the model can say, such as the multiple its sizes must have.
    """
    return estimate(loaded.recipe, workload_of(loaded, on_cpu=target.on_cpu))


def candidates(recipe: Recipe, stage: str, half: str = "bf16") -> Iterator[tuple[str, ...]]:
    """Changes that may help a stage, by the harm they do: first what costs only time, then precision, then pictures."""
    spec, batch = recipe.gradient, recipe.train_batch_size
    trains, scores = stage in ("shortcut", "graph"), stage in ("score", "graph")
    for size in (8, 1):
        if stage == "validation" and recipe.validation.batch_size > size:
            yield (f"validation.batch_size={size}",)
    if trains and not recipe.gradient_checkpointing:
        yield ("gradient_checkpointing=true",)
    for name in ("vae_checkpointing", "reward_checkpointing"):
        if scores and not getattr(recipe, name):
            yield (f"{name}=true",)
    if stage == "graph" and spec.checkpointing == "none":
        yield ("gradient.checkpointing=calls",)
    if stage in MICRO and batch > 1 and getattr(spec, MICRO[stage]) != 1:
        yield (f"gradient.{MICRO[stage]}=1",)
    for name in ("mixed_precision", "reward_precision"):
        if getattr(recipe, name) == "no":
            yield (f"{name}={half}",)
    if recipe.optimizer == "adamw":
        yield ("optimizer=adamw8bit",)
    if stage in (*MICRO, "graph") and batch % 2 == 0:
        # the global batch stays what it was
        yield (
            f"train_batch_size={batch // 2}",
            f"gradient_accumulation_steps={2 * recipe.gradient_accumulation_steps}",
        )
    if (scores or stage == "validation") and not recipe.vae_tiling:
        yield ("vae_tiling=true",)
    if stage == "prompts" and recipe.t5:
        yield ("t5=false",)
    if recipe.train == "full":
        if recipe.optimizer != "mofasgd":
            # weights learn in another way
            yield ("optimizer=mofasgd",)
        yield ("optimizer=adamw", "train=lora") if recipe.optimizer == "mofasgd" else ("train=lora",)


def smaller_images(size: tuple[int, int]) -> Iterator[tuple[str, ...]]:
    """The last resort: three quarters and half of the size, in multiples of 64."""
    for share in (0.75, 0.5):
        height, width = (max(64, int(side * share) // 64 * 64) for side in size)
        yield f"height={height}", f"width={width}"


def advise(loaded: LoadedRecipe, target: Target, first: Estimate) -> Advice:
    """Overrides with which the recipe fits ``target``: always the least harmful change that lowers the peak."""
    kept, now = loaded, first
    added: list[str] = []
    while target.needed(now.peak) > target.memory:
        found = _next(kept, target, now, first.size)
        if found is None:
            return Advice(tuple(_latest(added)), now, fits=False)
        words, kept, now = found
        added += words
    return _without_idle(loaded, target, _latest(added), now)


def _next(
    kept: LoadedRecipe, target: Target, now: Estimate, size: tuple[int, int]
) -> tuple[tuple[str, ...], LoadedRecipe, Estimate] | None:
    """The first change that lowers the peak."""
    for words in (*candidates(kept.recipe, now.largest.name, target.half), *smaller_images(size)):
        tried = _try(kept, target, words)
        if tried is not None and tried[1].peak < WORTH * now.peak:
            return words, *tried
    return None


def _try(loaded: LoadedRecipe, target: Target, words: Iterable[str]) -> tuple[LoadedRecipe, Estimate] | None:
    """The recipe with these overrides, None when it is not allowed with them."""
    try:
        changed = load_recipe(loaded.given, [*loaded.overrides, *words])
        return changed, estimate_recipe(changed, target)
    except RecipeFault:
        return None


def _latest(words: list[str]) -> list[str]:
    """Of several values for one key the last."""
    return [f"{key}={value}" for key, value in dict(word.split("=", 1) for word in words).items()]


def _without_idle(loaded: LoadedRecipe, target: Target, words: list[str], last: Estimate) -> Advice:
    """Leave out, the most harmful first, what later changes made unnecessary."""
    for word in reversed(list(words)):
        fewer = [other for other in words if other != word]
        # these go together
        if word.startswith(("train_batch_size", "gradient_accumulation_steps", "height", "width")):
            continue
        tried = _try(loaded, target, fewer)
        if tried is not None and target.needed(tried[1].peak) <= target.memory:
            words, last = fewer, tried[1]
    return Advice(tuple(words), last, fits=True)
