"""A user's own gradient rule: the example of docs/plugins.md as it stands there, and what goes wrong with others."""

import dataclasses
import hashlib
import json
import re
from pathlib import Path
from types import SimpleNamespace

import entry
import forked
import pytest
import torch

from sdo_cli.bench import cost, memory
from sdo_cli.bench.memory import measure_memory
from sdo_cli.errors import PluginFault
from sdo_cli.gradients.plan import Plan
from sdo_cli.gradients.rules import RULES, gradient_rule, option_problem
from sdo_cli.plugins import load_plugins
from sdo_cli.recipe.load import load_recipe
from sdo_cli.recipe.schema import GradientSpec
from sdo_cli.training.job import plan_step
from sdo_cli.training.prepare import prepare

PAGE = (Path(__file__).parent.parent / "docs" / "plugins.md").read_text()
EXAMPLE = re.search(r"```python\n(.*?)```", PAGE, re.S).group(1)
COMMANDS = [line for line in re.search(r"```console\n(.*?)```", PAGE, re.S).group(1).splitlines() if line]
TINY = ["max_train_steps=2", "train_batch_size=2", "num_inference_steps=4", "validation.num_prompts=3"]


def run(line, cwd, *more):
    return entry.run([*line.split()[1:], *more], cwd=cwd)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "middle.py").write_text(EXAMPLE)
    return tmp_path


def test_the_pages_rule_finetunes(folder):
    done = run(COMMANDS[0], folder, "--out", "run", *TINY, "validation.grid_prompts=0")
    assert done.returncode == 0, done.stderr
    manifest = json.loads((folder / "run" / "manifest.json").read_text())
    digest = hashlib.sha256(EXAMPLE.encode()).hexdigest()
    assert manifest["plugins"] == [{"path": str(folder / "middle.py"), "sha256": digest, "package": ""}]
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["calls"] for line in lines] == [{"no_grad": 8, "grad": 2}] * 2
    assert "--plugin" in (folder / "run" / "README.md").read_text()
    # the adapter is an ordinary one: no plug-in is needed to use it
    drawn = run("sdo sample x --lora run --steps 2 -q --out images", folder)
    assert drawn.returncode == 0, drawn.stderr


def test_the_pages_rule_runs_in_the_bench(folder, small, monkeypatch):
    def of_one(bench, loaded, *more):
        """It is the last rule that is looked at; its process need not import everything anew."""
        return measure_memory(bench, {v: it for v, it in loaded.items() if v.name == "middle:draw=batch"}, *more)

    def child(words, **options):
        return forked.run(words[3:], call="sdo_cli.bench.memory:main")

    monkeypatch.setattr(memory, "subprocess", SimpleNamespace(run=child))
    monkeypatch.setattr(cost, "PART_SECONDS", 0.0)

    monkeypatch.setattr("sdo_cli.bench.run.measure_memory", of_one)
    few = "--out b -q --part cost --part nearness --rounds 1 --draws 2 --batches 1 num_inference_steps=3"
    done = run(COMMANDS[1], folder, *few.split(), f"model={small('sd15')}", "rewards=[colorfulness]")
    assert done.returncode == 0, done.stderr
    record = json.loads((folder / "b" / "bench.json").read_text())
    assert record["cost"]["rules"]["middle"]["calls"] == {"no_grad": 3.0, "grad": 1.0}
    # the child process that measures memory knows the plug-in too
    assert record["cost"]["rules"]["middle:draw=batch"]["memory"]["tensors"] > 1e5
    assert set(record["nearness"]) == {"full", "sdo", "middle", "middle:draw=batch"}


def test_a_recipe_alone_runs_no_foreign_code(folder):
    done = run(COMMANDS[0].replace("--plugin middle.py", "--dry-run"), folder)
    assert done.returncode == 2 and "unknown gradient rule 'middle'" in done.stderr


def test_options_of_a_plugin_are_checked(folder):
    done = run(COMMANDS[0] + " gradient.options.draw=twice gradient.options.width=3 --dry-run", folder)
    assert done.returncode == 2
    assert "'twice' is not one of sample, batch" in done.stderr
    assert "gradient.options.width: unknown option; known: draw, share" in done.stderr


BROKEN = {
    "import fails": ("import nothing_of_this_name", "ModuleNotFoundError: No module named 'nothing_of_this_name'"),
    "name is taken": (EXAMPLE.replace('"middle"', '"sdo"'), "there is a gradient rule 'sdo' already"),
    "option without type": (
        EXAMPLE.replace("share: float = 0.5", "share=0.5"),
        "option share of rule 'middle' must be",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_plugin_is_one_sentence(kind, tmp_path):
    text, expected = BROKEN[kind]
    (tmp_path / "middle.py").write_text(text)
    done = run(COMMANDS[0], tmp_path, "--dry-run")
    assert done.returncode == 2, done.stderr
    assert expected in done.stderr and len(done.stderr.strip().splitlines()) == 2


@pytest.fixture(scope="module")
def job():
    return prepare(load_recipe("quickstart", [*TINY, "rollout={}", "gradient.options={}"]))[0]


UNFIT = {
    "raises": ("width = ", "width = 1 / 0 + ", "rule mine failed: ZeroDivisionError"),
    "no plan": ("return Plan(mode, weight)", "return mode", "rule mine returned a Tensor, not a Plan of"),
    "chains and does not say so": (
        "mode, weight = empty(calls, batch)",
        "return Plan(empty(calls, batch)[0] + 2, torch.ones(calls, batch))",
        "chains live calls and does not say so",
    ),
    "endless weights": (
        "float(width)",
        "float('inf')",
        "rule mine failed: ValueError: a weight of the plan is not a finite",
    ),
    "wrong shape": ("empty(calls, batch)", "empty(calls + 1, batch)", r"rule mine returned a plan of \(5, 2\)"),
}


@pytest.mark.parametrize("kind", UNFIT)
def test_a_rule_that_does_not_keep_the_contract_is_named(kind, job, tmp_path):
    old, new, expected = UNFIT[kind]
    path = tmp_path / "mine.py"
    path.write_text(EXAMPLE.replace('"middle"', '"mine"').replace(old, new))
    try:
        load_plugins([path])
        recipe = dataclasses.replace(job.recipe, gradient=GradientSpec(rule="mine"))
        with pytest.raises(PluginFault, match=expected):
            plan_step(dataclasses.replace(job, recipe=recipe), 0)
    finally:
        RULES.pop("mine", None)


def test_number_types_of_a_plugin_do_not_matter():
    plan = Plan(torch.ones(3, 2, dtype=torch.int32), torch.ones(3, 2))
    assert plan.mode.dtype == torch.int64 and plan.weight.dtype == torch.float64
    with pytest.raises(ValueError, match="endpoint must be in 0 … 3"):
        Plan(plan.mode * 0, plan.weight, endpoint=torch.tensor([4, 0]))


def test_a_plugins_own_check_that_fails_is_named():
    def check(options, calls):
        return options["gone"]

    try:
        gradient_rule("checked", summary="", problem=check)(lambda calls, batch, coefficients, generator: None)
        assert option_problem("checked", {}, 5) == "the plug-in's own check failed: KeyError: 'gone'"
    finally:
        RULES.pop("checked")


def test_missing_file():
    with pytest.raises(PluginFault, match="no such Python file"):
        load_plugins(["gone.py"])


def test_the_same_file_twice_is_loaded_once(tmp_path):
    path = tmp_path / "twice.py"
    path.write_text(EXAMPLE.replace('"middle"', '"twice"'))
    try:
        assert load_plugins([path, path])[0] is load_plugins([path])[0]
        assert RULES["twice"].options == {"share": float, "draw": ("sample", "batch")}
    finally:
        RULES.pop("twice", None)


def test_positional_parameters_are_no_options():
    try:
        gradient_rule("bare", summary="")(lambda calls, batch, coefficients, generator: None)
        assert RULES["bare"].options == {}
    finally:
        RULES.pop("bare")
