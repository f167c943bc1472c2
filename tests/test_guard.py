"""Checks for over-optimisation, best/, stopping; trackers."""

import json
import shutil

import entry
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_checkpoints import STEPS, TINY, UNMEASURED, run
from typer.testing import CliRunner

from sdo_cli.errors import RecipeFault, Stopped
from sdo_cli.progress import Silent
from sdo_cli.recipe.load import load_recipe
from sdo_cli.records.check import Check, gain, quality, verdict
from sdo_cli.runs.checkpoint import newest
from sdo_cli.training import guard as guarding
from sdo_cli.training import run as running

OWN = "guard.prompts={lines: [a cow on a silver sky, a fish on a pale sea, a rose on a dark desk]}"
# a rate that does not depend on the number of steps
GUARD = ["lr_scheduler=constant", "guard.steps=2", OWN, "guard.rewards=[colorfulness, aesthetic]", "guard.seeds=2"]
# a check after every step, nothing else
QUICK = [*GUARD, *UNMEASURED, "guard.steps=1", "guard.seeds=1", "guard.patience=2"]


def checks(trained, untrained, *, prompts=8):
    """Of runs whose measures move like these, each prompt about its own level."""
    levels = np.linspace(-1, 1, prompts)
    wobble = 0.01 * np.cos(np.arange(prompts))
    return [
        Check(
            10 * k,
            {
                "objective": list(levels + t),
                "clip-score": list(levels + t),
                "colorfulness": list(levels + u + k * wobble),
            },
            ["colorfulness"],
        )
        for k, (t, u) in enumerate(zip(trained, untrained, strict=True))
    ]


def test_quality_is_the_gain_in_what_is_not_trained_on_in_units_of_its_spread():
    first, second = checks([0, 5], [0, 0.5])
    spread = np.std(first.values["colorfulness"], ddof=1)
    expected = (np.array(second.values["colorfulness"]) - np.array(first.values["colorfulness"])) / spread
    assert np.allclose(quality(second, first), expected)
    assert np.allclose(gain(second, first, ["colorfulness", "clip-score"]), (expected + 5 / spread) / 2)


@pytest.mark.parametrize(
    "trained, untrained, best, bad, rises",
    [
        ([0, 1, 2, 3], [0, 0.1, 0.2, 0.3], 30, 0, False),  # all well: nothing has been lost since the last check
        ([0, 1, 2, 3], [0, 0.3, 0.2, 0.1], 10, 2, True),  # the reward rises, the others fall
        ([0, 1, 2, 3], [0, -0.1, -0.2, -0.3], 10, 3, True),  # never better than the untrained model
        ([0, 1, -2, -3], [0, 0.3, -1, -2], 10, 2, False),  # everything falls
        ([0, 1, 2, 3], [0, 0.3, 0.1, 0.4], 30, 0, False),  # fell once, and came back
    ],
)
def test_what_the_checks_say(trained, untrained, best, bad, rises):
    found = verdict(checks(trained, untrained))
    assert (found.best, found.bad, found.rise > 0) == (best, bad, rises)
    if bad:
        assert f"for {bad} checks" in found.sentence("x") and f"x by {'+' if rises else '-'}" in found.sentence("x")


def test_a_trained_reward_that_falls_itself_is_a_collapse_whatever_the_others_say():
    assert verdict(checks([0, 0, 0], [0, 0.1, 0.2])).bad == 0
    rows = checks([0, -1, -2], [0, 0.1, 0.2])
    for k, row in enumerate(rows):
        row.values["objective"] = [v + 0.1 * k * (-1) ** i for i, v in enumerate(row.values["objective"])]
    assert verdict(rows).bad == 2


def test_a_collapsed_model_is_never_the_best():
    """What the untrained rewards say of it is chance, and a picture without numbers is no picture."""
    rows = checks([0, 1, -3, -3], [0, 0.1, 0.5, 0.6])
    found = verdict(rows)
    assert (found.best, found.reference, found.bad) == (10, 10, 2)
    rows = checks([0, 1, 2], [0, 0.1, 0.5])
    rows[2].values["colorfulness"][3] = float("nan")
    found = verdict(rows)
    assert (found.best, found.bad) == (10, 1)
    rows = checks([0, 1], [0, float("nan")])
    assert verdict(rows).bad == 1


def test_where_all_prompts_score_alike_gains_stay_numbers():
    rows = [Check(k, {"objective": [1.0, 1.0], "x": [2.0 + k, 2.0 + k]}, ["x"]) for k in range(2)]
    assert quality(rows[1], rows[0]).tolist() == [1.0, 1.0]


def test_a_fall_within_chance_is_none():
    rows = checks([0, 1, 2], [0, 0.3, 0.3])
    noise = np.array([1, -1, 1, -1, 1, -1, 1, -1.2])
    rows[2].values["colorfulness"] = list(np.array(rows[1].values["colorfulness"]) + noise)
    assert verdict(rows).bad == 0
    rows[2].values["colorfulness"] = list(np.array(rows[1].values["colorfulness"]) - abs(noise))
    assert verdict(rows).bad == 1


@pytest.mark.parametrize(
    "words, said",
    [
        (["guard.steps=5"], "guard.prompts: checks need prompts of their own"),
        (["guard.steps=5"], "guard.rewards: is empty"),
        (["guard.stop=true"], "guard.stop: there are no checks without guard.steps"),
        ([*GUARD, "guard.rewards=[judge]"], "judge only measures, nothing is selected by it"),
        ([*GUARD, "guard.rewards=[jpeg-compressibility]"], "only measures, nothing is selected by it"),
        ([*GUARD, "guard.rewards=[clip]"], "clip is trained on; the guard needs a reward that is not"),
        (
            [*GUARD, "guard.rewards=[clip-embedded]"],
            "clip-embedded is trained on; the guard needs a reward that is not",
        ),
        ([*GUARD, "guard.rewards=[colorfulness, colorfulness]"], "is in the list twice"),
        (
            [*GUARD, "guard.rewards=[{name: hps, options: {model: embedded:judge}}]"],
            "nothing is selected by it",
        ),
        ([*GUARD, "guard.prompts={file: emoji-heldout.txt}"], "held out for the end"),
        ([*GUARD, "guard.num_prompts=1"], "checks need two prompts or more"),
        ([*GUARD, "guard.prompts={file: emoji-train.txt}"], "are trained on"),
        (["trackers=[tensorbord]"], "unknown tracker 'tensorbord'; did you mean tensorboard"),
    ],
)
def test_a_guard_that_could_not_judge_is_refused(words, said):
    with pytest.raises(RecipeFault) as caught:
        load_recipe("quickstart", words)
    assert any(said in line for line in caught.value.problems), caught.value.problems


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """A run with checks at steps 0, 2, 4."""
    folder = tmp_path_factory.mktemp("watched") / "run"
    done = run(folder, "-q", *GUARD, "trackers=[tensorboard]")
    assert done.returncode == 0, done.stderr
    return folder


def rows_of(folder):
    return [json.loads(line) for line in (folder / "guard.jsonl").read_text().splitlines()]


def test_a_run_keeps_its_checks_and_the_best_adapter(watched):
    rows = rows_of(watched)
    assert [row["step"] for row in rows] == [0, 2, 4]
    names = {"clip-embedded", "aesthetic-embedded", "colorfulness", "objective", "diversity", "distance-from-base"}
    assert all(set(row["values"]) == names and len(row["values"]["diversity"]) == 3 for row in rows)
    assert rows[0]["values"]["distance-from-base"] == pytest.approx([0] * 3, abs=1e-6)
    assert max(rows[-1]["values"]["distance-from-base"]) > 1e-6
    assert all(row["values"]["objective"] == pytest.approx(row["values"]["clip-embedded"], abs=1e-6) for row in rows)
    best = json.loads((watched / "best" / "best.json").read_text())
    assert best["step"] == verdict([Check(**row) for row in rows]).best and "judge" not in best["chosen_by"]
    page = (watched / "report.html").read_text()
    assert "Over-optimisation: trained against untrained rewards" in page and "Checks: diversity" in page


def test_best_holds_the_weights_of_its_step(watched, tmp_path):
    """Equal to those of a run that ends there and was not looked at."""
    step = json.loads((watched / "best" / "best.json").read_text())["step"]
    words = ["lr_scheduler=constant", *UNMEASURED, f"max_train_steps={step}"]
    assert run(tmp_path / "run", "-q", *words).returncode == 0
    best, end = (load_file(f / "pytorch_lora_weights.safetensors") for f in (watched / "best", tmp_path / "run"))
    assert all(torch.equal(best[name], end[name]) for name in end)


def test_killed_and_resumed_the_checks_and_the_best_are_the_same(watched, tmp_path):
    """Cut back to step 2 as a kill leaves it, with a best/ and checks from after the checkpoint."""
    folder = tmp_path / "run"
    shutil.copytree(watched, folder)
    shutil.rmtree(folder / "checkpoints" / "checkpoint-4")
    (folder / "pytorch_lora_weights.safetensors").unlink()
    for name in ("best.json", "pytorch_lora_weights.safetensors"):
        (folder / "best" / name).write_bytes(b"from a step that is done again")
    (folder / "manifest.json").write_text((folder / "manifest.json").read_text().replace('"finished"', '"running"'))
    done = run(folder, "-q", "--resume", *GUARD)
    assert done.returncode == 0, done.stderr
    assert rows_of(folder) == rows_of(watched)
    assert (folder / "best" / "best.json").read_bytes() == (watched / "best" / "best.json").read_bytes()
    for name in ("best/pytorch_lora_weights.safetensors", "pytorch_lora_weights.safetensors"):
        mine, theirs = load_file(folder / name), load_file(watched / name)
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)


def in_this_process(folder, *words, resume=False):
    running.finetune(load_recipe("quickstart", [*TINY, *words]), folder, Silent(), resume=resume)


def test_stopped_in_a_check_it_is_made_again(watched, tmp_path, monkeypatch):
    """Where a check and a checkpoint meet, the steps are saved, and the check is not lost."""
    real = guarding.Guard.check

    def check(self, job, step, reporter):
        if step == 2:
            raise Stopped("SIGTERM")
        return real(self, job, step, reporter)

    with monkeypatch.context() as patch:
        patch.setattr(guarding.Guard, "check", check)
        with pytest.raises(Stopped):
            in_this_process(tmp_path / "run", *GUARD, *UNMEASURED)
    assert newest(tmp_path / "run")[0].step == 2
    done = run(tmp_path / "run", "-q", "--resume", *GUARD, *UNMEASURED)
    assert done.returncode == 0, done.stderr
    assert rows_of(tmp_path / "run") == rows_of(watched)


def test_a_run_its_guard_ended_does_not_train_on_when_it_is_resumed(tmp_path, monkeypatch):
    """Stopped after the check, before anything was kept."""
    falling(monkeypatch)
    words = [*QUICK, "guard.stop=true"]
    in_this_process(tmp_path / "run", *words)
    path = tmp_path / "run" / "manifest.json"
    ended = json.loads(path.read_text())
    assert ended["stopped_at"] == 2
    path.write_text(json.dumps({**ended, "status": "interrupted", "stopped_at": None}))
    (tmp_path / "run" / "pytorch_lora_weights.safetensors").unlink()
    in_this_process(tmp_path / "run", *words, resume=True)
    assert json.loads(path.read_text())["stopped_at"] == 2 and len(rows_of(tmp_path / "run")) == 3
    assert (tmp_path / "run" / "pytorch_lora_weights.safetensors").is_file()
    # and without it training goes on
    in_this_process(tmp_path / "run", *words[:-1], "guard.stop=false", resume=True)
    assert len(rows_of(tmp_path / "run")) == STEPS + 1


def test_the_folder_alone_repeats_it(watched, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    again = load_recipe(str(watched / "resolved.yaml"), [])
    assert len(again.prompts(again.recipe.guard.prompts)) == 3
    assert again.prompts(again.recipe.guard.prompts)[0] == "a cow on a silver sky"


def test_trackers_get_the_numbers_of_metrics_and_checks(watched):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: dict = {}
    for path in (watched / "tracking").rglob("events*"):
        events = EventAccumulator(str(path))
        events.Reload()
        found |= {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    metrics = [json.loads(line) for line in (watched / "metrics.jsonl").read_text().splitlines()]
    for tag, value in (("train/loss", "loss"), ("train/grad_norm", "grad_norm")):
        assert [step for step, _ in found[tag]] == [row["step"] for row in metrics]
        assert [v for _, v in found[tag]] == pytest.approx([row[value] for row in metrics], rel=1e-6)
    assert [step for step, _ in found["guard/diversity"]] == [0, 2, 4]


def test_a_tracker_that_is_not_installed_is_said_before_anything_is_trained(tmp_path):
    done = run(tmp_path / "run", "-q", "trackers=[dvclive]")
    assert done.returncode == 2 and "trackers: dvclive is not installed" in done.stderr and "pip install" in done.stderr
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def falling(monkeypatch):
    """Every check of a trained model is worse than the one before by the untrained rewards."""
    real = guarding.Guard.check

    def check(self, job, step, reporter):
        found = real(self, job, step, reporter)
        found.values["colorfulness"] = [10.0 * p - step for p in range(len(found.values["colorfulness"]))]
        other = "aesthetic-embedded"
        found.values[other] = [10.0 * p - step for p in range(len(found.values[other]))]
        return found

    monkeypatch.setattr(guarding.Guard, "check", check)


@pytest.mark.parametrize("stop", [True, False])
def test_it_warns_and_stops_if_asked(tmp_path, monkeypatch, stop):
    from test_checkpoints import command

    from sdo_cli.cli import app

    falling(monkeypatch)
    words = [*QUICK, *(["--stop-on-overoptimisation"] if stop else [])]
    done = CliRunner().invoke(app.app, command(tmp_path / "run", *words))
    assert done.exit_code == 0, done.output
    said = done.stderr
    assert "over-optimisation at step 2: for 2 checks the pictures got worse; since step 0 the rewards not" in said
    assert "check at step 1: clip-embedded" in said
    assert "best/ holds step 1" in said
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(rows) == (2 if stop else STEPS) and said.count("over-optimisation at") == 1
    tree = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert tree["status"] == "finished" and tree["stopped_at"] == (2 if stop else None)
    page = (tmp_path / "run" / "report.html").read_text()
    assert (
        "Over-optimised: " in page
        and "step 1 was the best of the trained steps, and not better than the model as it was" in page
    )
    # and stands in the table of runs
    listed = CliRunner().invoke(app.app, ["runs", str(tmp_path)])
    assert listed.exit_code == 0 and "never better than at 0, over-optimised" in listed.output
    if stop:
        again = run(tmp_path / "run", "--resume", *words)
        assert again.returncode == 0 and "is finished already; its guard ended it" in again.stdout


def test_without_adapters_nothing_is_kept_as_best_but_it_still_warns(small, tmp_path):
    words = [f"model={small('sd15')}", "rewards=[{name: clip-score, options: {model: embedded}}]", *GUARD, *UNMEASURED]
    words += ["guard.rewards=[colorfulness]", "train=full", "max_train_steps=2", "train_batch_size=1"]
    done = run(tmp_path / "run", "-q", *words)
    assert done.returncode == 0, done.stderr
    assert len(rows_of(tmp_path / "run")) == 2 and not (tmp_path / "run" / "best").exists()


@pytest.mark.slow
def test_pushed_far_too_hard_the_guard_stops_in_time(tmp_path):
    """Twenty times the recipe's rate: the reward is won, the pictures are lost; best/ is better by the judge."""
    words = ["learning_rate=2e-2", "guard.steps=5", "num_inference_steps=10", "guidance_scale=1", "max_train_steps=40"]
    words += ["validation.num_prompts=32", "guard.num_prompts=16", "guard.patience=2"]
    base = ["finetune", "--recipe", "guarded", "-q", "--json"]
    done = entry.run([*base, "--out", str(tmp_path / "run"), *words], timeout=1500)
    assert done.returncode == 0, done.stderr
    gains = json.loads(done.stdout)["gains"]
    gain = gains["aesthetic-embedded"]
    assert gain["difference"] > 10 * gain["standard_error"]
    assert gains["judge"]["difference"] < -10 * gains["judge"]["standard_error"]
    rows = [Check(**row) for row in rows_of(tmp_path / "run")]
    print(
        {
            row.step: (row.of("aesthetic-embedded").mean().round(3), row.of("clip-embedded").mean().round(3))
            for row in rows
        }
    )
    found = verdict(rows)
    assert found.bad >= 3 and found.best <= 10
    stopped = tmp_path / "stopped"
    done = entry.run([*base, "--out", str(stopped), *words, "--stop-on-overoptimisation"], timeout=1500)
    assert done.returncode == 0, done.stderr
    at = json.loads((stopped / "manifest.json").read_text())["stopped_at"]
    print(f"stopped at {at}")
    assert at is not None and at <= 15
    words = [
        "eval",
        "--prompts",
        "emoji-eval",
        "--limit",
        "32",
        "--steps",
        "10",
        "--guidance",
        "1",
        "--rewards",
        "judge",
    ]
    loras = [word for name in ("best", ".") for word in ("--lora", str(tmp_path / "run" / name))]
    done = entry.run([*words, *loras, "--no-base", "--json", "-q", "--out", str(tmp_path / "e")], timeout=1500)
    assert done.returncode == 0, done.stderr
    best, end = (v["measures"]["judge"] for v in json.loads(done.stdout)["variants"].values())
    print(best, end)
    assert best["mean"] - end["mean"] > 5 * (best["standard_error"] + end["standard_error"])
