"""Recipes: every mistake at once, each with origin, key and remedy; through the real command."""

import os
from pathlib import Path

import entry
import pytest
import yaml

from sdo_cli.errors import RecipeFault
from sdo_cli.recipe.load import load_recipe, shipped_recipes
from sdo_cli.recipe.prompts import read_prompts, shipped_folder
from sdo_cli.recipe.schema import PromptSource

GOOD = """model: embedded
rewards:
  - name: clip
prompts:
  lines: [a tiger]
"""


def sdo(*arguments, cwd):
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    return entry.run(arguments, cwd=cwd, env=environment)


BAD = {
    "unknown key": (
        GOOD + "learning_rat: 1\n",
        [],
        "bad.yaml:6: learning_rat: unknown key; did you mean learning_rate?",
    ),
    "wrong type": (GOOD + "seed: soon\n", [], "bad.yaml:6: seed: must be a whole number, not 'soon'"),
    "missing prompt file": (
        GOOD.replace("lines: [a tiger]", "file: gone.txt"),
        [],
        "bad.yaml:5: prompts.file: no file gone.txt; it is looked for",
    ),
    "zero steps": (GOOD + "num_inference_steps: 0\n", [], "bad.yaml:6: num_inference_steps: must be at least 1, not 0"),
    "unknown reward": (
        GOOD.replace("clip", "klip"),
        [],
        "bad.yaml:3: rewards.0.name: unknown reward 'klip'; did you mean",
    ),
    "duplicate key": (GOOD + "seed: 1\nseed: 2\n", [], "bad.yaml:7: seed: written twice, first in line 6; remove one"),
    "bad YAML": (GOOD + "lora: {rank: 2\n", [], "not valid YAML"),
    "rank None": (GOOD, ["lora.rank=None"], "argument 'lora.rank=None': lora.rank: must be a whole number, not 'None'"),
    "negative rank": (GOOD, ["lora.rank=-4"], "argument 'lora.rank=-4': lora.rank: must be at least 1, not -4"),
    "solver outside the list": (
        GOOD + "solver: heun\n",
        [],
        "bad.yaml:6: solver: unknown solver 'heun'; known: auto, ddim",
    ),
    "empty prompt file": (
        GOOD.replace("lines: [a tiger]", "file: empty.txt"),
        [],
        "prompts.file: empty.txt gives no prompt at all",
    ),
    "override without =": (GOOD, ["seed"], "argument 'seed': not of the form key=value; write for example seed=1"),
    "judge": (GOOD.replace("clip", "judge"), [], "rewards.0.name: judge only measures, no recipe may train on it"),
    "judge by another name": (
        GOOD.replace("  - name: clip", "  - {name: clip, options: {model: 'embedded:judge'}}"),
        [],
        "rewards.0.options: the judge only measures",
    ),
    "the same reward twice": (GOOD, ["rewards=[clip, clip-score]"], "rewards.1.name: clip-score is in the list twice"),
    "held-out prompts that are trained on": (
        GOOD + "validation:\n  prompts: {lines: [a tiger, a bus]}\n",
        [],
        "bad.yaml:7: validation.prompts: 1 held-out prompts are trained on, for example 'a tiger'",
    ),
    "nothing to measure on": (GOOD + "validation: {rewards: [judge]}\n", [], "there are no validation.prompts"),
    "too many steps": (GOOD, ["num_inference_steps=1001"], "must be at most 999, not 1001"),
    "unknown embedded model": (GOOD, ["rewards.0.options.model='embedded:x'"], "no embedded model embedded:x"),
    "reward option of a wrong type": (
        GOOD,
        ["rewards.0.options.model=5"],
        "rewards.0.options.model: must be text, not 5",
    ),
    "mixture without a list": (GOOD, ["rewards.0.name=mixture", "rewards.0.options.parts=clip"], "must be a list with"),
    "mixture of something unknown": (
        GOOD,
        ["rewards.0.name=mixture", "rewards.0.options.parts=[{name: clop}]"],
        "unknown reward 'clop'; did you mean clip?",
    ),
    "mixture that trains on the judge": (
        GOOD,
        ["rewards.0.name=mixture", "rewards.0.options.parts=[{name: judge}]"],
        "judge only measures and cannot be part of a mixture",
    ),
    "mixture that trains on the judge by another name": (
        GOOD,
        ["rewards.0.name=mixture", "rewards.0.options.parts=[{name: clip, options: {model: 'embedded:judge'}}]"],
        "clip: the judge only measures, no recipe may train on it",
    ),
    "mixture with options that are none": (
        GOOD,
        ["rewards.0.name=mixture", "rewards.0.options.parts=[{name: clip, options: embedded}]"],
        "clip: options must be {option: value}, not 'embedded'",
    ),
    "mixture with no spread": (
        GOOD,
        ["rewards.0.name=mixture", "rewards.0.options.parts=[{name: clip, std: 0}]"],
        "clip: std must be more than 0",
    ),
    "JPEG to train on": (GOOD.replace("clip", "jpeg-compressibility"), [], "jpeg-compressibility only measures"),
    "infinite weight": (GOOD, ["rewards.0.weight=inf"], "rewards.0.weight: must be a number other than 0, not inf"),
    "not filled in": (GOOD + "seed: ???\n", [], "bad.yaml:6: seed: is not filled in: '???'"),
    "a bad place in a list": (GOOD, ["rewards.9.weight=2"], "rewards is a list with 1 entries, from 0"),
    "no integer": (GOOD, ["seed=2.5"], "seed: must be a whole number, not 2.5"),
    "a mapping for a list": (GOOD, ["rewards=3"], "rewards: must be a list, not 3"),
    "an anchor in itself": (GOOD + "lora: &a {rank: *a}\n", [], "an anchor (&) contains itself"),
    "a template with nothing to fill": (GOOD.replace("lines: [a tiger]", "template: a {}"), [], "no {name} to fill in"),
    "an empty file": ("", [], "a recipe is a mapping of keys to values"),
    "missing model": (GOOD.replace("model: embedded\n", ""), [], "model: is missing; every recipe needs it"),
    "option of another rule": (
        GOOD + "gradient:\n  rule: full\n  options: {step: 1}\n",
        [],
        "bad.yaml:8: gradient.options.step: unknown option; full takes none",
    ),
    "fixed without step": (
        GOOD + "gradient:\n  options: {step_choice: fixed}\n",
        [],
        "bad.yaml:7: gradient.options: step_choice fixed needs step between 0 and 49",
    ),
    "a rule for latents": (
        GOOD,
        ["gradient.rule=sdo-0"],
        "gradient.rule: sdo-0 has no gradient for weights, only for latents",
    ),
    "stages of one graph": (
        GOOD,
        ["gradient={rule: full, score_micro_batch: 1}"],
        "gradient.score_micro_batch: full is one graph without stages; lower train_batch_size",
    ),
    "nothing to recompute": (
        GOOD,
        ["gradient.checkpointing=none"],
        "gradient.checkpointing: is for rules that chain steps; sdo has none to recompute",
    ),
    "more steps than there are": (
        GOOD,
        ["gradient={rule: draft-k, options: {k: 51}}"],
        "k must be between 1 and 50, not 51",
    ),
    "more steps than PNDM's calls": (
        GOOD + "solver: pndm\n",
        ["gradient={rule: draft-k, options: {k: 52}}"],
        "k must be between 1 and 51, not 52",
    ),
    "truncation without step": (
        GOOD,
        ["gradient={rule: alignprop, options: {truncation: fixed}}"],
        "truncation fixed needs step between 0 and 49, not None",
    ),
    "unit weights of one step": (
        GOOD,
        ["gradient.options={step_choice: last, weights: unit}"],
        "step_choice last always takes the same one",
    ),
    "option that is no number": (
        GOOD,
        ["gradient={rule: drtune, options: {early_stop: late}}"],
        "gradient.options.early_stop: must be a number, not 'late'",
    ),
    "share beyond one": (
        GOOD,
        ["gradient={rule: drtune, options: {early_stop: 2}}"],
        "early_stop must be between 0 and 1, not 2",
    ),
    "flag that is no flag": (
        GOOD,
        ["gradient.options={as_epsilon: maybe}"],
        "gradient.options.as_epsilon: must be true or false, not 'maybe'",
    ),
    "noise of a solver without": (
        GOOD + "solver: pndm\n",
        ["eta=0.5"],
        "eta: is the noise of ddim, tcd; solver pndm takes none",
    ),
    "too much noise": (GOOD, ["eta=1.5"], "eta: must be between 0 and 1, not 1.5"),
    "target without a loss": (GOOD, ["rewards.0.target=0.3"], "rewards.0.target: belongs to loss distance or hinge"),
    "loss without a target": (GOOD, ["rewards.0.loss=hinge"], "rewards.0.loss: hinge needs a target"),
    "pulled away from the base": (GOOD, ["kl_weight=-1"], "kl_weight: must not be negative, not -1.0"),
    "not a number": (GOOD, ["learning_rate=nan"], "learning_rate: must be more than 0, not nan"),
    "missing recipe": (None, [], "no such file or shipped recipe"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_recipe_is_one_report_with_origin_and_remedy(kind, tmp_path):
    text, overrides, expected = BAD[kind]
    (tmp_path / "empty.txt").write_text("\n  \n")
    if text is not None:
        (tmp_path / "bad.yaml").write_text(text)
    done = sdo("finetune", "--recipe", "bad.yaml", *overrides, cwd=tmp_path)
    assert done.returncode == 2
    assert expected in done.stderr
    assert done.stderr.startswith("sdo: 1 problem in the recipe:"), done.stderr
    assert "Traceback" not in done.stderr
    assert {p.name for p in tmp_path.iterdir()} <= {"bad.yaml", "empty.txt"}


def test_all_mistakes_are_reported_together(tmp_path):
    text = (
        GOOD.replace("clip", "klip") + "sead: 3\nseed: x\nsolver: heun\nlora: {rank: -2}\nvalidation: {rewards: [j]}\n"
    )
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(RecipeFault) as fault:
        load_recipe(str(tmp_path / "bad.yaml"), ["max_train_steps=0", "nothing"])
    keys = [
        "rewards.0.name",
        "sead",
        "seed",
        "solver",
        "lora.rank",
        "validation.rewards.0.name",
        "max_train_steps",
        "nothing",
    ]
    assert len(fault.value.problems) == len(keys)
    for key in keys:
        assert sum(f": {key}:" in line or f"'{key}':" in line for line in fault.value.problems) == 1


def test_overrides_win_and_numbers_are_numbers(tmp_path):
    (tmp_path / "r.yaml").write_text(GOOD + "learning_rate: 1e-4\n")
    loaded = load_recipe(str(tmp_path / "r.yaml"), ["seed=7", "rewards.0.weight=2.5", "lora.target_modules=[to_q]"])
    assert loaded.recipe.learning_rate == 1e-4
    assert (loaded.recipe.seed, loaded.recipe.rewards[0].weight) == (7, 2.5)
    assert loaded.recipe.lora.target_modules == ["to_q"]


def test_shipped_recipes_are_found_and_fine():
    names = shipped_recipes()
    assert "quickstart" in names
    for name in names:
        text = (shipped_folder() / f"{name}.yaml").read_text()
        assert text.startswith(f"# sdo finetune --recipe {name}\n")
        assert load_recipe(name).recipe.description


def test_heldout_prompts_are_not_trained_on_but_their_words_are():
    train = read_prompts(PromptSource(file="emoji-train"), None)
    held = read_prompts(PromptSource(file="emoji-heldout"), None)
    assert len(held) == len(set(held)) >= 128
    assert not set(train) & set(held)
    assert {word for line in held for word in line.split()} <= {word for line in train for word in line.split()}


def test_template_prompts_are_the_product():
    source = PromptSource(template="a {x} {y}", values={"x": ["b", "c"], "y": ["d", "e"]})
    assert read_prompts(source, None) == ["a b d", "a b e", "a c d", "a c e"]


@pytest.mark.parametrize(
    "source",
    [PromptSource(), PromptSource(file="a", lines=["b"]), PromptSource(template="{x}"), PromptSource(lines=[" "])],
)
def test_prompt_sources_that_give_nothing_say_why(source):
    with pytest.raises(ValueError, match=r"exactly one|values does not give|no prompt"):
        read_prompts(source, None)


def test_recipe_commands(tmp_path):
    assert "quickstart" in sdo("recipe", "list", cwd=tmp_path).stdout
    assert "model: embedded" in sdo("recipe", "show", "quickstart", cwd=tmp_path).stdout
    assert sdo("recipe", "copy", "quickstart", cwd=tmp_path).returncode == 0
    assert sdo("recipe", "check", "quickstart.yaml", "seed=3", cwd=tmp_path).returncode == 0
    again = sdo("recipe", "copy", "quickstart", cwd=tmp_path)
    assert again.returncode == 2 and "exists already" in again.stderr


def test_dry_run_shows_the_resolved_recipe_and_runs_nothing(tmp_path):
    done = sdo("finetune", "--recipe", "quickstart", "--dry-run", "seed=5", cwd=tmp_path)
    assert done.returncode == 0 and yaml.safe_load(done.stdout)["seed"] == 5
    assert list(tmp_path.iterdir()) == []


def test_an_occupied_run_folder_is_refused(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("keep")
    done = sdo("finetune", "--recipe", "quickstart", "--out", "run", cwd=tmp_path)
    assert done.returncode == 2 and "is not empty" in done.stderr
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["mine.txt"]


def test_a_missing_model_is_one_sentence_and_leaves_no_folder(tmp_path):
    done = sdo("finetune", "--recipe", "quickstart", "model=some/where", "--out", "run", cwd=tmp_path)
    assert done.returncode == 2 and "some/where " in done.stderr and "Traceback" not in done.stderr
    assert "2 of the recipe's weights are not on this machine" in done.stderr
    assert not Path(tmp_path / "run").exists()
