"""What a recipe names and this machine has not: found before anything is loaded, by `recipe check` and `--dry-run`."""

from sdo_cli.errors import EnvironmentFault
from sdo_cli.models.load import source_of
from sdo_cli.recipe.schema import Recipe
from sdo_cli.weights.needs import Need, needs_of


def problems_of(recipe: Recipe) -> list[str]:
    """A sentence for every path that is not there, and for target modules that name no layer of the model.

    What is still to be fetched from the hub is no problem here; `sdo doctor` lists it.
    """
    found = [_said(need) for need in needs_of(recipe) if need.is_local and not need.present]
    targets = recipe.lora.target_modules
    if targets and recipe.train == "lora" and not found:
        import torch

        from sdo_cli.estimate.pipelines import plain_family
        from sdo_cli.models.lora_targets import nowhere, said

        try:
            family = plain_family(source_of(recipe), torch.float32)
        except EnvironmentFault:
            # an architecture that is not known before its weights are fetched
            return found
        if missing := nowhere(family.denoiser, list(targets)):
            found.append(said(missing, recipe.model, list(family.lora_targets)))
    return found


def _said(need: Need) -> str:
    known = "give `embedded`, the folder of a diffusers pipeline, a .safetensors checkpoint, or a hub id (owner/name)"
    if need.what == "model":
        return f"model: nothing is at {need.source}; {known}"
    return f"{need.what}: nothing is at {need.source}; check the path"
