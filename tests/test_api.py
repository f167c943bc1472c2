"""The Python interface: what a notebook gets; the commands' own code behind it."""

import inspect
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import entry
import pytest
from PIL import Image
from safetensors.torch import load_file

import rewards
import sdo_cli
from sdo_cli import Evaluation, Run, compare, evaluate, export, finetune, load_recipe, optimize, sample
from sdo_cli.api import Told
from sdo_cli.errors import Interrupted, PluginFault, RecipeFault, SdoError
from sdo_cli.gradients.plan import Mode, plan_of
from sdo_cli.runs.read import manifest_of

ROOT = Path(__file__).parent.parent
HELD_OUT = ["a dog on a red field", "a cat on a blue field", "a bus on a green field"]
SMALL = {
    "max_train_steps": 2,
    "checkpointing_steps": 1,
    "train_batch_size": 2,
    "num_inference_steps": 2,
    "rollout": {},
    "gradient": {"rule": "sdo"},
    "lr_warmup_steps": 0,
    "validation": {"prompts": {"lines": HELD_OUT}, "grid_prompts": 1, "batch_size": 2, "rewards": ["judge"]},
}


class Redness:
    """How red."""

    def score(self, images, prompts):
        return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))


@pytest.fixture(autouse=True)
def tables():
    """Objects register themselves for the process; tests are others'."""
    with entry._tables():
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    place = tmp_path_factory.mktemp("api")
    told, steps = [], []
    made = finetune(load_recipe("quickstart", SMALL), out=place / "r", progress=told.append, on_step=steps.append)
    return made, told, steps


def test_a_run_is_the_commands_run(run, tmp_path):
    made, told, steps = run
    words = [f"{key}={json.dumps(value)}" for key, value in SMALL.items()]
    done = entry.run(["finetune", "quickstart", "--out", tmp_path / "r", "-q", *words])
    assert done.returncode == 0, done.stderr
    mine, theirs = (load_file(place / "pytorch_lora_weights.safetensors") for place in (made.folder, tmp_path / "r"))
    assert mine.keys() == theirs.keys() and all(bool((mine[key] == theirs[key]).all()) for key in mine)
    assert made.gains == Run(tmp_path / "r").gains and set(made.gains) == {"clip-embedded", "judge"}
    assert made.status == "finished" and made.checkpoints == [1, 2] and made.report.is_file()
    assert [step.step for step in steps] == [1, 2]
    assert Told("training", 2, 2, told[-1].text) not in told[:1] and told[-1].phase == "held-out, after"
    assert any(t.phase == "training" and t.done == 1 and "clip-embedded" in t.text for t in told)
    command = manifest_of(made.folder)["command"]
    assert command.startswith("sdo finetune --recipe quickstart max_train_steps=2") and f"--out {made}" in command


def test_what_a_run_holds(run):
    made, _, _ = run
    assert made.recipe.train_batch_size == 2 and made.grid.size[1] > 128
    frame = made.to_pandas()
    assert list(frame["step"]) == [1, 2] and "rewards.clip-embedded" in frame and "seconds.rollout" in frame
    assert made.at(1) == f"{made}@1"
    with pytest.raises(RecipeFault, match=r"has no checkpoint 7; there are: 1, 2"):
        made.at(7)
    with pytest.raises(RecipeFault, match="no best adapter: it has no guard"):
        made.at("best")
    with pytest.raises(RecipeFault, match="is no run"):
        Run("/nowhere")


def test_resume_goes_on(run, tmp_path):
    recipe = load_recipe("quickstart", {**SMALL, "max_train_steps": 1})
    finetune(recipe, out=tmp_path / "r")
    with pytest.raises(RecipeFault, match="is not empty; give a new folder, or resume=True"):
        finetune(recipe, out=tmp_path / "r")
    again = finetune(load_recipe("quickstart", SMALL), out=tmp_path / "r", resume=True)
    name = "pytorch_lora_weights.safetensors"
    # the rate falls to the end of the steps, which was another
    assert again.checkpoints == [1, 2] and (again.folder / name).is_file() and len(again.metrics) == 2


def test_a_run_goes_on_as_it_was_with_its_objects_given_again(run, tmp_path):
    """Stopped by a signal after its first step; equal to one that was left alone."""
    recipe = load_recipe("quickstart", SMALL)

    def stop(step):
        if step.step == 1:
            os.kill(os.getpid(), signal.SIGINT)

    whole = finetune(recipe, out=tmp_path / "whole", rewards=[(Redness(), 2.0)])
    with pytest.raises(Interrupted, match=r"stopped \(SIGINT\); what is done is kept") as fault:
        finetune(recipe, out=tmp_path / "r", rewards=[(Redness(), 2.0)], on_step=stop)
    assert f'finetune(Run("{tmp_path}/r"), rewards=' in fault.value.remedy
    del rewards.FOREIGN["Redness"]
    assert fault.value.__notes__ == [fault.value.remedy] and "rewards=[…]" in fault.value.remedy
    with pytest.raises(RecipeFault, match="the run has Redness, given as an object: give it again"):
        finetune(Run(tmp_path / "r"))
    with pytest.raises(RecipeFault, match="Redness has the weight 2 there, 3 here"):
        finetune(Run(tmp_path / "r"), rewards=[(Redness(), 3.0)])
    with pytest.raises(RecipeFault, match="clip is none of the run's: Redness"):
        finetune(Run(tmp_path / "r"), rewards=[Redness(), "clip"])
    with pytest.raises(RecipeFault, match="out: the run goes on in its own folder"):
        finetune(Run(tmp_path / "r"), out=tmp_path / "s")
    again = finetune(Run(tmp_path / "r"), rewards=[Redness()])
    mine, theirs = (load_file(place.folder / "pytorch_lora_weights.safetensors") for place in (again, whole))
    assert again.status == "finished" and all(bool((mine[key] == theirs[key]).all()) for key in mine)
    # a finished one stays as it is, a folder's name is the run
    before = (again.folder / "manifest.json").read_bytes()
    assert finetune(str(again.folder), rewards=[Redness()]) == again
    assert (again.folder / "manifest.json").read_bytes() == before
    with pytest.raises(RecipeFault, match="resume=True: goes on in out=FOLDER"):
        finetune(recipe, resume=True)
    with pytest.raises(RecipeFault, match="there is no run to go on with"):
        finetune(recipe, resume=True, out=tmp_path / "nothing")


@pytest.mark.parametrize("how", ["False", "interrupt", "fault", "progress"])
def test_whatever_ends_a_step_it_is_saved(how, tmp_path):
    def on_step(step):
        if step.step == 1 and how == "interrupt":
            raise KeyboardInterrupt
        if step.step == 1 and how == "fault":
            raise ZeroDivisionError
        return step.step != 1 if how == "False" else None

    def progress(told):
        if how == "progress" and told.phase == "training" and told.done == 1:
            raise KeyboardInterrupt

    recipe = load_recipe("quickstart", {**SMALL, "checkpointing_steps": 2, "validation": {}})
    with pytest.raises(ZeroDivisionError if how == "fault" else Interrupted):
        finetune(recipe, out=tmp_path / "r", on_step=on_step, progress=progress)
    assert Run(tmp_path / "r").checkpoints == [1]
    assert finetune(Run(tmp_path / "r")).checkpoints == [1, 2]


def test_rewards_and_rules_are_objects(tmp_path):
    def last_call(calls, batch, coefficients, generator):
        """Gradients at the last call."""
        return plan_of(calls, batch, [calls - 1], Mode.WEIGHTS)

    given = load_recipe("quickstart", SMALL)
    made = finetune(given, out=tmp_path / "r", rewards=[(Redness(), 2.0), "clip"], rule=last_call)
    assert [(spec.name, spec.weight) for spec in made.recipe.rewards] == [("Redness", 2.0), ("clip-embedded", 1.0)]
    assert made.recipe.gradient.rule == "last-call" and set(made.gains) == {"Redness", "clip-embedded", "judge"}


class Blind(Redness):
    def score(self, images, prompts):
        return super().score(images.detach(), prompts)


def test_what_cannot_be_trained_on_is_found_before_anything_is_drawn(tmp_path):
    recipe = load_recipe("quickstart", SMALL)
    with pytest.raises(PluginFault, match="Blind has no gradient") as fault:
        finetune(recipe, out=tmp_path / "r", rewards=[Blind()])
    assert "validation.rewards" in fault.value.remedy and "policy gradient" in fault.value.remedy
    with pytest.raises(RecipeFault, match=r"has no score\(images, prompts\)"):
        finetune(recipe, out=tmp_path / "r", rewards=[object()])
    named = Redness()
    named.name = "clip"
    with pytest.raises(RecipeFault, match="clip is the name of a shipped reward"):
        finetune(recipe, out=tmp_path / "r", rewards=[named])
    with pytest.raises(RecipeFault, match="judge only measures"):
        finetune(recipe, out=tmp_path / "r", rewards=["judge"])
    with pytest.raises(RecipeFault, match=r"Redness is a class; give an object, Redness\(\)"):
        finetune(recipe, out=tmp_path / "r", rewards=[Redness])
    with pytest.raises(RecipeFault, match=r"objects go to finetune\(rewards"):
        load_recipe("quickstart", rewards=[Redness()])
    with pytest.raises(RecipeFault, match="changes belong into load_recipe"):
        finetune(recipe, max_train_steps=1)
    with pytest.raises(RecipeFault, match="give the run itself"):
        finetune(recipe.recipe)
    with pytest.raises(RecipeFault, match="rule: 3 is neither"):
        finetune(recipe, rule=3)
    assert not (tmp_path / "r").exists()


def test_a_rule_of_ones_own_has_as_many_updates_as_it_serves(tmp_path):
    def last_call(calls, batch, coefficients, generator):
        return plan_of(calls, batch, [calls - 1], Mode.WEIGHTS)

    many = {**SMALL, "max_train_steps": 1, "rollout": {"updates": 2}, "validation": {}}
    assert finetune("quickstart", many, out=tmp_path / "r", rule=last_call).recipe.rollout.updates == 1


def test_rewards_are_measured_and_evaluated_as_objects(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = finetune("quickstart", SMALL, max_train_steps=1, out="r", rewards=["clip"], measure=[Redness()])
    assert set(made.gains) == {"clip-embedded", "judge", "Redness"}
    words = ["a red bus", "a blue cat"]
    found = evaluate(words, loras=made, rewards=[Redness(), "clip"], embedding=False, out="e")
    assert set(found.means["r"]) == {"Redness", "clip-embedded"} and Evaluation("e").means == found.means
    frame = found.to_pandas()
    assert list(frame["prompt"].unique()) == words and set(frame["lora"].dropna()) == {"r"}
    rows = evaluate(words, loras=made.at(1), rewards="clip", embedding=False, out="e2").to_pandas(by="variant")
    assert list(rows["step"].dropna()) == [1] and {"mean", "low", "high", "scale"} <= set(rows)
    del rewards.FOREIGN["Redness"]
    with pytest.raises(RecipeFault, match="Redness of the run was an object: give it again"):
        evaluate(words, loras=made, out="e3")
    with pytest.raises(RecipeFault, match="prompts: give at least one"):
        evaluate([], loras=made, rewards="clip", out="e4")


def test_export_writes_for_other_programs(run):
    made, _, _ = run
    path = export(made.at(1))
    assert path == made.folder / "r-1-kohya.safetensors" and path.is_file()
    with pytest.raises(RecipeFault, match="exists already"):
        export(made.at(1))
    with pytest.raises(RecipeFault, match="ComfyUI and A1111 read kohya"):
        export(made, "comfyui")


def test_compare_wants_two_of_a_kind(run):
    made, _, _ = run
    for folders, more in (((made,), {}), ((made, made), {"out": "x"}), ((made, "evals"), {})):
        with pytest.raises(RecipeFault, match=r"two runs|runs are compared with runs"):
            compare(*folders, **more)


def test_prompts_of_a_recipe_may_be_a_list_or_a_file():
    lines = load_recipe("quickstart", prompts=["a cow", "a fish"], validation={})
    assert lines.prompts(lines.recipe.prompts) == ["a cow", "a fish"]
    assert load_recipe("quickstart", prompts="emoji-guard.txt", validation={}).recipe.prompts.file == "emoji-guard.txt"


def test_sample_is_the_commands_picture(run, tmp_path):
    made, _, _ = run
    mine = sample(["a tiger", "a rose"], lora=made, num_images=2, seed=5)
    assert [(s.prompt, s.seed) for s in mine] == [("a tiger", 5), ("a tiger", 6), ("a rose", 7), ("a rose", 8)]
    words = ["sample", "a tiger", "a rose", "-n", "2", "--seed", "5", "--lora", made, "--out", tmp_path / "s", "-q"]
    assert entry.run(words).returncode == 0
    for j, one in enumerate(mine):
        with Image.open(tmp_path / "s" / f"{j:05d}.png") as there:
            assert one.image.tobytes() == there.tobytes() and one.image.mode == "RGB"
    (other,) = sample("a tiger", lora=[made.at(1)], steps=3, seed=5, out=tmp_path / "kept")
    assert other.image.tobytes() != mine[0].image.tobytes() and (tmp_path / "kept/00000.png").is_file()
    (plain,) = sample("a tiger", steps=2, guidance=1, seed=5)
    assert plain.image.size == (64, 64)
    with pytest.raises(RecipeFault, match="steps: must be between 1 and"):
        sample("a tiger", steps=0)
    with pytest.raises(RecipeFault, match="prompts: give at least one"):
        sample([])


def test_evaluations_and_comparisons_are_tables(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made, _, _ = run
    found = evaluate(loras=[made.all_checkpoints], rewards=["clip"], limit=2, seeds=2, out="e")
    assert list(found.means) == ["base", "r-1", "r-2"] and "clip-embedded" in found.means["base"]
    assert set(found.differences) == {"r-1", "r-2"} and found.report.is_file()
    frame = found.to_pandas()
    assert len(frame) == 3 * 2 * 2 and {"variant", "prompt", "clip-embedded"} <= set(frame)
    rows = compare("e/base", "e/r-2", out="c").to_pandas()
    assert set(rows["measure"]) >= {"clip-embedded"} and rows["prompts"].iloc[0] == 2
    trained = compare(made, made)
    assert trained.folder is None and list(trained.to_pandas()["difference"]) == [0.0, 0.0]


def test_optimize_gives_pictures(tmp_path):
    words = {"num_inference_steps": 2}
    found = optimize(prompts="a tiger", objectives=["clip"], changes=words, steps=1, out=tmp_path / "o")
    assert len(found.images) == len(found.before) == 1 and found.images[0].size == (64, 64)
    assert found.to_pandas()["prompt"][0] == "a tiger"
    with pytest.raises(RecipeFault, match="is not empty; give another folder"):
        optimize(prompts="a tiger", objectives=["clip"], out=tmp_path / "o")


def test_every_error_has_a_cause_and_every_name_a_docstring():
    with pytest.raises(SdoError, match="did you mean learning_rate") as fault:
        load_recipe("quickstart", lr=1)
    assert fault.value.message
    for name in sdo_cli.__all__:
        assert name == "__version__" or getattr(sdo_cli, name).__doc__
    for call in (load_recipe, finetune, sample, evaluate, compare, optimize, export):
        said = str(inspect.signature(call))
        assert "->" in said and "typer." not in said and "sdo_cli.cli" not in said
    assert (ROOT / "sdo_cli" / "py.typed").is_file()


def test_the_package_imports_no_torch_before_it_is_used():
    code = "import sdo_cli, sys; assert 'torch' not in sys.modules; import sdo_cli.training, sdo_cli.evaluation"
    code += "; from sdo_cli import evaluate, finetune; assert callable(finetune) and callable(evaluate)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.slow
def test_the_notebook_runs_from_its_first_cell_to_its_last(tmp_path):
    import nbformat
    from nbclient import NotebookClient

    book = nbformat.read(ROOT / "examples" / "quickstart.ipynb", as_version=4)
    assert all(not cell.get("outputs") and cell.get("execution_count") is None for cell in book.cells)
    book.cells.append(nbformat.v4.new_code_cell(CHECKS))
    NotebookClient(book, timeout=900, resources={"metadata": {"path": str(tmp_path)}}).execute()


CHECKS = """
assert run.status == "finished" and run.checkpoints == [8, 16, 24] and len(run.metrics) == 24
assert set(run.gains) == {"clip-embedded", "colorfulness", "judge"}
assert run.gains["colorfulness"].difference > 2 * run.gains["colorfulness"].standard_error
assert set(curve.means) == {"base", "notebook-8", "notebook-16", "notebook-24"}
assert set(scales.means) == {"base", "notebook@0.5", "notebook"}
assert warm.gains["Warmth"].difference > 2 * warm.gains["Warmth"].standard_error
assert steered.rows[0]["after"] != steered.rows[0]["before"] and steered.images[0].size == (64, 64)
"""


@pytest.mark.slow
def test_the_example_of_an_own_reward(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "own_reward.py"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "warmth: " in done.stdout and (tmp_path / "tiger.png").is_file()
