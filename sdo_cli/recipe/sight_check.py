"""How rewards are put together and what they see: what goes with what."""

import rewards as reward_table
from sdo_cli.gradients.rules import RULES
from sdo_cli.recipe.rollout_check import Problem
from sdo_cli.recipe.schema import Recipe

# subsets of so many rewards are tried one by one
MOST_FOR_MGDA = 6


def check_sight(recipe: Recipe, problem: Problem) -> None:
    combine, look = recipe.combine, recipe.sight
    if combine.looks and len(recipe.rewards) < 2:
        name = "conflict" if combine.conflict != "none" else "measure"
        problem(("combine", name), "is about several rewards, and there is one; take it out")
    if combine.conflict == "mgda" and len(recipe.rewards) > MOST_FOR_MGDA:
        problem(("combine", "conflict"), f"mgda takes up to {MOST_FOR_MGDA} rewards; take projection")
    # gradients at the pictures are taken without the loss scale
    half = "fp16" in (recipe.mixed_precision, recipe.reward_precision)
    if half and (combine.looks or look.sharpness):
        key = ("combine", "conflict") if combine.looks else ("sight", "sharpness")
        problem(key, "needs gradients at the pictures, which vanish in fp16; take bf16 or no")
    _check_gate(recipe, problem)
    _check_weights(recipe, problem)
    if combine.normalise != "none" and recipe.train_batch_size * recipe.gradient_accumulation_steps < 2:
        problem(("combine", "normalise"), "one sample a step has no spread; accumulate gradients, or write none")
    if not 0 <= look.crop <= 0.9:
        problem(("sight", "crop"), f"must be a share from 0 to 0.9, not {look.crop}")
    if look.jpeg > 95:
        problem(("sight", "jpeg"), f"is the lowest quality, 1 to 95 (0: none), not {look.jpeg}")
    if look.noise > 1 or look.sharpness > 1:
        name = "noise" if look.noise > 1 else "sharpness"
        problem(("sight", name), f"is of pixels from 0 to 1, so at most 1, not {getattr(look, name)}")
    if look.views > 1 and not (look.crop or look.noise or look.jpeg):
        problem(("sight", "views"), "are all the same picture; add crop, noise or jpeg")
    blind = [
        item.name for item in recipe.rewards if reward_table.resolve(item.name) and reward_table.sees_latents(item.name)
    ]
    altered = next((name for name in ("crop", "noise", "jpeg", "sharpness") if getattr(look, name)), None)
    if blind and altered:
        problem(("sight", altered), f"alters pictures, and {blind[0]} sees latents; take it out, or another reward")
    if blind and len(blind) == len(recipe.rewards):
        if recipe.decoder != "full":
            problem(("decoder",), f"{recipe.decoder} has nothing to decode: every reward sees latents; write full")
        if recipe.vae_checkpointing:
            problem(
                ("vae_checkpointing",), "recomputes a decoder that no gradient goes through: every reward sees latents"
            )
    if look.lower_bound and look.views < 2:
        problem(("sight", "lower_bound"), f"needs the spread of several views; write views: 4, not {look.views}")


def _check_gate(recipe: Recipe, problem: Problem) -> None:
    """Something has to be gated, and something to say how uncertain a reward is."""
    if not recipe.kl_gate:
        return
    if not recipe.kl_weight:
        problem(("kl_gate",), "is about whom kl_weight holds, and it is 0; give that too, or take this out")
    several = [item for item in recipe.rewards if item.name == "mixture" and len(item.options.get("parts") or []) > 1]
    if recipe.sight.views < 2 and not several:
        problem(("kl_gate",), "needs rewards that say how uncertain they are; give sight.views, 4 say, or a mixture")


def _check_weights(recipe: Recipe, problem: Problem) -> None:
    """Live calls that can be made again on their own, and weights that there can be a copy of."""
    key, rule, info = ("gradient", "weight_sharpness"), recipe.gradient.rule, RULES.get(recipe.gradient.rule)
    if not recipe.gradient.weight_sharpness or info is None:
        return
    if recipe.train == "full":
        why = "keeps a copy of the weights and makes their gradient twice, which with train: full are the whole model's"
        problem(key, f"{why} and may lie in parts on several GPUs; write train: lora, or 0")
    if info.chained or rule == "draft-lv":
        why = "chains its live calls on one graph" if info.chained else "repeats its live call on other latents"
        problem(key, f"makes live calls again on their own, and {rule} {why}; use sdo, or write 0")
