"""Models as people have them: configs as published and files with markers are drawn as meant, or refused by name."""

import json
import shutil

import diffusers
import entry
import numpy as np
import pytest
import torch
from original_names import write_original
from PIL import Image
from published import CONFIGS, with_config
from safetensors.torch import load_file, save_file
from small_models import plain

from sdo_cli.drawing.draw import DrawSettings, draw_images, make_route, native_of
from sdo_cli.drawing.notes import drawing_notes
from sdo_cli.errors import EnvironmentFault, SolverFault
from sdo_cli.models import single_file
from sdo_cli.models.file_header import BASE_STEPS
from sdo_cli.models.load import ModelSource, load_family
from sdo_cli.models.single_file import CROSS, UNET, kind_of
from sdo_cli.sampling.solvers import SOLVERS, make_scheduler, native_solver

WORDS = ["sample", "the cat", "--steps", "4", "--guidance", "3", "--seed", "5"]


def sdo(*arguments, cwd):
    return entry.run(arguments, cwd=cwd)


def picture(folder):
    return np.asarray(Image.open(folder / "00000.png"), dtype=int)


def drawn(name, cwd, *words):
    done = sdo(*WORDS, "--out", name, *words, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return picture(cwd / name), done.stderr


def plainly(model, steps=4, scheduler=None, **changes):
    """By plain diffusers, with the model's own scheduler or another made of its config."""
    pipe = plain(model)
    if scheduler or changes:
        kind = type(pipe.scheduler) if scheduler is None else getattr(diffusers, scheduler)
        config = {k: v for k, v in pipe.scheduler.config.items() if k != "_use_default_values" or not changes}
        pipe.scheduler = kind.from_config(config, **changes)
    made = pipe("the cat", num_inference_steps=steps, guidance_scale=3, generator=torch.Generator().manual_seed(5))
    return np.asarray(made.images[0], dtype=int)


def test_prediction_type_counts_where_the_config_is_silent(small, tmp_path):
    """SD 1.5's published config names neither kind of prediction nor spacing."""
    model = with_config(small("sd15"), tmp_path / "m", "sd15")
    silent, _ = drawn("silent", tmp_path, "-m", model)
    said, _ = drawn("said", tmp_path, "-m", model, "--prediction-type", "v_prediction")
    pipe = plain(model)
    pipe.scheduler = diffusers.PNDMScheduler(**_constructor("sd15"), prediction_type="v_prediction")
    made = pipe("the cat", num_inference_steps=4, guidance_scale=3, generator=torch.Generator().manual_seed(5))
    assert np.abs(said - np.asarray(made.images[0], dtype=int)).max() <= 1
    assert np.abs(silent - said).max() > 5 and np.abs(silent - plainly(model)).max() <= 1
    family = load_family(ModelSource(str(model), prediction_type="v_prediction"))
    for name in (name for name, solver in SOLVERS.items() if not solver.flow):
        assert make_scheduler(name, family.scheduler_config, 4).config.prediction_type == "v_prediction", name


def _constructor(name):
    return {key: value for key, value in CONFIGS[name].items() if not key.startswith("_") and key != "clip_sample"}


@pytest.mark.parametrize(("key", "value"), [("timestep_spacing", "trailing"), ("rescale_betas_zero_snr", True)])
def test_spacing_and_zero_snr_can_be_said_too(key, value, small, tmp_path):
    model = with_config(small("sd2"), tmp_path / "m", "sd21")
    family = load_family(ModelSource(str(model), **{key: value}))
    made = make_scheduler("euler", family.scheduler_config, 4)
    assert made.config[key] == value
    words = ["--timestep-spacing", value] if key == "timestep_spacing" else ["--rescale-betas-zero-snr"]
    said, _ = drawn("said", tmp_path, "-m", model, *words)
    assert np.abs(said - plainly(model, **{key: value})).max() <= 1
    assert np.abs(said - plainly(model)).max() > 1


@pytest.mark.parametrize("scale", ["0", "0.5"])
def test_guidance_up_to_one_is_without(scale, small, tmp_path):
    """As in diffusers' pipelines: what cards of Turbo and Lightning write as 0 is no picture without a prompt."""
    words = ["-m", small("sd15"), "--guidance"]
    zero, said = drawn("zero", tmp_path, *words, scale)
    one, silent = drawn("one", tmp_path, *words, "1")
    assert (zero == one).all() and f"guidance_scale {scale} is without guidance" in said and "guidance" not in silent
    other = sdo("sample", "the dog", *WORDS[2:], "--out", "other", *words, scale, cwd=tmp_path)
    # the small model looks at its prompt a little
    assert other.returncode == 0 and np.abs(zero - picture(tmp_path / "other")).max() > 2


def test_training_without_guidance_is_that_of_one(small, tmp_path):
    losses = []
    for scale in (0, 1):
        words = [f"model={small('sd15')}", "rewards=[colorfulness]", "max_train_steps=1", "train_batch_size=1"]
        words += ["num_inference_steps=2", "validation={}", f"guidance_scale={scale}"]
        done = sdo("finetune", "--recipe", "quickstart", "--out", f"run{scale}", *words, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        losses.append(json.loads((tmp_path / f"run{scale}" / "metrics.jsonl").read_text().splitlines()[0])["loss"])
    assert losses[0] == losses[1]


def timesteps(model, solver="dpm++2m"):
    return make_scheduler(solver, load_family(str(model)).scheduler_config, 4).timesteps.tolist()


def test_saved_pipelines_keep_the_models_timesteps(small, tmp_path):
    """Saving turns diffusers' defaults into settings, which another scheduler would then follow."""
    model = with_config(small("sd15"), tmp_path / "m", "sd15")
    words = [f"model={model}", "train=full", "rewards=[colorfulness]", "max_train_steps=1", "train_batch_size=1"]
    words += ["num_inference_steps=4", "validation={}", "solver=dpm++2m"]
    done = sdo("finetune", "--recipe", "quickstart", "--out", "run", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lora = ["max_train_steps=1", "train=lora", *(word for word in words if word != "train=full")]
    assert sdo("finetune", "--recipe", "quickstart", "--out", "lora", *lora, cwd=tmp_path).returncode == 0
    assert sdo("export", "lora", "--format", "merged", "--out", "merged", cwd=tmp_path).returncode == 0
    before = timesteps(model)
    assert before == [999, 749, 500, 250]
    for folder in (tmp_path / "run" / "pipeline", tmp_path / "merged"):
        assert timesteps(folder) == before
        # and by whoever loads it
        pipe = plain(folder)
        changed = diffusers.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
        changed.set_timesteps(4)
        assert changed.timesteps.tolist() == before
        saved = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
        assert {k: v for k, v in saved.items() if k != "_diffusers_version"} == {
            k: v for k, v in CONFIGS["sd15"].items() if k != "_diffusers_version"
        }


def test_what_is_said_of_a_model_is_saved_with_it(small, tmp_path):
    model = with_config(small("sd15"), tmp_path / "m", "sd15")
    family = load_family(ModelSource(str(model), prediction_type="v_prediction", timestep_spacing="trailing"))
    family.save_pipeline(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "scheduler" / "scheduler_config.json").read_text())
    assert (saved["prediction_type"], saved["timestep_spacing"]) == ("v_prediction", "trailing")


@pytest.fixture
def single(small, tmp_path, monkeypatch):
    """single(kind, **markers) -> a file in the original names, read with the small model's configs."""

    def write(kind, metadata=None, drop=(), rename=lambda name: name, **extra):
        without = {"text_encoder_3": None, "tokenizer_3": None} if kind == "sd35" else {}
        write_original(plain(small(kind), **without), tmp_path / "plain.safetensors")
        kept = {rename(k): v for k, v in load_file(tmp_path / "plain.safetensors").items() if not k.startswith(drop)}
        path = tmp_path / f"{kind}.safetensors"
        save_file(kept | extra, path, metadata=metadata)
        monkeypatch.setattr(single_file, "config_folder", lambda found: small(kind))
        return path

    return write


EMPTY = {"v_pred": torch.tensor([])}


@pytest.mark.parametrize(
    ("extra", "metadata", "settings"),
    [
        (EMPTY, None, {"prediction_type": "v_prediction"}),
        (
            {**EMPTY, "ztsnr": torch.tensor([])},
            None,
            {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
        ),
        ({}, {"modelspec.prediction_type": "v"}, {"prediction_type": "v_prediction"}),
        ({}, {"modelspec.predict_key": "v"}, {"prediction_type": "v_prediction"}),
        (
            {},
            {"ss_v_parameterization": "True", "ss_zero_terminal_snr": "True"},
            {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
        ),
    ],
)
def test_a_file_that_says_what_it_is_is_drawn_so(extra, metadata, settings, single, small, tmp_path):
    path = single("sdxl", metadata, **extra)
    image, _ = drawn("out", tmp_path, "-m", path)
    assert np.abs(image - plainly(small("sdxl"), **settings)).max() <= 1
    assert np.abs(image - plainly(small("sdxl"))).max() > 5


def test_a_file_and_a_recipe_that_disagree_are_a_sentence(single, tmp_path):
    path = single("sdxl", {"modelspec.prediction_type": "epsilon"}, **EMPTY)
    family = load_family(ModelSource(str(path), prediction_type="epsilon"))
    assert family.scheduler_config["prediction_type"] == "epsilon"
    first, second = drawing_notes(family, [], DrawSettings())
    assert "marker v_pred says v_prediction, its metadata modelspec.prediction_type epsilon" in first
    assert second == "prediction_type: epsilon, where the file says v_prediction"
    _, said = drawn("out", tmp_path, "-m", path, "--prediction-type", "epsilon")
    assert second in said


@pytest.mark.parametrize("markers", [("edm_mean", "edm_std"), ("edm_vpred.sigma_max", "v_pred")])
def test_edm_files_are_refused_by_name(markers, single, tmp_path):
    path = single("sdxl", **{name: torch.ones(4) for name in markers})
    for words in (["sample", "x", "-m", path], ["doctor", "--recipe", "quickstart", f"model={path}"]):
        done = sdo(*words, cwd=tmp_path)
        assert done.returncode == 2 and "is an EDM model" in done.stderr + done.stdout


def test_an_edm_folder_is_refused_by_name(small, tmp_path):
    model = with_config(small("sdxl"), tmp_path / "m", "playground")
    for words in (["sample", "x", "-m", model], ["doctor", "--recipe", "quickstart", f"model={model}"]):
        done = sdo(*words, cwd=tmp_path)
        assert done.returncode == 2 and "EDMDPMSolverMultistepScheduler" in done.stderr + done.stdout


@pytest.mark.parametrize("extra", [{"scaled_fp8": torch.tensor([])}, {"x.scale_weight": torch.ones(1)}])
def test_scaled_fp8_is_refused(extra, single, tmp_path):
    done = sdo("sample", "x", "-m", single("sdxl", **extra), cwd=tmp_path)
    assert done.returncode == 2 and "scaled fp8 weights" in done.stderr and "fp16 or bf16" in done.stderr


@pytest.mark.parametrize("solver", ["pndm", "deis"])
def test_solvers_without_zero_snr_are_refused(solver, small, tmp_path):
    model = with_config(small("sd2"), tmp_path / "m", "zero-snr")
    done = sdo(*WORDS, "-m", model, "--solver", solver, cwd=tmp_path)
    assert done.returncode == 2 and f"solver '{solver}' has no rescale_betas_zero_snr" in done.stderr
    assert "choose one of: ddim, euler, dpm++2m, dpm++2m-karras, unipc" in done.stderr
    for fitting in ("ddim", "euler", "dpm++2m", "dpm++2m-karras", "unipc"):
        assert make_scheduler(fitting, CONFIGS["zero-snr"], 4).alphas_cumprod[-1] < 1e-4


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_guidance_goes_into_an_lcm_network(kind, small, tmp_path):
    """As in diffusers: an embedding of the scale in every call, and no second call for the negative prompt."""
    model = with_config(small(kind), tmp_path / "m", "lcm")
    pipe = plain(model)
    pipe.unet = diffusers.UNet2DConditionModel.from_config({**pipe.unet.config, "time_cond_proj_dim": 16})
    torch.nn.init.normal_(pipe.unet.time_embedding.cond_proj.weight)
    pipe.unet.save_pretrained(model / "unet")
    one, _ = drawn("one", tmp_path, "-m", model)
    other, said = drawn("other", tmp_path, "-m", model, "--guidance", "0")
    assert np.abs(one - plainly(model)).max() <= 1 and np.abs(one - other).max() > 5 and "without guidance" not in said
    words = [f"model={model}", "rewards=[colorfulness]", "max_train_steps=1", "train_batch_size=2", "solver=auto"]
    words += ["num_inference_steps=2", "validation={}", "guidance_scale=3", "gradient_accumulation_steps=1"]
    for number, more in enumerate([[], ["lora.text_encoder=true"]] if kind == "sd15" else [[]]):
        out = f"run{number}"
        done = sdo("finetune", "--recipe", "quickstart", "--out", out, *words, *more, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        (line,) = map(json.loads, (tmp_path / out / "metrics.jsonl").read_text().splitlines())
        assert line["calls"] == {"no_grad": 4, "grad": 2} and line["loss"] != 0
    refused = sdo("optimize", "--prompt", "the cat", "--objective", "colorfulness", "-m", model, cwd=tmp_path)
    assert refused.returncode == 2 and "is an LCM network" in refused.stderr, refused.stderr
    found = sdo("doctor", "--recipe", "quickstart", "--json", *words, cwd=tmp_path)
    assert json.loads(found.stdout)["estimate"]["flops_per_step"] > 0


@pytest.mark.parametrize("kind", ["UniPCMultistepScheduler", "DPMSolverMultistepScheduler"])
def test_the_shift_of_a_flow_is_kept_whatever_its_solver_calls_it(kind):
    config = {"_class_name": kind, "prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    shifted, plainer = (make_scheduler("flow-euler", c, 4).sigmas for c in (config, {**config, "flow_shift": 1.0}))
    assert torch.equal(shifted, make_scheduler("flow-euler", CONFIGS["sd3"], 4).sigmas)
    assert not torch.equal(shifted, plainer)
    own = native_solver(config)
    assert (own.solver, own.instead_of) == ("flow-euler", kind)


def test_a_stochastic_flow_is_drawn_without_noise_and_that_is_said(small, tmp_path):
    model = with_config(small("sd3-no-t5"), tmp_path / "m", "sd3", stochastic_sampling=True)
    alone, said = drawn("alone", tmp_path, "-m", model)
    done = sdo("sample", "the cat", "the dog", *WORDS[2:], "-m", model, "--out", "two", cwd=tmp_path)
    assert done.returncode == 0 and np.abs(picture(tmp_path / "two") - alone).max() <= 1
    assert "flow-euler stands in for the model's own" in said and "stochastic_sampling" in said
    assert np.abs(alone - plainly(small("sd3-no-t5"))).max() <= 1


OWN = {"sd15": "pndm", "sd21": "ddim", "sdxl": "euler", "zero-snr": "euler", "lightning": "euler", "sd3": "flow-euler"}


@pytest.mark.parametrize("name", OWN)
def test_auto_is_the_models_own_sampler(name):
    assert native_solver(CONFIGS[name]) == native_solver({**CONFIGS[name], "trained_betas": None})
    assert (native_solver(CONFIGS[name]).solver, native_solver(CONFIGS[name]).instead_of) == (OWN[name], "")


@pytest.mark.parametrize(
    ("config", "solver", "said"),
    [
        (CONFIGS["sdxl"] | {"_class_name": "HeunDiscreteScheduler"}, "ddim", "HeunDiscreteScheduler"),
        (CONFIGS["sdxl"] | {"use_karras_sigmas": True}, "euler", "EulerDiscreteScheduler with use_karras_sigmas True"),
        (
            CONFIGS["sdxl"] | {"_class_name": "DPMSolverMultistepScheduler", "use_karras_sigmas": True},
            "dpm++2m-karras",
            "",
        ),
        (
            CONFIGS["sdxl"] | {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++"},
            "dpm++2m",
            "DPMSolverMultistepScheduler with algorithm_type sde-dpmsolver++",
        ),
        (
            CONFIGS["zero-snr"] | {"_class_name": "PNDMScheduler"},
            "ddim",
            "PNDMScheduler, which has no rescale_betas_zero_snr",
        ),
    ],
)
def test_what_stands_in_is_said(config, solver, said):
    found = native_solver(config)
    assert (found.solver, found.instead_of) == (solver, said)


def test_noise_of_ddim_makes_ddim_of_auto(small):
    family = load_family(str(small("sd15")))
    settings = DrawSettings(eta=0.5, num_inference_steps=4)
    assert native_of(family, settings).solver == "ddim" and make_route(family, settings).eta == 0.5
    assert "ddim stands in for the model's own pndm, which takes no eta" in " ".join(
        drawing_notes(family, [], settings)
    )


def test_a_folder_of_nine_channels_is_an_inpainting_model(small, tmp_path):
    model = with_config(small("sd15"), tmp_path / "m", "sd15")
    pipe = plain(model)
    pipe.unet = diffusers.UNet2DConditionModel.from_config({**pipe.unet.config, "in_channels": 9})
    pipe.save_pretrained(model)
    done = sdo(*WORDS, "-m", model, cwd=tmp_path)
    assert done.returncode == 2 and "takes 9 channels" in done.stderr


def test_zero_snr_of_a_noise_prediction_is_refused(small, tmp_path):
    model = with_config(small("sd2-base"), tmp_path / "m", "zero-snr", prediction_type="epsilon")
    words = ["max_train_steps=1", "validation={}", "rewards=[colorfulness]", f"model={model}", "solver=auto"]
    for command in ([*WORDS, "-m", model], ["finetune", "--recipe", "quickstart", *words]):
        done = sdo(*command, cwd=tmp_path)
        assert done.returncode == 2 and "a prediction of the noise says nothing about the image" in done.stderr
        assert "fault of sdo" not in done.stderr


@pytest.mark.parametrize("spacing", ["use_exponential_sigmas", "use_beta_sigmas"])
def test_a_solvers_name_says_its_spacing(spacing):
    config = CONFIGS["sdxl"] | {spacing: True}
    for solver in ("euler", "dpm++2m", "dpm++2m-karras"):
        found = make_scheduler(solver, config, 6).sigmas
        assert torch.equal(found, make_scheduler(solver, CONFIGS["sdxl"], 6).sigmas)


def test_deis_has_its_own_algorithm():
    config = CONFIGS["sdxl"] | {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++"}
    assert torch.equal(make_scheduler("deis", config, 4).sigmas, make_scheduler("deis", CONFIGS["sdxl"], 4).sigmas)


def test_settings_a_scheduler_cannot_follow_are_one_sentence():
    with pytest.raises(SolverFault, match=r"solver 'euler' does not work with 4 steps .* no_such_schedule"):
        make_scheduler("euler", CONFIGS["sdxl"] | {"beta_schedule": "no_such_schedule"}, 4)


def test_parts_a_file_lacks_are_named(single, small, tmp_path):
    for kind, prefix in (("sd15", "cond_stage_model"), ("sdxl", "conditioner"), ("sd35", "text_encoders")):
        path = single(kind, drop=(prefix,))
        done = sdo(*WORDS, "-m", path, cwd=tmp_path)
        assert done.returncode == 2 and "holds no text encoders\n     give them with text_encoders:" in done.stderr
        image, _ = drawn(f"{kind}-given", tmp_path, "-m", path, "--text-encoders", small(kind))
        assert np.abs(image - plainly(small(kind))).max() <= 1
    refused = sdo(*WORDS, "-m", path, "--text-encoders", "nowhere", cwd=tmp_path)
    assert refused.returncode == 2 and "nowhere is no folder of a diffusers pipeline" in refused.stderr
    path = single("sd15", drop=("first_stage_model",))
    done = sdo(*WORDS, "-m", path, cwd=tmp_path)
    assert done.returncode == 2 and "holds no VAE\n     give one with vae:" in done.stderr
    with_one, _ = drawn("with", tmp_path, "-m", path, "--vae", small("sd15") / "vae")
    assert np.abs(with_one - plainly(small("sd15"))).max() <= 1


def test_a_runs_card_says_where_the_text_encoders_came_from(single, small, tmp_path):
    path = single("sd15", drop=("cond_stage_model",))
    words = [f"model={path}", f"text_encoders={small('sd15')}", "rewards=[colorfulness]", "max_train_steps=1"]
    words += ["train_batch_size=1", "num_inference_steps=2", "validation={}", "solver=auto"]
    done = sdo("finetune", "--recipe", "quickstart", "--out", "run", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "run" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    compile(lines, "card", "exec")
    assert "from transformers import CLIPTextModel, CLIPTokenizer" in lines
    assert f'text_encoder=CLIPTextModel.from_pretrained("{small("sd15")}", subfolder="text_encoder")' in lines
    # the folder says where they are
    assert "--lora run" in done.stdout
    assert sdo("sample", "a", "--lora", "run", "--steps", "2", "--out", "s", cwd=tmp_path).returncode == 0


def test_clip_under_older_names_is_read(single, small, tmp_path):
    path = single("sd15", rename=lambda name: name.replace("transformer.text_model.", "transformer."))
    image, _ = drawn("out", tmp_path, "-m", path)
    assert np.abs(image - plainly(small("sd15"))).max() <= 1


def header(tmp_path, **tensors):
    save_file(tensors, tmp_path / "m.safetensors")
    return tmp_path / "m.safetensors"


def test_the_refiner_and_unclip_are_refused_by_name(tmp_path):
    refiner = {UNET: torch.zeros(1, 4, 1, 1), "conditioner.embedders.0.model.ln_final.weight": torch.zeros(1)}
    with pytest.raises(EnvironmentFault, match="SDXL's refiner"):
        kind_of(header(tmp_path, **refiner))
    other = {UNET: torch.zeros(1, 4, 1, 1), CROSS: torch.zeros(1, 1024), single_file.LABEL: torch.zeros(1, 1)}
    with pytest.raises(EnvironmentFault, match="unCLIP"):
        kind_of(header(tmp_path, **other))


def test_a_step_counter_tells_the_base_model_of_sd_2(tmp_path):
    tensors = {UNET: torch.zeros(1, 4, 1, 1), CROSS: torch.zeros(1, 1024)}
    assert kind_of(header(tmp_path, **tensors)) == "sd21"
    assert kind_of(header(tmp_path, **tensors, global_step=torch.tensor(BASE_STEPS))) == "sd21-base"
    assert kind_of(header(tmp_path, **tensors, global_step=torch.tensor(110_000))) == "sd21"
    assert kind_of(header(tmp_path, **tensors, global_step=torch.tensor(BASE_STEPS)), "v_prediction") == "sd21"


def test_one_step_that_begins_at_the_end_is_said(small):
    family = load_family(str(small("sdxl")))
    (said,) = drawing_notes(family, [], DrawSettings(num_inference_steps=1))
    assert "timestep_spacing puts it at t = 1" in said
    trailing = load_family(ModelSource(str(small("sdxl")), timestep_spacing="trailing"))
    assert drawing_notes(trailing, [], DrawSettings(num_inference_steps=1)) == []


# the noise of every sampler comes from the image's own generator, first the latent, then one draw per call, as in
# diffusers' pipelines
FAMILIES = {
    "sd15": ("sd15", {}),
    "sd21": ("sd2", {}),
    "zero-snr": ("sd2", {}),
    "sdxl": ("sdxl", {}),
    "sdxl-turbo": ("sdxl", {"guidance_scale": 0.0}),
    "lightning": ("sdxl", {"guidance_scale": 0.0}),
    "lcm": ("sd15", {"guidance_scale": 1.0}),
    "tcd": ("sdxl", {"guidance_scale": 0.0, "eta": 0.3}),
    "sd3": ("sd3-no-t5", {}),
    "sd35-turbo": ("sd35", {"guidance_scale": 0.0}),
}


@pytest.fixture(scope="module")
def published_models(small, tmp_path_factory):
    """published_models(name) -> ours and plain diffusers' of a small model with the published config."""
    folder = tmp_path_factory.mktemp("published")
    made = {}

    def of(name):
        if name not in made:
            model = with_config(small(FAMILIES[name][0]), folder / name, name)
            made[name] = load_family(str(model)), plain(model)
        return made[name]

    return of


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize("name", FAMILIES)
def test_auto_draws_what_plain_diffusers_draws_with_the_published_config(name, steps, published_models):
    family, pipe = published_models(name)
    options = {"guidance_scale": 3.0, **FAMILIES[name][1]}
    settings = DrawSettings(num_inference_steps=steps, **options)
    ours = next(draw_images(family, ["the cat"], lambda j: torch.Generator().manual_seed(5), settings))[0]
    theirs = pipe("the cat", num_inference_steps=steps, generator=torch.Generator().manual_seed(5), **options).images
    shown = (ours.permute(1, 2, 0).numpy() * 255).round()
    assert native_of(family, settings).instead_of == ""
    assert np.abs(shown - np.asarray(theirs[0], dtype=int)).max() <= 1 and shown.std() > 1


def emptied(model, folder, **renamed):
    """A copy of a small model; ``renamed``: a part's weights under another name, or gone for None."""
    shutil.copytree(model, folder)
    for part, name in renamed.items():
        for path in (folder / part).glob("*.safetensors"):
            path.unlink() if name is None else path.rename(path.with_name(name))
    return folder


WEIGHTS = "diffusion_pytorch_model"
FILES = {
    "no third encoder": ("sd3", {"text_encoder_3": None}, "holds no weights", "t5: false (--no-t5)"),
    "one part in fp16": ("sd15", {"text_encoder": "model.fp16.safetensors"}, "but in fp16", "variant: fp16"),
    "pickles": ("sd15", {"unet": f"{WEIGHTS}.bin"}, "only as pickles", "save_pretrained"),
    "a piece": ("sd15", {"unet": f"{WEIGHTS}-00001-of-00002.safetensors"}, "holds no weights", "pieces may be missing"),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_folder_that_lacks_files_says_which_and_what_to_do(kind, small, tmp_path):
    model, renamed, problem, remedy = FILES[kind]
    folder = emptied(small(model), tmp_path / "m", **renamed)
    done = sdo(*WORDS, "-m", folder, cwd=tmp_path)
    assert done.returncode == 2 and problem in done.stderr and remedy in done.stderr
    assert "sdo fetch" not in done.stderr and next(iter(renamed)) in done.stderr
    if kind == "one part in fp16":
        image, _ = drawn("out", tmp_path, "-m", folder, "--variant", "fp16")
        assert np.abs(image - plainly(small(model))).max() <= 1
    if kind == "no third encoder":
        assert drawn("out", tmp_path, "-m", folder, "--no-t5")[0].std() > 1


def test_a_pipeline_in_fp16_pieces_is_found(small, tmp_path):
    """As large transformers are saved: names and an index by variant."""
    folder = tmp_path / "m"
    plain(small("sd15")).save_pretrained(folder, variant="fp16", max_shard_size="100KB")
    assert len(list((folder / "unet").glob("*.fp16-0*.safetensors"))) > 1
    image, _ = drawn("out", tmp_path, "-m", folder)
    assert np.abs(image - plainly(small("sd15"))).max() <= 1


def test_a_tiny_autoencoder_is_no_vae_to_train_through(small, tmp_path):
    blocks = {f"{side}_block_out_channels": (8,) * 4 for side in ("encoder", "decoder")}
    diffusers.AutoencoderTiny(**blocks).save_pretrained(tmp_path / "tiny")
    done = sdo(*WORDS, "-m", small("sd15"), "--vae", "tiny", cwd=tmp_path)
    assert done.returncode == 2 and "is an AutoencoderTiny, not an AutoencoderKL" in done.stderr
