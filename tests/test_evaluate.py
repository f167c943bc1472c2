"""`sdo eval` through the real command and the library."""

import csv
import hashlib
import io
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import entry
import forked
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from small_rewards import make_small_reward

from sdo_cli.cli.evaluate import as_text
from sdo_cli.drawing.draw import DrawSettings
from sdo_cli.drawing.pictures import read_image
from sdo_cli.errors import EnvironmentFault, RecipeFault
from sdo_cli.evaluation import draw as drawing
from sdo_cli.evaluation.draw import metadata_row
from sdo_cli.evaluation.evaluation import Evaluation, folder_variants
from sdo_cli.evaluation.folders import read_folder
from sdo_cli.evaluation.job import EvalPrompt, Job, Prompts, Settings, Variant, items_of, variants_of
from sdo_cli.evaluation.layouts import SUFFIXES
from sdo_cli.evaluation.picture_text import prompt_inside
from sdo_cli.evaluation.reference import reference_files
from sdo_cli.evaluation.report import evaluation_report
from sdo_cli.evaluation.run import evaluate
from sdo_cli.evaluation.score import ScoreFile, diversity_lines
from sdo_cli.files import alone_in
from sdo_cli.models.load import ModelSource, load_family
from sdo_cli.progress import Silent
from sdo_cli.recipe.schema import LoraSpec, RewardSpec
from sdo_cli.scoring.rewards import build_reward, score_images, sources
from sdo_cli.training.lora import add_lora

TEXTS = [
    ("a tiger on a teal background", "animals"),
    ("a lemon on a blue background", "fruit"),
    ("a rose on a white background", "plants"),
    ("a cat on a pink background", "animals"),
    ("a taxi, parked on a “red” background", ""),
]
PROMPTS = Prompts("five", "test", [EvalPrompt(*pair) for pair in TEXTS])
SETTINGS = Settings(
    ModelSource("embedded"),
    DrawSettings("ddim", num_inference_steps=3, guidance_scale=2.0),
    "no",
    2,
    7,
    PROMPTS.fingerprint,
)
REWARDS = {
    "clip-score": RewardSpec("clip-score", options={"model": "embedded"}),
    "judge": RewardSpec("judge"),
}


def job(model, *variants, settings=SETTINGS, **changes):
    """With the model of this machine's ``small`` pipelines."""
    settings = replace(settings, model=model)
    wanted = Job(PROMPTS, settings, list(variants) or [Variant("base")], REWARDS, select_by="clip-score")
    return replace(wanted, **changes)


def sdo(*arguments, cwd=None):
    return entry.run(arguments, cwd=cwd)


def content(folder):
    """Every file that must repeat: all but what says when it was made."""
    skipped = {"manifest.json", "report.html"}
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name not in skipped
    }


@pytest.fixture(scope="module")
def model(small):
    return ModelSource(str(small("sd15")))


@pytest.fixture(scope="module")
def lora(tmp_path_factory, model):
    """A LoRA that changes pictures visibly."""
    folder = tmp_path_factory.mktemp("lora") / "strong"
    family = load_family(model)
    add_lora(family, LoraSpec(rank=2), seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in family.denoiser.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator)
    family.save_lora(folder)
    return folder


@pytest.fixture(scope="module")
def done(tmp_path_factory, lora, model):
    """An evaluation of base and LoRA at two scales, by the library."""
    folder = tmp_path_factory.mktemp("eval") / "e"
    wanted = job(model, *variants_of([str(lora)], [0.0, 0.5, 1.0], base=True))
    tree = evaluate(wanted, folder, Silent(), batch_size=4)
    return folder, tree, wanted


def test_the_folder_holds_what_is_promised(done):
    folder, tree, _ = done
    names = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    variants = ["base", "strong@0.5", "strong"]
    images = {f"{v}/{i:05d}_{j:02d}.png" for v in variants for i in range(5) for j in range(2)}
    tables = {
        "settings.json",
        "manifest.json",
        "scores.jsonl",
        "scores.csv",
        "summary.json",
        "summary.csv",
        "report.html",
    }
    assert names == images | tables | {f"{v}/metadata.jsonl" for v in variants} | {
        f"embeddings/{v}.safetensors" for v in variants
    }
    assert json.loads((folder / "manifest.json").read_text())["status"] == "finished"
    assert json.loads((folder / "summary.json").read_text()) == json.loads(json.dumps(tree))
    assert list(tree["variants"]) == variants
    measures = tree["variants"]["strong"]["measures"]
    assert set(measures) == {"clip-score", "judge", "diversity", "distance-from-base"}
    assert measures["clip-score"]["n"] == 5 and measures["clip-score"]["scores"] == 10
    assert "distance-from-base" not in tree["variants"]["base"]["measures"]


def test_tables_agree_with_the_scores(done):
    folder, tree, _ = done
    rows = list(csv.DictReader(io.StringIO((folder / "scores.csv").read_text())))
    assert len(rows) == 30 and rows[-1]["prompt"] == TEXTS[-1][0]
    base, tuned = ([r for r in rows if r["variant"] == v] for v in ("base", "strong"))
    gains = [float(b["judge"]) - float(a["judge"]) for a, b in zip(base, tuned, strict=True)]
    by_prompt = np.array(gains).reshape(5, 2).mean(1)
    found = tree["differences"]["strong"]["judge"]
    assert found["difference"]["mean"] == pytest.approx(by_prompt.mean()) and found["difference"]["n"] == 5
    assert found["win_rate"]["mean"] == (by_prompt > 0).mean()
    assert found["categories"]["animals"]["mean"] == pytest.approx(by_prompt[[0, 3]].mean())
    assert found["categories"].keys() == {"animals"}, "one prompt says nothing of its category"
    summary = list(csv.DictReader(io.StringIO((folder / "summary.csv").read_text())))
    row = next(r for r in summary if (r["variant"], r["measure"]) == ("strong", "judge"))
    assert float(row["difference"]) == pytest.approx(by_prompt.mean())
    assert float(row["mean"]) == pytest.approx(np.mean([float(r["judge"]) for r in tuned]))


def test_images_load_as_a_hugging_face_image_folder(done, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    from datasets import load_dataset

    rows = load_dataset("imagefolder", data_dir=str(done[0] / "strong"), split="train", cache_dir=str(tmp_path))
    assert [row["prompt"] for row in rows] == [text for text, _ in TEXTS for _ in range(2)]
    assert rows[0]["image"].size == (64, 64) and rows[3]["seed"] == items_of(PROMPTS, SETTINGS)[3].seed


def test_the_text_in_the_png_is_a1111s(done):
    text = Image.open(done[0] / "strong@0.5" / "00000_01.png").text["parameters"]
    seed = items_of(PROMPTS, SETTINGS)[1].seed
    lines = text.splitlines()
    assert lines[0] == "a tiger on a teal background <lora:strong:0.5>"
    assert lines[1].startswith(
        f"Steps: 3, Sampler: DDIM, CFG scale: 2, Seed: {seed}, Size: 64x64, Model: sd15, Version: sdo "
    )
    assert prompt_inside(done[0] / "base" / "00004_00.png") == TEXTS[4][0]


def test_the_seed_in_the_metadata_is_sdo_samples_and_diffusers(done, model, tmp_path):
    row = json.loads((done[0] / "base" / "metadata.jsonl").read_text().splitlines()[2])
    words = ["--seed", row["seed"], "--steps", 3, "--guidance", 2, "--out", tmp_path / "s", "-q"]
    words += ["--model", model.model, "--solver", "ddim"]
    assert sdo("sample", row["prompt"], *words).returncode == 0
    mine, theirs = (
        np.asarray(Image.open(p), dtype=int)
        for p in (done[0] / "base" / row["file_name"], tmp_path / "s" / "00000.png")
    )
    assert np.abs(mine - theirs).max() <= 1


def test_the_scale_is_sdo_samples(done, lora, model, tmp_path):
    row = json.loads((done[0] / "strong@0.5" / "metadata.jsonl").read_text().splitlines()[2])
    words = ["--seed", row["seed"], "--steps", 3, "--guidance", 2, "--lora", lora, "--lora-scale", 0.5, "-q"]
    words += ["--model", model.model, "--solver", "ddim"]
    assert sdo("sample", row["prompt"], *words, "--out", tmp_path / "s").returncode == 0
    paths = [done[0] / name / row["file_name"] for name in ("strong@0.5", "strong", "base")]
    half, whole, none, theirs = (np.asarray(Image.open(p), dtype=int) for p in (*paths, tmp_path / "s" / "00000.png"))
    assert np.abs(half - theirs).max() <= 1
    assert np.abs(half - whole).mean() > 1 and np.abs(half - none).mean() > 1


def test_what_is_encoded_together_does_not_depend_on_what_is_missing():
    """A batch of other prompts may round otherwise; so a batch with one missing prompt is encoded as a whole."""
    texts = [f"prompt {i}" for i in range(70)]
    items = [replace(items_of(PROMPTS, SETTINGS)[0], text=text) for text in texts for _ in range(2)]
    assert drawing._to_encode(items, items) == texts
    assert drawing._to_encode(items, [items[2 * 40], items[2 * 41]]) == texts[32:64]
    assert drawing._to_encode(items, [items[0], items[2 * 69]]) == texts[:32] + texts[64:]


def test_repeated_it_is_the_same_byte_for_byte(done, tmp_path):
    folder, _, wanted = done
    evaluate(wanted, tmp_path / "again", Silent(), batch_size=4)
    mine, theirs = content(folder), content(tmp_path / "again")
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if mine[name] != theirs[name]] == []


class Stopping(Silent):
    """Interrupts after so many calls."""

    def __init__(self, after):
        self.left = after

    def advance(self, count=1, text=""):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("after", [0, 2, 7, 10, 13])
def test_interrupted_anywhere_it_goes_on_and_draws_nothing_twice(done, tmp_path, after, monkeypatch):
    folder, _, wanted = done
    counted = []
    real = drawing._draw
    monkeypatch.setattr(drawing, "_draw", lambda *a: counted.extend(i.file for i in a[3]) or real(*a))
    with pytest.raises(KeyboardInterrupt):
        evaluate(wanted, tmp_path / "e", Stopping(after), batch_size=4)
    manifest = json.loads((tmp_path / "e" / "manifest.json").read_text())
    assert manifest["status"] == "interrupted" and not (tmp_path / "e" / "summary.json").exists()
    evaluate(wanted, tmp_path / "e", Silent(), batch_size=4)
    assert len(counted) == 30
    assert content(tmp_path / "e") == content(folder)


def test_a_kill_between_drawing_and_moving_loses_and_doubles_nothing(done, tmp_path):
    """What a SIGKILL can leave: a half-written chunk, a whole one not moved in, half of one moved, a line cut off."""
    folder, _, wanted = done
    evaluate(wanted, tmp_path / "e", Silent(), batch_size=4)
    base = tmp_path / "e" / "base"
    files = sorted(base.glob("0*.png"))
    partial, whole = base / ".partial-000001", base / ".drawn-000000"
    partial.mkdir()
    whole.mkdir()
    for path in files[4:8]:
        path.replace(partial / path.name)
    (partial / files[7].name).write_bytes(b"\x89PNG half")
    for path in files[2:4]:
        path.replace(whole / path.name)
    with (tmp_path / "e" / "scores.jsonl").open("r+b") as stream:
        stream.truncate(1000)
    # of a session with a smaller batch, where there were more chunks
    far = base / ".drawn-000009"
    far.mkdir()
    files[9].replace(far / files[9].name)
    moved = [(whole / path.name).stat().st_mtime_ns for path in files[2:4]]
    evaluate(wanted, tmp_path / "e", Silent(), batch_size=4)
    assert content(tmp_path / "e") == content(folder)
    assert [path.stat().st_mtime_ns for path in files[2:4]] == moved, "a finished chunk was drawn again"
    assert not list(base.glob(".*"))


def test_more_seeds_and_prompts_leave_the_others_as_they_are():
    few = items_of(PROMPTS, SETTINGS)
    more = items_of(replace(PROMPTS, prompts=PROMPTS.prompts * 2), replace(SETTINGS, seeds=3))
    assert {i.file: i.seed for i in few}.items() <= {i.file: i.seed for i in more}.items()
    assert len({i.seed for i in more}) == 30


def test_rewards_and_loras_can_be_added_later(tmp_path, lora, model):
    evaluate(job(model), tmp_path / "e", Silent(), batch_size=4)
    first = (tmp_path / "e" / "base" / "00000_00.png").stat()
    more = job(
        model,
        *variants_of([str(lora)], [1.0], base=True),
        rewards=REWARDS | {"colorfulness": RewardSpec("colorfulness")},
    )
    tree = evaluate(more, tmp_path / "e", Silent(), batch_size=4)
    assert (tmp_path / "e" / "base" / "00000_00.png").stat() == first
    assert set(tree["variants"]) == {"base", "strong"} and "colorfulness" in tree["differences"]["strong"]
    # another scale takes its place in the sweep
    half = job(model, *variants_of([str(lora)], [0.5], base=False))
    assert list(evaluate(half, tmp_path / "e", Silent(), batch_size=4)["variants"]) == ["base", "strong@0.5", "strong"]
    # and asked for less, what is there stays
    tree = evaluate(job(model), tmp_path / "e", Silent(), batch_size=4)
    assert len(tree["variants"]) == 3


@pytest.mark.parametrize(
    "change, said",
    [
        ({"settings": replace(SETTINGS, seed=8)}, "seed is 7 there, 8 here"),
        (
            {"settings": replace(SETTINGS, draw=replace(SETTINGS.draw, guidance_scale=3.0))},
            "guidance_scale is 2.0 there",
        ),
        ({"rewards": {"clip-score": RewardSpec("clip-score", options={"model": "x"})}}, "options of clip-score"),
        (
            {"prompts": replace(PROMPTS, prompts=[*PROMPTS.prompts[:2], EvalPrompt("a fox"), *PROMPTS.prompts[3:]])},
            "5 prompts of five there, 5 prompts of five here (only there: a rose on a white background)",
        ),
        (
            {"prompts": replace(PROMPTS, prompts=[EvalPrompt(TEXTS[0][0], "cats"), *PROMPTS.prompts[1:]])},
            "(of a tiger on a teal background the category is animals there, cats here)",
        ),
        (
            {"prompts": replace(PROMPTS, prompts=PROMPTS.prompts[::-1])},
            "(prompt 0 is a tiger on a teal background there, a taxi",
        ),
        ({"reward_precision": "bf16"}, "reward precision is no there, bf16 here"),
        ({"variants": [Variant("base"), Variant("strong", "x", 1.0, "other")]}, "its LoRA strong has changed"),
    ],
)
def test_other_settings_do_not_go_into_the_same_folder(done, model, change, said):
    before = content(done[0])
    with pytest.raises(RecipeFault, match="other settings") as caught:
        evaluate(job(model, **change), done[0], Silent())
    assert said in caught.value.message and content(done[0]) == before


def test_two_processes_do_not_share_a_folder(tmp_path):
    with alone_in(tmp_path):
        code = "import sys, pathlib, sdo_cli.files as files; files.alone_in(pathlib.Path(sys.argv[1])).__enter__()"
        other = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
        assert other.returncode == 1 and "another process works in" in other.stderr
    assert not (tmp_path / ".lock").exists()
    with alone_in(tmp_path):
        pass


def test_a_folder_of_something_else_is_left_alone(tmp_path, model):
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(RecipeFault, match="holds no evaluation"):
        evaluate(job(model), tmp_path, Silent())


# folders made elsewhere


def test_an_image_folder_made_by_diffusers_gets_the_values_of_our_own(done, model, tmp_path):
    """Drawn by a plain pipeline with the seeds of the metadata, saved as people save; scored through the command."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(model.model, safety_checker=None)
    # as Stable Diffusion's own scheduler says
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    pipe.set_progress_bar_config(disable=True)
    folder = tmp_path / "theirs"
    folder.mkdir()
    rows = []
    for item in items_of(PROMPTS, SETTINGS):
        generator = torch.Generator().manual_seed(item.seed)
        image = pipe(item.text, num_inference_steps=3, guidance_scale=2.0, generator=generator).images[0]
        image.save(folder / item.file)
        rows.append({"file_name": item.file, "text": item.text})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = sdo("eval", "--images", folder, "--model", "embedded", cwd=tmp_path)
    assert out.returncode == 2 and "--images: scores what is there" in out.stderr
    words = ["--rewards", "judge,clip", "--option", "clip.model=embedded", "--out", tmp_path / "e", "--json", "-q"]
    out = sdo("eval", "--images", folder, *words, cwd=tmp_path)
    assert out.returncode == 0, out.stderr
    tree = json.loads(out.stdout)
    # image by image; pixels may differ by one level
    named = {"clip-embedded": "clip-score", "judge": "judge", "diversity": "diversity"}
    for measure in ("clip-embedded", "judge"):
        theirs = ScoreFile(tmp_path / "e" / "scores.jsonl").of("theirs", measure)
        ours = ScoreFile(done[0] / "scores.jsonl").of("base", named[measure])
        assert len(theirs) == 10 and theirs == pytest.approx(ours, abs=1e-4) and np.std(list(ours.values())) > 1e-2
    ours = done[1]["variants"]["base"]["measures"]
    for name, row in tree["variants"]["theirs"]["measures"].items():
        assert row["mean"] == pytest.approx(ours[named[name]]["mean"], abs=1e-4) and row["n"] == 5
    assert not (folder / "scores.jsonl").exists(), "the folder is theirs"


@pytest.fixture
def renders(tmp_path):
    """Pictures made elsewhere, two of one prompt."""
    (tmp_path / "renders").mkdir()
    rows = [{"file_name": f"{k}.png", "prompt": "a plain field"} for k in range(2)]
    for row, colour in zip(rows, ("red", "blue"), strict=True):
        picture(tmp_path / "renders" / row["file_name"], colour)
    (tmp_path / "renders" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "renders"


@pytest.mark.parametrize("words", [[], ["--rewards", "aesthetic"], ["--rewards", "colorfulness"]])
def test_pictures_made_elsewhere_are_not_scored_by_the_toy_under_published_names(renders, tmp_path, words, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = sdo("eval", "--images", renders, *words, cwd=tmp_path)
    assert found.returncode == 2 and "Traceback" not in found.stderr
    text = " ".join(found.stderr.split())
    wanted = [name for name in ("aesthetic-v2", "clip-score") if name == "clip-score" or "colorfulness" not in words]
    assert "of the rewards' weights are not on this machine" in text and "open_clip_model.safetensors" in text
    assert re.search(f"sdo fetch --rewards ({','.join(wanted)}|{','.join(wanted[::-1])}) ", text)
    assert "--no-embedding" in text
    assert "clip-embedded" in text.split("toy:")[1]
    assert not (tmp_path / "evals").exists()


@pytest.mark.parametrize(
    "words",
    [
        ["--rewards", "clip-embedded,aesthetic-embedded"],
        [
            "--option",
            "clip.model=embedded",
            "--option",
            "aesthetic.model=embedded",
            "--option",
            "aesthetic.head=embedded",
        ],
    ],
)
def test_the_toy_scores_under_names_that_say_so(renders, tmp_path, words):
    words = [*words, "--reference", renders, "--fid-features", "clip"]
    found = sdo("eval", "--images", renders, *words, "--out", "e", "-q", cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    for text in (found.stdout, *((tmp_path / "e" / name).read_text() for name in ("scores.csv", "summary.csv"))):
        assert "clip-embedded" in text and "aesthetic-embedded" in text
        assert "clip-score" not in text and "aesthetic-v2" not in text
    tree = json.loads((tmp_path / "e" / "summary.json").read_text())
    assert list(tree["rewards"]) == list(tree["variants"]["renders"]["measures"])[:2]
    assert "diversity" in tree["variants"]["renders"]["measures"]
    distances = {"clip_embedded_fid", "clip_embedded_kid", "reference_images"}
    assert set(tree["variants"]["renders"]["reference"]) == distances
    lines = [json.loads(line) for line in (tmp_path / "e" / "scores.jsonl").read_text().splitlines()]
    assert {line["measure"] for line in lines} == {"clip-embedded", "aesthetic-embedded", "diversity"}
    page = (tmp_path / "e" / "report.html").read_text()
    assert "clip-embedded" in page and "clip-score" not in page


def test_pictures_made_elsewhere_are_scored_by_weights_that_are_there(renders, tmp_path):
    """A CLIP in the published format keeps the published name, and embeds."""
    options = [f"clip.{key}={value}" for key, value in make_small_reward("clip-score", tmp_path / "w").items()]
    words = ["--rewards", "clip", "--option", *options, "--out", "e", "-q", "--no-report"]
    assert sdo("eval", "--images", renders, *words, cwd=tmp_path).returncode == 0
    tree = json.loads((tmp_path / "e" / "summary.json").read_text())
    assert list(tree["variants"]["renders"]["measures"]) == ["clip-score", "diversity"]
    assert (tmp_path / "e" / "embeddings" / "renders.safetensors").is_file()


def test_the_embedded_models_pictures_are_scored_by_its_own_rewards(tmp_path):
    words = ["-p", "animals", "--limit", "2", "--steps", "1", "--select-by", "clip", "--out", "e", "-q", "--no-report"]
    assert sdo("eval", *words, cwd=tmp_path).returncode == 0
    tree = json.loads((tmp_path / "e" / "settings.json").read_text())
    assert tree["rewards"] == {"clip-embedded": {}, "aesthetic-embedded": {}} and tree["select_by"] == "clip-embedded"


def test_the_score_of_a_file_is_the_rewards_own(done):
    folder, _, _ = done
    reward = build_reward("clip-score", {"model": "embedded"}, torch.device("cpu"))
    items = items_of(PROMPTS, SETTINGS)
    images = torch.stack([read_image(folder / "base" / item.file) for item in items])
    own = score_images(reward, images, [item.text for item in items])
    found = ScoreFile(folder / "scores.jsonl").of("base", "clip-score")
    assert [found[i.prompt, i.seed_index] for i in items] == pytest.approx(own.tolist(), abs=1e-6)


def picture(path, colour, size=(24, 24), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **options)


def test_prompts_of_a_folder_are_found_where_people_keep_them(tmp_path):
    picture(tmp_path / "side" / "b.jpg", "red")
    (tmp_path / "side" / "b.txt").write_text("a red square\n")
    assert [i.text for i in read_folder(tmp_path / "side", None)[1]] == ["a red square"]
    for name in ("00001_00.png", "00000_00.png", "00000_01.png"):
        picture(tmp_path / "named" / name, "blue")
    _prompts, items, _notes = read_folder(tmp_path / "named", PROMPTS)
    assert [(i.file, i.prompt, i.seed_index, i.category) for i in items] == [
        ("00000_00.png", 0, 0, "animals"),
        ("00000_01.png", 0, 1, "animals"),
        ("00001_00.png", 1, 0, "fruit"),
    ]
    with pytest.raises(RecipeFault, match=r"no prompt for 00000_00.png and 2 more"):
        read_folder(tmp_path / "named", None)
    (tmp_path / "empty").mkdir()
    with pytest.raises(RecipeFault, match="holds no images"):
        read_folder(tmp_path / "empty", None)
    with pytest.raises(RecipeFault, match="no such folder"):
        read_folder(tmp_path / "nowhere", None)


@pytest.mark.parametrize(
    "text, said",
    [
        ('{"file_name": "a.png", "prompt": "x"}\n{"file_name": ', "metadata.jsonl:2: is not JSON"),
        ('{"prompt": "x"}', "metadata.jsonl:1: has no file_name"),
        ('{"file_name": "b.png", "prompt": "x"}', "names b.png, which is not in"),
        ('{"file_name": "a.png", "prompt": ""}', "no prompt for a.png"),
    ],
)
def test_broken_metadata_is_one_sentence(tmp_path, text, said):
    picture(tmp_path / "a.png", "red")
    (tmp_path / "metadata.jsonl").write_text(text)
    with pytest.raises(RecipeFault, match=said):
        read_folder(tmp_path, None)


def test_folders_are_compared_when_they_hold_the_same_prompts(tmp_path):
    for name, colour in (("a", "red"), ("b", "blue")):
        for index in range(2):
            picture(tmp_path / name / f"{index:05d}_00.png", colour, (24 + 8 * index, 24))
    variants, prompts, _notes = folder_variants([tmp_path / "a", tmp_path / "b"], PROMPTS)
    wanted = Job(prompts, None, variants, {"colorfulness": RewardSpec("colorfulness")}, embedding=False)
    tree = evaluate(wanted, tmp_path / "e", Silent())
    assert tree["differences"]["b"]["colorfulness"]["difference"]["n"] == 2
    (tmp_path / "c").mkdir()
    picture(tmp_path / "c" / "x.png", "red")
    (tmp_path / "c" / "x.txt").write_text("other")
    (tmp_path / "d").mkdir()
    picture(tmp_path / "d" / "x.png", "red")
    (tmp_path / "d" / "x.txt").write_text("words")
    with pytest.raises(RecipeFault, match=r"has other prompts than .*/c \(only there: other\); score"):
        folder_variants([tmp_path / "c", tmp_path / "d"], None)
    picture(tmp_path / "a" / "00000_00.png", "green")
    changed = folder_variants([tmp_path / "a", tmp_path / "b"], PROMPTS)[0]
    with pytest.raises(RecipeFault, match="its images a has changed"):
        evaluate(replace(wanted, variants=changed), tmp_path / "e", Silent())


def shades(folder, scores, *, seeds=True):
    """Pictures as red as their score by prompt and seed, with a metadata.jsonl that may state the seeds."""
    rows = []
    for (prompt, seed), red in scores.items():
        name = f"{prompt}-{seed}.png"
        picture(folder / name, (red, 100, 50))
        rows.append({"file_name": name, "prompt": f"a {prompt}"} | ({"seed": seed} if seeds else {}))
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


# one seed is much redder than the others, so that another pairing changes the sign
RED = {("cat", 0): 250, ("cat", 1): 40, ("cat", 2): 80, ("dog", 0): 240, ("dog", 1): 30, ("dog", 2): 90}
LATE = {key: red for key, red in RED.items() if key[1] > 0}
MINE = """
from rewards import reward


@reward("mine", summary="how red", range=(0, 10))
class Mine:
    def score(self, images, prompts):
        return images[:, 0].mean((1, 2)) * 1
"""


def shades_scored(tmp_path, *words):
    plugin = tmp_path / "mine.py"
    if not plugin.exists():
        plugin.write_text(MINE)
    found = sdo("eval", *words, "--rewards", "mine,clip-embedded", "--plugin", plugin, "--out", "e", cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    return json.loads((tmp_path / "e" / "summary.json").read_text()), found.stdout


def test_pictures_of_the_same_seed_are_pairs_whatever_their_number(tmp_path):
    """The first seed is missing in one folder: what is left is the same file by file."""
    one, two = shades(tmp_path / "one", RED), shades(tmp_path / "two", LATE)
    tree, text = shades_scored(tmp_path, "--images", one, "--images", two)
    row = tree["differences"]["two"]["mine"]
    assert row["difference"]["mean"] == 0 and row["win_rate"]["mean"] == 0.5
    means = [tree["variants"][name]["measures"]["mine"]["mean"] for name in ("one", "two")]
    assert means[0] > means[1] + 0.2
    assert tree["variants"]["two"]["measures"]["distance-from-base"]["mean"] == pytest.approx(0, abs=1e-6)
    assert tree["pairing"]["two"]["by"] == "seed" and tree["pairing"]["two"]["pairs"] == 4
    said = "2 pictures without one of the same seed, not in differences"
    assert said in text and "differences to one, same seeds; brackets" in text and "same noise" not in text
    page = (tmp_path / "e" / "report.html").read_text()
    assert said in page and "Differences to one, same seeds" in page
    assert "2 prompts of one, 6 images of one, 4 images of two" in page


def test_of_pictures_without_seeds_the_means_of_prompts_are_compared(tmp_path):
    """Paired k-th with k-th, the difference would be that of other pictures than the means are of."""
    one, two = shades(tmp_path / "one", RED, seeds=False), shades(tmp_path / "two", LATE, seeds=False)
    tree, text = shades_scored(tmp_path, "--images", one, "--images", two)
    means = [tree["variants"][name]["measures"]["mine"]["mean"] for name in ("one", "two")]
    row = tree["differences"]["two"]["mine"]
    assert row["difference"]["mean"] == pytest.approx(means[1] - means[0]) and row["win_rate"]["mean"] == 0
    assert means[1] < means[0] and row["difference"]["n"] == 2
    assert "distance-from-base" not in tree["variants"]["two"]["measures"]
    assert "diversity" in tree["differences"]["two"]
    assert "their noise is not known, so differences are of each prompt's means, and no distance" in text
    assert "differences to one, prompt by prompt; brackets" in text and "same noise" not in text
    assert "Differences to one, prompt by prompt" in (tmp_path / "e" / "report.html").read_text()


def test_of_seeds_that_are_not_the_same_the_means_of_prompts_are_compared(tmp_path):
    other = {(prompt, seed + 5 * (prompt == "dog")): red for (prompt, seed), red in LATE.items()}
    one, two = shades(tmp_path / "one", RED), shades(tmp_path / "two", other)
    tree, text = shades_scored(tmp_path, "--images", one, "--images", two)
    means = [tree["variants"][name]["measures"]["mine"]["mean"] for name in ("one", "two")]
    row = tree["differences"]["two"]["mine"]["difference"]
    assert row["n"] == 2 and row["mean"] == pytest.approx(means[1] - means[0])
    assert "not every prompt has a seed that both name once" in text


def test_the_gallery_shows_pairs_side_by_side(tmp_path):
    """What has no pair stands alone, not beside another seed of its number; the third folder's noise is not known."""
    only = {("cat", 2): 80, ("cat", 1): 40, ("cat", 7): 10}
    parts = [shades(tmp_path / "one", RED), shades(tmp_path / "two", only | {("dog", 2): 90})]
    parts.append(shades(tmp_path / "three", LATE, seeds=False))
    variants, prompts, _notes = folder_variants(parts, None)
    wanted = Job(prompts, None, variants, {"colorfulness": RewardSpec("colorfulness")}, embedding=False)
    tree = evaluate(wanted, tmp_path / "e", Silent(), report=False)
    page = evaluation_report(wanted, Evaluation(wanted, tmp_path / "e").measured(), tree, tmp_path / "e")
    shown = {case.key: [path and path.name for path in case.images[:2]] for case in page.gallery.cases}
    assert shown == {
        "00000_00": ["cat-0.png", None],
        "00000_01": ["cat-1.png", "cat-1.png"],
        "00000_02": ["cat-2.png", "cat-2.png"],
        "00000_03": [None, "cat-7.png"],
        "00001_00": ["dog-0.png", None],
        "00001_01": ["dog-1.png", None],
        "00001_02": ["dog-2.png", "dog-2.png"],
    }
    case = page.gallery.cases[3]
    found = ScoreFile(tmp_path / "e" / "scores.jsonl").of("two", "colorfulness")
    assert case.scores["colorfulness"] == [None, found[0, 2], None]
    titles = [block.title for block in page.blocks]
    assert "Differences to one, two same seeds, three prompt by prompt" in titles
    assert "differences to one, two same seeds, three prompt by prompt; brackets" in as_text(
        tree, tmp_path, report=False
    )
    assert page.subtitle == "2 prompts of one, 6 images of one, 4 images of two, 4 images of three"


def test_one_folder_alone_has_no_differences(tmp_path):
    some = {key: red for key, red in RED.items() if key in (("cat", 0), ("cat", 1), ("dog", 2))}
    tree, text = shades_scored(tmp_path, "--images", shades(tmp_path / "one", some))
    assert tree["pairing"] == {} and "differences" not in text and "noise" not in text
    assert "2 prompts of one, 3 images" in (tmp_path / "e" / "report.html").read_text()
    assert "3 images each" not in (tmp_path / "e" / "report.html").read_text()


def test_a_reward_whose_code_changed_is_not_scored_into_the_same_folder(tmp_path):
    """Old and new scores would stand side by side as if of one measure."""
    one, two = shades(tmp_path / "one", RED), shades(tmp_path / "two", RED)
    shades_scored(tmp_path, "--images", one)
    manifest = json.loads((tmp_path / "e" / "manifest.json").read_text())
    digest = hashlib.sha256(MINE.encode()).hexdigest()
    assert manifest["plugins"] == [{"path": str(tmp_path / "mine.py"), "sha256": digest, "package": ""}]
    settings = json.loads((tmp_path / "e" / "settings.json").read_text())
    assert settings["sources"] == {"mine": {"code": digest}, "clip-embedded": {}}
    (tmp_path / "moved").mkdir()
    (tmp_path / "mine.py").rename(tmp_path / "moved" / "other.py")
    both = ["eval", "--images", one, "--images", two, "--out", "e"]
    same = sdo(*both, "--rewards", "mine,clip-embedded", "--plugin", "moved/other.py", cwd=tmp_path)
    assert same.returncode == 0, "the same code in another place is the same reward"
    before = content(tmp_path / "e")
    (tmp_path / "mine.py").write_text(MINE.replace("* 1", "* 2"))
    for words in (["mine,clip-embedded"], ["clip-embedded"]):
        found = sdo(*both, "--rewards", *words, "--plugin", "mine.py", cwd=tmp_path)
        assert found.returncode == 2 and "mine was scored before its plug-in's code changed" in found.stderr
        assert "give another folder" in found.stderr
    found = sdo(*both, "--rewards", "clip-embedded", cwd=tmp_path)
    assert found.returncode == 2 and "mine there is of a plug-in that is not loaded here; give it with" in found.stderr
    assert content(tmp_path / "e") == before


def test_a_weight_file_that_changed_is_not_scored_into_the_same_folder(tmp_path):
    options = make_small_reward("clip-score", tmp_path / "w")
    words = [f"clip.{key}={value}" for key, value in options.items()]
    words = ["eval", "--images", shades(tmp_path / "one", RED), "--rewards", "clip", "--option", *words, "--out", "e"]
    for _ in range(2):
        found = sdo(*words, "-q", "--no-report", cwd=tmp_path)
        assert found.returncode == 0, found.stderr
    (option,) = json.loads((tmp_path / "e" / "settings.json").read_text())["sources"]["clip-score"]
    for path in (tmp_path / "w").rglob("*"):
        os.utime(path, (1, 1))
    found = sdo(*words, cwd=tmp_path)
    assert found.returncode == 2 and f"clip-score was scored before what {option} names changed" in found.stderr


def test_parts_of_a_mixture_have_sources_too(tmp_path):
    (tmp_path / "head.pth").write_bytes(b"x")
    parts = [{"name": "judge"}, {"name": "aesthetic-v2", "options": {"head": str(tmp_path / "head.pth")}}]
    assert list(sources("mixture", {"parts": parts})) == ["parts.1.head"]
    # a folder of that name would not be read
    assert sources("clip-score", {"model": "embedded", "pretrained": str(tmp_path / "none")}) == {}


def test_an_evaluation_of_before_there_were_sources_goes_on(tmp_path):
    shades_scored(tmp_path, "--images", shades(tmp_path / "one", RED))
    path = tmp_path / "e" / "settings.json"
    tree = json.loads(path.read_text())
    del tree["sources"]
    path.write_text(json.dumps(tree))
    shades_scored(tmp_path, "--images", tmp_path / "one")
    assert "code" in json.loads(path.read_text())["sources"]["mine"]


def test_distances_of_an_older_evaluation_that_are_to_no_pair_are_not_told(tmp_path):
    one, two = (shades(tmp_path / name, scores, seeds=False) for name, scores in (("one", RED), ("two", LATE)))
    shades_scored(tmp_path, "--images", one, "--images", two)
    with (tmp_path / "e" / "scores.jsonl").open("a") as stream:
        line = {"variant": "two", "measure": "distance-from-base", "prompt": 0, "seed": 0, "image": "", "score": 0.5}
        stream.write(json.dumps(line) + "\n")
    tree, _ = shades_scored(tmp_path, "--images", one, "--images", two)
    assert "distance-from-base" not in tree["variants"]["two"]["measures"]


def test_a_baseline_that_comes_later_is_what_distances_are_to(tmp_path, model, lora):
    half, whole = variants_of([str(lora)], [0.5, 1.0], base=False)
    evaluate(job(model, half, whole), tmp_path / "e", Silent(), batch_size=4)
    later = evaluate(job(model, Variant("base")), tmp_path / "e", Silent(), batch_size=4)
    tuned, base = (load_file(tmp_path / "e" / "embeddings" / f"{name}.safetensors") for name in ("strong", "base"))
    by_hand = [1 - float(tuned[file].double() @ base[file].double()) for file in base]
    found = later["variants"]["strong"]["measures"]["distance-from-base"]["mean"]
    assert found == pytest.approx(np.mean(by_hand))


def test_an_unreadable_image_is_named(tmp_path):
    picture(tmp_path / "a" / "0.png", "red")
    (tmp_path / "a" / "0.png").write_bytes(b"\x89PNG not really")
    (tmp_path / "a" / "0.txt").write_text("a red square")
    variants, prompts, _notes = folder_variants([tmp_path / "a"], None)
    wanted = Job(prompts, None, variants, {"colorfulness": RewardSpec("colorfulness")}, embedding=False)
    with pytest.raises(EnvironmentFault, match=r"0\.png is no readable image"):
        evaluate(wanted, tmp_path / "e", Silent())
    assert json.loads((tmp_path / "e" / "manifest.json").read_text())["status"] == "failed"


# measures


def test_diversity_and_distance_by_hand(done):
    """cos of the kept embeddings: of the two seeds of a prompt, and to the image of base with the same noise."""
    folder, tree, _ = done
    base, tuned = (load_file(folder / "embeddings" / f"{name}.safetensors") for name in ("base", "strong"))
    scores = ScoreFile(folder / "scores.jsonl")
    expected = 1 - float(tuned["00001_00.png"].double() @ tuned["00001_01.png"].double())
    assert scores.of("strong", "diversity")[1, None] == pytest.approx(expected)
    distance = {
        (p, s): 1 - float(tuned[f"{p:05d}_{s:02d}.png"].double() @ base[f"{p:05d}_{s:02d}.png"].double())
        for p in range(5)
        for s in range(2)
    }
    assert scores.of("strong", "distance-from-base") == pytest.approx(distance)
    assert tree["variants"]["strong"]["measures"]["distance-from-base"]["mean"] > 0.001


def test_diversity_of_three_images():
    items = [replace(items_of(PROMPTS, SETTINGS)[0], seed_index=j) for j in range(3)]
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    (line,) = diversity_lines("v", items, rows)
    assert line.score == pytest.approx(1 - (0 + 0.6 + 0.8) / 3) and line.seed is None
    assert diversity_lines("v", items[:1], rows[:1]) == []


def test_metadata_names_what_the_table_needs():
    item = items_of(PROMPTS, SETTINGS)[3]
    assert metadata_row(item) == {
        "file_name": "00001_01.png",
        "prompt": "a lemon on a blue background",
        "category": "fruit",
        "seed": item.seed,
        "prompt_index": 1,
        "seed_index": 1,
    }


def test_an_evaluation_opens_again_as_it_was(done):
    folder, _, wanted = done
    assert Evaluation.open(folder).job == wanted


def test_a_score_file_that_is_none_is_named(tmp_path):
    (tmp_path / "scores.jsonl").write_text('{"variant": "base"}\n')
    with pytest.raises(EnvironmentFault, match=r"scores\.jsonl:1: is not a score"):
        ScoreFile(tmp_path / "scores.jsonl")


# the command


def test_the_command_says_everything_that_is_wrong(tmp_path):
    words = ["--prompts", "nothing-like-it", "--rewards", "clip,beauty", "--lora", "missing", "--lora-scale", "a,b"]
    words += ["--seeds", 0, "--steps", 0, "--select-by", "judge", "--option", "clip", "--reference", "nowhere"]
    found = sdo("eval", *words, cwd=tmp_path)
    assert found.returncode == 2 and "Traceback" not in found.stderr
    for said in (
        "--prompts: no prompt set nothing-like-it; there are emoji-eval",
        "--rewards: unknown reward 'beauty'",
        "--lora missing: no such file or folder",
        "--lora-scale: 'a,b' is no list of numbers",
        "--seeds: must be at least 1",
        "--steps: must be between",
        "--select-by: judge is not among the rewards",
        "--option clip: is not REWARD.KEY=VALUE",
        "--reference nowhere: no such folder",
    ):
        assert said in found.stderr, said
    assert not list(tmp_path.iterdir())


def test_a_folder_without_a_lora_is_said_before_anything_is_drawn(tmp_path):
    from sdo_cli.cli.evaluate_options import lora_problem

    assert "holds no LoRA" in lora_problem(str(tmp_path))
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    assert f"--model {tmp_path}/pipeline" in lora_problem(str(tmp_path))
    assert lora_problem("owner/name") is None and "no such file" in lora_problem("./owner/name")


def test_names_of_loras_are_fit_for_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        (tmp_path / name / "run").mkdir(parents=True)
        (tmp_path / name / "run" / "pytorch_lora_weights.safetensors").write_bytes(name.encode())
    (tmp_path / "base.safetensors").write_bytes(b"x")
    loras = ["a/run", "b/run/pytorch_lora_weights.safetensors", "base.safetensors", "owner/my lora"]
    found = variants_of(loras, [1.0, 0.5], base=False)
    assert [v.name for v in found if v.scale == 1] == ["run", "run-2", "base-2", "my-lora"]
    assert found[1].name == "run@0.5" and found[0].fingerprint != found[2].fingerprint and found[-1].fingerprint is None


def test_nothing_is_chosen_by_the_judge():
    found = sdo("eval", "--prompts", "animals", "--rewards", "judge,clip", "--select-by", "judge")
    assert found.returncode == 2 and "--select-by: judge only measures" in found.stderr


def test_missing_weights_are_said_before_anything_is_drawn(tmp_path):
    found = sdo(
        "eval", "-p", "animals", "-m", "stable-diffusion-v1-5/stable-diffusion-v1-5", "--rewards", "hps", cwd=tmp_path
    )
    assert found.returncode == 2 and "HPS_v2.1_compressed.pt" in found.stderr and "sdo fetch" in found.stderr
    assert not (tmp_path / "evals").exists()


def test_a_run_folder_brings_model_sampling_and_prompts(tmp_path, lora, model):
    """A run's own settings are taken and said; the command prints a table and where the report is."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "pytorch_lora_weights.safetensors").write_bytes(
        (lora / "pytorch_lora_weights.safetensors").read_bytes()
    )
    (tmp_path / "run" / "resolved.yaml").write_text(
        f"model: {model.model}\nrewards: [{{name: clip, options: {{model: embedded}}}}]\n"
        "prompts: {lines: [a tiger]}\nnum_inference_steps: 2\nguidance_scale: 1\n"
        "validation: {prompts: {lines: [a rose on a white background, a cat on a pink background]}, rewards: [judge]}\n"
    )
    found = sdo("eval", "--lora", "run", "--out", "e", cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    assert "model, sampling, prompts and rewards as in run/resolved.yaml" in found.stderr
    assert "; 4 parts: 4 images (base, run), clip-embedded, judge, report" in found.stderr
    settings = json.loads((tmp_path / "e" / "settings.json").read_text())
    assert settings["settings"]["draw"]["num_inference_steps"] == 2 and settings["trained_on"] == ["clip-embedded"]
    assert [v["name"] for v in settings["variants"]] == ["base", "run"] and list(settings["rewards"]) == [
        "clip-embedded",
        "judge",
    ]
    assert "higher on" in found.stdout and "e/report.html" in found.stdout
    assert "2 prompts; differences to base, same noise; brackets" in found.stdout
    assert Path(tmp_path / "e" / "report.html").stat().st_size > 20_000


# distance to reference images


def test_fid_and_kid_against_their_formulas(tmp_path):
    """FID by its closed form in numpy; KID's unbiased estimate by hand where one subset is the whole set."""
    from scipy.linalg import sqrtm

    from sdo_cli.evaluation.reference import fid_kid

    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(40, 6, generator=generator), 1.3 * torch.randn(40, 6, generator=generator) + 0.2
    found = fid_kid(x, y)
    a, b = x.double().numpy(), y.double().numpy()
    ca, cb = np.cov(a.T), np.cov(b.T)
    fid = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(ca + cb - 2 * sqrtm(ca @ cb).real)
    assert found["fid"] == pytest.approx(fid, rel=1e-3)
    kernel = lambda u, v: (u @ v.T / 6 + 1) ** 3  # noqa: E731
    kaa, kbb, kab = kernel(a, a), kernel(b, b), kernel(a, b)
    same = ((kaa.sum() - np.trace(kaa)) + (kbb.sum() - np.trace(kbb))) / (40 * 39)
    assert found["kid"] == pytest.approx(same - 2 * kab.mean(), rel=1e-3)
    assert fid_kid(x, y) == found


def test_kids_spread_is_told_only_of_subsets_that_differ(monkeypatch):
    """Of 40 images in one subset, or 60 in subsets of 40, it would read as certainty."""
    from sdo_cli.evaluation import reference

    x = torch.randn(80, 6, generator=torch.Generator().manual_seed(0))
    assert set(reference.fid_kid(x[:40], x + 1)) == {"fid", "kid"}
    monkeypatch.setattr(reference, "SUBSET", 40)
    assert set(reference.fid_kid(x[:60], x + 1)) == {"fid", "kid"}
    assert reference.fid_kid(x, x + 1)["kid_std"] > 1e-3


def test_the_distance_of_a_set_to_itself_is_no_minus_zero():
    import math

    from sdo_cli.evaluation.reference import fid_kid

    for seed in range(8):
        x = torch.randn(30, 4, generator=torch.Generator().manual_seed(seed))
        found = fid_kid(x, x.clone())["fid"]
        assert math.copysign(1, found) == 1 and found < 1e-2


def test_a_reference_set_through_the_evaluation(done, tmp_path):
    """Distance to base's own images: none for base, some for the LoRA; again at the next call without computing."""
    folder, _, wanted = done
    import shutil

    shutil.copytree(folder, tmp_path / "e")
    for path in (folder / "base").glob("*.png"):
        shutil.copy(path, (tmp_path / "ref").mkdir(exist_ok=True) or tmp_path / "ref" / path.name)
    tree = evaluate(wanted, tmp_path / "e", Silent(), reference=tmp_path / "ref", features="clip")
    base, tuned = (tree["variants"][name]["reference"] for name in ("base", "strong"))
    assert base["clip_fid"] < 1e-3 < tuned["clip_fid"] and base["clip_kid"] < tuned["clip_kid"]
    again = evaluate(wanted, tmp_path / "e", Silent())
    assert again["variants"]["strong"]["reference"] == tuned


def test_a_reference_leaves_out_what_images_does_and_says_so(tmp_path):
    """Sheets and thumbnails are no pictures of the set; folders inside are part of it."""
    ref = tmp_path / "ref"
    for name in ("a.png", "inside/b.JPG", ".thumbs/a.png", "inside/.c.png", "grid.png", "inside/xyz_grid-0001.png"):
        picture(ref / name, "red")
    for name in ("d.avif", "a.txt"):
        (ref / name).write_bytes(b"x")
    files, said = reference_files(ref)
    assert [str(path.relative_to(ref)) for path in files] == ["a.png", "inside/b.JPG"]
    assert said == (
        f"--reference {ref}: 2 pictures used; left out: 2 sheets of several pictures, grid.png first; 2 pictures in "
        "hidden files or folders, .thumbs/a.png first; 1 file of kinds that sdo does not read, d.avif first"
    )
    assert reference_files(ref / "inside" / "..")[0], "a folder above is not looked at"
    (tmp_path / ".hidden").mkdir()
    ref.rename(tmp_path / ".hidden" / "ref")
    assert len(reference_files(tmp_path / ".hidden" / "ref")[0]) == 2, "where the folder lies does not matter"
    picture(tmp_path / "jfif" / "a.jfif", "red", format="JPEG")
    picture(tmp_path / "jfif" / "a.png", "red")
    picture(tmp_path / "jfif" / "b.png", "red")
    files, said = reference_files(tmp_path / "jfif")
    # as --images has it: read, or left out with a line
    assert len(files) == 2 + (".jfif" in SUFFIXES)
    assert ("1 file of kinds that sdo does not read, a.jfif first" in said) == (".jfif" not in SUFFIXES)


def test_what_a_reference_holds_is_said_before_anything_is_scored(renders, tmp_path):
    picture(tmp_path / "ref" / "grid.png", "red")
    words = ["eval", "--images", renders, "--rewards", "clip-embedded", "--fid-features", "clip", "--out", "e"]
    found = sdo(*words, "--reference", tmp_path / "ref", cwd=tmp_path)
    assert found.returncode == 2 and "0 pictures used; left out: 1 sheet of several pictures" in found.stderr
    assert "it needs two or more" in found.stderr and not (tmp_path / "e").exists()
    for name in "ab":
        picture(tmp_path / "ref" / f"{name}.png", "blue")
    found = sdo(*words, "--reference", tmp_path / "ref", cwd=tmp_path)
    assert found.returncode == 0 and "2 pictures used; left out: 1 sheet of several" in found.stderr
    tree = json.loads((tmp_path / "e" / "summary.json").read_text())
    assert tree["variants"]["renders"]["reference"]["reference_images"] == 2


def test_inceptions_real_architecture_reads_its_weight_file(tmp_path):
    """Random weights in the published names: loaded, features of the right width, others for another image."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3 as Network

    from sdo_cli.evaluation.reference import inception, inception_features, require_torchmetrics

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "load", lambda *a, **k: {})
        patch.setattr(Network, "load_state_dict", lambda *a, **k: None)
        random = Network("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(tmp_path))
    torch.save(random.state_dict(), tmp_path / "weights.pth")
    for index, colour in enumerate(("red", "blue")):
        picture(tmp_path / f"{index}.png", colour, (40 + 10 * index, 40))
    network = inception(tmp_path / "weights.pth", torch.device("cpu"))
    rows = inception_features(network, sorted(tmp_path.glob("*.png")), torch.device("cpu"))
    assert rows.shape == (2, 2048) and (rows[0] - rows[1]).abs().max() > 0
    with pytest.raises(EnvironmentFault, match="no such file"):
        require_torchmetrics("inception", tmp_path / "none.pth")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
        with pytest.raises(EnvironmentFault, match="FID needs Inception's weights"):
            require_torchmetrics("inception", None)


@pytest.mark.parametrize("first", ["--base", "--no-base"])
def test_a_lora_of_another_model_is_refused_before_the_first_picture(tmp_path, model, lora, first):
    """Pictures of base and of the LoRAs before it would be drawn for nothing."""
    tensors = load_file(lora / "pytorch_lora_weights.safetensors")
    wide = {key: torch.cat([t, t], 1) if "lora_A" in key or "lora.down" in key else t for key, t in tensors.items()}
    save_file(wide, tmp_path / "wide.safetensors")
    words = ["eval", "--model", model.model, "--prompts", "emoji-eval", "--limit", "2", "--steps", "2", first]
    words += [
        "--rewards",
        "judge",
        "--no-embedding",
        "--lora",
        str(lora),
        "--lora",
        str(tmp_path / "wide.safetensors"),
        "-q",
    ]
    done = forked.run([*words, "--out", str(tmp_path / "e")], cwd=tmp_path)
    assert done.returncode == 2 and "wide.safetensors" in done.stderr, done.stderr
    assert not list((tmp_path / "e").rglob("*.png"))
