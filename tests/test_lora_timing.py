"""A LoRA that is not there, or not alike, at every step of `sdo sample`."""

import hashlib
import json
from pathlib import Path

import entry
import pytest
from PIL import Image
from test_sample import lora_folder  # noqa: F401

from sdo_cli.drawing.lora_timing import LoraTiming
from sdo_cli.evaluation import report
from sdo_cli.evaluation.job import Variant
from sdo_cli.evaluation.summary import Measured

STEPS = 4


@pytest.fixture(scope="module")
def drawn(lora_folder, tmp_path_factory):  # noqa: F811
    """Hash of the pixels, and the text, of a picture drawn with these words; the run's own settings are typed over."""
    folder, known = tmp_path_factory.mktemp("timed"), {}

    def draw(*words):
        if words not in known:
            out = str(folder / str(len(known)))
            lora = ["--lora", str(lora_folder)] if "plain" not in words else []
            more = [word for word in words if word != "plain"]
            command = [
                "sample",
                "a rose",
                "--steps",
                str(STEPS),
                "--seed",
                "3",
                "--guidance",
                "3",
                "--out",
                out,
                "-q",
                *lora,
                *more,
            ]
            done = entry.run(command, cwd=folder)
            assert done.returncode == 0, done.stderr
            picture = Image.open(f"{out}/00000.png")
            known[words] = hashlib.sha256(picture.tobytes()).hexdigest(), picture.text["parameters"]
        return known[words]

    return draw


@pytest.mark.parametrize("solver", ["ddim", "pndm"])
def test_its_ends_are_the_lora_and_the_base_bit_for_bit(solver, drawn):
    """PNDM makes a call more than steps: with all steps the base's, no call has the LoRA."""
    by = ("--solver", solver)
    plain, whole = drawn("plain", *by)[0], drawn(*by)[0]
    assert plain != whole
    assert drawn("--lora-from-step", "0", *by)[0] == whole
    assert drawn("--lora-from-step", str(STEPS), *by)[0] == plain
    between = {drawn("--lora-from-step", str(k), *by)[0] for k in (1, STEPS - 1)}
    assert len(between | {plain, whole}) == 4


def test_a_weight_that_moves(drawn):
    plain, whole = drawn("plain", "--solver", "ddim")[0], drawn("--solver", "ddim")[0]
    by = ("--solver", "ddim")
    assert drawn("--lora-scale-end", "1", *by)[0] == whole
    assert drawn("--lora-scale", "0", "--lora-scale-end", "0", *by)[0] == plain
    moved = [drawn("--lora-scale-end", "0", *by), drawn("--lora-scale", "0", "--lora-scale-end", "1", *by)]
    moved.append(drawn("--lora-from-step", "2", "--lora-scale-end", "0.5", *by))
    assert len({plain, whole, *(pixels for pixels, _ in moved)}) == 5
    # the text is a recipe: where it begins, and where it ends
    assert "LoRA scale end: 0," in moved[0][1] and ":1>" in moved[0][1] and "LoRA from step" not in moved[0][1]
    assert "LoRA scale end: 1," in moved[1][1] and ":0>" in moved[1][1]
    assert "LoRA from step: 2, LoRA scale end: 0.5," in moved[2][1]
    assert "LoRA" not in drawn("--solver", "ddim")[1].splitlines()[-1]


def test_shares_of_the_loaded_weight():
    assert LoraTiming(0, 0.8, 0.8).shares(4, 4) == [1.0] * 4
    assert LoraTiming(2, 1.0, 0.0).shares(5, 5) == [0.0, 0.0, 1.0, 0.5, 0.0]
    # a call more than steps, made in the first of them
    assert LoraTiming(1).shares(3, 4) == [0.0, 0.0, 1.0, 1.0]
    assert LoraTiming(4).shares(4, 5) == [0.0] * 5 and LoraTiming(0).shares(4, 5) == [1.0] * 5
    risen = LoraTiming(0, 0.0, 0.5)
    assert risen.loaded == 0.5 and risen.shares(3, 3) == [0.0, 0.5, 1.0]
    # one step with the LoRA has the weight that it begins with
    assert LoraTiming(3, 0.7, 0.2).shares(4, 4) == [0.0, 0.0, 0.0, 1.0]


WRONG = {
    ("--lora-from-step", "2"): "--lora-from-step: there is no --lora",
    ("--lora", "x", "--lora-from-step", "5"): "--lora-from-step: must be between 0 and the 4 steps, not 5",
    ("--lora", "x", "--lora-scale-end", "nan"): "--lora-scale-end: must be a number like 0.5, not nan",
    ("--lora", "x", "--lora-scale-end", "1", "--grid"): "--lora-scale-end: not with --grid or --seeds",
    ("--lora", "x", "--lora-from-step", "1", "--seeds", "2"): "--lora-from-step: not with --grid or --seeds",
}


@pytest.mark.parametrize("words", WRONG)
def test_what_cannot_be_is_one_sentence(words, tmp_path):
    done = entry.run(["sample", "a rose", "--steps", str(STEPS), *words], cwd=tmp_path)
    assert done.returncode == 2 and WRONG[words] in " ".join(done.stderr.split()), done.stderr


def pixels(folder):
    return {path.name: Image.open(path).tobytes() for path in sorted(folder.glob("*.png"))}


def test_an_evaluation_draws_each_late_start_beside_the_base(lora_folder, tmp_path):  # noqa: F811
    """At all steps it is the base's picture, at 0 the LoRA's; scales and checkpoints are compared among whole ones."""
    words = ["eval", "--prompts", "emoji-eval", "--limit", "2", "--steps", str(STEPS), "--guidance", "1", "--no-report"]
    words += [
        "--rewards",
        "clip-score",
        "--no-embedding",
        "-q",
        "--lora",
        str(lora_folder),
        "--out",
        str(tmp_path / "e"),
    ]
    for given in (["--lora-from-step", f"0,2,{STEPS}"], ["--lora-from-step", "1"]):
        # the second adds to the folder
        done = entry.run([*words, *given], cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    tree = json.loads((tmp_path / "e" / "summary.json").read_text())
    name = lora_folder.name
    assert list(tree["variants"]) == ["base", name, *(f"{name}-from-{k}" for k in (1, 2, STEPS))]
    found = {variant: pixels(tmp_path / "e" / variant) for variant in tree["variants"]}
    assert found[f"{name}-from-{STEPS}"] == found["base"]
    assert len({str(found[one]) for one in ("base", name, f"{name}-from-1", f"{name}-from-2")}) == 4
    text = Image.open(tmp_path / "e" / f"{name}-from-2" / "00000_00.png").text["parameters"]
    assert "LoRA from step: 2" in text
    assert tree["variants"][f"{name}-from-2"]["from_step"] == 2 and "recommended_scale" not in tree


@pytest.mark.parametrize(
    "words, said",
    [
        (["--lora", "LORA", "--lora-from-step", "5"], "no list of steps from 0 to 4; write 0,2"),
        (["--lora", "LORA", "--lora-from-step", "x"], "'x' is no list of steps"),
        (["--lora-from-step", "1"], "there is no --lora"),
    ],
)
def test_an_evaluation_says_what_is_wrong_with_late_starts(words, said, lora_folder, tmp_path):  # noqa: F811
    words = [str(lora_folder) if word == "LORA" else word for word in words]
    done = entry.run(["eval", "--prompts", "emoji-eval", "--steps", str(STEPS), *words], cwd=tmp_path)
    assert done.returncode == 2 and f"{said}" in done.stderr, done.stderr
    assert not (tmp_path / "evals").exists()


def test_the_conclusion_is_about_the_lora_as_it_is():
    """Not about it from its last late start, nor as a skip plan draws it, whatever comes last."""
    base = Measured(Variant("base"), Path(), [], {})
    kinds = {"half": {"scale": 0.5}, "whole": {}, "late": {"from_step": 2}, "skipped": {"plan": "plan.json"}}
    variants = {name: Measured(Variant(name, "lora", **kind), Path(), [], {}) for name, kind in kinds.items()}
    assert report._said_first([base, *variants.values()]) == ["whole"]
    assert report._said_first([base, variants["half"], variants["late"]]) == ["half"]
    assert report._said_first([base, variants["late"], variants["half"]]) == ["half"]
