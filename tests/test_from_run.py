"""What `optimize`, `prune` and `export` take from a run's folder: prompts, plug-ins, places of weights."""

import json
import shlex
import shutil

import entry
import pytest
from test_run_folder import OWN_REWARD, RECIPE

from sdo_cli.cli.drawing import ModelOptions, PictureOptions, SolverOptions
from sdo_cli.cli.from_run import laid_over_run, start_from
from sdo_cli.cli.prune_options import SearchOptions


def sdo(*words, cwd, **more):
    return entry.run([str(word) for word in words], cwd=cwd, **more)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """``runs/own``, trained on a reward of ``own.py``."""
    place = tmp_path_factory.mktemp("from-run")
    (place / "own.py").write_text(OWN_REWARD)
    (place / "mine.yaml").write_text(RECIPE.replace("[clip]", "[redness]").replace("steps: 4", "steps: 1"))
    done = sdo("finetune", "mine.yaml", "--plugin", "own.py", "--out", "runs/own", "-q", cwd=place)
    assert done.returncode == 0, done.stderr
    return place


def test_optimize_takes_the_runs_prompts_and_says_what_was_typed(place):
    words = ["--lora", "runs/own", "-o", "clip", "--steps", "1", "--inference-steps", "3", "guidance_scale=2"]
    done = sdo("optimize", *words, "--out", "o1", cwd=place)
    assert done.returncode == 0, done.stderr
    assert "by hand in place of the run's: num_inference_steps 3, guidance_scale 2" in done.stderr
    assert "no prompt was given: the first 2 of the run's held-out ones" in done.stderr
    rows = json.loads((place / "o1/results.json").read_text())["images"]
    assert [row["prompt"] for row in rows] == ["a dog on a red field", "a cat on a blue field"]
    # a picture to begin from is of a prompt that only the user knows
    done = sdo("optimize", "--lora", "runs/own", "-o", "clip", "--image", "x.png", cwd=place)
    assert done.returncode == 2 and "--prompt is missing" in done.stderr


@pytest.mark.parametrize("verb", ["optimize", "prune"])
def test_rewards_of_the_runs_plugin_are_known_and_a_changed_one_is_not_run(verb, place, tmp_path):
    shutil.copytree(place, tmp_path, dirs_exist_ok=True)
    manifest = tmp_path / "runs/own/manifest.json"
    manifest.write_text(manifest.read_text().replace(str(place), str(tmp_path)))
    words = {
        "optimize": ["--prompt", "x", "--steps", "1", "-o"],
        "prune": [
            *("--method", "uniform", "--ratio", "0.5", "--steps", "2", "--no-controls", "--num-prompts", "2"),
            *("--measure-on", "two.txt", "--rounds", "1", "--reward"),
        ],
    }[verb]
    (tmp_path / "two.txt").write_text("a bus\na tree\n")
    done = sdo(verb, "--lora", "runs/own", *words, "redness", "--out", "o", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "redness" in (tmp_path / "o" / {"optimize": "results.json", "prune": "measures.json"}[verb]).read_text()
    assert json.loads((tmp_path / "o/manifest.json").read_text())["plugins"][0]["path"].endswith("own.py")
    (tmp_path / "own.py").write_text(OWN_REWARD + "# changed\n")
    done = sdo(verb, "--lora", "runs/own", *words, "redness", "--out", "p", cwd=tmp_path)
    assert done.returncode == 2 and "own.py has changed since the run began" in done.stderr
    # of no use here, so not asked after
    done = sdo(verb, "--lora", "runs/own", *words, "clip", "--out", "p", "-q", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = sdo(verb, "--lora", "runs/own", *words, "redness", "--plugin", "own.py", "--out", "q", "-q", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_the_line_that_prune_prints_draws(place):
    """With a prompt and the LoRA; and a run of two steps needs no --live-calls."""
    words = ["--method", "uniform", "--ratio", "0.5", "--num-prompts", "0", "--guidance", "2", "--out", "p1"]
    done = sdo("prune", "--lora", "runs/own", *words, cwd=place)
    assert done.returncode == 0, done.stderr
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("use one: "))
    again = sdo(*shlex.split(line.removeprefix("use one: "))[1:], "--out", "drawn", "-q", cwd=place)
    assert again.returncode == 0 and (place / "drawn/00000.png").is_file(), again.stderr
    assert "--lora runs/own --guidance 2.0 --skip-plan p1/plan-0.50.json" in line.replace("'", "")


def test_few_steps_have_fewer_live_calls():
    assert [SearchOptions().live(steps) for steps in (2, 3, 5, 50)] == [1, 2, 4, 4]
    assert [SearchOptions(gradients="l2c").live(steps) for steps in (2, 6, 50)] == [1, 3, 4]
    assert SearchOptions(live_calls=9).live(4) == 9


def test_export_finds_the_runs_model_from_anywhere(small, tmp_path):
    shutil.copytree(small("sd15"), tmp_path / "models/mine")
    (tmp_path / "r.yaml").write_text(
        "model: models/mine\nrewards: [colorfulness]\nprompts: {lines: [a cow]}\nmax_train_steps: 1\n"
        "train_batch_size: 1\nnum_inference_steps: 2\nguidance_scale: 1\nheight: 64\nwidth: 64\n"
    )
    assert sdo("finetune", "r.yaml", "--out", "runs/r", "-q", cwd=tmp_path).returncode == 0
    (tmp_path / "elsewhere").mkdir()
    done = sdo("export", "../runs/r", "--format", "merged", "--out", "m", cwd=tmp_path / "elsewhere")
    assert done.returncode == 0 and (tmp_path / "elsewhere/m/model_index.json").is_file(), done.stderr
    (tmp_path / "models/mine").rename(tmp_path / "models/other")
    done = sdo("export", "runs/r", "--format", "merged", cwd=tmp_path)
    assert done.returncode == 2 and "1 problem in the run runs/r:" in done.stderr
    assert "models/mine is not on this machine; give another place by hand, as --model PLACE" in done.stderr
    done = sdo("export", "runs/r", "--format", "merged", "--model", "models/other", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_revision_variant_and_size_come_from_the_folder(place, tmp_path):
    """What names the weights on the hub and how large pictures are; typed ones win and are said."""
    shutil.copytree(place / "runs/own", tmp_path / "own")
    recipe = tmp_path / "own/resolved.yaml"
    text = recipe.read_text().replace("model: embedded", "model: someone/unheard-of", 1)
    for key, value in {"revision": "v1.1", "variant": "fp16", "height": 128, "width": 192}.items():
        assert f"\n{key}: null\n" in text
        text = text.replace(f"\n{key}: null\n", f"\n{key}: {value}\n", 1)
    recipe.write_text(text)
    start = start_from([str(tmp_path / "own")], None)
    groups = (ModelOptions(), SolverOptions(), PictureOptions())
    asked, said = laid_over_run(start.loaded.recipe, [], groups)
    assert (asked.model, asked.revision, asked.variant) == ("someone/unheard-of", "v1.1", "fp16")
    assert (asked.height, asked.width) == (128, 192) and said == ""
    groups = (ModelOptions(revision="main"), SolverOptions(), PictureOptions(width=256))
    asked, said = laid_over_run(start.loaded.recipe, ["revision", "width"], groups)
    assert (asked.revision, asked.variant, asked.width) == ("main", "fp16", 256)
    assert said == "by hand in place of the run's: revision main, width 256"
