"""Fine-tuning through the real command and the library, on the embedded model."""

import json
import re
import shutil
import signal
import time
from functools import cache
from pathlib import Path

import entry
import pytest
import torch
from forked import Forked
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from sdo_cli.drawing.draw import draw_noise, make_path
from sdo_cli.errors import RecipeFault
from sdo_cli.estimate.network import NetworkSetup, weights_of
from sdo_cli.gradients.one_graph import one_graph
from sdo_cli.gradients.outcome import Terms
from sdo_cli.gradients.rules import RULES, find_rule
from sdo_cli.gradients.run import with_repeats
from sdo_cli.gradients.three_stage import three_stage
from sdo_cli.models.load import ModelSource, load_family
from sdo_cli.recipe.load import load_recipe
from sdo_cli.runs.folder import write_recipe
from sdo_cli.scoring.statistics import paired_gain
from sdo_cli.training.batches import PromptOrder
from sdo_cli.training.job import plan_step
from sdo_cli.training.loop import train
from sdo_cli.training.objective import RewardObjective, WeightedReward
from sdo_cli.training.overview import parts_of
from sdo_cli.training.prepare import only_measured, prepare

TINY = [
    "max_train_steps=2",
    "train_batch_size=2",
    "num_inference_steps=4",
    "validation.num_prompts=4",
    "validation.grid_prompts=2",
    "validation.grid_steps=1",
]


UNMEASURED = ["validation.prompts={}", "validation.rewards=[]"]


def command(*arguments):
    return ["finetune", "--recipe", "quickstart", *arguments]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "mine"
    done = entry.run(command("--out", str(folder), "--json", *TINY, "lora.alpha=4"))
    assert done.returncode == 0, done.stderr
    return folder, done


def test_run_folder_holds_what_is_promised(run_folder):
    folder, done = run_folder
    names = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert names == {
        "recipe.yaml",
        "resolved.yaml",
        "manifest.json",
        "metrics.jsonl",
        "train_prompts.txt",
        "heldout_prompts.txt",
        "validation.json",
        "reward_curve.png",
        "README.md",
        "report.html",
        "checkpoints/before.json",
        "checkpoints/guided.json",
        *(f"samples/guided/{name}.png" for name in ("00000", "00001")),
        *(f"checkpoints/checkpoint-2/{name}" for name in ("state.safetensors", "state.json", "complete.json")),
        "checkpoints/checkpoint-2/pytorch_lora_weights.safetensors",
        "pytorch_lora_weights.safetensors",
        *(f"samples/step_{s:06d}/{name}.png" for s in (0, 1, 2) for name in ("grid", "00000", "00001")),
    }
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["written"] >= manifest["started"]
    assert manifest["status"] == "finished" and manifest["versions"]["torch"] == torch.__version__.split("+")[0]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert lines[0]["calls"] == {"no_grad": 8, "grad": 2}
    record = json.loads(done.stdout)
    assert record["gains"]["judge"]["prompts"] == 4
    progress = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]
    assert progress[0]["note"].startswith("embedded on the CPU, ") and progress[0]["note"].endswith(
        "; 4 parts: 4 held-out prompts before, and with guidance 5, 2 steps, the same prompts after, report"
    )
    fewer = "rollout.num_inference_steps 10 of the recipe: more than the 4 of sampling, which are taken"
    toys = "rewards by the package's own small CLIP, to try things out: clip-score is clip-embedded"
    assert [line["note"] for line in progress[1:3]] == [fewer, toys]
    phases = {"held-out, before", "held-out, before, guidance 5", "training", "held-out, after"}
    assert {p["phase"] for p in progress[3:]} == phases


def test_the_adapter_has_moved_and_carries_its_alpha(run_folder):
    path = run_folder[0] / "pytorch_lora_weights.safetensors"
    weights = load_file(path)
    ups = [value for key, value in weights.items() if ".lora_B." in key]
    assert ups and all(value.dtype == torch.float32 for value in weights.values())
    assert any(value.abs().max() > 0 for value in ups)
    with safe_open(path, "pt") as stream:
        assert json.loads(stream.metadata()["lora_adapter_metadata"])["unet.lora_alpha"] == 4


def test_the_resolved_recipe_repeats_the_run(run_folder, tmp_path):
    """From the run folder alone, moved elsewhere: prompts, overrides and seed are all in it."""
    moved = tmp_path / "moved"
    shutil.copytree(run_folder[0], moved)
    again = command("--out", str(tmp_path / "again"), "-q")
    again[again.index("quickstart")] = str(moved / "resolved.yaml")
    assert entry.run(again).returncode == 0
    first, second = (load_file(p / "pytorch_lora_weights.safetensors") for p in (run_folder[0], tmp_path / "again"))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_the_card_says_where_things_are(run_folder):
    text = (run_folder[0] / "README.md").read_text()
    named = re.findall(r'(?:from_pretrained|load_lora_weights)\("([^"]+)"', text)
    assert len(named) == 2 and all(Path(path).is_dir() for path in named)
    assert "only measured" in text
    assert "Describe here what it is for" in text and load_recipe("quickstart").recipe.description not in text


def test_the_run_has_a_page_of_its_own(run_folder, tmp_path):
    """Curves, held-out gains, pictures of every stage; the same again from the folder alone, also of a stopped run."""
    folder = run_folder[0]
    page = (folder / "report.html").read_text()
    assert "<h1>Run: quickstart</h1>" in page and "clip-embedded: trained and held out" in page
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])
    assert data["columns"] == ["before", "step 1", "step 2", "before, guidance 5"] and len(data["cases"]) == 2
    assert data["row"] and data["right"] == 2 and page.index('id="pictures"') < page.index('id="figures"')
    assert "4 held-out prompts, and under 10 chance decides" in page
    # warm-up's first step changes something
    assert len(set(data["cases"][0]["images"][:3])) == 3
    held_out = json.loads((folder / "validation.json").read_text())
    judge = data["measures"].index("judge")
    row = data["cases"][1]["scores"][judge]
    ends = [held_out[when]["judge"][1][0] for when in ("before", "after", "guided")]
    assert row == [ends[0], None, *ends[1:]]
    stopped = tmp_path / "stopped"
    shutil.copytree(folder, stopped)
    for name in ("validation.json", "report.html"):
        (stopped / name).unlink()
    manifest = json.loads((stopped / "manifest.json").read_text())
    (stopped / "manifest.json").write_text(json.dumps(manifest | {"status": "interrupted"}))
    with (stopped / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 3, "rew')
    done = entry.run(["report", str(stopped)])
    assert done.returncode == 0, done.stderr
    assert "Run: quickstart (interrupted)" in (stopped / "report.html").read_text()
    # as they are kept when one begins with a #
    lines = (stopped / "heldout_prompts.txt").read_text().splitlines()
    (stopped / "heldout_prompts.txt").unlink()
    (stopped / "heldout_prompts.jsonl").write_text("".join(json.dumps(f"#{line}") + "\n" for line in lines))
    done = entry.run(["report", str(stopped)])
    assert done.returncode == 0 and f"#{lines[1]}" in (stopped / "report.html").read_text(), done.stderr


def test_the_parts_of_a_run_are_those_that_follow():
    assert parts_of(load_recipe("quickstart")) == [
        "256 held-out prompts before, and with guidance 5", "240 steps", "the same prompts after", "report",
    ]  # fmt: skip
    assert parts_of(load_recipe("quickstart"), 40) == ["steps 41 to 240", "256 held-out prompts after", "report"]
    assert parts_of(load_recipe("quickstart"), 240) == ["256 held-out prompts after", "report"]
    guarded = parts_of(load_recipe("guarded", ["max_train_steps=1", "guard.steps=1", "validation.num_prompts=3"]))
    assert guarded[:2] == ["3 held-out prompts before", "1 step with a check every 1"]


def test_one_prompt_has_no_standard_error_and_the_json_is_json(tmp_path):
    words = ["validation.num_prompts=1", "validation.grid_prompts=0", "max_train_steps=1"]
    done = entry.run(command("--out", str(tmp_path / "r"), "--json", *TINY, *words))
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout, parse_constant=lambda word: pytest.fail(word))
    assert record["gains"]["judge"]["standard_error"] is None


def test_a_reward_that_is_not_finite_stops_the_run_with_a_sentence(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "model: embedded\nrewards: [clip]\nprompts: {lines: [a tiger]}\nmax_train_steps: 50\n"
        "train_batch_size: 1\nnum_inference_steps: 2\nguidance_scale: 1\nlearning_rate: 1e30\n"
    )
    arguments = command("--out", str(tmp_path / "run"), "-q")
    arguments[arguments.index("quickstart")] = str(recipe)
    done = entry.run(arguments)
    assert done.returncode == 2 and "finite" in done.stderr and "learning_rate" in done.stderr
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["status"] == "failed"
    assert not list((tmp_path / "run").glob("*.safetensors"))


def test_the_weights_outlive_a_measurement_that_fails(tmp_path):
    """The held-out scores come after the training; a reward that breaks there must not cost the run."""
    (tmp_path / "mine.py").write_text(
        "from rewards import reward\n"
        "@reward('breaks', summary='fails after the training', licence='none needed')\n"
        "class Breaks:\n    seen = 0\n"
        "    def score(self, images, prompts):\n        self.seen += len(images)\n"
        "        if self.seen > 4: raise RuntimeError('the second time')\n"
        "        return images.mean(dim=(1, 2, 3))\n"
    )
    words = [
        "validation.rewards=[breaks]",
        "validation.base_guidance_scale=null",
        f"--plugin={tmp_path}/mine.py",
        "validation.grid_prompts=0",
        "validation.seeds=1",
    ]
    done = entry.run(command("--out", str(tmp_path / "r"), "-q", *TINY, *words))
    assert done.returncode != 0 and "the second time" in done.stderr
    ups = [v for k, v in load_file(tmp_path / "r" / "pytorch_lora_weights.safetensors").items() if ".lora_B." in k]
    assert any(value.abs().max() > 0 for value in ups)
    assert json.loads((tmp_path / "r" / "manifest.json").read_text())["status"] == "failed"
    assert not (tmp_path / "r" / "README.md").exists()


def test_the_same_reward_with_other_options_is_measured():
    def measured(*names):
        listed = ", ".join(f"{{name: clip, options: {{model: '{name}'}}}}" if name else "clip" for name in names)
        return only_measured(load_recipe("clip", [f"validation.rewards=[{listed}, colorfulness]"]).recipe)

    assert list(measured("")) == ["colorfulness"]
    assert list(measured("ViT-B-32")) == ["clip (model=ViT-B-32)", "colorfulness"]
    with pytest.raises(RecipeFault, match="clip is in the list twice; give it once"):
        measured("ViT-B-32", "ViT-B-32")


def test_the_resolved_recipe_names_its_files_from_anywhere(tmp_path, monkeypatch, small):
    monkeypatch.chdir(small("sd15").parent)
    name = small("sd15").name
    loaded = load_recipe("quickstart", [*TINY, f"model=./{name}", "rewards=[colorfulness]", "validation.rewards=[]"])
    write_recipe(loaded, tmp_path)
    monkeypatch.chdir("/")
    assert load_recipe(str(tmp_path / "resolved.yaml"), []).recipe.model == str(small("sd15"))


def test_a_prompt_that_looks_like_a_comment_comes_back(tmp_path):
    loaded = load_recipe("quickstart", [*TINY, "prompts={lines: ['#3 in a row', a tiger]}"])
    write_recipe(loaded, tmp_path)
    again = load_recipe(str(tmp_path / "resolved.yaml"))
    assert again.prompts(again.recipe.prompts) == ["#3 in a row", "a tiger"]


def test_a_mixture_reports_its_parts():
    """In the metrics of every step, and the mixture is what its weights and frozen statistics make of them."""
    parts = "[{name: clip, weight: 2, mean: 0.5, std: 0.1}, {name: colorfulness, weight: 0.5}]"
    words = ["max_train_steps=1", f"rewards=[{{name: mixture, options: {{parts: {parts}}}}}]", "validation.rewards=[]"]
    job, _ = prepare(load_recipe("quickstart", [*TINY, *words]))
    found = next(train(job)).rewards
    assert list(found) == ["mixture", "mixture/clip-embedded", "mixture/colorfulness"]
    expected = 2 * (found["mixture/clip-embedded"] - 0.5) / 0.1 + 0.5 * found["mixture/colorfulness"]
    assert found["mixture"] == pytest.approx(expected, rel=1e-4)


def test_no_error_no_number_of_errors():
    same = torch.tensor([0.1, 0.5])
    assert paired_gain(same, same).times_its_error == "–"
    assert paired_gain(same, same + torch.tensor([0.1, 0.3])).times_its_error == "+2.0"


def test_what_is_only_measured_changes_nothing():
    """The judge is drawn and scored, and the adapter does not know."""
    measured = trained("validation.prompts={file: emoji-heldout.txt}", "validation.rewards=[judge]")
    assert torch.equal(trained()[1], measured[1])


@cache
def trained(*overrides, steps=2):
    """What the steps were, and the adapter after them; the same words give what they gave before."""
    torch.set_num_threads(1)
    words = [*TINY, *UNMEASURED, f"max_train_steps={steps}", *overrides]
    job, _ = prepare(load_recipe("quickstart", words), whole_file=False)
    results = list(train(job))
    return results, torch.cat([p.detach().flatten() for p in job.parameters])


def test_training_is_deterministic_and_follows_the_seed():
    first, again, other = trained(), trained.__wrapped__(), trained("seed=1")
    assert torch.equal(first[1], again[1])
    assert [r.loss for r in first[0]] == [r.loss for r in again[0]]
    assert not torch.equal(first[1], other[1])


def test_accumulation_and_micro_batches_draw_the_same_global_batch():
    whole = trained("train_batch_size=4", steps=1)
    split = trained("train_batch_size=2", "gradient_accumulation_steps=2", steps=1)
    micro = trained("train_batch_size=4", "gradient.rollout_micro_batch=3", "gradient.shortcut_micro_batch=1", steps=1)
    assert split[0][0].loss == pytest.approx(whole[0][0].loss, abs=2e-6)
    assert split[0][0].grad_norm == pytest.approx(whole[0][0].grad_norm, rel=1e-3)
    assert micro[0][0].grad_norm == pytest.approx(whole[0][0].grad_norm, rel=1e-3)


def test_only_prompts_that_the_steps_come_to_are_encoded():
    """A file of thousands costs a short run nothing."""
    loaded = load_recipe("quickstart", [*TINY, "validation.prompts={}", "validation.rewards=[]"])
    job, _ = prepare(loaded, whole_file=False)
    order = PromptOrder(job.prompts, job.recipe.seed)
    come_to = {order.at(position) for position in range(2 * job.global_batch)}
    assert job.embed._kept.keys() == come_to and len(come_to) == 4 < len(job.prompts)
    assert order.first(len(job.prompts) + 1) == job.prompts
    list(train(job))


def test_steps_are_stratified_over_the_global_batch():
    job, _ = prepare(load_recipe("quickstart", [*TINY, "rollout={}", "num_inference_steps=8", "train_batch_size=4",
                                                "gradient_accumulation_steps=2"]))  # fmt: skip
    for step in range(5):
        assert plan_step(job, step).live.sum(1).tolist() == [1] * 8


def test_the_saved_adapter_is_the_trained_one(tmp_path):
    """Alpha other than rank: what training saw, the loaded file gives."""
    words = ["learning_rate=2e-2", "lr_warmup_steps=0", "lora.rank=4", "lora.alpha=12", "max_train_steps=4"]
    job, validation = prepare(load_recipe("quickstart", [*TINY, *words]), whole_file=False)
    plain = validation.draw(job.family, range(2))
    list(train(job))
    seen = validation.draw(job.family, range(2))
    assert (seen - plain).abs().max() > 0.05
    job.family.save_lora(tmp_path)
    loaded = load_family("embedded")
    loaded.load_lora(str(tmp_path), scale=1.0)
    assert (validation.draw(loaded, range(2)) - seen).abs().max() < 1 / 255


WEIGHT_RULES = [name for name, info in RULES.items() if not info.latents_only]


@pytest.mark.parametrize("rule", WEIGHT_RULES)
def test_every_rule_runs_by_one_line(rule):
    options = "gradient.options={k: 2}" if "k" in RULES[rule].options else "gradient.options={}"
    results, _ = trained(f"gradient.rule={rule}", options, steps=1)
    expected = {"forward", "backward"} if RULES[rule].chained else {"rollout", "score", "shortcut"}
    # AlignProp may draw the last step alone, which needs no graph of many
    assert set(results[0].seconds) == expected or rule == "alignprop"
    assert results[0].grad_norm > 0


@pytest.mark.parametrize("kind", ["calls", "blocks", "none"])
def test_what_is_recomputed_does_not_change_the_gradient(kind):
    reference = trained("gradient.rule=full", "guidance_scale=3", steps=1)[0][0]
    result = trained("gradient.rule=full", f"gradient.checkpointing={kind}", "guidance_scale=3", steps=1)[0][0]
    assert result.loss == reference.loss and result.grad_norm == pytest.approx(reference.grad_norm, rel=1e-5)


def test_three_stages_equal_one_graph_on_the_embedded_model():
    """Real UNet, LoRA, guidance, VAE and reward in float32."""
    torch.set_num_threads(1)
    job, _ = prepare(load_recipe("quickstart", [*TINY, *UNMEASURED, "guidance_scale=3"]), whole_file=False)
    # an adapter that has moved: both halves have a gradient
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in job.parameters:
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    settings = job.draw_settings
    noise = draw_noise(job.family, settings, [torch.Generator().manual_seed(s) for s in range(2)])
    prompts = list(job.embed._kept)[:2]
    path = make_path(job.family, settings, noise, job.embed(prompts), job.embed.negative("", 2))
    objective = RewardObjective(job.family, job.rewards, prompts)
    for rule, options in (("sdo", {"steps_per_sample": 2}), ("refl", {}), ("draft-lv", {"repeats": 1})):
        plan = find_rule(rule)(4, 2, path.coefficients, torch.Generator().manual_seed(1), **options)
        gradients = []
        for engine in (three_stage, one_graph):
            with_repeats(lambda p, q, o, t, e=engine: e(p, q, o, terms=t), path, plan, objective, Terms(kl_weight=0.5))
            gradients.append(torch.cat([p.grad.flatten() for p in job.parameters]))
            for parameter in job.parameters:
                parameter.grad = None
        assert (gradients[0] - gradients[1]).norm() < 1e-4 * gradients[1].norm(), rule


def test_the_base_network_is_the_model_without_its_adapter():
    plain = load_family("embedded")
    words = [*TINY, *UNMEASURED, "learning_rate=2e-2", "lr_warmup_steps=0"]
    job, _ = prepare(load_recipe("quickstart", words), whole_file=False)
    list(train(job))
    x, t, c = torch.randn(2, *plain.latent_shape()), torch.full((2,), 400), plain.encode(["a tiger", "a rose"])
    with torch.no_grad():
        tuned, base, own = job.family.network(x, t, c), job.family.base_network(x, t, c), plain.network(x, t, c)
    assert torch.equal(base, own) and (tuned - own).abs().max() > 1e-3
    # switched on again, and still trainable
    with torch.no_grad():
        assert torch.equal(job.family.network(x, t, c), tuned)
    assert all(p.requires_grad for p in job.parameters)


def test_kl_weight_keeps_the_adapter_near_the_base():
    words = ["learning_rate=2e-2", "lr_warmup_steps=0", "lr_scheduler=constant"]
    loose, _ = trained(*words, "kl_weight=1e-6", steps=4)
    tight, _ = trained(*words, "kl_weight=100", steps=4)
    assert loose[0].penalty == 0 and loose[1].penalty > 0
    assert tight[3].penalty < 0.5 * loose[3].penalty
    assert trained(*words, steps=1)[0][0].penalty is None


def test_forms_of_the_loss():
    scores = torch.tensor([0.2, 0.9], requires_grad=True)
    forms = {"maximize": [-0.2, -0.9], "distance": [0.3, 0.4], "hinge": [0.3, 0.0]}
    slopes = {"maximize": [-1, -1], "distance": [-1, 1], "hinge": [-1, 0]}
    for loss, values in forms.items():
        got = WeightedReward("r", None, 2.0, loss, 0.5).loss_of(scores)
        assert got.tolist() == pytest.approx([2 * value for value in values])
        assert torch.autograd.grad(got.sum(), scores)[0].tolist() == [2 * slope for slope in slopes[loss]]


def test_the_recipe_chooses_the_form_of_the_loss():
    reward = trained(steps=1)[0][0].rewards["clip-embedded"]
    hinge = trained("rewards.0.loss=hinge", "rewards.0.target=-5", steps=1)[0][0]
    assert hinge.loss == 0 and hinge.grad_norm == 0
    far = trained("rewards.0.loss=distance", "rewards.0.target=3", steps=1)[0][0]
    assert far.loss == pytest.approx(3 - reward, abs=1e-5)


def test_noise_of_ddim_is_drawn_per_sample():
    """η > 0: the global batch has the same noise however it is split."""
    whole = trained("train_batch_size=4", "eta=0.8", steps=1)[0][0]
    split = trained("train_batch_size=2", "gradient_accumulation_steps=2", "eta=0.8", steps=1)[0][0]
    assert split.loss == pytest.approx(whole.loss, abs=2e-6)
    assert whole.loss != trained("train_batch_size=4", steps=1)[0][0].loss


def test_half_precision_trains_an_adapter_in_full_precision(tmp_path, small):
    # CPUs are slow at it: as little as there can be
    words = ["mixed_precision=bf16", "gradient_checkpointing=true", "lr_warmup_steps=0", "max_train_steps=1"]
    words += ["train_batch_size=1", "num_inference_steps=1", "validation.num_prompts=1", "validation.grid_prompts=0"]
    words += [f"model={small('sd15')}", "rewards=[colorfulness]", "validation.rewards=[]"]
    done = entry.run(command("--out", str(tmp_path / "r"), "-q", *TINY, *words))
    assert done.returncode == 0, done.stderr
    weights = load_file(tmp_path / "r" / "pytorch_lora_weights.safetensors")
    assert all(value.dtype == torch.float32 and torch.isfinite(value).all() for value in weights.values())
    assert "grid.png" not in done.stdout and not (tmp_path / "r" / "samples").exists()


def test_the_base_model_is_never_changed():
    job, _ = prepare(load_recipe("quickstart", [*TINY, *UNMEASURED]), whole_file=False)
    own = {n: p.detach().clone() for n, p in job.family.denoiser.named_parameters() if not p.requires_grad}
    list(train(job))
    assert own and all(torch.equal(p, own[n]) for n, p in job.family.denoiser.named_parameters() if n in own)


def until_it_trains(folder):
    deadline = time.monotonic() + 120
    while not (folder / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.1)


def test_a_killed_run_leaves_nothing_that_looks_finished(tmp_path):
    folder = tmp_path / "run"
    arguments = ["max_train_steps=400", *TINY[1:]]
    process = Forked(command("--out", str(folder), "-q", *arguments))
    until_it_trains(folder)
    process.kill()
    process.wait()
    assert json.loads((folder / "manifest.json").read_text())["status"] == "running"
    assert not list(folder.rglob("*.safetensors")) and not (folder / "README.md").exists()


def test_ctrl_c_is_one_line(tmp_path):
    folder = tmp_path / "run"
    process = Forked(command("--out", str(folder), "-q", "max_train_steps=400", *TINY[1:]))
    until_it_trains(folder)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert json.loads((folder / "manifest.json").read_text())["status"] == "interrupted"
    assert "stopped (SIGINT)" in stderr and "--resume" in stderr and "Traceback" not in stderr


def test_unwritable_output_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    done = entry.run(command("--out", str(tmp_path / "file" / "run"), *TINY))
    assert done.returncode == 2 and "Traceback" not in done.stderr


def test_lora_targets_that_match_nothing_are_refused(tmp_path):
    done = entry.run(command("--out", str(tmp_path / "run"), "lora.target_modules=[nowhere]", *TINY))
    assert done.returncode == 2 and "lora.target_modules" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_lora_beside_all_layers(tmp_path):
    """Every linear layer and convolution of the blocks; diffusers reads the file, and the estimate counts the same."""
    folder = tmp_path / "run"
    words = [*TINY, "lora.layers=all", "lora.rank=2", "max_train_steps=1"]
    done = entry.run(command("--out", str(folder), *words))
    assert done.returncode == 0, done.stderr
    file = load_file(folder / "pytorch_lora_weights.safetensors")
    adapted = {name.removeprefix("unet.").rsplit(".lora", 1)[0] for name in file}
    layers = {
        name
        for name, layer in load_family(ModelSource("embedded"), dtype=torch.float32).denoiser.named_modules()
        if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d)
    }
    outside = {"conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2"}
    assert adapted == layers - outside and len(adapted) == 79
    setup = NetworkSetup.of(load_recipe("quickstart", words).recipe)
    assert sum(weights_of(setup).trained) == sum(tensor.numel() for tensor in file.values())
    # read back and drawn with
    drawn = entry.run(["sample", "a tiger", "--lora", str(folder), "--steps", "2", "--out", str(tmp_path / "one")])
    assert drawn.returncode == 0, drawn.stderr
    both = entry.run(command("--out", str(tmp_path / "both"), *words, "lora.target_modules=[to_q]"))
    assert both.returncode == 2 and "lora.layers: and lora.target_modules both say which layers" in both.stderr
    none = entry.run(command("--out", str(tmp_path / "none"), *TINY, "train=full", "lora.layers=all"))
    assert none.returncode == 2 and "lora.layers: belongs to train: lora" in none.stderr


def test_the_untrained_model_with_guidance_stands_beside(tmp_path):
    """As training without guidance wants to make it needless: scores, a row of the grid, pictures; resumed too."""
    words = [*TINY, "validation.base_guidance_scale=3"]
    folder = tmp_path / "run"
    done = entry.run(command("--out", str(folder), *words))
    assert done.returncode == 0, done.stderr
    table = json.loads((folder / "validation.json").read_text())
    # the same as a run that trains with that guidance begins with
    other = tmp_path / "guided"
    assert entry.run(command("--out", str(other), *TINY, "guidance_scale=3", "max_train_steps=1")).returncode == 0
    assert table["guided"] == json.loads((other / "validation.json").read_text())["before"] != table["before"]
    mean = sum(row[0] for row in table["guided"]["judge"]) / 4
    said = re.search(r"the untrained model with guidance 3: clip-embedded [\d.]+, judge ([\d.]+)", done.stdout)
    assert float(said[1]) == pytest.approx(mean, abs=1e-4)
    assert (
        f"guidance 3: clip-embedded {float(said[0].split()[7].rstrip(',')):.4f}" in (folder / "README.md").read_text()
    )
    assert "The untrained model with guidance" in (folder / "report.html").read_text()
    pictures = [path.read_bytes() for path in sorted((folder / "samples" / "guided").glob("*.png"))]
    assert pictures == [path.read_bytes() for path in sorted((other / "samples" / "step_000000").glob("0*.png"))]
    grids = [(folder / "samples" / f"step_{step:06d}" / "grid.png") for step in (1, 2)]
    heights = [Image.open(path).height for path in grids]
    # two rows on the way, three at the end
    assert heights[1] > 1.3 * heights[0]
    again = entry.run(command("--out", str(folder), *words, "max_train_steps=3", "--resume"))
    assert again.returncode == 0 and "held-out, before, guidance" not in again.stderr, again.stderr
    assert json.loads((folder / "validation.json").read_text())["guided"] == table["guided"]


def test_guidance_beside_needs_held_out_prompts(tmp_path):
    done = entry.run(command("--out", str(tmp_path), *UNMEASURED, "validation.base_guidance_scale=3"))
    assert done.returncode == 2 and "validation.base_guidance_scale: there are no validation.prompts" in done.stderr
