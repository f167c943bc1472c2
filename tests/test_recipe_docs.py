"""Every key of a recipe is explained: the page, the command, and that what they say is so."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

import rewards
from sdo_cli.cli.app import app
from sdo_cli.errors import RecipeFault
from sdo_cli.gradients.rules import RULES
from sdo_cli.recipe.choices import reward_options, rule_options
from sdo_cli.recipe.explain import SCHEMAS, entries, explained, find
from sdo_cli.recipe.load import load_recipe
from sdo_cli.recipe.meanings import MEANINGS
from sdo_cli.recipe.schema import LoraSpec, Recipe
from sdo_cli.recipe.steering import load_steering
from sdo_cli.recipe.steering_meanings import STEERING_MEANINGS

PAGE = Path(__file__).parent.parent / "docs" / "recipe.md"
SHOWN = [entry for entry in explained() if not entry.repeats]
BASE = {
    "finetune": {"model": "embedded", "rewards": ["colorfulness"], "prompts": {"lines": ["a tiger"]}},
    "optimize": {"model": "embedded", "objectives": ["clip"], "prompts": {"lines": ["a tiger"]}},
}
# files that examples name
FILES = ("my-prompts.txt", "animals-train.txt", "waves.png", "house.png", "prunes/dip-go-1/plan-0.80.json")


def sdo(*words):
    return CliRunner().invoke(app, ["recipe", "explain", *words])


def test_the_page_is_what_the_command_prints_and_neither_needs_torch():
    code = "import sys; from sdo_cli.cli.app import app; app(standalone_mode=False)"
    code += "; sys.exit(any(m in sys.modules for m in ('torch', 'diffusers', 'numpy')))"
    done = subprocess.run(
        [sys.executable, "-c", code, "recipe", "explain", "--markdown"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == PAGE.read_text(), "stale: sdo recipe explain --markdown > docs/recipe.md"


@pytest.mark.parametrize("schema", [Recipe, LoraSpec])
def test_a_key_without_a_meaning_is_a_fault(schema, monkeypatch):
    longer = dataclasses.make_dataclass(
        "Longer", [("moment", int, dataclasses.field(default=3))], bases=(schema,), frozen=True
    )
    monkeypatch.setitem(MEANINGS, longer, MEANINGS[schema])
    with pytest.raises(LookupError, match=r"Longer\.moment has no meaning"):
        entries("finetune", longer)


def test_no_meaning_is_left_over():
    for table in (MEANINGS, STEERING_MEANINGS):
        for schema, told in table.items():
            assert set(told) <= {field.name for field in dataclasses.fields(schema)}


def test_a_line_fits_a_line():
    assert [entry.key for entry in SHOWN if len(entry.line) > 80 or not entry.line.endswith(".")] == []


@pytest.mark.parametrize("entry", SHOWN, ids=lambda entry: f"{entry.verbs[0]}-{entry.key}")
def test_every_example_is_a_recipe_without_a_mistake(entry, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in FILES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("a bus\n")
    example = yaml.safe_load(entry.example)
    assert has(example, entry.path), "the example does not show its key"
    for verb in entry.verbs:
        (tmp_path / "r.yaml").write_text(yaml.safe_dump(BASE[verb] | example))
        load_recipe("r.yaml") if verb == "finetune" else load_steering("r.yaml", {}, [])


def has(tree, path):
    if isinstance(tree, list):
        # a bare name stands for an entry with a name
        return any(has({"name": item} if isinstance(item, str) else item, path) for item in tree)
    return not path or (path[0] in tree and has(tree[path[0]], path[1:]))


def outside(bound):
    if "more than 0" in bound:
        return [0]
    low, _, high = bound.partition(" to ")
    if high:
        return [float(low) - 1, float(high) + 1]
    return [int(bound.split("at least ")[1].split(",")[0]) - 1, *([1] if "less than 1" in bound else [])]


BOUNDED = [(verb, e) for e in SHOWN for verb in e.verbs if "at least" in e.type or "more" in e.type or " to " in e.type]


@pytest.mark.parametrize(("verb", "entry"), BOUNDED, ids=lambda value: getattr(value, "key", value))
def test_what_is_outside_of_a_range_is_refused(verb, entry, tmp_path):
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(BASE[verb]))
    for value in outside(entry.type.partition(", ")[2]):
        word = f"{entry.key}={value:g}"
        with pytest.raises(RecipeFault) as fault:
            load_recipe(str(tmp_path / "r.yaml"), [word]) if verb == "finetune" else load_steering(None, {}, [word])
        assert any(f" {entry.key}: must " in line for line in fault.value.problems), fault.value.problems


@pytest.mark.parametrize("told", [rule_options, reward_options])
def test_every_option_is_said(told):
    silent = [(choice.name, o.name) for choice in told() for o in choice.options if not o.meaning]
    # tests of plug-ins may have registered theirs in this process
    assert [
        pair for pair in silent if pair[0] in rewards.TABLE or (pair[0] in RULES and not RULES[pair[0]].function)
    ] == []


def test_defaults_are_those_of_the_functions():
    options = {
        choice.name: {o.name: o.default for o in choice.options} for choice in (*rule_options(), *reward_options())
    }
    assert options["drtune"] == {"k": "3", "early_stop": "0.4"}
    assert options["jpeg-compressibility"] == {"quality": "95"}
    assert options["mixture"] == {"parts": None, "lower_bound": "0.0"}
    assert options["hps-v2.1"]["model"] == "ViT-H-14"


@pytest.mark.parametrize(
    ("word", "keys"),
    {
        "gradient.rule": ["gradient.rule"],
        "rank": ["lora.rank"],
        "guard": ["guard"],
        "rewards[0].weight": ["rewards.0.weight"],
        "rewards.weight": ["rewards.0.weight"],
        "guard.rewards.1.weight": ["rewards.0.weight"],
        "validation.prompts.file": ["prompts.file"],
        "gradient.options.step_choice": ["gradient.options"],
        "step_choice": ["gradient.options"],
        "rule": ["gradient.rule", "rule"],
        "solver": ["solver"],
        "norm_prior": ["norm_prior"],
    }.items(),
)
def test_a_key_is_found_by_its_path_or_its_last_part(word, keys):
    assert [entry.key for entry in find(word)] == keys


def test_the_command():
    assert "lora.rank   (recipes of sdo finetune)" in sdo("rank").output
    table = sdo().output
    assert all(entry.key in table for entry in SHOWN)
    assert "guard.patience" in sdo("guard").output
    found = yaml.safe_load(sdo("gradient.options", "--json").output)
    assert found[0]["choices"][0]["options"][0]["default"] == "stratified"
    assert set(SCHEMAS) == {verb for entry in yaml.safe_load(sdo("--json").output) for verb in entry["verbs"]}


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("leraning_rate", "did you mean learning_rate"),
        ("zzz", "shows all keys"),
        ("options", "rewards.0.options or grad"),
    ],
)
def test_an_unknown_key_is_one_sentence_with_the_nearest(word, said):
    with pytest.raises(RecipeFault) as fault:
        find(word)
    assert fault.value.exit_code == 2 and len(fault.value.problems) == 1 and said in fault.value.problems[0]


def test_a_plugins_options_are_read_off_its_function(tmp_path):
    (tmp_path / "middle.py").write_text(
        "from sdo_cli.gradients.rules import gradient_rule\n"
        "@gradient_rule('explained-middle', summary='in the middle')\n"
        "def middle(calls, batch, coefficients, generator, *, share: float = 0.25):\n"
        '    """Mine.\n\n    Args:\n        share: how wide.\n    """\n'
    )
    try:
        said = sdo("gradient.options", "--plugin", str(tmp_path / "middle.py")).output
    finally:
        RULES.pop("explained-middle", None)
    assert "share: how wide (a number; default 0.25)" in said


@pytest.mark.parametrize(
    ("line", "command"),
    {
        "learning_rat=1": "did you mean learning_rate? (sdo recipe explain learning_rate)",
        "lora.rnak=1": "did you mean rank? (sdo recipe explain lora.rank)",
        "guard.zzz=1": "(sdo recipe explain guard)",
        "gradient.options.zzz=1": "(sdo recipe explain gradient.options)",
        "rewards.0.options.zzz=1": "(sdo recipe explain rewards.0.options)",
    }.items(),
)
def test_a_mistake_in_a_recipe_names_the_command_that_explains_it(line, command, tmp_path):
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(BASE["finetune"] | {"rewards": [{"name": "clip"}]}))
    with pytest.raises(RecipeFault) as fault:
        load_recipe(str(tmp_path / "r.yaml"), [line])
    assert command in fault.value.problems[0]
    find(command.rsplit(" ", 1)[1].rstrip(")"))
