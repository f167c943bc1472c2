"""What a recipe file says gives way to the command line where both cannot be, and that is said; nothing typed does."""

import pytest

from sdo_cli.errors import RecipeFault
from sdo_cli.recipe.load import load_recipe

FILE = """
model: embedded
rewards: [colorfulness]
prompts: {lines: [a cat, a dog]}
num_inference_steps: 20
gradient: {rule: sdo, options: {weights: root, steps_per_sample: 2}}
rollout: {num_inference_steps: 10, updates: 4, max_change: 0.1}
validation: {prompts: {lines: [a cow]}, base_guidance_scale: 3.0}
"""


@pytest.fixture
def load(tmp_path):
    path = tmp_path / "mine.yaml"

    def found(*overrides, text=FILE):
        path.write_text(text)
        return load_recipe(str(path), list(overrides))

    return found


def test_the_file_alone_is_as_it_is(load):
    loaded = load()
    assert loaded.notes == () and loaded.recipe.rollout.updates == 4 and loaded.recipe.gradient.options
    assert load("seed=3").notes == ()


def test_options_of_another_rule(load):
    loaded = load("gradient.rule=drtune")
    assert loaded.recipe.gradient.options == {}
    assert loaded.notes[0] == "gradient.options weights, steps_per_sample of sdo: not for drtune"
    with pytest.raises(RecipeFault, match=r"gradient\.options\.weights"):
        load("gradient.rule=drtune", "gradient.options.weights=root")


def test_updates_that_rule_and_steps_do_not_have(load):
    chained = load("gradient.rule=full")
    assert (chained.recipe.rollout.updates, chained.recipe.rollout.max_change) == (1, 0.0)
    assert "rollout.updates 4 of the recipe: 1 with full and these steps" in chained.notes
    few = load("rollout.num_inference_steps=6")
    assert (few.recipe.rollout.updates, few.recipe.rollout.max_change) == (3, 0.1)
    assert few.notes == ("rollout.updates 4 of the recipe: 3 with sdo and these steps",)
    for words in (["rollout.updates=6"], ["rollout.num_inference_steps=6", "rollout.updates=4"]):
        with pytest.raises(RecipeFault, match="updates of 2 live calls a picture each"):
            load(*words)
    # a file that contradicts itself is refused
    with pytest.raises(RecipeFault, match="there are 10; write at most 5"):
        load(text=FILE.replace("updates: 4", "updates: 6"))


def test_layers_of_an_adapter_that_is_another_or_none(load):
    text = FILE + "lora: {layers: all}\n"
    assert load(text=text).recipe.lora.layers == "all"
    named = load("lora.target_modules=[to_q]", text=text)
    assert named.recipe.lora.layers == "attention"
    assert named.notes == ("lora.layers all of the recipe: lora.target_modules names others",)
    whole = load("train=full", text=text)
    assert whole.notes == ("lora.layers all of the recipe: with train: full there is no adapter",)
    for words in (["lora.layers=all", "lora.target_modules=[to_q]"], ["lora.layers=all", "train=full"]):
        with pytest.raises(RecipeFault, match=r"lora\.layers"):
            load(*words, text=text)


def test_shorter_rollouts_than_sampling(load):
    loaded = load("num_inference_steps=8")
    assert loaded.recipe.rollout.num_inference_steps == 0 and loaded.recipe.rollout.updates == 4
    said = "rollout.num_inference_steps 10 of the recipe: more than the 8 of sampling, which are taken"
    assert loaded.notes == (said,)
    assert load("num_inference_steps=8", "rollout.num_inference_steps=10").notes == ()


def test_a_comparison_without_prompts(load):
    loaded = load("validation.prompts={}")
    assert loaded.recipe.validation.base_guidance_scale is None
    with pytest.raises(RecipeFault, match="there are no validation\\.prompts"):
        load("validation.prompts={}", "validation.base_guidance_scale=3")
