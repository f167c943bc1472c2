"""sdo doctor: through its entry point, and its advice held against its own estimate."""

import json
import os
import shlex
from dataclasses import replace

import entry
import pytest
import typer
from small_models import make_small

from sdo_cli.cli.doctor import machine_alone
from sdo_cli.doctor import environment
from sdo_cli.doctor.advice import advise, candidates, estimate_recipe
from sdo_cli.doctor.environment import look_around, packages
from sdo_cli.doctor.examine import examine
from sdo_cli.doctor.target import Target, find_target, gpu, parse_size
from sdo_cli.errors import RecipeFault
from sdo_cli.estimate import stages
from sdo_cli.installed import install, install_extra
from sdo_cli.recipe.load import load_recipe

GB = 10**9
SMALL = ["validation.num_prompts=4", "train_batch_size=4", "num_inference_steps=4", "guidance_scale=3"]


def doctor(*arguments, cwd):
    return entry.run(["doctor", *arguments], cwd=cwd)


def test_the_embedded_recipe_is_well_and_nothing_is_written(tmp_path):
    done = doctor("--recipe", "quickstart", *SMALL, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    for word in ("packages", "torch 2", "everything ships with sdo", "world size 1", "shortcut", "fits this machine"):
        assert word in done.stdout
    assert done.stderr == "" and not list(tmp_path.iterdir())


def test_without_a_recipe_the_machine_is_looked_at(tmp_path):
    done = doctor("--json", cwd=tmp_path)
    found = json.loads(done.stdout)["findings"]
    assert done.returncode == 0 and done.stderr == "" and not list(tmp_path.iterdir())
    sections = [finding["section"] for finding in found]
    assert list(dict.fromkeys(sections)) == ["packages", "driver", "device", "disk", "cores", "world"]
    said = {finding["section"]: finding["text"] for finding in found}
    assert "GB of memory" in said["device"] and "free for runs/" in said["disk"]
    assert said["cores"].startswith(f"{os.cpu_count()} core") and "threads" in said["cores"]


def test_the_machine_alone_may_be_what_is_wrong(monkeypatch, capsys):
    real = environment._version
    monkeypatch.setattr(environment, "_version", lambda name: None if name == "peft" else real(name))
    with pytest.raises(typer.Exit) as end:
        machine_alone(as_json=False)
    assert end.value.exit_code == 2
    assert "! packages  peft is missing" in (said := capsys.readouterr().out) and install("peft>=0")[:-2] in said


def test_what_does_not_fit_gets_a_line_to_type(tmp_path):
    done = doctor("--recipe", "quickstart", *SMALL, "--gpu-memory", "0.77GB", cwd=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "! does not fit a GPU of 0.77GB (0.8 GB): needs about" in done.stdout
    assert f"sdo finetune --recipe quickstart {' '.join(SMALL)} gradient" in done.stdout


@pytest.mark.parametrize(("setting", "value"), environment.EXTRAS)
def test_a_package_that_the_recipe_needs_and_that_is_not_there_is_named(monkeypatch, setting, value):
    """Whatever is installed here."""
    package, extra = environment.EXTRAS[setting, value]
    real = environment._version
    monkeypatch.setattr(environment, "_version", lambda name: None if name == package else real(name))
    recipe = replace(load_recipe("quickstart").recipe, **{setting: value})
    found = {item.text: item.remedy for item in environment.packages(recipe) if not item.ok}
    assert found == {f"{setting}={value} needs {package}, which is not installed": install_extra(extra)}
    monkeypatch.setattr(environment, "_version", lambda name: real(name) or "1.0")
    assert all(item.ok for item in environment.packages(recipe))


def test_what_is_missing_is_one_screen(tmp_path, monkeypatch):
    """A hub model without weights: still an estimate, what to type, exit code 2."""
    words = ["train_batch_size=2", "gradient_accumulation_steps=1", "optimizer=adamw8bit", "height=256", "width=256"]
    words += ["gradient.score_micro_batch=0"]
    monkeypatch.chdir(tmp_path)
    done = doctor("--recipe", "aesthetic", *words, "--gpu-memory", "80GB", "--json", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr == ""
    report = json.loads(done.stdout)
    wrong = {finding["text"].split(":")[0]: finding["remedy"] for finding in report["findings"] if not finding["ok"]}
    assert wrong["model"] == wrong["reward aesthetic-v2"] and wrong["model"].endswith(
        f"sdo fetch aesthetic {shlex.join(words)}"
    )
    found = report["estimate"]
    assert report["fits"] is True and report["advice"] is None
    names = [stage["stage"] for stage in found["stages"]]
    assert names == ["prompts", "rollout", "score", "shortcut", "optimizer", "validation"]
    assert found["peak_of_tensors"] == max(stage["resident"] + stage["working"] for stage in found["stages"])
    assert found["flops_per_step"] == sum(stage["flops"] for stage in found["stages"] if stage["each_step"])
    # SD 1.5 at 256 pixels: 50 guided calls of 2 samples, 0.36 TFLOP each, for four updates
    assert found["stages"][1]["flops"] / 1e12 == pytest.approx(50 * 2 * 0.36 / 4, rel=0.02)
    assert found["trained_parameters"] > 10**6


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["train_batch_size=2"], "--recipe is missing"),
        (["--gpu", "4090"], "--recipe is missing"),
        (["--recipe", "quickstart", "--gpu-memory", "much"], "--gpu-memory much: is no size of memory"),
        (["--recipe", "quickstart", "train_batch_sise=2"], "did you mean train_batch_size"),
        (["--recipe", "quickstart", "model=/no/such/folder"], "no estimate: no model at /no/such/folder"),
        (["--recipe", "quickstart", "model=a/b"], "the architecture of a/b is not known on this machine"),
    ],
)
def test_bad_input_is_one_sentence(arguments, text, tmp_path):
    done = doctor(*arguments, cwd=tmp_path)
    assert done.returncode == 2 and text in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def job(*words):
    return load_recipe("quickstart", [*SMALL, *words])


def needs(loaded, target):
    return target.needed(estimate_recipe(loaded, target).peak)


def exactly(memory):
    """A target whose memory is all for tensors."""
    return Target("test", memory, on_cpu=False, context=0, slack=0.0)


def peak(*words):
    return estimate_recipe(job(*words), exactly(0)).peak


def test_advice_fits_when_typed_and_says_no_more_than_it_must():
    target = exactly(round(0.35 * peak()))
    found = examine(job(), target)
    assert found.fits is False and found.advice.fits
    overrides = found.advice.overrides
    assert len(overrides) > 1
    after = examine(job(*overrides), target)
    assert after.fits and after.estimate.peak == found.advice.estimate.peak
    for word in overrides:
        fewer = [other for other in overrides if other != word]
        assert needs(job(*fewer), target) > target.memory, f"{word} was not needed"


def test_the_least_harmful_change_comes_first():
    """What only takes longer is tried before precision, and smaller pictures are the last resort."""
    assert advise_for(0.95)[0].startswith(("vae_checkpointing", "gradient.score_micro_batch", "reward_checkpointing"))
    harm = [next(i for i, start in enumerate(HARM) if word.startswith(start)) for word in advise_for(0.5)]
    assert max(harm) <= HARM.index("gradient.")
    words = [word for stage in ("score", "shortcut") for change in candidates(job().recipe, stage) for word in change]
    assert words.index("vae_checkpointing=true") < words.index("mixed_precision=bf16") < words.index("vae_tiling=true")


HARM = ("validation", "gradient_checkpointing", "vae_checkpointing", "reward_checkpointing", "gradient.", "mixed")


def advise_for(share):
    loaded = job()
    first = estimate_recipe(loaded, exactly(0))
    return advise(loaded, exactly(round(share * first.peak)), first).overrides


def test_a_rule_on_one_graph_gets_a_smaller_batch_for_the_same_global_one():
    loaded = job("gradient.rule=full", "gradient.checkpointing=none", "num_inference_steps=2")
    first = estimate_recipe(loaded, exactly(0))
    assert [stage.name for stage in first.stages if stage.each_step] == ["graph", "optimizer"]
    found = advise(loaded, exactly(round(0.15 * first.peak)), first)
    assert "gradient.checkpointing=calls" in found.overrides and not any("micro_batch" in w for w in found.overrides)
    given = dict(word.split("=") for word in found.overrides)
    assert int(given["train_batch_size"]) * int(given["gradient_accumulation_steps"]) == 4


def test_what_can_never_fit_is_said_to():
    target = exactly(10**6)
    found = examine(job(), target)
    assert not found.fits and not found.advice.fits and found.problems == 1
    assert found.advice.estimate.peak < 0.3 * found.estimate.peak


def test_parts_a_change_does_not_touch_are_not_run_again(monkeypatch):
    loaded = job()
    estimate_recipe(loaded, exactly(0))
    monkeypatch.setattr("sdo_cli.estimate.network.count", None)
    assert estimate_recipe(job("vae_checkpointing=true"), exactly(0)).peak < peak()


def test_every_family_is_estimated(tmp_path):
    """Small pipelines in the real layout, their own solver."""
    for kind in ("sd2", "sdxl", "sd35"):
        model = [f"model={make_small(kind, tmp_path)}", "solver=auto"]
        reward = "rewards=[{name: clip, options: {model: embedded}}]"
        found = estimate_recipe(job(*model, reward, "validation.rewards=[]"), exactly(0))
        assert found.size == (64, 64) and found.flops > 0
        assert len(found.stages) == 6


def test_a_size_the_model_does_not_take_is_a_fault_of_the_recipe(tmp_path):
    with pytest.raises(RecipeFault, match="multiple of 16"):
        examine(job(f"model={make_small('sd35', tmp_path)}", "solver=auto", "height=72"), exactly(GB))


def test_sizes_of_memory():
    assert parse_size("12GB") == parse_size("12") == parse_size(" 12 g ") == 12 * GB
    assert parse_size("24GiB") == 24 * 2**30 and parse_size("0.5TB") == 500 * GB
    for text in ("", "GB", "-3GB", "12XB", "1kB"):
        with pytest.raises(RecipeFault):
            parse_size(text)


def test_the_target_is_the_named_gpu_or_this_machine():
    here, named = find_target(None), find_target("8GB")
    assert here.on_cpu and here.memory > GB
    assert not named.on_cpu and named.memory == 8 * GB == gpu("x", 8 * GB).memory
    # not every byte is for tensors
    assert named.needed(7 * GB) > 8 * GB > named.needed(6 * GB)


def test_packages_too_old_too_new_or_missing_are_found(monkeypatch):
    versions = {"peft": "0.1", "diffusers": None, "transformers": "99"}
    real = environment._version
    monkeypatch.setattr(environment, "_version", lambda name: versions[name] if name in versions else real(name))
    wrong = {finding.text.split(" ")[0]: finding for finding in packages(job().recipe) if not finding.ok}
    assert set(wrong) == set(versions)
    assert "0.1" in wrong["peft"].text and wrong["diffusers"].remedy.startswith(install("diffusers>=0")[:-2])
    assert "<" in wrong["transformers"].remedy


def test_a_full_disk_is_found(monkeypatch):
    monkeypatch.setattr("sdo_cli.doctor.environment._free", lambda path: 10**6)
    recipe = load_recipe("hps").recipe
    (found,) = [finding for finding in look_around(recipe, ["hps"]) if finding.section == "disk"]
    assert not found.ok and "HF_HOME" in found.remedy
    assert all(finding.ok for finding in look_around(job().recipe, ["quickstart"]))


def test_the_largest_stage_names_the_peak():
    found = estimate_recipe(job(), exactly(0))
    assert isinstance(found, stages.Estimate) and found.peak == found.largest.peak == max(s.peak for s in found.stages)
