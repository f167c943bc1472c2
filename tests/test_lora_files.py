"""Names and files of LoRAs: kohya's and diffusers' layouts give the same layers, each with its own alpha."""

import json
from functools import cache
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from small_models import FAMILY_OF, plain

from sdo_cli.errors import EnvironmentFault
from sdo_cli.models.kohya import kohya_names, sgm_name
from sdo_cli.models.load import load_family
from sdo_cli.models.lora_files import (
    NAME,
    alpha_of,
    kohya_tensors,
    published,
    write_diffusers,
)
from sdo_cli.models.lora_read import as_diffusers, read_diffusers, read_lora

CONFIGS = Path(__file__).parent.parent / "sdo_cli" / "models" / "configs"
KINDS = ("sd15", "sd2", "sdxl", "sd35")
UNET_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "ff.net.2", "conv1", "time_emb_proj", "conv_in"]
SD3_TARGETS = ["to_q", "to_k", "add_q_proj", "to_add_out", "ff.net.2", "norm1.linear"]


def parts_of(pipe):
    names = ("unet", "transformer", "text_encoder", "text_encoder_2")
    return {name: getattr(pipe, name) for name in names if getattr(pipe, name, None) is not None}


@pytest.fixture(scope="module")
def parts(small):
    """parts(kind) -> the networks of its pipeline, for those who only look at them."""
    return cache(lambda kind: parts_of(plain(small(kind))))


def picture(pipe):
    image = pipe("the cat", num_inference_steps=2, guidance_scale=2.0, generator=torch.Generator().manual_seed(4))
    return np.asarray(image.images[0], dtype=int)


@pytest.fixture(scope="module")
def diffusers_file(small, tmp_path_factory):
    """diffusers_file(kind) -> a LoRA whose rank and alpha differ from layer to layer; text encoders too."""
    made = {}

    def file(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp("lora") / kind
            family = load_family(str(small(kind)))
            denoiser_targets = SD3_TARGETS if FAMILY_OF[kind] == "sd3" else UNET_TARGETS
            generator, size = torch.Generator().manual_seed(7), 0.4 if FAMILY_OF[kind] == "sd3" else 0.12
            for part in (family.denoiser, *family.text_encoders.values()):
                text = part is not family.denoiser
                targets = ["q_proj", "k_proj", "fc1"] if text else denoiser_targets
                # what diffusers' own reader of kohya files loses: another alpha on some attention layers
                special = "k_proj" if text else "to_k"
                config = LoraConfig(
                    r=16, lora_alpha=4, target_modules=targets, alpha_pattern={special: 32}, rank_pattern={special: 8}
                )
                part.add_adapter(config, adapter_name="default")
                with torch.no_grad():
                    for name, p in part.named_parameters():
                        if "lora_" in name:
                            p.copy_(torch.randn(p.shape, generator=generator) * (size if "lora_B" in name else 0.1))
            family.save_lora(folder)
            made[kind] = folder / NAME
        return made[kind]

    return file


@pytest.fixture(scope="module")
def kohya_file(small, diffusers_file, tmp_path_factory):
    @cache
    def file(kind):
        layers = read_diffusers(diffusers_file(kind))
        path = tmp_path_factory.mktemp("kohya") / f"{kind}.safetensors"
        # the small UNets have one layer per block, the published ones two
        save_file(kohya_tensors(layers, family=FAMILY_OF[kind], layers_per_block=1), path)
        return path

    return file


@pytest.mark.parametrize("kind", KINDS)
def test_both_layouts_hold_the_same_layers(kind, parts, diffusers_file, kohya_file):
    ours = read_lora(kohya_file(kind), parts(kind), family=FAMILY_OF[kind])
    first = read_diffusers(diffusers_file(kind))
    assert ours.keys() == first.keys() and len(ours) == (2 if FAMILY_OF[kind] == "sd" else 3)
    for component, layers in first.items():
        assert layers.keys() == ours[component].keys()
        for module, layer in layers.items():
            again = ours[component][module]
            special = module.endswith(("to_k", "k_proj")) and "add_" not in module
            assert (layer.rank, layer.alpha) == ((8, 32) if special else (16, 4))
            assert (again.rank, again.alpha) == (layer.rank, layer.alpha)
            assert torch.equal(again.down, layer.down) and torch.equal(again.up, layer.up)


@pytest.mark.parametrize("kind", KINDS)
def test_a_kohya_file_gives_the_image_of_the_diffusers_file(kind, small, diffusers_file, kohya_file, tmp_path):
    pipe, other = plain(small(kind)), plain(small(kind))

    def by_ours(file):
        with as_diffusers(file, parts_of(other), family=FAMILY_OF[kind]) as (path, _):
            other.load_lora_weights(path, adapter_name="a")
        return picture(other)

    base = picture(pipe)
    pipe.load_lora_weights(diffusers_file(kind), adapter_name="a")
    one = picture(pipe)
    assert np.abs(one - by_ours(kohya_file(kind))).max() <= 1
    assert np.abs(one - base).mean() > 2
    # alpha = rank is another image
    state = load_file(kohya_file(kind))
    for key in [key for key in state if key.endswith(".alpha")]:
        state[key] = torch.tensor(float(len(state[key.replace(".alpha", ".lora_down.weight")])))
    save_file(state, tmp_path / "wrong.safetensors")
    other.unload_lora_weights()
    assert np.abs(one - by_ours(tmp_path / "wrong.safetensors")).mean() > 2


def test_why_kohya_files_are_not_left_to_diffusers(small, tmp_path):
    """Its reader keeps one alpha for all attention layers; once it does not, :func:`as_diffusers` can go."""
    unet = plain(small("sd15")).unet
    unet.add_adapter(LoraConfig(r=4, lora_alpha=2, target_modules=["to_q", "to_k", "to_v"], alpha_pattern={"to_k": 8}))
    write_lora(unet, tmp_path)
    save_file(kohya_tensors(read_diffusers(tmp_path / NAME), family="sd"), tmp_path / "k.safetensors")
    factors = {}
    for name in ("theirs", "ours"):
        pipe = plain(small("sd15"))
        if name == "theirs":
            pipe.load_lora_weights(tmp_path / "k.safetensors", adapter_name="a")
        else:
            with as_diffusers(tmp_path / "k.safetensors", parts_of(pipe), family="sd") as (path, _):
                pipe.load_lora_weights(path, adapter_name="a")
        found = [m for n, m in pipe.unet.named_modules() if n.endswith("to_k")]
        factors[name] = {m.scaling["a"] for m in found if hasattr(m, "scaling")}
    assert factors == {"theirs": {0.5}, "ours": {2.0}}


def write_lora(unet, folder):
    from peft import get_peft_model_state_dict

    diffusers.StableDiffusionPipeline.save_lora_weights(
        folder,
        unet_lora_layers=get_peft_model_state_dict(unet, adapter_name="default"),
        unet_lora_adapter_metadata=unet.peft_config["default"].to_dict(),
    )


def test_beside_another_adapter_the_layers_are_found_as_well(small, parts, kohya_file):
    pipe = plain(small("sd15"))
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), adapter_name="other")
    both = read_lora(kohya_file("sd15"), parts_of(pipe), family="sd")
    alone = read_lora(kohya_file("sd15"), parts("sd15"), family="sd")
    assert {c: set(layers) for c, layers in both.items()} == {c: set(layers) for c, layers in alone.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_diffusers_files_are_read_with_a_model_as_without(kind, parts, diffusers_file):
    alone = read_diffusers(diffusers_file(kind))
    with as_diffusers(diffusers_file(kind), parts(kind), family=FAMILY_OF[kind]) as (path, layers):
        written = read_diffusers(path)
    for found in (layers, written):
        assert {c: set(m) for c, m in found.items()} == {c: set(m) for c, m in alone.items()}
        for component, module in ((c, m) for c, modules in alone.items() for m in modules):
            one, other = alone[component][module], found[component][module]
            assert one.alpha == other.alpha and torch.equal(one.down, other.down) and torch.equal(one.up, other.up)


def test_written_diffusers_file_reads_back(diffusers_file, tmp_path):
    first = read_diffusers(diffusers_file("sdxl"))
    write_diffusers(first, tmp_path / NAME)
    again = read_diffusers(tmp_path / NAME)
    assert {(c, m, x.rank, x.alpha) for c, ls in first.items() for m, x in ls.items()} == {
        (c, m, x.rank, x.alpha) for c, ls in again.items() for m, x in ls.items()
    }


# names, written out


SD = {
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": (
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    ),
    "mid_block.attentions.0.transformer_blocks.0.attn2.to_k": (
        "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    ),
    "mid_block.attentions.0.transformer_blocks.0.attn2.to_v": (
        "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_v"
    ),
    "up_blocks.3.attentions.2.transformer_blocks.0.attn2.to_out.0": (
        "lora_unet_up_blocks_3_attentions_2_transformer_blocks_0_attn2_to_out_0"
    ),
    "up_blocks.1.attentions.0.transformer_blocks.0.ff.net.0.proj": (
        "lora_unet_up_blocks_1_attentions_0_transformer_blocks_0_ff_net_0_proj"
    ),
    "down_blocks.2.attentions.1.proj_in": "lora_unet_down_blocks_2_attentions_1_proj_in",
    "down_blocks.0.downsamplers.0.conv": "lora_unet_down_blocks_0_downsamplers_0_conv",
    "up_blocks.0.resnets.2.conv_shortcut": "lora_unet_up_blocks_0_resnets_2_conv_shortcut",
}
SDXL = {
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": (
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
    ),
    "down_blocks.1.attentions.1.proj_in": "lora_unet_input_blocks_5_1_proj_in",
    "down_blocks.2.attentions.0.transformer_blocks.9.attn2.to_k": (
        "lora_unet_input_blocks_7_1_transformer_blocks_9_attn2_to_k"
    ),
    "down_blocks.2.attentions.1.transformer_blocks.0.ff.net.2": (
        "lora_unet_input_blocks_8_1_transformer_blocks_0_ff_net_2"
    ),
    "mid_block.attentions.0.transformer_blocks.3.attn1.to_v": (
        "lora_unet_middle_block_1_transformer_blocks_3_attn1_to_v"
    ),
    "up_blocks.0.attentions.2.transformer_blocks.0.attn2.to_out.0": (
        "lora_unet_output_blocks_2_1_transformer_blocks_0_attn2_to_out_0"
    ),
    "up_blocks.1.attentions.1.proj_out": "lora_unet_output_blocks_4_1_proj_out",
    "down_blocks.0.resnets.0.conv1": "lora_unet_input_blocks_1_0_in_layers_2",
    "down_blocks.1.resnets.0.conv_shortcut": "lora_unet_input_blocks_4_0_skip_connection",
    "mid_block.resnets.1.conv2": "lora_unet_middle_block_2_out_layers_3",
    "up_blocks.2.resnets.2.time_emb_proj": "lora_unet_output_blocks_8_0_emb_layers_1",
    "down_blocks.0.downsamplers.0.conv": "lora_unet_input_blocks_3_0_op",
    "up_blocks.1.upsamplers.0.conv": "lora_unet_output_blocks_5_2_conv",
    "conv_in": "lora_unet_input_blocks_0_0",
    "add_embedding.linear_2": "lora_unet_label_emb_0_2",
}
SD3 = {
    "transformer_blocks.0.attn.to_q": "lora_transformer_transformer_blocks_0_attn_to_q",
    "transformer_blocks.3.attn.add_k_proj": "lora_transformer_transformer_blocks_3_attn_add_k_proj",
    "transformer_blocks.5.attn.to_out.0": "lora_transformer_transformer_blocks_5_attn_to_out_0",
    "transformer_blocks.5.attn2.to_v": "lora_transformer_transformer_blocks_5_attn2_to_v",
    "transformer_blocks.7.ff_context.net.0.proj": "lora_transformer_transformer_blocks_7_ff_context_net_0_proj",
}
ATTENTION, MLP = "text_model.encoder.layers.0.self_attn.q_proj", "text_model.encoder.layers.11.mlp.fc2"
TEXT = {
    ("sd", "text_encoder"): "lora_te_text_model_encoder_layers",
    ("sdxl", "text_encoder"): "lora_te1_text_model_encoder_layers",
    ("sdxl", "text_encoder_2"): "lora_te2_text_model_encoder_layers",
    ("sd3", "text_encoder"): "lora_te1_text_model_encoder_layers",
    ("sd3", "text_encoder_2"): "lora_te2_text_model_encoder_layers",
}


@pytest.mark.parametrize(
    ("family", "component", "names"), [("sd", "unet", SD), ("sdxl", "unet", SDXL), ("sd3", "transformer", SD3)]
)
def test_names_of_layers(family, component, names):
    for module, name in names.items():
        assert kohya_names(component, module, family=family)[0] == name


def test_names_of_text_encoders():
    for (family, component), stem in TEXT.items():
        assert kohya_names(component, ATTENTION, family=family)[0] == f"{stem}_0_self_attn_q_proj"
        assert kohya_names(component, MLP, family=family)[0] == f"{stem}_11_mlp_fc2"


@cache
def full_size(kind, component):
    """Names of the linear and convolution layers of a published model."""
    config = json.loads((CONFIGS / kind / component / "config.json").read_text())
    with torch.device("meta"):
        if component == "unet":
            model = diffusers.UNet2DConditionModel.from_config(config)
        elif component == "transformer":
            model = diffusers.SD3Transformer2DModel.from_config(config)
        else:
            text_config = transformers.CLIPTextConfig.from_dict(config)
            model = getattr(transformers, config["architectures"][0])(text_config)
    layers = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)]
    return [published(component, name) for name in layers], model.config


@pytest.mark.parametrize(
    ("kind", "component", "count"),
    [
        ("sd15", "unet", 282),
        ("sd21", "unet", 282),
        ("sdxl", "unet", 794),
        ("sd35-medium", "transformer", 393),
        ("sdxl", "text_encoder", 72),
        ("sdxl", "text_encoder_2", 193),
    ],
)
def test_every_layer_of_a_full_size_model_has_a_name_of_its_own(kind, component, count):
    modules, _ = full_size(kind, component)
    family = "sdxl" if kind == "sdxl" else "sd3" if component == "transformer" else "sd"
    spellings = [set(kohya_names(component, module, family=family)) for module in modules]
    assert len(set.union(*spellings)) == sum(map(len, spellings))
    assert len(modules) == count


@pytest.mark.parametrize("kind", ["sd15", "sd21", "sdxl"])
def test_diffusers_reads_every_full_size_name_as_the_same_layer(kind):
    """All attention, projection and feed-forward layers through diffusers' own reader of kohya names."""
    modules, config = full_size(kind, "unet")
    modules = [module for module in modules if ".attentions." in module]
    assert len(modules) > (700 if kind == "sdxl" else 150)
    family = "sdxl" if kind == "sdxl" else "sd"
    state = {}
    for j, module in enumerate(modules):
        name = kohya_names("unet", module, family=family)[0]
        state |= {f"{name}.lora_down.weight": torch.full((1,), j), f"{name}.lora_up.weight": torch.full((1,), j)}
        state[f"{name}.alpha"] = torch.tensor(1.0)
    pipeline = diffusers.StableDiffusionXLPipeline if kind == "sdxl" else diffusers.StableDiffusionPipeline
    back, _ = pipeline.lora_state_dict(state, unet_config=config)
    unet = {key.removeprefix("unet."): tensor for key, tensor in back.items()}
    peft = diffusers.utils.convert_unet_state_dict_to_peft(unet)
    found = {key.removesuffix(".lora_A.weight"): t.item() for key, t in peft.items() if ".lora_A" in key}
    assert found == {module: j for j, module in enumerate(modules)}


# what other files hold


def test_files_without_metadata_have_the_rank_as_alpha(diffusers_file, tmp_path):
    save_file(load_file(diffusers_file("sd15")), tmp_path / "bare.safetensors")
    layers = [layer for part in read_diffusers(tmp_path / "bare.safetensors").values() for layer in part.values()]
    assert {layer.rank for layer in layers} == {8, 16} and all(layer.alpha == layer.rank for layer in layers)


def test_old_spellings_of_diffusers_are_read(tmp_path):
    two, text = torch.zeros(2, 3), "text_encoder.text_model.encoder.layers.0.self_attn"
    unet = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor"
    state = {f"{unet}.to_{n}_lora.{half}.weight": two.clone() for n in ("q", "out") for half in ("down", "up")}
    state |= {f"{text}.to_{n}_lora.{half}.weight": two.clone() for n in ("q", "out") for half in ("down", "up")}
    save_file(state, tmp_path / "old.safetensors")
    layers = read_diffusers(tmp_path / "old.safetensors")
    stem = "mid_block.attentions.0.transformer_blocks.0.attn1"
    assert set(layers["unet"]) == {f"{stem}.to_q", f"{stem}.to_out.0"}
    stem = "text_model.encoder.layers.0.self_attn"
    assert set(layers["text_encoder"]) == {f"{stem}.q_proj", f"{stem}.out_proj"}


def test_alpha_follows_peft():
    """Patterns and rank-stabilised scaling, against peft's own factor."""
    from peft import PeftModel

    config = LoraConfig(
        r=4, lora_alpha=2, target_modules=["to_q", "to_k"], use_rslora=True, alpha_pattern={"to_k": 8},
        rank_pattern={"to_k": 16},
    )  # fmt: skip
    net = torch.nn.Sequential(torch.nn.ModuleDict({n: torch.nn.Linear(3, 3) for n in ("to_q", "to_k")}))
    tuned = PeftModel(net, config).base_model.model[0]
    for name, rank in (("to_q", 4), ("to_k", 16)):
        factor = tuned[name].scaling["default"]
        assert alpha_of(config.to_dict(), f"0.{name}", rank=rank) / rank == pytest.approx(factor)
    assert alpha_of({}, "x", rank=5) == 5


def test_a_lora_for_another_model_is_refused(parts, kohya_file):
    with pytest.raises(EnvironmentFault, match=r"made for another model: \d+ of \d+ layers are not in this one"):
        read_lora(kohya_file("sd15"), parts("sdxl"), family="sdxl")
    # the same names, other sizes
    unet = {"unet": torch.nn.ModuleDict({"conv_in": torch.nn.Conv2d(4, 7, 3)})}
    state = {"lora_unet_conv_in.lora_down.weight": torch.zeros(2, 4, 3, 3)}
    path = kohya_file("sd15").with_name("small.safetensors")
    save_file(state | {"lora_unet_conv_in.lora_up.weight": torch.zeros(8, 2, 1, 1)}, path)
    with pytest.raises(EnvironmentFault, match="1 of 1 layers"):
        read_lora(path, unet, family="sd")
    save_file(state | {"lora_unet_conv_in.lora_up.weight": torch.zeros(7, 2, 1, 1)}, path)
    assert read_lora(path, unet, family="sd")["unet"]["conv_in"].alpha == 2


@pytest.mark.parametrize(
    ("key", "said"),
    [
        (
            "lora_unet_x.hada_w1_a",
            r"is LoHa \(LyCORIS\), which is not applied as a LoRA: it holds lora_unet_x.hada_w1_a",
        ),
        ("lora_unet_x.lokr_w1", r"is LoKr \(LyCORIS\)"),
        ("lora_unet_x.oft_blocks", "is OFT"),
        ("lora_unet_x.on_input", r"is IA3 \(LyCORIS\)"),
        ("lora_unet_x.a1.weight", r"is GLoRA \(LyCORIS\)"),
        ("bundle_emb.word.string_to_param.*", "is a file with textual-inversion embeddings"),
        ("lora_unet_x.diff_b", "is a LoRA with whole weights beside it"),
        ("model.diffusion_model.input_blocks.0.0.weight", "is a whole checkpoint"),
        ("unet.conv_in.weight", r"is no plain LoRA: it holds unet\.conv_in\.weight"),
        ("lora_unet_y.lora_up.weight", "is no plain LoRA: it has up of lora_unet_y alone"),
    ],
)
def test_more_than_plain_lora_is_refused_as_what_it_is(key, said, tmp_path):
    pair = {f"lora_unet_x.lora_{half}.weight": torch.zeros(2, 2) for half in ("down", "up")}
    save_file(pair | {key: torch.zeros(2, 2)}, tmp_path / "x.safetensors")
    with pytest.raises(EnvironmentFault, match=said) as fault:
        read_lora(tmp_path / "x.safetensors", {}, family="sd")
    assert fault.value.remedy


def test_other_layouts_are_refused_by_name(kohya_file, tmp_path):
    with pytest.raises(EnvironmentFault, match="has names that only a model can resolve"):
        read_diffusers(kohya_file("sd15"))
    save_file({"down_blocks.0.x.weight": torch.zeros(2)}, tmp_path / "x.safetensors")
    with pytest.raises(EnvironmentFault, match="it holds down_blocks"):
        read_diffusers(tmp_path / "x.safetensors")


def test_layers_without_a_name_are_refused(tmp_path):
    with pytest.raises(KeyError):
        sgm_name("encoder_hid_proj")
    save_file({f"unet.encoder_hid_proj.lora_{half}.weight": torch.zeros(2, 2) for half in "AB"}, tmp_path / "x")
    with pytest.raises(EnvironmentFault, match=r"no kohya name for unet\.encoder_hid_proj"):
        kohya_tensors(read_diffusers(tmp_path / "x"), family="sdxl")
