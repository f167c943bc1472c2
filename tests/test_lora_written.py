"""What `sdo export` writes of unusual LoRAs, and what is no LoRA to weigh, hash or switch on."""

import shutil
from dataclasses import replace

import entry
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from small_models import plain
from test_lora_layouts import PEFT, SUFFIX, base, difference, dora, family_of, file_of, kohya, made, weights_of

from sdo_cli.errors import EnvironmentFault
from sdo_cli.exporting.export import ExportJob, export
from sdo_cli.models.load import ModelSource
from sdo_cli.models.lora_files import lora_hash
from sdo_cli.models.lora_read import has_text_layers
from sdo_cli.models.second_lora import load_second
from sdo_cli.steering.variables_file import whole_lora

__all__ = ["base", "family_of"]
SOME = r"^unet\..*attn2\.to_[qk]"


def made_for(path, small, *, scale=1.0, precision="no"):
    return ExportJob(path, ModelSource(str(small("sd15"))), "sd", scale, precision)


def diffusers_state(pairs, alpha):
    state = {f"{'.'.join(key)}.{PEFT[half]}": value for key, pair in pairs.items() for half, value in pair.items()}
    return state | {f"{'.'.join(key)}.alpha": torch.tensor(float(alpha)) for key in pairs}


@pytest.fixture
def dora_file(base, tmp_path):
    """DoRA in kohya's names with norms of its own, and what it adds."""
    pairs, _ = made(base("sd15"), SOME)
    state, added = {}, {}
    for key, pair in pairs.items():
        weight = base("sd15")[key]
        norms = weight.flatten(1).norm(dim=1) * 1.3
        added[key] = dora(weight, pair, norms)
        state |= {f"{kohya(*key)}.{SUFFIX[half]}": value for half, value in pair.items()}
        state |= {f"{kohya(*key)}.alpha": torch.tensor(2.0), f"{kohya(*key)}.dora_scale": norms[:, None]}
    return file_of(tmp_path, state, "dora.safetensors"), added


def test_dora_has_no_weight_but_one(family_of, small, dora_file, tmp_path):
    """peft scales the matrices alone: at weight 0 the base would not come back."""
    path, _ = dora_file
    for word, scale in ((str(path), 0.5), (f"{path}:0", None)):
        with pytest.raises(EnvironmentFault, match=r"is DoRA, which has no weight but 1: it was asked for 0"):
            family_of("sd15").load_lora(word, scale=scale)
    job = made_for(path, small, scale=0.5)
    with pytest.raises(EnvironmentFault, match=r"is DoRA, which has no weight but 1: it was asked for 0.5"):
        export(job, "merged", tmp_path / "m")
    family = family_of("sd15")
    with pytest.raises(EnvironmentFault, match=r"is DoRA, which has no weight but 1: it was asked for 0.5"):
        load_second(family, str(path), scale=0.5)
    family.pipeline.unload_lora_weights()


def test_dora_is_written_for_peft_with_its_norms(family_of, base, small, dora_file, tmp_path):
    path, added = dora_file
    job = made_for(path, small)
    export(job, "diffusers", tmp_path / "d")
    export(replace(job, source=tmp_path / "d"), "peft", tmp_path / "p")
    family = family_of("sd15")
    for place in (tmp_path / "d", tmp_path / "p"):
        family.load_lora(str(place))
        assert difference(family, base("sd15"), added) < 1e-4
    pipe = plain(small("sd15"))
    pipe.unet = PeftModel.from_pretrained(pipe.unet, tmp_path / "p" / "unet").merge_and_unload()
    now = weights_of(pipe)
    assert max((now[key] - base("sd15")[key] - value).abs().max().item() for key, value in added.items()) < 1e-4


@pytest.mark.parametrize("form", ["diffusers", "peft", "kohya"])
def test_an_alpha_of_nothing_adds_nothing(form, family_of, base, small, tmp_path):
    """Zero is a number: it was read back as "none said", which is the rank."""
    pairs, added = made(base("sd15"), SOME)
    state, zero = diffusers_state(pairs, 2.0), next(iter(pairs))
    state[f"{'.'.join(zero)}.alpha"] = torch.tensor(0.0)
    added[zero] = torch.zeros_like(added[zero])
    job = made_for(file_of(tmp_path, state), small)
    out = tmp_path / ("k.safetensors" if form == "kohya" else "out")
    export(job, form, out)
    family = family_of("sd15")
    family.load_lora(str(out))
    assert difference(family, base("sd15"), added) < 1e-4


@pytest.mark.parametrize("form", ["kohya", "peft", "merged"])
def test_numbers_that_half_precision_cannot_hold_are_refused(form, base, small, tmp_path):
    pairs, _ = made(base("sd15"), SOME)
    state = {key: value * (1e6 if "lora_" in key else 1) for key, value in diffusers_state(pairs, 2.0).items()}
    job = made_for(file_of(tmp_path, state), small, precision="fp16")
    with pytest.raises(EnvironmentFault, match="holds numbers that fp16 cannot hold"):
        export(job, form, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_rounding_takes_from_the_matrices_is_said(base, small, tmp_path):
    pairs, _ = made(base("sd15"), SOME)
    # half precision knows nothing below 6e-8
    state = {
        key: value * (1e-7 if "lora_A" in key else 1e2 if "lora_B" in key else 1)
        for key, value in diffusers_state(pairs, 2.0).items()
    }
    job = made_for(file_of(tmp_path, state), small, precision="fp16")
    assert "fp16 rounds away" in export(job, "kohya", tmp_path / "k.safetensors")
    assert export(replace(job, precision="no"), "kohya", tmp_path / "n.safetensors") == ""
    with pytest.raises(EnvironmentFault, match="diffusers is written in fp32"):
        export(job, "diffusers", tmp_path / "d")


def test_whole_numbers_are_no_weights(family_of, base, tmp_path):
    pairs, _ = made(base("sd15"), SOME)
    state = {k: (v * 100).to(torch.int8) if "lora_" in k else v for k, v in diffusers_state(pairs, 2.0).items()}
    with pytest.raises(EnvironmentFault, match=r"lora_A.weight holds numbers of torch.int8"):
        family_of("sd15").load_lora(str(file_of(tmp_path, state)))


@pytest.mark.parametrize("before", ["", "base_model.model.", "module.", "_orig_mod."])
def test_layers_of_text_encoders_are_known_behind_any_beginning(before, base, tmp_path):
    pairs, _ = made(base("sd15"), r"^text_encoder\..*q_proj")
    path = file_of(tmp_path, {f"{before}{key}": value for key, value in diffusers_state(pairs, 2.0).items()})
    assert has_text_layers(path)
    pairs, _ = made(base("sd15"), SOME)
    assert not has_text_layers(file_of(tmp_path, diffusers_state(pairs, 2.0)))


def test_the_strength_in_peft_s_settings_is_part_of_the_digest(base, small, tmp_path):
    pairs, _ = made(base("sd15"), SOME)
    job = made_for(file_of(tmp_path, diffusers_state(pairs, 2.0)), small)
    export(job, "peft", tmp_path / "p")
    before, settings = lora_hash(str(tmp_path / "p")), tmp_path / "p" / "unet" / "adapter_config.json"
    text = settings.read_text()
    assert lora_hash(str(tmp_path / "p")) == before
    settings.write_text(text.replace('"lora_alpha": 2.0', '"lora_alpha": 40.0'))
    assert settings.read_text() != text and lora_hash(str(tmp_path / "p")) != before


def test_every_lora_of_a_stack_is_found_from_anywhere(tmp_path, monkeypatch):
    for name in ("a.safetensors", "b.safetensors"):
        save_file({"x": torch.zeros(1)}, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert whole_lora("a.safetensors:0.5+b.safetensors") == f"{tmp_path}/a.safetensors:0.5+{tmp_path}/b.safetensors"
    assert whole_lora("a.safetensors") == f"{tmp_path}/a.safetensors" and whole_lora(None) is None


def test_a_scale_belongs_to_merging(tmp_path):
    done = entry.run(["export", str(tmp_path), "--format", "kohya", "--lora-scale", "0.5"])
    assert (
        done.returncode == 2
        and "--lora-scale: is for --format merged and checkpoint; of kohya the program" in done.stderr
    )


def test_alphas_of_several_numbers_and_norms_of_columns_are_refused(family_of, base, tmp_path):
    pairs, _ = made(base("sd15"), r"^unet\..*conv2$")
    key, pair = next((k, p) for k, p in pairs.items() if base("sd15")[k].shape[0] == base("sd15")[k].shape[1])
    state = {f"{kohya(*key)}.{SUFFIX[half]}": value for half, value in pair.items()}
    columns = {f"{kohya(*key)}.dora_scale": torch.ones(1, len(pair["up"]), 1, 1)}
    with pytest.raises(EnvironmentFault, match="norms, those of columns"):
        family_of("sd15").load_lora(str(file_of(tmp_path, state | columns)))
    with pytest.raises(EnvironmentFault, match="alpha holds 4 numbers, not one"):
        family_of("sd15").load_lora(str(file_of(tmp_path, state | {f"{kohya(*key)}.alpha": torch.ones(4)})))


def test_adapters_whose_training_changed_the_base_are_refused(family_of, small, tmp_path):
    """Written by peft: PiSSA takes its matrices out of the weights, so on the unchanged base they count twice."""
    unet = plain(small("sd15")).unet
    settings = LoraConfig(r=2, target_modules=["to_q"], init_lora_weights="pissa")
    get_peft_model(unet, settings).save_pretrained(tmp_path / "p")
    with pytest.raises(EnvironmentFault, match=r"init_lora_weights pissa"):
        family_of("sd15").load_lora(str(tmp_path / "p"))


def test_folders_of_peft_are_read_whole_or_not(family_of, base, small, tmp_path):
    pairs, _ = made(base("sd15"), SOME)
    export(made_for(file_of(tmp_path, diffusers_state(pairs, 2.0)), small), "peft", tmp_path / "p")
    shutil.copytree(tmp_path / "p" / "unet", tmp_path / "p" / "text_encoder_3")
    with pytest.raises(EnvironmentFault, match="adapters of peft that are not read together: text_encoder_3, unet"):
        family_of("sd15").load_lora(str(tmp_path / "p"))
    (tmp_path / "p" / "text_encoder_3").rename(tmp_path / "p" / "text_encoder")
    weights = tmp_path / "p" / "text_encoder" / "adapter_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(EnvironmentFault, match="not read together: text_encoder, unet"):
        family_of("sd15").load_lora(str(tmp_path / "p"))
