"""What gpu/check.py measures: models and sizes, gradient rules, their recipe, the plan of the pruned rollouts."""

from dataclasses import dataclass
from pathlib import Path

import torch

from sdo_cli.bench.variants import Variant, load_variants
from sdo_cli.drawing.draw import draw_settings, make_route
from sdo_cli.drawing.pruned import made_for, wiring_of
from sdo_cli.estimate.network import encoded
from sdo_cli.estimate.pipelines import plain_family
from sdo_cli.models.load import source_of
from sdo_cli.models.single_file import CONFIGS
from sdo_cli.prune.baselines import every
from sdo_cli.recipe.load import LoadedRecipe, load_recipe
from sdo_cli.skipping.skip_plan import SkipPlan

# most important first: what there is no time for is left out from the end
ARMS = {
    "SDO": "sdo",
    "full": "full",
    "SDO, pruned rollouts": "sdo:rollout.skip_plan={plan}",
    "SDO, four updates a rollout": "sdo:rollout.updates=4",
    "SDO, four updates a ten-call rollout": "sdo:rollout.updates=4,rollout.num_inference_steps={computed}",
    "SDO, back through a small decoder": "sdo:decoder=tiny-jacobian,tiny_decoder={tiny}",
    "SDO, scored and sent back one by one": "sdo:score_micro_batch=1,shortcut_micro_batch=1",
    "DRaFT-1": "draft-k:k=1",
    "SDO, K = 2": "sdo:steps_per_sample=2",
    "SDO, K = 4": "sdo:steps_per_sample=4",
    "ReFL": "refl",
    "DRTune": "drtune",
    "AlignProp": "alignprop",
    "full, blocks recomputed": "full:checkpointing=blocks",
}
# what every ratio is against: whole calls are recomputed, so that N latents are all it keeps
REFERENCE = "full"

RECIPE = """
model: {model}
rewards:
  - name: clip-score
    options: {clip}
prompts:
  lines: [a lighthouse in thick fog, a red bus in the rain, a tiger on a sofa, a bowl of ripe lemons,
          an old man reading, a castle on a hill, a green bicycle, two boats at dawn]
max_train_steps: 1
train_batch_size: {batch}
solver: ddim
num_inference_steps: {steps}
guidance_scale: 7.5
height: {pixels}
width: {pixels}
mixed_precision: {precision}
reward_precision: {precision}
lora: {{rank: 8}}
"""


@dataclass(frozen=True)
class Cell:
    """One model at one size.

    Attributes:
        kind: of the model; cells of one kind share its weights.
        computed: network calls that the pruned rollout makes.
        tiny: for a test of the script: small random models of the same classes.
    """

    name: str
    kind: str
    pixels: int
    batch: int
    steps: int = 50
    computed: int = 10
    precision: str = "bf16"
    tiny: bool = False


FULL_SIZE = (
    Cell("SD 1.5, 512 px, batch 8", "sd15", 512, 8),
    Cell("SD 1.5, 512 px, batch 1", "sd15", 512, 1),
    Cell("SDXL, 1024 px, batch 1", "sdxl", 1024, 1),
)
TINY = (
    Cell("small SD 1.5, batch 2", "sd15", 64, 2, 4, 1, "no", tiny=True),
    Cell("small SDXL, batch 1", "sdxl", 64, 1, 4, 1, "no", tiny=True),
)


def write_recipe(cell: Cell, folder: Path, *, configs_only: bool = False) -> Path:
    """The recipe of a cell.

    Args:
        folder: of the weights.
        configs_only: for counting, which needs none.
    """
    model = CONFIGS / cell.kind if configs_only and not cell.tiny else folder / cell.kind
    clip = f"{{model: ViT-L-14-quickgelu, pretrained: {folder / 'clip-l14.safetensors'}}}"
    shown = {key: getattr(cell, key) for key in ("batch", "steps", "pixels", "precision")}
    path = folder / f"{cell.kind}-{cell.batch}{'-counted' if configs_only else ''}.yaml"
    path.write_text(RECIPE.format(model=model, clip="{model: embedded}" if cell.tiny else clip, **shown))
    return path


def write_plan(cell: Cell, recipe: Path) -> Path:
    """A skip plan without a search: whole calls at even intervals, their output repeated in between."""
    loaded = load_recipe(str(recipe)).recipe
    source, settings = source_of(loaded), draw_settings(loaded)
    family = plain_family(source, torch.float32)
    wiring = wiring_of(family, "blocks", encoded(source, "no", 1))
    runs = every(make_route(family, settings).calls, cell.computed)[:, None].expand(-1, len(wiring.units)).clone()
    path = recipe.with_suffix(".plan.json")
    SkipPlan(made_for(family, settings), "blocks", wiring, runs, {"method": "uniform calls"}).save(path)
    return path


def write_tiny(cell: Cell, folder: Path) -> Path:
    """A small decoder of TAESD's size, or of a small model's latents, with random weights."""
    from diffusers import AutoencoderTiny

    path = folder / f"tiny-{cell.kind}"
    if not path.exists():
        torch.manual_seed(0)
        if cell.tiny:
            stages = plain_family(source_of(load_recipe(str(write_recipe(cell, folder))).recipe), torch.float32)
            widths, blocks = (8,) * stages.vae_factor.bit_length(), (1,) * stages.vae_factor.bit_length()
            tiny = AutoencoderTiny(
                encoder_block_out_channels=widths,
                decoder_block_out_channels=widths,
                num_encoder_blocks=blocks,
                num_decoder_blocks=blocks,
            )
        else:
            tiny = AutoencoderTiny()
        # random weights make black, and a random VAE grey
        tiny.decoder.layers[-1].bias.data.fill_(0.5)
        tiny.save_pretrained(path)
    return path


def load_arms(cell: Cell, folder: Path, *, configs_only: bool = False) -> dict[str, tuple[Variant, LoadedRecipe]]:
    """Every arm of a cell by its name, with its checked recipe."""
    recipe = write_recipe(cell, folder, configs_only=configs_only)
    plan = write_plan(cell, recipe)
    tiny = write_tiny(cell, folder)
    rules = [rule.format(plan=plan, tiny=tiny, computed=max(4, cell.computed)) for rule in ARMS.values()]
    return dict(zip(ARMS, load_variants(str(recipe), (), rules).items(), strict=True))
