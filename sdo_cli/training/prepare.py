"""From a recipe to what a run works on: models, adapter, rewards, prompts."""

from dataclasses import replace

import torch

import rewards
from rewards.base import Reward
from sdo_cli.device import dtype_of, pick_device
from sdo_cli.drawing.draw import draw_settings
from sdo_cli.drawing.prompts import PromptEmbeddings
from sdo_cli.drawing.rollouts import rollout_network, rollout_plan, rollout_settings, rollout_skips
from sdo_cli.errors import RecipeFault
from sdo_cli.gradients.rules import RULES
from sdo_cli.models.base import Family
from sdo_cli.models.compiling import compile_modules
from sdo_cli.models.load import load_family, source_of
from sdo_cli.models.tiny_decoder import TinyDecoder, load_tiny_decoder
from sdo_cli.parallel.world import SINGLE, World
from sdo_cli.recipe.load import LoadedRecipe
from sdo_cli.recipe.schema import PromptSource, Recipe, RewardSpec
from sdo_cli.scoring.latents import as_measure, check_latent_space
from sdo_cli.scoring.rewards import build_reward, try_gradient
from sdo_cli.seeding import keyed_generator
from sdo_cli.training.batches import PromptOrder
from sdo_cli.training.job import Job, make_plan
from sdo_cli.training.lora import add_lora, train_everything, trainable
from sdo_cli.training.objective import WeightedReward
from sdo_cli.training.rollouts import Rollouts
from sdo_cli.training.sharding import check_shardable
from sdo_cli.training.spreads import AT_START, Spreads
from sdo_cli.training.validate import Validation
from sdo_cli.weights.needs import explaining, reward_options


def prepare(loaded: LoadedRecipe, world: World = SINGLE, *, whole_file: bool = True) -> tuple[Job, Validation | None]:
    """Load models and rewards and put the adapter in; nothing is written.

    Prompts are encoded first and the text encoders freed, unless they are trained.

    Args:
        whole_file: False encodes only the prompts that the recipe's steps come to: none of a later step may be drawn.
    """
    if world.dealt_out:
        check_shardable(loaded.recipe, "FSDP" if world.sharded else "DeepSpeed")
    with explaining(loaded.recipe, loaded.given, loaded.overrides):
        return _load_all(loaded, world, whole_file)


def _load_all(loaded: LoadedRecipe, world: World, whole_file: bool) -> tuple[Job, Validation | None]:
    recipe, device = loaded.recipe, pick_device()
    prompts, held_out = loaded.prompts(recipe.prompts), held_out_prompts(loaded)
    family = fresh_family(recipe)
    if recipe.train == "full":
        train_everything(family)
    else:
        add_lora(family, recipe.lora, seed=recipe.seed)
    embed = PromptEmbeddings(family)
    if not recipe.lora.text_encoder:
        drawn = prompts if whole_file else _drawn(prompts, recipe, world)
        embed.prepare([*drawn, *held_out, *guard_prompts(loaded)], recipe.negative_prompt, device)
    if world.sharding is not None:
        # before the move: no device ever holds the whole network
        world.sharding.shard(family.denoiser, device, dtype_of(recipe.mixed_precision))
    family.to(device, dtype_of(recipe.mixed_precision), train_all=recipe.train == "full")
    _save_memory(family, recipe)
    trained = [
        WeightedReward(spec.name, reward_of(spec, recipe, device), spec.weight, spec.loss, spec.target or 0.0)
        for spec in recipe.rewards
    ]
    for item in trained:
        check_latent_space(item.name, item.reward, family)
        try_gradient(item.name, item.reward, prompts[0], device)
    # looked up after the move: only then are they the tensors the optimizer has to hold
    rollouts = cheap_rollouts(loaded, family)
    _save_time(family, recipe, rollouts)
    decode = small_decoder(recipe, family)
    job = Job(recipe, family, trained, prompts, trainable(family), embed, world, rollouts, decode)
    if recipe.combine.normalise != "none":
        job = replace(job, spreads=Spreads(AT_START if recipe.combine.normalise == "spread-at-start" else 0))
    check_plan(job)
    world.make_same(job.parameters)
    return job, _prepare_validation(job, held_out)


def _drawn(prompts: list[str], recipe: Recipe, world: World) -> list[str]:
    """Those that training comes to: of a file of thousands often a few."""
    return PromptOrder(prompts, recipe.seed).first(recipe.max_train_steps * recipe.global_batch(world.size))


def small_decoder(recipe: Recipe, family: Family) -> TinyDecoder | None:
    """What decodes, or what gradients go through, in place of the model's own decoder; None for that."""
    if recipe.decoder == "full":
        return None
    name = recipe.tiny_decoder or "embedded:tiny"
    return load_tiny_decoder(name, family, only_jacobian=recipe.decoder == "tiny-jacobian")


def cheap_rollouts(loaded: LoadedRecipe, family: Family) -> Rollouts | None:
    """How training draws, where the recipe wants that to cost less than sampling.

    Raises:
        RecipeFault: a skip plan or LoRA that does not fit, or that this recipe's gradients cannot be taken through.
    """
    recipe = loaded.recipe
    plan = rollout_plan(recipe, loaded.folder)
    if plan is None and recipe.rollout.lora is None and not recipe.rollout.num_inference_steps:
        return None
    settings = rollout_settings(recipe, plan)
    if (network := rollout_network(recipe, family)) is not None:
        return Rollouts(settings, network=network)
    skips = rollout_skips(recipe, plan, family, settings)
    if skips is not None and skips.exact and skips.plan.loses_gradients:
        text = (
            f"rollout.estimator: exact misses the gradients of calls that {recipe.model} makes of stored outputs alone"
        )
        raise RecipeFault([f"{text}; write whole"])
    if skips is not None and skips.exact and not skips.plan.is_whole and not recipe.gradient.negative_gradient:
        text = "gradient.negative_gradient: false runs both branches apart, which stored outputs are not; write true"
        raise RecipeFault([f"{text}, or rollout.estimator: whole"])
    return Rollouts(settings, skips)


def check_plan(job: Job) -> None:
    """Raises RecipeFault when the rule cannot draw from the calls that cheap rollouts have."""
    if job.rollouts is None or job.recipe.gradient.rule not in RULES:
        return
    try:
        make_plan(job, keyed_generator(job.recipe.seed, "plan", 0))
    except ValueError as fault:
        raise RecipeFault([f"rollout: {fault}"]) from fault


def held_out_prompts(loaded: LoadedRecipe) -> list[str]:
    """Those that are drawn before and after; none when the recipe names none."""
    spec = loaded.recipe.validation
    return [] if spec.prompts == PromptSource() else loaded.prompts(spec.prompts)[: spec.num_prompts]


def guard_prompts(loaded: LoadedRecipe) -> list[str]:
    """Those that checks for over-optimisation draw; none without checks."""
    spec = loaded.recipe.guard
    return loaded.prompts(spec.prompts)[: spec.num_prompts] if spec.steps else []


def fresh_family(recipe: Recipe) -> Family:
    """The recipe's model as it was before training."""
    # weights that are all trained stay in fp32
    return load_family(source_of(recipe), dtype=dtype_of("no" if recipe.train == "full" else recipe.mixed_precision))


def _save_memory(family: Family, recipe: Recipe) -> None:
    """What is recomputed or cut into tiles so that a step fits."""
    if recipe.gradient_checkpointing or recipe.gradient.checkpointing == "blocks":
        family.denoiser.enable_gradient_checkpointing()
    if recipe.vae_tiling:
        family.tile_vae()
    if recipe.vae_checkpointing:
        family.checkpoint_vae()


def _save_time(family: Family, recipe: Recipe, rollouts: Rollouts | None) -> None:
    """What makes calls quicker and changes nothing but the rounding."""
    if recipe.channels_last:
        family.lay_out_channels_last()
    if recipe.compile == "none":
        return
    batch = recipe.gradient.rollout_micro_batch or recipe.train_batch_size
    rows = min(batch, recipe.train_batch_size) * (2 if recipe.guidance_scale > 1.0 else 1)
    # units that are skipped at some calls are switched outside what is compiled
    units = rollouts.skips.modules.values() if rollouts is not None and rollouts.skips is not None else ()
    compile_modules(units or [family.denoiser], recipe.compile, rows)


def reward_of(spec: RewardSpec, recipe: Recipe, device: torch.device) -> Reward:
    """A reward on ``device``, as the recipe means it."""
    reward = build_reward(spec.name, reward_options(spec, recipe), device, dtype_of(recipe.reward_precision))
    if recipe.reward_checkpointing and hasattr(reward, "gradient_checkpointing"):
        reward.gradient_checkpointing()
    return reward


def _prepare_validation(job: Job, held_out: list[str]) -> Validation | None:
    if not held_out:
        return None
    recipe, spec = job.recipe, job.recipe.validation
    known = measures_of(job)
    measured = {
        name: as_measure(name, reward_of(item, recipe, pick_device()), job.family)
        for name, item in only_measured(recipe).items()
    }
    return Validation(
        prompts=held_out,
        seeds=spec.seeds,
        run_seed=recipe.seed,
        rewards=known | measured,
        settings=draw_settings(recipe),
        batch_size=spec.batch_size,
        embed=job.embed,
        world=job.world,
    )


def measures_of(job: Job) -> dict[str, Reward]:
    """The trained rewards by name, as they measure pictures that were drawn."""
    return {item.name: as_measure(item.name, item.reward, job.family) for item in job.rewards}


def only_measured(recipe: Recipe) -> dict[str, RewardSpec]:
    """The validation rewards that are not trained on, by a name for each; other options make another reward."""
    return not_trained(recipe, recipe.validation.rewards)


def not_trained(recipe: Recipe, specs: list[RewardSpec]) -> dict[str, RewardSpec]:
    """Those of ``specs`` that are not trained on, by a name for each; other options make another reward."""
    trained = [(rewards.full_name(spec.name), spec.options) for spec in recipe.rewards]
    taken = {name for name, _ in trained}
    found = {}
    for spec in specs:
        full = rewards.full_name(spec.name)
        if (full, spec.options) in trained:
            continue
        options = ", ".join(f"{key}={value}" for key, value in spec.options.items()) or "published"
        found[f"{spec.name} ({options})" if full in taken else spec.name] = spec
        taken.add(full)
    return found
