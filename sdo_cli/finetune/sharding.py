"""Which recipes can be trained in shards."""

import os

from sdo_cli.errors import EnvironmentFault
from sdo_cli.recipe.schema import Recipe


def check_shardable(recipe: Recipe) -> None:
    """Accelerate's configuration asks for FSDP: does this recipe go with it?

    Raises:
        EnvironmentFault: it does not.
    """
    if recipe.train != "full":
        raise EnvironmentFault(
            "accelerate's configuration asks for FSDP, and the recipe trains a LoRA: an adapter is too small to shard",
            remedy="start with --gpus N, or choose multi-GPU in `accelerate config`; FSDP is for train=full",
        )
    if recipe.rollout.skip_plan is not None:
        raise EnvironmentFault(
            "accelerate's configuration asks for FSDP, and a skip plan lets processes compute different blocks",
            remedy="leave rollout.skip_plan out; rollout.num_inference_steps makes rollouts shorter here too",
        )
    if recipe.mixed_precision == "fp16":
        raise EnvironmentFault(
            "accelerate's configuration asks for FSDP, which cannot be trained in fp16 here: its loss scaler looks at "
            "one process's shards alone",
            remedy="set mixed_precision=bf16 or no",
        )
    if recipe.optimizer != "adamw":
        raise EnvironmentFault(
            f"accelerate's configuration asks for FSDP, and optimizer {recipe.optimizer} knows no shards",
            remedy="set optimizer=adamw: its state is in shards too",
        )
    theirs = os.environ.get("ACCELERATE_MIXED_PRECISION") or "no"
    # "no" is also what it says when nobody chose
    if theirs not in ("no", recipe.mixed_precision):
        raise EnvironmentFault(
            f"accelerate's configuration has mixed_precision {theirs}, the recipe {recipe.mixed_precision}",
            remedy="write the same in both; the recipe decides where accelerate's says no",
        )
