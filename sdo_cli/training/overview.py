"""What a run is about to do, in one line."""

from sdo_cli.device import described
from sdo_cli.recipe.load import LoadedRecipe
from sdo_cli.training.prepare import held_out_prompts


def overview(loaded: LoadedRecipe, start: int = 0) -> str:
    """Model, device, threads, and the parts that follow.

    Args:
        start: the step it goes on from; what came before it is kept.
    """
    parts = parts_of(loaded, start)
    return f"{loaded.recipe.model} on {described()}; {len(parts)} parts: {', '.join(parts)}"


def parts_of(loaded: LoadedRecipe, start: int = 0) -> list[str]:
    """Those of a run from step ``start``, in their order."""
    recipe, held_out = loaded.recipe, len(held_out_prompts(loaded))
    last = recipe.max_train_steps
    steps = f"{last} step{'s' * (last != 1)}" if start == 0 else f"steps {start + 1} to {last}"
    if recipe.guard.steps:
        steps += f" with a check every {recipe.guard.steps}"
    parts = [steps] if start < last else []
    if held_out and start == 0:
        guided = recipe.validation.base_guidance_scale
        also = "" if guided is None else f", and with guidance {guided:g}"
        parts.insert(0, f"{held_out} held-out prompts before{also}")
    if held_out:
        parts.append("the same prompts after" if start == 0 else f"{held_out} held-out prompts after")
    return [*parts, "report"]
