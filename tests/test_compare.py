"""`sdo compare` and `sdo report` on evaluations made here."""

import json
from dataclasses import replace
from pathlib import Path

import entry
import numpy as np
import pytest
from PIL import Image

from sdo_cli.cli.evaluate import as_text
from sdo_cli.drawing.draw import DrawSettings
from sdo_cli.errors import RecipeFault
from sdo_cli.evaluation.compare import compare_folders
from sdo_cli.evaluation.evaluation import Evaluation, job_tree
from sdo_cli.evaluation.job import EvalPrompt, Item, Job, Prompts, Settings, Variant, items_of, pairs_by_seed
from sdo_cli.evaluation.report import comparison_report, evaluation_report
from sdo_cli.evaluation.run import write_tables
from sdo_cli.evaluation.score import Score, ScoreFile
from sdo_cli.evaluation.summary import Measured, compare, comparisons, recommendations, recommended, summary, sweeps
from sdo_cli.files import write_json
from sdo_cli.models.load import ModelSource
from sdo_cli.recipe.schema import RewardSpec
from sdo_cli.scoring.statistics import mean_interval

PROMPTS = Prompts("set", "test", [EvalPrompt(f"prompt {i}", ("even", "odd")[i % 2]) for i in range(24)])
SETTINGS = Settings(ModelSource("embedded"), DrawSettings(), "no", 2, 0, PROMPTS.fingerprint)


def made(folder, gains, *, settings=SETTINGS, prompts=PROMPTS, name="tuned", measure="clip-score"):
    """An evaluation folder with made-up scores: base, and a variant better by ``gains``; tiny pictures."""
    settings = replace(settings, prompts=prompts.fingerprint)
    variants = [Variant("base"), Variant(name, "x/lora", 1.0, "hash")]
    job = Job(prompts, settings, variants, {measure: RewardSpec(measure)}, embedding=False, select_by=measure)
    folder.mkdir(parents=True)
    write_json(folder / "settings.json", job_tree(job))
    scores = ScoreFile(folder / "scores.jsonl")
    noise = np.random.default_rng(3).normal(size=(len(prompts.prompts), 2))
    for variant, gain in (("base", np.zeros(len(prompts.prompts))), (name, np.asarray(gains))):
        (folder / variant).mkdir()
        lines = []
        for item in items_of(prompts, settings):
            value = float(noise[item.prompt, item.seed_index] + gain[item.prompt])
            lines.append(Score(variant, measure, item.prompt, item.seed_index, item.file, value))
            Image.new("RGB", (8, 8), (item.prompt, 0, 0)).save(folder / variant / item.file)
        scores.add(lines)
    write_tables(Evaluation(job, folder), {})
    return folder


@pytest.fixture
def gains():
    return np.random.default_rng(1).normal(0.2, 0.3, 24)


def sdo(*arguments, cwd=None):
    return entry.run(arguments, cwd=cwd)


def test_two_evaluations_through_the_command(tmp_path, gains):
    a, b = made(tmp_path / "a", gains), made(tmp_path / "b", gains + 0.5)
    done = sdo("compare", a / "tuned", b / "tuned", "--out", tmp_path / "c", "--json")
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout)["results"]["b/tuned"]["clip-score"]
    assert row["difference"]["mean"] == pytest.approx(0.5) and row["win_rate"]["mean"] == 1
    assert set(row["categories"]) == {"even", "odd"}
    page = (tmp_path / "c" / "report.html").read_text()
    assert "Comparison: b/tuned against a/tuned" in page and "prompt 3" in page
    assert json.loads((tmp_path / "c" / "comparison.json").read_text())["baseline"] == "a/tuned"


def test_the_measure_said_first_is_one_of_those_there(tmp_path, gains):
    """A name that was not measured left the verdict empty."""
    a = made(tmp_path / "a", gains, measure="clip-embedded")
    done = sdo("compare", a, "--select-by", "clip", "--out", tmp_path / "c", "--no-report")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "c" / "comparison.json").read_text())["measure"] == "clip-embedded"
    done = sdo("compare", a, "--select-by", "hps", "--out", tmp_path / "d")
    assert done.returncode == 2
    assert "--select-by: hps-v2.1 is not among the measures in common; take one of clip-embedded" in done.stderr


def test_an_evaluation_stands_for_all_it_holds(tmp_path, gains):
    a = made(tmp_path / "a", gains)
    tree = compare_folders([a], tmp_path / "c")
    row = tree["results"]["tuned"]["clip-score"]
    by_hand = mean_interval(gains)
    assert row["difference"]["mean"] == pytest.approx(gains.mean())
    assert row["difference"]["low"] == pytest.approx(by_hand.low) and row["difference"]["n"] == 24
    assert row["win_rate"]["mean"] == pytest.approx((gains > 0).mean())
    assert row["categories"]["odd"]["mean"] == pytest.approx(gains[1::2].mean())
    order = np.argsort(gains)
    assert [r["index"] for r in row["worst"]] == order[:5].tolist()
    assert [r["index"] for r in row["best"]] == order[::-1][:5].tolist()


@pytest.mark.parametrize(
    "change, said",
    [
        ({"seed": 5}, "seed is 0 and 5"),
        ({"draw": DrawSettings(num_inference_steps=20)}, "num_inference_steps is 50 and 20"),
        ({"draw": DrawSettings(guidance_scale=1.0)}, "guidance_scale is 7.5 and 1.0"),
        ({"precision": "bf16"}, "precision is 'no' and 'bf16'"),
    ],
)
def test_other_settings_are_refused_unless_told(tmp_path, gains, change, said):
    a, b = made(tmp_path / "a", gains), made(tmp_path / "b", gains, settings=replace(SETTINGS, **change))
    with pytest.raises(RecipeFault, match="not comparable") as caught:
        compare_folders([a / "tuned", b / "tuned"], tmp_path / "c")
    assert said in caught.value.message and not (tmp_path / "c").exists()
    tree = compare_folders([a / "tuned", b / "tuned"], tmp_path / "c", anyway=True)
    assert any(said in problem for problem in tree["differences_of_settings"])
    assert "differs" in (tmp_path / "c" / "report.html").read_text()


def test_another_model_is_what_is_compared(tmp_path, gains):
    other = replace(SETTINGS, model=ModelSource("stable-diffusion-v1-5/stable-diffusion-v1-5"))
    a, b = made(tmp_path / "a", gains), made(tmp_path / "b", gains, settings=other)
    tree = compare_folders([a / "base", b / "base"], tmp_path / "c")
    assert tree["results"]["b/base"]["clip-score"]["difference"]["mean"] == 0


def test_other_prompts_pair_by_their_words_when_told(tmp_path, gains):
    half = Prompts("half", "test", [*PROMPTS.prompts[20:], EvalPrompt("new")])
    a, b = made(tmp_path / "a", gains), made(tmp_path / "b", np.ones(5), prompts=half)
    with pytest.raises(RecipeFault, match="other prompts"):
        compare_folders([a / "base", b / "tuned"], tmp_path / "c")
    tree = compare_folders([a / "base", b / "tuned"], tmp_path / "c", anyway=True)
    row = tree["results"]["tuned"]["clip-score"]
    assert row["difference"]["n"] == 4 and {r["prompt"] for r in row["best"]} == {f"prompt {i}" for i in range(20, 24)}
    noise = np.random.default_rng(3).normal(size=(24, 2)).mean(1)[20:]
    theirs = np.random.default_rng(3).normal(size=(5, 2)).mean(1)[:4] + 1
    assert row["difference"]["mean"] == pytest.approx((theirs - noise).mean())
    c = made(tmp_path / "d", [1.0], prompts=Prompts("one", "test", [EvalPrompt("alone")]))
    with pytest.raises(RecipeFault, match="no prompt in common"):
        compare_folders([a / "base", c / "base"], tmp_path / "e", anyway=True)


def test_rewards_with_other_options_are_refused(tmp_path, gains):
    a, b = made(tmp_path / "a", gains), made(tmp_path / "b", gains)
    tree = json.loads((b / "settings.json").read_text())
    tree["rewards"]["clip-score"] = {"model": "other"}
    write_json(b / "settings.json", tree)
    with pytest.raises(RecipeFault, match="clip-score with"):
        compare_folders([a / "base", b / "base"], tmp_path / "c")


def folder_evaluation(folder, scores, *, seeds):
    """Of a folder made elsewhere, with made-up scores by prompt and seed; seeds are stated or not."""
    (folder / "pictures").mkdir(parents=True)
    items, count = [], {}
    for prompt, seed in scores:
        at = count[prompt] = count.get(prompt, -1) + 1
        items.append(Item(f"{prompt}-{seed}.png", prompt, at, f"prompt {prompt}", "", seed if seeds else None))
        Image.new("RGB", (8, 8)).save(folder / "pictures" / items[-1].file)
    prompts = Prompts("two", "test", PROMPTS.prompts[:2])
    variant = Variant(folder.name, folder=str(folder / "pictures"), items=tuple(items))
    job = Job(prompts, None, [variant], {"judge": RewardSpec("judge")}, embedding=False, select_by="judge")
    write_json(folder / "settings.json", job_tree(job))
    values = list(scores.values())
    lines = [Score(folder.name, "judge", i.prompt, i.seed_index, i.file, v) for i, v in zip(items, values, strict=True)]
    ScoreFile(folder / "scores.jsonl").add(lines)
    return folder


@pytest.mark.parametrize(
    "seeds, difference, said", [(True, 0, "same seeds"), (False, (1.5 - 4 + 2 - 4) / 2, "prompt by prompt")]
)
def test_folders_made_elsewhere_are_not_paired_by_number(tmp_path, seeds, difference, said):
    whole = {(0, 0): 9.0, (0, 1): 1.0, (0, 2): 2.0, (1, 0): 8.0, (1, 1): 1.0, (1, 2): 3.0}
    late = {key: value for key, value in whole.items() if key[1] > 0}
    a, b = (folder_evaluation(tmp_path / n, s, seeds=seeds) for n, s in (("a", whole), ("b", late)))
    done = sdo("compare", a, b, "--out", tmp_path / "c")
    assert done.returncode == 0, done.stderr
    row = json.loads((tmp_path / "c" / "comparison.json").read_text())["results"]["b"]["judge"]
    assert row["difference"]["mean"] == pytest.approx(difference)
    assert f"differences {said}; brackets" in done.stdout
    assert f"that all have, {said}" in (tmp_path / "c" / "report.html").read_text()


@pytest.mark.parametrize("key, said", [("code", "other code of its plug-in"), ("model", "other local files")])
def test_rewards_with_other_code_or_files_are_refused(tmp_path, gains, key, said):
    a, b = made(tmp_path / "a", gains), made(tmp_path / "b", gains)
    for folder, digest in ((a, "1"), (b, "2")):
        tree = json.loads((folder / "settings.json").read_text())
        write_json(folder / "settings.json", tree | {"sources": {"clip-score": {key: digest}}})
    with pytest.raises(RecipeFault, match=f"clip-score with {said}"):
        compare_folders([a / "base", b / "base"], tmp_path / "c")


def test_bad_input_is_a_sentence(tmp_path, gains):
    a = made(tmp_path / "a", gains)
    done = sdo("compare", a / "tuned", tmp_path / "nowhere")
    assert done.returncode == 2 and "nowhere: no such folder" in done.stderr
    for paths, said in (
        ([tmp_path], "holds no evaluation"),
        ([a / "base"], "two things are needed"),
        ([a / "tuned", a / "strange"], "is no part of its evaluation; there are base, tuned"),
    ):
        (a / "strange").mkdir(exist_ok=True)
        with pytest.raises(RecipeFault, match=said):
            compare_folders(paths, tmp_path / "c")
    (a / "scores.jsonl").unlink()
    with pytest.raises(RecipeFault, match="has no scores yet"):
        compare_folders([a], tmp_path / "c")


def test_the_report_is_written_again(tmp_path, gains):
    a = made(tmp_path / "a", gains)
    first = (a / "report.html").read_bytes()
    (a / "report.html").unlink()
    done = sdo("report", a)
    assert done.returncode == 0 and done.stdout.strip() == str(a / "report.html")
    assert (a / "report.html").read_bytes() == first
    assert sdo("report", a, "--images", "beside", "--out", tmp_path / "r.html").returncode == 0
    assert len(list((tmp_path / "r_images").iterdir())) == 24
    done = sdo("report", tmp_path)
    assert done.returncode == 2 and "is neither a run nor an evaluation" in done.stderr


# a LoRA's scale


def sweep(means, n=40, spread=1.0, seed=0):
    """Variants of one LoRA at rising scales; every prompt has its own level, and noise of its own."""
    generator = np.random.default_rng(seed)
    level = generator.normal(size=n) * 5
    found = []
    for k, mean in enumerate(means):
        values = level + mean + spread * generator.normal(size=n)
        variant = Variant("base") if k == 0 else Variant(f"l@{k}", "x/l", k / 4, "h")
        table = {(i, 0): float(v) for i, v in enumerate(values)}
        found.append(Measured(variant, Path(), [], {"r": table}))
    return found


def test_the_smallest_scale_that_is_as_good_is_recommended():
    assert recommended(sweep([0, 3, 6, 6.02, 5.9], spread=0.2), "r").name == "l@2"
    assert recommended(sweep([0, 3, 6, 9, 7], spread=0.2), "r").name == "l@3"
    assert recommended(sweep([5, 3, 2, 1, 0], spread=0.2), "r").name == "base"
    # what chance could do keeps the base
    assert recommended(sweep([0, 0.01, 0.02], spread=2.0), "r").name == "base"


def test_what_prompts_cannot_decide_is_not_called_zero():
    """Three scales that chance could do, and three that are worse."""
    items = [Item(f"{k}.png", k, 0, "p", "", 0) for k in range(40)]
    for means, expected in (
        ([0, 0.4, 0.6], "scale of x/l: not decided by 40 prompts"),
        ([5, 3, 2], "scale of x/l: 0,"),
    ):
        variants = [replace(m, items=items) for m in sweep(means, spread=2.0, seed=2)]
        job = Job(PROMPTS, SETTINGS, [m.variant for m in variants], {"r": RewardSpec("r")}, select_by="r")
        tree = summary(job, variants, {})
        (said,) = recommendations(tree)
        assert expected in said and ("--select-by" in said) == ("not decided" in said)
        assert expected in as_text(tree, Path("e"), report=False)


def test_variants_of_one_lora_are_a_sweep_from_zero():
    variants = sweep([0, 1, 2])
    found = sweeps([variants[2], variants[0], variants[1]])
    assert [m.name for m in found["x/l"]] == ["base", "l@1", "l@2"]
    assert sweeps(variants[:2]) == {}
    job = Job(PROMPTS, SETTINGS, [m.variant for m in variants], {"r": RewardSpec("r")}, select_by="r")
    assert summary(job, variants, {})["recommended_scale"]["x/l"]["scale"] == 0.5


def test_of_few_prompts_no_scale_is_recommended_and_no_verdict_given():
    """The same three scales: of nine prompts a sentence says why, of ten they are judged."""
    for n, few in ((9, True), (10, False)):
        variants = sweep([0, 3, 6], n=n)
        items = [Item(f"{k}.png", k, 0, "p", "", 0) for k in range(n)]
        variants = [replace(m, items=items) for m in variants]
        job = Job(PROMPTS, SETTINGS, [m.variant for m in variants], {"r": RewardSpec("r")}, select_by="r")
        tree = summary(job, variants, {})
        assert ("recommended_scale" in tree) != few and ("no_recommendation" in tree) == few
        said = as_text(tree, Path("e"), report=False)
        assert ("recommended scale of x/l" in said) != few and (f"{n} prompts, and under 10" in said) == few
        page = evaluation_report(job, variants, {**tree, "settings_hash": "h"}, Path("e"))
        assert (page.verdict == [tree.get("no_recommendation")]) == few
        assert any("Recommended scale" in sentence for sentence in page.verdict) != few
        pairs = {m.name: comparisons(variants[0], m, PROMPTS) for m in variants[1:]}
        assert (comparison_report(variants, pairs, PROMPTS, [], "r", "c").verdict == page.verdict) == few


def test_only_pairs_count():
    a = {(0, 0): 1.0, (0, 1): 2.0, (1, 0): 5.0, (2, None): 1.0}
    b = {(0, 0): 2.0, (0, 1): 5.0, (2, 0): 9.0, (2, None): 4.0}
    found = compare(a, b, "r", {0: "x", 2: "x"})
    assert found.gains == {0: 2.0, 2: 3.0} and found.difference.mean == 2.5 and list(found.categories) == ["x"]


def test_a_seed_that_two_pictures_of_a_prompt_state_pairs_nothing():
    """Which of the two is the partner would be a guess."""
    items = [Item(f"{k}.png", 0, k, "a", "", seed) for k, seed in enumerate((5, 6, 7))]
    assert pairs_by_seed(items, items[1:]) == {(0, 1): (0, 1), (0, 2): (0, 2)}
    twice = [replace(items[0], seed=6), *items[1:]]
    assert pairs_by_seed(items, twice) == pairs_by_seed(twice, items) == {}
    assert pairs_by_seed(items, [replace(items[0], seed=None), *items[1:]]) == {}
