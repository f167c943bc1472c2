"""Which recipes can be trained in shards, or with their optimizer dealt out."""

import os

from sdo_cli.errors import EnvironmentFault
from sdo_cli.recipe.schema import Recipe


def check_shardable(recipe: Recipe, by: str) -> None:
    """Accelerate's configuration asks for FSDP or DeepSpeed (``by``): does this recipe go with it?

    Raises:
        EnvironmentFault: it does not.
    """
    if recipe.train != "full":
        raise EnvironmentFault(
            f"accelerate's configuration asks for {by}, and the recipe trains a LoRA: an adapter is too small to shard",
            remedy=f"start with --gpus N, or choose multi-GPU in `accelerate config`; {by} is for train=full",
        )
    if recipe.rollout.lora is not None or recipe.rollout.skip_plan is not None or recipe.rollout.drift_steps:
        raise EnvironmentFault(
            f"accelerate's configuration asks for {by}, under which all processes make the same calls: in a skip "
            "plan they do not, and a look at the drift wants whole gradients",
            remedy="leave rollout.lora, skip_plan and drift_steps out; rollout.num_inference_steps saves time here too",
        )
    if recipe.compile != "none" or recipe.channels_last:
        raise EnvironmentFault(
            f"accelerate's configuration asks for {by}, which lays weights out in its own way: they stay as they are, "
            "and network calls are not compiled",
            remedy="set compile=none and channels_last=false",
        )
    if recipe.mixed_precision == "fp16":
        raise EnvironmentFault(
            f"accelerate's configuration asks for {by}, which cannot be trained in fp16 here: the loss scaler looks at "
            "one process's part alone",
            remedy="set mixed_precision=bf16 or no",
        )
    of_low_rank = recipe.optimizer == "mofasgd"
    if recipe.optimizer != "adamw":
        raise EnvironmentFault(
            f"accelerate's configuration asks for {by}, and optimizer {recipe.optimizer} knows no parts"
            + (": its bases belong to whole matrices" if of_low_rank else ""),
            remedy="start with --gpus N: its state is small, and little is sent; or set optimizer=adamw"
            if of_low_rank
            else "set optimizer=adamw: its state is cut up too",
        )
    theirs = os.environ.get("ACCELERATE_MIXED_PRECISION") or "no"
    # "no" is also what it says when nobody chose
    if theirs not in ("no", recipe.mixed_precision):
        raise EnvironmentFault(
            f"accelerate's configuration has mixed_precision {theirs}, the recipe {recipe.mixed_precision}",
            remedy="write the same in both; the recipe decides where accelerate's says no",
        )
