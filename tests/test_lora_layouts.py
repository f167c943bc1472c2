"""LoRA files as many programs lay them out: every layer at its place and strength, W + scale · alpha / rank · B A."""

import json
import re
import shutil
from functools import cache

import numpy as np
import pytest
import torch
from original_names import MMDIT_HEADS, MMDIT_LAYERS, original_unet
from peft import LoraConfig
from PIL import Image
from safetensors.torch import load_file, save_file
from small_models import FAMILY_OF, plain

from sdo_cli.drawing.parameters import lora_name, lora_tags
from sdo_cli.errors import EnvironmentFault, RecipeFault
from sdo_cli.evaluation.job import variants_of
from sdo_cli.models.kohya import sgm_name
from sdo_cli.models.load import load_family
from sdo_cli.models.lora_files import published
from sdo_cli.models.lora_places import places_of
from sdo_cli.models.lora_read import read_lora
from sdo_cli.models.lora_stack import Stacked, joined, stack_of
from sdo_cli.recipe.schema import LoraSpec
from sdo_cli.steering.variables_file import whole_lora
from sdo_cli.training.lora import add_lora

SUFFIX = {"down": "lora_down.weight", "up": "lora_up.weight"}
PEFT = {"down": "lora_A.weight", "up": "lora_B.weight"}


@pytest.fixture(scope="module")
def family_of(small):
    """family_of(kind) -> loaded once; :func:`difference` takes LoRAs out again."""
    return cache(lambda kind: load_family(str(small(kind))))


@pytest.fixture(scope="module")
def base(small):
    """base(kind) -> the weights of every layer by (component, published name)."""
    made = {}

    def of(kind):
        if kind not in made:
            made[kind] = weights_of(plain(small(kind)))
        return made[kind]

    return of


def weights_of(pipe):
    found = {}
    for component in ("unet", "transformer", "text_encoder", "text_encoder_2"):
        part = getattr(pipe, component, None)
        for name, module in part.named_modules() if part is not None else ():
            if isinstance(module, torch.nn.Linear | torch.nn.Conv2d) and "lora_" not in name:
                key = component, published(component, name.removesuffix(".base_layer"))
                found[key] = module.weight.detach().clone()
    return found


def made(weights, chosen, *, rank=4, alpha=2.0, seed=3):
    """Halves of these layers, and what they add."""
    generator, pairs, added = torch.Generator().manual_seed(seed), {}, {}
    for key, weight in weights.items():
        if not re.search(chosen, f"{key[0]}.{key[1]}"):
            continue
        down = 0.1 * torch.randn(rank, *weight.shape[1:], generator=generator)
        up = 0.1 * torch.randn(weight.shape[0], rank, *[1] * (weight.dim() - 2), generator=generator)
        pairs[key] = {"down": down, "up": up}
        added[key] = alpha / rank * (up.flatten(1) @ down.flatten(1)).view_as(weight)
    assert pairs
    return pairs, added


def difference(family, weights, added):
    """The largest error of any layer, as a share of what the LoRA adds at most; the family is then as it was."""
    from peft.tuners.lora import LoraLayer

    largest = max(value.abs().max() for value in added.values())
    changed, worst = set(), 0.0
    for component, part in parts_of(family).items():
        for name, layer in part.named_modules():
            if isinstance(layer, LoraLayer):
                key = component, published(component, name)
                changed.add(key)
                layer.merge()
                now = layer.get_base_layer().weight.detach().clone()
                layer.unmerge()
                worst = max(worst, ((now - weights[key] - added.get(key, 0.0)).abs().max() / largest).item())
    assert changed == set(added)
    family.pipeline.unload_lora_weights()
    return worst


def file_of(tmp_path, state, name="x.safetensors"):
    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / name)
    return tmp_path / name


ATTENTION = r"attn\d?\.(to_|add_)|self_attn\.\w+_proj"
DENOISER = r"^(unet|transformer)\..*attn\d?\.(to_|add_)"


def kohya(component, module):
    prefix = {"unet": "lora_unet", "transformer": "lora_transformer", "text_encoder_2": "lora_te2"}
    return f"{prefix.get(component, 'lora_te')}_{module.replace('.', '_')}"


def old_diffusers(component, module):
    """Attention processors, as up to diffusers 0.18."""
    stem, _, last = module.removesuffix(".0").rpartition(".")
    last = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}.get(last, last)
    return f"{component}.{stem}.{'processor.' if component == 'unet' else ''}{last}_lora"


# name(component, module) and the halves' endings, and whether alpha has a key of its own
LAYOUTS = {
    "kohya": (kohya, SUFFIX, True),
    "kohya, dots in original blocks (ComfyUI)": (None, SUFFIX, True),
    "diffusers": (lambda c, m: f"{c}.{m}", PEFT, False),
    "diffusers, with alpha keys (OneTrainer, SimpleTuner)": (lambda c, m: f"{c}.{m}", PEFT, True),
    "diffusers' training scripts, text encoders": (
        lambda c, m: f"{c}.{m}",
        {"down": "lora.down.weight", "up": "lora.up.weight"},
        False,
    ),
    "diffusers, linear layers": (
        lambda c, m: f"{c}.{m}",
        {"down": "lora_linear_layer.down.weight", "up": "lora_linear_layer.up.weight"},
        False,
    ),
    "adapter names in keys": (
        lambda c, m: f"{c}.{m}",
        {"down": "lora_A.default.weight", "up": "lora_B.default.weight"},
        False,
    ),
    "torch.compile": (lambda c, m: f"{c}._orig_mod.{m}", PEFT, False),
    "peft": (lambda c, m: f"base_model.model.{m}", PEFT, False),
    "no prefix": (lambda c, m: m, PEFT, False),
}
OF_THE_DENOISER = ("peft", "no prefix", "torch.compile", "kohya, dots in original blocks (ComfyUI)")


def name_in(layout, component, module):
    if layout.startswith("kohya, dots"):
        return f"diffusion_model.{sgm_name(module, 1)}"
    return LAYOUTS[layout][0](component, module)


@pytest.mark.parametrize("kind", ["sd15", "sdxl", "sd35"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layer_is_added_at_its_strength(layout, kind, family_of, base, tmp_path):
    if layout.startswith("kohya, dots") and kind == "sd35":
        pytest.skip("has its own test")
    _, endings, own_alpha = LAYOUTS[layout]
    alpha = 2.0 if own_alpha else 4.0
    pairs, added = made(base(kind), DENOISER if layout in OF_THE_DENOISER else ATTENTION, alpha=alpha)
    state = {}
    for (component, module), pair in pairs.items():
        name = name_in(layout, component, module)
        state |= {f"{name}.{endings[half]}": value for half, value in pair.items()}
        if own_alpha:
            state[f"{name}.alpha"] = torch.tensor(alpha)
    family = family_of(kind)
    family.load_lora(str(file_of(tmp_path, state)))
    assert difference(family, base(kind), added) < 1e-4


def test_processors_of_old_diffusers(family_of, base, tmp_path):
    pairs, added = made(base("sd15"), ATTENTION, alpha=4.0)
    state = {
        f"{old_diffusers(*key)}.{half}.weight": value for key, pair in pairs.items() for half, value in pair.items()
    }
    family = family_of("sd15")
    family.load_lora(str(file_of(tmp_path, state)))
    assert difference(family, base("sd15"), added) < 1e-4


def test_two_spellings_and_two_programs_in_one_file(family_of, base, tmp_path):
    """diffusers' own scripts write proj_in otherwise than attention; the first spelling in the file won."""
    pairs, added = made(base("sdxl"), r"attn\d?\.to_|proj_in|self_attn\.\w+_proj", alpha=4.0)
    state = {}
    for (component, module), pair in pairs.items():
        if component.startswith("text"):
            prefix = "lora_te1" if component == "text_encoder" else "lora_te2"
            name, endings = f"{prefix}_{module.replace('.', '_')}", SUFFIX
        else:
            name = f"{component}.{module}"
            endings = PEFT if "proj_in" in module else {"down": "lora.down.weight", "up": "lora.up.weight"}
        state |= {f"{name}.{endings[half]}": value for half, value in pair.items()}
    family = family_of("sdxl")
    family.load_lora(str(file_of(tmp_path, state)))
    assert difference(family, base("sdxl"), added) < 1e-4


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_original_block_names_of_every_layer(kind, small, family_of, base, tmp_path):
    pairs, added = made(base(kind), r"^unet\.")
    attended = [hasattr(block, "attentions") for block in plain(small(kind)).unet.up_blocks]
    state = {}
    for (_, module), pair in pairs.items():
        name = original_unet(f"{module}.weight", 1, attended).removesuffix(".weight").replace(".", "_")
        state |= {f"lora_unet_{name}.{SUFFIX[half]}": value for half, value in pair.items()}
        state[f"lora_unet_{name}.alpha"] = torch.tensor(2.0)
    family = family_of(kind)
    family.load_lora(str(file_of(tmp_path, state)))
    assert difference(family, base(kind), added) < 1e-4


def mmdit_name(module, last):
    """Stability's name, and what stands otherwise in it: a third of q, k and v, or halves swapped."""
    if hit := next((new for old, new in MMDIT_HEADS.items() if f"{module}.".startswith(old)), None):
        return hit.removesuffix("."), None, module == "norm_out.linear"
    number, rest = re.fullmatch(r"transformer_blocks\.(\d+)\.(.*)", module).groups()
    packed = {"attn.to_": "x_block.attn.qkv", "attn.add_": "context_block.attn.qkv", "attn2.to_": "x_block.attn2.qkv"}
    for start, name in packed.items():
        if (found := re.fullmatch(re.escape(start) + r"([qkv])(_proj)?", rest)) is not None:
            return f"joint_blocks.{number}.{name}", "qkv".index(found[1]), False
    name = next(new for old, new in MMDIT_LAYERS.items() if f"{rest}." == old).removesuffix(".")
    return f"joint_blocks.{number}.{name}", None, rest == "norm1_context.linear" and int(number) == last


@pytest.mark.parametrize("prefix", ["lora_unet_", "diffusion_model."])
def test_sd_scripts_names_of_sd3_with_one_matrix_for_queries_keys_and_values(prefix, family_of, base, tmp_path):
    weights = {key: w for key, w in base("sd35").items() if key[0] == "transformer"}
    last = max(int(m.split(".")[1]) for _, m in weights if m.startswith("transformer_blocks."))
    generator, state, added, rank = torch.Generator().manual_seed(5), {}, {}, 4
    packed = {}
    for (component, module), weight in weights.items():
        name, third, swapped = mmdit_name(module, last)
        if third is None:
            down = 0.1 * torch.randn(rank, *weight.shape[1:], generator=generator)
            up = 0.1 * torch.randn(weight.shape[0], rank, *[1] * (weight.dim() - 2), generator=generator)
            there = torch.cat(up.chunk(2)[::-1]) if swapped else up
            state |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": there}
        else:
            if name not in packed:
                packed[name] = (
                    0.1 * torch.randn(rank, weight.shape[1], generator=generator),
                    0.1 * torch.randn(3 * weight.shape[0], rank, generator=generator),
                )
            down, up = packed[name][0], packed[name][1].chunk(3)[third]
            state |= {f"{name}.lora_down.weight": packed[name][0], f"{name}.lora_up.weight": packed[name][1]}
        state[f"{name}.alpha"] = torch.tensor(2.0)
        added[component, module] = 0.5 * (up.flatten(1) @ down.flatten(1)).view_as(weight)
    names = {key: key if prefix.endswith(".") else key.rsplit(".lora", 1)[0].removesuffix(".alpha") for key in state}
    if not prefix.endswith("."):
        names = {key: stem.replace(".", "_") + key.removeprefix(stem) for key, stem in names.items()}
    family = family_of("sd35")
    family.load_lora(str(file_of(tmp_path, {prefix + names[key]: value for key, value in state.items()})))
    assert difference(family, base("sd35"), added) < 1e-4


def test_projections_as_matrices_and_as_convolutions(family_of, base, tmp_path):
    for kind in ("sd15", "sdxl"):
        pairs, added = made(base(kind), r"^unet\..*proj_(in|out)$")
        state = {}
        for (component, module), pair in pairs.items():
            for half, value in pair.items():
                other = value.flatten(1) if value.dim() == 4 else value[:, :, None, None]
                state[f"{kohya(component, module)}.{SUFFIX[half]}"] = other
            state[f"{kohya(component, module)}.alpha"] = torch.tensor(2.0)
        family = family_of(kind)
        family.load_lora(str(file_of(tmp_path, state)))
        assert difference(family, base(kind), added) < 1e-4


def test_three_factors_of_a_convolution(family_of, base, tmp_path):
    """LyCORIS' Tucker form, its own equation."""
    state, added, generator = {}, {}, torch.Generator().manual_seed(2)
    for key, weight in base("sd15").items():
        if key[0] == "unet" and key[1].endswith("conv1"):
            down, up = (0.3 * torch.randn(4, n, 1, 1, generator=generator) for n in weight.shape[1::-1])
            mid = 0.3 * torch.randn(4, 4, *weight.shape[2:], generator=generator)
            up = up.transpose(0, 1)
            name = kohya(*key)
            state |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.lora_mid.weight": mid}
            added[key] = torch.einsum("or,rskl,si->oikl", up.flatten(1), mid, down.flatten(1))
    family = family_of("sd15")
    family.load_lora(str(file_of(tmp_path, state)))
    assert difference(family, base("sd15"), added) < 1e-4


def test_three_factors_in_half_precision_are_multiplied_in_float32(family_of, base, tmp_path):
    """Their product was rounded to the file's precision: 3e-4 of what is added."""
    state, added, generator = {}, {}, torch.Generator().manual_seed(2)
    for key, weight in base("sd15").items():
        if key[0] == "unet" and key[1].endswith("conv1"):
            down, up = (0.3 * torch.randn(4, n, 1, 1, generator=generator).half() for n in weight.shape[1::-1])
            mid = 0.3 * torch.randn(4, 4, *weight.shape[2:], generator=generator).half()
            up = up.transpose(0, 1)
            name = kohya(*key)
            state |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.lora_mid.weight": mid}
            factors = up.flatten(1).double(), mid.double(), down.flatten(1).double()
            added[key] = torch.einsum("or,rskl,si->oikl", *factors).float()
    family = family_of("sd15")
    family.load_lora(str(file_of(tmp_path, state)))
    assert difference(family, base("sd15"), added) < 1e-5


@pytest.mark.parametrize(
    "noted", ["[1]", "null", "3", "{", "", '{"unet.lora_alpha": "much"}', '{"unet.alpha_pattern": [4]}']
)
def test_settings_in_a_header_that_are_none(noted, base, small, tmp_path):
    import entry

    pairs, _ = made(base("sd15"), r"^unet\.mid_block.*attn2\.to_k")
    state = {f"{'.'.join(key)}.{PEFT[half]}": value for key, pair in pairs.items() for half, value in pair.items()}
    save_file(state, tmp_path / "x.safetensors", metadata={"lora_adapter_metadata": noted})
    done = entry.run(["sample", "a", "-m", str(small("sd15")), "--lora", "x.safetensors"], cwd=tmp_path)
    assert done.returncode == 2 and "in the header of x.safetensors" in done.stderr, done.stderr
    # peft's own file beside the weights
    (tmp_path / "p").mkdir()
    save_file(state, tmp_path / "p" / "adapter_model.safetensors")
    (tmp_path / "p" / "adapter_config.json").write_text(noted.replace("unet.", ""))
    done = entry.run(["sample", "a", "-m", str(small("sd15")), "--lora", "p"], cwd=tmp_path)
    assert done.returncode == 2 and "adapter_config.json" in done.stderr, done.stderr


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float8_e4m3fn"])
def test_every_precision_a_file_may_have(dtype, family_of, base, tmp_path):
    pairs, _ = made(base("sd15"), DENOISER)
    kept = {key: {h: v.to(getattr(torch, dtype)) for h, v in pair.items()} for key, pair in pairs.items()}
    added = {key: 0.5 * p["up"].float() @ p["down"].float() for key, p in kept.items()}
    state = {f"{kohya(*key)}.{SUFFIX[h]}": v for key, pair in kept.items() for h, v in pair.items()}
    state |= {f"{kohya(*key)}.alpha": torch.tensor(2.0) for key in kept}
    family = family_of("sd15")
    family.load_lora(str(file_of(tmp_path, state)))
    assert difference(family, base("sd15"), added) < 2e-3


# DoRA


def dora(weight, pair, magnitude, alpha=2.0):
    total = weight + alpha / 4 * (pair["up"].flatten(1) @ pair["down"].flatten(1)).view_as(weight)
    norms = total.flatten(1).norm(dim=1)
    return total * (magnitude / norms).view(-1, *[1] * (weight.dim() - 1)) - weight


@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
def test_dora_is_applied(layout, family_of, base, tmp_path):
    """Liu et al. 2024 (arXiv 2402.09353), eq. 5: rows of the sum, each with its learned norm."""
    pairs, _ = made(base("sd15"), r"^unet\..*(attn\d?\.to_|conv1$)|^text_encoder\.")
    generator, state, added = torch.Generator().manual_seed(4), {}, {}
    for key, pair in pairs.items():
        weight = base("sd15")[key]
        magnitude = weight.flatten(1).norm(dim=1) * (1 + 0.2 * torch.randn(len(weight), generator=generator))
        added[key] = dora(weight, pair, magnitude)
        if layout == "kohya":
            state |= {f"{kohya(*key)}.{SUFFIX[half]}": value for half, value in pair.items()}
            state |= {f"{kohya(*key)}.alpha": torch.tensor(2.0)}
            state[f"{kohya(*key)}.dora_scale"] = magnitude.view(-1, *[1] * (weight.dim() - 1))
        else:
            name = ".".join(key)
            state |= {f"{name}.{PEFT[half]}": value for half, value in pair.items()} | {
                f"{name}.alpha": torch.tensor(2.0),
                f"{name}.lora_magnitude_vector": magnitude,
            }
    family = family_of("sd15")
    family.load_lora(str(file_of(tmp_path, state)))
    assert difference(family, base("sd15"), added) < 1e-4


def test_dora_with_norms_of_columns_is_refused(family_of, base, tmp_path):
    pairs, _ = made(base("sd15"), r"^unet\.mid_block.*attn2\.to_k")
    (key, pair), *_ = pairs.items()
    state = {f"{kohya(*key)}.{SUFFIX[half]}": value for half, value in pair.items()}
    state[f"{kohya(*key)}.dora_scale"] = torch.ones(1, base("sd15")[key].shape[1])
    with pytest.raises(EnvironmentFault, match="norms"):
        family_of("sd15").load_lora(str(file_of(tmp_path, state)))


def test_a_file_with_two_pairs_for_one_layer_or_dora_in_part_is_refused(family_of, base, tmp_path):
    pairs, _ = made(base("sd15"), r"^unet\.mid_block.*attn2\.to_[kv]")
    (key, pair), (other, second), *_ = pairs.items()
    state = {f"{kohya(*key)}.{SUFFIX[half]}": value for half, value in pair.items()}
    twice = state | {f"{'.'.join(key)}.{PEFT[half]}": value.clone() for half, value in pair.items()}
    with pytest.raises(EnvironmentFault, match=f"two pairs for one layer, {'.'.join(key)}"):
        family_of("sd15").load_lora(str(file_of(tmp_path, twice)))
    part = state | {f"{kohya(*other)}.{SUFFIX[half]}": value for half, value in second.items()}
    part[f"{kohya(*other)}.dora_scale"] = torch.ones(len(second["up"]), 1)
    with pytest.raises(EnvironmentFault, match=f"DoRA in 1 of 2 layers of the unet, .* {key[1]} first"):
        family_of("sd15").load_lora(str(file_of(tmp_path, part)))


# LyCORIS' own writer

LYCORIS = {
    "locon": {"algo": "locon"},
    "tucker": {"algo": "locon", "use_tucker": True},
    "rank-stabilised": {"algo": "locon", "rs_lora": True},
    "a learned scalar": {"algo": "locon", "use_scalar": True},
    "DoRA": {"algo": "locon", "dora_wd": True, "wd_on_output": True},
}
LYCORIS_REFUSED = {
    "DoRA of columns": ({"algo": "locon", "dora_wd": True, "wd_on_output": False}, "norms"),
    "loha": ({"algo": "loha"}, "LoHa"),
    "lokr": ({"algo": "lokr"}, "LoKr"),
    "glora": ({"algo": "glora"}, "GLoRA"),
    "ia3": ({"algo": "ia3"}, "IA3"),
    "diag-oft": ({"algo": "diag-oft"}, "OFT"),
    "boft": ({"algo": "boft"}, "OFT"),
    "full": ({"algo": "full"}, "whole weights"),
    "norms": ({"algo": "locon", "train_norm": True}, "whole weights"),
}


def lycoris_file(pipe, settings, path):
    """Written by lycoris_lora with sd-scripts' interface; the network, for what it merges itself."""
    from lycoris.config import PRESET
    from lycoris.kohya import create_network

    encoders = [part for part in (pipe.text_encoder, getattr(pipe, "text_encoder_2", None)) if part is not None]
    text_encoder = encoders if len(encoders) > 1 else encoders[0]
    # its preset `full` names diffusers' time embedding twice
    PRESET["here"] = PRESET["full"] | {"unet_target_name": ["conv_in", "conv_out"]}
    sizes = {"conv_dim": 4, "conv_alpha": 3.0, "preset": "here", "warn_on_unmatched": False}
    torch.manual_seed(1)
    network = create_network(1.0, 4, 2.0, pipe.vae, text_encoder, pipe.unet, **sizes, **settings)
    network.apply_to(text_encoder, pipe.unet, True, True)
    with torch.no_grad():
        for value in network.parameters():
            value += 0.02 * torch.randn_like(value)
    network.save_weights(str(path), torch.float32, {"ss_network_module": "lycoris.kohya"})
    return network


@pytest.mark.parametrize(("name", "kind"), [*((name, "sd15") for name in LYCORIS), ("locon", "sdxl"), ("DoRA", "sdxl")])
def test_what_lycoris_writes_is_applied_as_lycoris_merges_it(name, kind, small, family_of, base, tmp_path):
    pipe = plain(small(kind))
    network = lycoris_file(pipe, LYCORIS[name], tmp_path / "x.safetensors")
    network.restore()
    for layer in network.loras:
        layer.merge_to(1.0)
    merged = weights_of(pipe)
    added = {key: value - base(kind)[key] for key, value in merged.items() if not torch.equal(value, base(kind)[key])}
    assert len(added) == len(network.loras) > 100
    family = family_of(kind)
    family.load_lora(str(tmp_path / "x.safetensors"))
    assert difference(family, base(kind), added) < 1e-4


@pytest.mark.parametrize("name", LYCORIS_REFUSED)
def test_kinds_of_lycoris_that_are_no_lora_are_named(name, small, family_of, tmp_path):
    settings, said = LYCORIS_REFUSED[name]
    lycoris_file(plain(small("sd15")), settings, tmp_path / "x.safetensors")
    with pytest.raises(EnvironmentFault, match=said):
        family_of("sd15").load_lora(str(tmp_path / "x.safetensors"))


# folders of peft's


def test_peft_folders_are_read_with_their_settings(small, family_of, base, tmp_path):
    """Written by peft itself: alpha, patterns and rank-stabilised scaling are in adapter_config.json."""
    from peft import get_peft_model

    family = family_of("sd15")
    config = LoraConfig(
        r=4,
        lora_alpha=2,
        target_modules=["to_q", "to_k", "to_out.0"],
        alpha_pattern={"to_k": 8},
        rank_pattern={"to_q": 2},
        use_rslora=True,
    )
    model = get_peft_model(plain(small("sd15")).unet, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(name)))
    model.save_pretrained(tmp_path / "adapter")
    added = {}
    for name, module in model.base_model.model.named_modules():
        if hasattr(module, "lora_A"):
            added["unet", name] = module.get_delta_weight("default").detach()
    family.load_lora(str(tmp_path / "adapter"))
    assert difference(family, base("sd15"), added) < 1e-4
    # the file alone, beside its settings
    other = family_of("sd15")
    other.load_lora(str(tmp_path / "adapter" / "adapter_model.safetensors"))
    assert difference(other, base("sd15"), added) < 1e-4


# what is refused


def refused(family_of, path, said, kind="sd15"):
    with pytest.raises(EnvironmentFault, match=said) as fault:
        family_of(kind).load_lora(str(path))
    assert fault.value.remedy and "\n" not in fault.value.message
    return fault.value


def test_a_file_that_the_model_only_half_has_is_refused(family_of, base, tmp_path):
    pairs, _ = made(base("sd15"), DENOISER)
    state = {}
    for place, ((component, module), pair) in enumerate(pairs.items()):
        name = re.sub(r"_blocks\.\d", "_blocks.9", module) if place % 2 else module
        state |= {f"{component}.{name}.{PEFT[half]}": value for half, value in pair.items()}
    path = file_of(tmp_path, state)
    fault = refused(family_of, path, rf"was made for another model: \d+ of {len(pairs)} layers are not in this one")
    assert "_blocks.9" in fault.message
    # a part that the model has not
    text = {f"text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj.{PEFT[h]}": torch.zeros(4, 4) for h in PEFT}
    first = next(iter(pairs))
    state = {f"{'.'.join(first)}.{PEFT[half]}": value for half, value in pairs[first].items()}
    refused(family_of, file_of(tmp_path, state | text, "t.safetensors"), "1 of 2 layers .* text_encoder_2")


def test_numbers_that_are_not_finite_are_refused_by_name(family_of, base, tmp_path):
    pairs, _ = made(base("sd15"), DENOISER)
    state = {f"{'.'.join(key)}.{PEFT[half]}": value for key, pair in pairs.items() for half, value in pair.items()}
    bad = list(state)[3]
    for wrong in (float("nan"), float("inf")):
        state[bad] = state[bad].clone().index_fill_(0, torch.tensor([0]), wrong)
        refused(family_of, file_of(tmp_path, state), f"is damaged: {re.escape(bad)} holds numbers that are not finite")


def test_a_folder_of_several_files_is_listed_and_none_taken(family_of, base, tmp_path):
    pairs, _ = made(base("sd15"), DENOISER)
    state = {f"{kohya(*key)}.{SUFFIX[half]}": value for key, pair in pairs.items() for half, value in pair.items()}
    folder = tmp_path / "loras"
    folder.mkdir()
    refused(family_of, folder, "holds no LoRA")
    file_of(folder, state, "a.safetensors")
    family = family_of("sd15")
    family.load_lora(str(folder))
    shutil.copy(folder / "a.safetensors", folder / "b.safetensors")
    refused(family_of, folder, r"holds 2 LoRA files: a\.safetensors, b\.safetensors")


def test_two_adapters_in_one_file_are_refused(family_of, base, tmp_path):
    pairs, _ = made(base("sd15"), DENOISER)
    state = {}
    for key, pair in pairs.items():
        for half, name in (("down", "lora_A"), ("up", "lora_B")):
            state |= {f"{'.'.join(key)}.{name}.{adapter}.weight": pair[half].clone() for adapter in ("one", "two")}
    refused(family_of, file_of(tmp_path, state), "holds several adapters: one, two")


def test_no_two_layers_answer_to_one_name(small):
    """Names as matched, dots and underscores alike; only queries, keys and values share one, which is a matrix."""
    for kind in ("sd15", "sdxl", "sd35"):
        pipe = plain(small(kind))
        names = ("unet", "transformer", "text_encoder", "text_encoder_2")
        parts = {name: getattr(pipe, name) for name in names if getattr(pipe, name, None) is not None}
        for places in places_of(parts, FAMILY_OF[kind]).values():
            assert len(places) == 1 or {place.third for place in places} == {0, 1, 2}


@pytest.mark.parametrize("kind", ["sd15", "sdxl", "sd35"])
def test_what_sdo_writes_for_others_it_reads_itself(kind, small, family_of, base, tmp_path):
    import entry

    family = family_of(kind)
    pairs, _ = made(base(kind), ATTENTION)
    state = {f"{'.'.join(key)}.{PEFT[half]}": value for key, pair in pairs.items() for half, value in pair.items()}
    metadata = {"lora_adapter_metadata": json.dumps({f"{c}.lora_alpha": 2 for c, _ in pairs})}
    save_file(state, tmp_path / "x.safetensors", metadata=metadata)
    first = read_lora(tmp_path / "x.safetensors", parts_of(family), family=FAMILY_OF[kind])
    for form in ("kohya", "peft", "diffusers"):
        words = [
            "export",
            tmp_path / "x.safetensors",
            "--format",
            form,
            "--model",
            small(kind),
            "--family",
            FAMILY_OF[kind],
            "--out",
            form,
        ]
        done = entry.run(list(map(str, words)), cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        again = read_lora(tmp_path / form, parts_of(family), family=FAMILY_OF[kind])
        assert {c: set(m) for c, m in again.items()} == {c: set(m) for c, m in first.items()}
        for component, modules in first.items():
            for module, layer in modules.items():
                other = again[component][module]
                assert torch.equal(other.down, layer.down) and torch.equal(other.up, layer.up)
                assert other.alpha == layer.alpha == 2


def parts_of(family):
    return {family.denoiser_name: family.denoiser, **family.text_encoders}


def test_export_merged_of_a_file_it_cannot_place_writes_nothing(small, tmp_path):
    """It ended with the base model and exit status 0."""
    import entry

    state = {f"elsewhere.{n}.{PEFT[half]}": torch.zeros(4, 4) for n in range(3) for half in PEFT}
    words = ["export", file_of(tmp_path, state), "--format", "merged", "--model", small("sd15"), "--out", "merged"]
    done = entry.run(list(map(str, words)), cwd=tmp_path)
    assert done.returncode == 2 and "was made for another model: 3 of 3 layers" in done.stderr
    assert not (tmp_path / "merged").exists() and load_file(tmp_path / "x.safetensors")


# pictures that are not finite


@pytest.fixture
def overflowing(small, tmp_path):
    """A LoRA whose numbers are finite and whose products are not."""
    weights = weights_of(plain(small("sd15")))
    pairs, _ = made(weights, r"^unet\..*attn1\.to_(q|v)")
    state = {
        f"{'.'.join(key)}.{PEFT[half]}": 1e30 * value for key, pair in pairs.items() for half, value in pair.items()
    }
    return file_of(tmp_path, state, "huge.safetensors")


def test_black_pictures_are_no_result(small, overflowing, tmp_path):
    """With one such LoRA clip-score was higher on all prompts: of black."""
    import entry

    words = ["sample", "a cat", "a dog", "--model", small("sd15"), "--lora", overflowing, "--steps", "2", "--out", "s"]
    done = entry.run(list(map(str, words)), cwd=tmp_path)
    assert done.returncode == 2 and "2 of 2 pictures are not finite, the first of 'a cat'" in done.stderr
    assert not list(tmp_path.rglob("0*.png"))
    (tmp_path / "p.txt").write_text("a cat\na dog\n")
    words = ["eval", "-p", "p.txt", "--model", small("sd15"), "--lora", overflowing, "--steps", "2", "--out", "e"]
    words += ["--rewards", "colorfulness", "--no-embedding", "--no-report"]
    done = entry.run(list(map(str, words)), cwd=tmp_path)
    assert done.returncode == 2 and "pictures are not finite" in done.stderr
    assert not (tmp_path / "e" / "summary.json").exists()


def test_an_adapter_that_is_not_finite_is_not_written(small, tmp_path):
    family = load_family(str(small("sd15")))
    parameters = add_lora(family, LoraSpec(rank=2), seed=0)
    with torch.no_grad():
        parameters[3].view(-1)[0] = float("nan")
    with pytest.raises(EnvironmentFault, match="the trained LoRA is not finite"):
        family.save_lora(tmp_path)
    assert not list(tmp_path.iterdir())


# several at once


def test_several_loras_are_stacked_each_with_its_weight(small, family_of, base, tmp_path):
    import entry

    sums, words = {}, []
    for name, weight, chosen in (("a", 0.8, r"attn1\.to_q"), ("b", -0.5, r"attn\d\.to_[qk]")):
        pairs, added = made(base("sd15"), rf"^unet\..*{chosen}", alpha=4.0, seed=ord(name))
        state = {f"{'.'.join(key)}.{PEFT[half]}": value for key, pair in pairs.items() for half, value in pair.items()}
        words.append(f"{file_of(tmp_path, state, f'{name}.safetensors')}:{weight}")
        for key, value in added.items():
            sums[key] = sums.get(key, 0.0) + weight * value
    merged = tmp_path / "merged"
    done = entry.run(
        ["export", "+".join(words), "--format", "merged", "--model", str(small("sd15")), "--out", str(merged)],
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    now = weights_of(plain(merged))
    for key, weight in base("sd15").items():
        assert torch.allclose(now[key], weight + sums.get(key, 0.0), atol=1e-6)
    common = ["a cat", "--steps", "2", "--guidance", "1", "-q"]
    stacked = [part for word in words for part in ("--lora", word)]
    for out, more in (("s", ["--model", str(small("sd15")), *stacked]), ("m", ["--model", str(merged)])):
        done = entry.run(["sample", *common, *more, "--out", out], cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    one, other = (np.asarray(Image.open(tmp_path / out / "00000.png"), dtype=int) for out in "sm")
    assert np.abs(one - other).max() <= 1
    text = Image.open(tmp_path / "s" / "00000.png").text["parameters"]
    assert text.splitlines()[0] == "a cat <lora:a:0.8> <lora:b:-0.5>"
    (tmp_path / "p.txt").write_text("a cat\na dog\n")
    words = [
        "eval",
        "-p",
        "p.txt",
        "--model",
        str(small("sd15")),
        "--lora",
        "+".join(words),
        "--steps",
        "2",
        "--no-report",
    ]
    done = entry.run([*words, "--rewards", "colorfulness", "--no-embedding", "--out", "e", "-q"], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "e" / "a-0.8+b--0.5").is_dir()
    # one of them missing, and what takes one alone
    done = entry.run(["eval", *words[1:5], "--lora", f"{tmp_path}/a.safetensors+gone/x/y"], cwd=tmp_path)
    assert done.returncode == 2 and "--lora gone/x/y: no such file" in done.stderr
    with pytest.raises(RecipeFault, match="goes on from one LoRA"):
        add_lora(load_family(str(small("sd15"))), LoraSpec(start_from=f"{tmp_path}/a.safetensors:0.5"), seed=0)


def test_words_that_name_loras(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a+b:1").mkdir()
    assert stack_of("a+b:1") == [Stacked("a+b:1")]
    assert stack_of("x:0.5+runs/y+embedded:student") == [
        Stacked("x", 0.5),
        Stacked("runs/y"),
        Stacked("embedded:student"),
    ]
    assert stack_of("x:-1e-2") == [Stacked("x", -0.01)] and stack_of("x:y") == [Stacked("x:y")]


def test_plus_and_colon_in_a_name_are_no_neighbours(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("style+v2.safetensors", "v3:1", "x", "runs+new/one"):
        (tmp_path / name).mkdir(parents=True)
    whole = Stacked("style+v2.safetensors")
    assert stack_of("style+v2.safetensors:0.8") == [Stacked(whole.path, 0.8)]
    assert stack_of("x:-.5+style+v2.safetensors+runs+new/one") == [Stacked("x", -0.5), whole, Stacked("runs+new/one")]
    assert stack_of("v3:1:+1e+0+owner/name") == [Stacked("v3:1"), Stacked("owner/name")]
    assert joined(["x", "style+v2.safetensors:2"]) == "x+style+v2.safetensors:2"
    # a path wins over a name that could be looked up
    (tmp_path / "a" / "b").mkdir(parents=True)
    assert stack_of("a/b+runs+new/one") == [Stacked("a/b"), Stacked("runs+new/one")]
    # both are there
    for name in ("style", "v2.safetensors", "v3"):
        (tmp_path / name).mkdir()
    for word in ("style+v2.safetensors", "x+style+v2.safetensors:0.8"):
        with pytest.raises(EnvironmentFault, match=r"may be style.* and v2.safetensors|may be x and style") as fault:
            stack_of(word)
        assert "./style+./v2.safetensors" in fault.value.remedy
    with pytest.raises(EnvironmentFault, match=r"may be v3:1 alone, or v3 at weight 1"):
        stack_of("v3:1")
    assert stack_of("./style+./v2.safetensors") == [Stacked("./style"), Stacked("./v2.safetensors")]
    # options of their own say which are meant
    two = stack_of(joined(["style", "v2.safetensors:0.5"]))
    assert two == [Stacked(f"{tmp_path}/style"), Stacked(f"{tmp_path}/v2.safetensors", 0.5)]


def test_commands_refuse_a_word_that_may_be_several(tmp_path):
    import entry

    for name in ("style", "v2.safetensors", "style+v2.safetensors"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "p.txt").write_text("a cat\n")
    for words in (
        ["sample", "a cat"],
        ["eval", "-p", "p.txt", "--rewards", "colorfulness"],
        ["prune", "-p", "p.txt", "--num-prompts", "0"],
    ):
        done = entry.run([*words, "--lora", "style+v2.safetensors"], cwd=tmp_path)
        assert done.returncode == 2 and "may be style and v2.safetensors, or style+v2" in done.stderr, done.stderr


@pytest.mark.parametrize("number", ["1_0", "１", "0,8", "nan", "inf", "1e999", "2000", "0x1", " 1", ""])
def test_weights_are_plain_numbers(number, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.safetensors").write_bytes(b"x")
    with pytest.raises(EnvironmentFault, match=r"weight .* of the LoRA a.safetensors is no plain number") as fault:
        stack_of(f"a.safetensors:{number}")
    assert "a.safetensors:0.8" in fault.value.remedy


def test_names_of_stacks_are_not_those_of_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b", "c+d"):
        (tmp_path / f"{name}.safetensors").write_bytes(name.encode())
    assert lora_name("c+d.safetensors") == "c-d" and lora_name("a.safetensors+b.safetensors") == "a+b"
    assert lora_tags("c+d.safetensors:0.5", 2.0) == [("c+d", 1.0)]
    loras = ["a.safetensors", "a.safetensors+b.safetensors", "a.safetensors:0.12345678"]
    found = variants_of(loras, [1.0, 0.5, 0.50000001], base=True, plans={"b.json": "1"})
    assert len({variant.name for variant in found}) == len(found) == 20
    # a weight is kept as it is
    (word,) = stack_of(whole_lora("a.safetensors:0.12345678"))
    assert word == Stacked(f"{tmp_path}/a.safetensors", 0.12345678)
