"""What a run's report, card and last lines say: what fell is never left out, of few prompts nothing is concluded."""

import json
import shlex
from dataclasses import replace
from pathlib import Path

import entry
import pytest
import yaml
from report_samples import picture

from sdo_cli.cli.finetune import as_text
from sdo_cli.recipe.load import load_recipe
from sdo_cli.runs.card import description_of
from sdo_cli.runs.report import run_report
from sdo_cli.runs.summary import RunSummary
from sdo_cli.scoring.statistics import Estimate, Gain, paired_gain

NAMES = ["trained", "one", "two", "three", "four", "five"]


def a_run(folder: Path, gains: dict[str, float], prompts: int = 16, plugins: tuple[dict, ...] = ()) -> Path:
    """The folder of a finished run in which each reward changed by so much, with a spread of 0.1 over prompts."""
    folder.mkdir(parents=True)
    loaded = load_recipe("quickstart")
    (folder / "resolved.yaml").write_text(yaml.safe_dump(loaded.resolved()))
    manifest = {"status": "finished", "command": "sdo finetune --recipe mine.yaml", "recipe": "mine"}
    manifest |= {"versions": {}, "started": "", "plugins": list(plugins)}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "rewards": {"trained": 0.5}, "grad_norm": 1.0}) + "\n")
    wobble = [0.1 if i % 2 else -0.1 for i in range(prompts)]
    rows = {
        "before": {name: [[0.5]] * prompts for name in gains},
        "after": {name: [[0.5 + gain + w] for w in wobble] for name, gain in gains.items()},
        "guided": {name: [[0.7]] * prompts for name in gains},
    }
    (folder / "validation.json").write_text(json.dumps({"prompts": [f"prompt {i}" for i in range(prompts)], **rows}))
    for number, stage in enumerate(("step_000000", "step_000300", "guided")):
        for i in range(2):
            picture(folder / "samples" / stage / f"{i:05d}.png", 3 * i + number, 64)
    return folder


def test_what_fell_is_said_first_and_never_cut(tmp_path):
    """Six rewards, of which the last two fell; four sentences were said, of the first four."""
    gains = dict.fromkeys(NAMES, 0.3) | {"four": -0.3, "five": -0.2}
    verdict = run_report(a_run(tmp_path / "r", gains)).verdict
    assert [sentence.split()[0] for sentence in verdict] == ["four", "five", "trained", "one"]
    assert verdict[0].startswith(
        "four (only measured) fell by more than 3 standard errors: -0.3000 ± 0.0258 on 16 held-out"
    )
    assert verdict[2].startswith("trained (trained) rose on held-out prompts: +0.3000 [")
    every = run_report(a_run(tmp_path / "s", dict.fromkeys(NAMES, -0.3))).verdict
    assert len(every) == 6 and all("fell by more than 3 standard errors" in sentence for sentence in every)
    # two standard errors are no such fall
    less = run_report(a_run(tmp_path / "t", {"trained": -0.05})).verdict
    assert len(less) == 1 and "standard errors" not in less[0]


def test_of_few_prompts_nothing_is_concluded(tmp_path):
    verdict = run_report(a_run(tmp_path / "r", {"trained": 0.3, "one": -0.3}, prompts=9)).verdict
    assert verdict == [
        "one (only measured) fell by more than 3 standard errors: -0.3111 ± 0.0351 on 9 held-out prompts.",
        "No verdict and no recommendation: 9 held-out prompts, and under 10 chance decides; "
        "the figures are shown as they came out.",
    ]
    enough = run_report(a_run(tmp_path / "s", {"trained": 0.3}, prompts=10)).verdict
    assert len(enough) == 1 and "rose" in enough[0]


def test_pictures_stand_first_in_one_row_with_those_under_guidance(tmp_path):
    found = run_report(a_run(tmp_path / "r", {"trained": 0.3}))
    gallery = found.gallery
    assert found.pictures_first and gallery.row and gallery.right == 1
    assert gallery.columns == ["before", "step 300", "before, guidance 5"]
    assert [path.parent.name for path in gallery.cases[1].images] == ["step_000000", "step_000300", "guided"]
    assert gallery.cases[1].scores["trained"] == [0.5, pytest.approx(0.9), 0.7]


def test_settings_are_rows_as_they_are_typed(tmp_path):
    rows = dict(run_report(a_run(tmp_path / "r", {"trained": 0.3})).settings)
    assert rows["gradient.rule"] == "sdo" and rows["lora.rank"] == "16" and rows["rewards.0.name"] == "clip-embedded"
    assert (
        load_recipe("quickstart", [f"rewards.0.name={rows['rewards.0.name']}"]).recipe.rewards[0].name
        == "clip-embedded"
    )
    assert not any(value.startswith(("{", "[")) for value in rows.values())


def test_held_out_scores_stand_at_the_last_step(tmp_path):
    """Of which the curve leaves out those that replayed a rollout."""
    run = a_run(tmp_path / "r", {"clip-embedded": 0.3})
    lines = [
        {"step": n, "rewards": {"clip-embedded": 0.5}, "grad_norm": 1.0, "replay": {"update": 1 + (n - 1) % 4}}
        for n in range(1, 7)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (chart,) = (block for block in run_report(run).blocks if "trained and held out" in block.title)
    assert chart.series[0].x == [1.0, 5.0] and chart.series[-1].x == [0.0, 6.0]


RULE = """
from sdo_cli.gradients.rules import gradient_rule

@gradient_rule("mine", summary="mine")
def mine(calls, batch, coefficients, generator):
    ...
"""


@pytest.mark.parametrize("place", ["", "elsewhere"])
def test_the_command_that_repeats_it_runs_as_it_is_printed(place, tmp_path, monkeypatch):
    """From above the run, from elsewhere, with a blank in its name, and with its plug-in."""
    plugin = tmp_path / "my rule.py"
    plugin.write_text(RULE)
    folder = a_run(
        tmp_path / "runs" / "a run",
        {"trained": 0.3},
        plugins=({"path": str(plugin), "sha256": "x"}, {"path": "a.b:c", "sha256": "", "package": "thing 1.0"}),
    )
    here = tmp_path / place
    here.mkdir(exist_ok=True)
    monkeypatch.chdir(here)
    words = shlex.split(run_report(folder).repeat[1])
    path = "runs/a run/resolved.yaml" if not place else str(folder / "resolved.yaml")
    assert words == ["sdo", "finetune", "--recipe", path, "--plugin", str(plugin)]
    done = entry.run([*words[1:], "--dry-run"], cwd=here)
    assert done.returncode == 0, done.stderr


def gain(mean, error=0.01, n=16):
    return Gain(Estimate(0.5, 0.01, n), Estimate(0.5 + mean, 0.01, n), Estimate(mean, error, n))


def test_a_fall_is_more_than_three_standard_errors():
    assert gain(-0.031).fell and not gain(-0.03).fell and not gain(0.5).fell
    assert gain(-0.001, 0.0).fell and not gain(0.0, 0.0).fell
    assert not gain(-0.5, float("nan"), 1).fell
    import torch

    assert not paired_gain(torch.ones(1), torch.zeros(1)).fell


def test_the_last_lines_name_what_fell(tmp_path):
    gains = {"clip-embedded": gain(0.1), "judge": gain(-0.1)}
    summary = RunSummary(tmp_path, gains, ["clip-embedded"], {"rollout": 1.0}, 3)
    said = as_text(load_recipe("quickstart"), summary)
    lines = said.splitlines()
    (at,) = (i for i, line in enumerate(lines) if line.startswith("look at this: "))
    assert lines[at] == (
        "look at this: judge (only measured) fell by more than 3 standard errors: -0.1000 ± 0.0100 "
        "on 16 held-out prompts."
    )
    assert lines[at + 2] == "next:"
    assert "look at this" not in as_text(
        load_recipe("quickstart"), replace(summary, gains={"clip-embedded": gain(0.1)})
    )


def test_of_few_prompts_the_last_lines_and_the_card_say_so(tmp_path):
    few = replace(gain(0.1), difference=replace(gain(0.1).difference, n=9))
    summary = RunSummary(tmp_path, {"clip-embedded": few}, ["clip-embedded"], {"rollout": 1.0}, 3)
    assert "\n\nNo verdict and no recommendation: 9 held-out prompts, and under 10 chance decides" in as_text(
        load_recipe("quickstart"), summary
    )
    assert summary.too_few and not replace(summary, gains={"clip-embedded": gain(0.1)}).too_few
    assert not replace(summary, gains={}).too_few


def test_a_card_asks_for_a_description_where_the_recipe_has_none_of_its_own():
    recipe = load_recipe("quickstart").recipe
    asked = description_of(recipe)
    assert "Describe here what it is for" in asked and recipe.description not in asked
    assert description_of(replace(recipe, description="")) == asked
    assert description_of(replace(recipe, description="Tigers in teal.")) == "Tigers in teal."
