"""``gradient.rule: auto``: SDO, or full backpropagation where that costs about as much."""

from dataclasses import replace

from sdo_cli.recipe.rollout_check import training_steps
from sdo_cli.recipe.schema import GradientSpec, Recipe
from sdo_cli.sampling.solvers import calls_of

AUTO = "auto"
# the gradient of the whole way has no chance in it, which is worth some of its cost
WORTH = 1.25


def cost_of(rule: str, calls: int, *, recomputed: bool = True) -> int:
    """Network work of one picture's training step, in forward passes; a backward pass is two.

    SDO draws every call and runs one again with a graph. ``full`` has the graph of every call, which is made a second
    time in the backward pass where it is recomputed; a single call is drawn and run again, as SDO's.
    """
    return calls + 3 if rule == "sdo" else (4 if recomputed or calls == 1 else 3) * calls


def with_rule_chosen(recipe: Recipe) -> tuple[Recipe, str]:
    """The recipe with a rule in place of ``auto``, and a line that says which and why; else as it is, and nothing."""
    spec = recipe.gradient
    if spec.rule != AUTO:
        return recipe, ""
    calls = calls_of(recipe.solver, training_steps(recipe))
    recomputed = spec.checkpointing != "none"
    sdo, full = (cost_of(rule, calls, recomputed=recomputed) for rule in ("sdo", "full"))
    rule, why = ("full", "") if full <= WORTH * sdo else ("sdo", "")
    if rule == "full" and (kept := _only_for_stages(recipe)):
        rule, why = "sdo", f", and {kept} goes with rules of one step alone"
    # what belongs to the other rule means nothing here
    checkpointing = spec.checkpointing if rule == "full" else GradientSpec().checkpointing
    said = f"gradient.rule auto: {rule}; a step of {calls} call{'s' * (calls != 1)} costs sdo {sdo} and full {full}"
    chosen = replace(spec, rule=rule, checkpointing=checkpointing)
    return replace(recipe, gradient=chosen), f"{said} forward passes of the network{why}"


def _only_for_stages(recipe: Recipe) -> str:
    """What in the recipe a rule on one graph would refuse."""
    stages = ("rollout_micro_batch", "score_micro_batch", "shortcut_micro_batch")
    found = [f"gradient.{name}" for name in stages if getattr(recipe.gradient, name)]
    found += [f"rollout.{name}" for name in ("lora", "skip_plan") if getattr(recipe.rollout, name) is not None]
    found += ["rollout.updates"] if recipe.rollout.updates > 1 else []
    return found[0] if found else ""
