"""Prompts that model or rewards do not read as they seem to be meant: counted and said, by every command."""

import pytest
import torch
from test_families import sdo
from test_rewards import NAMES, make, shown

import rewards
from rewards.reading import unread
from sdo_cli.drawing.draw import DrawSettings
from sdo_cli.drawing.notes import drawing_notes
from sdo_cli.models.load import load_family
from sdo_cli.scoring.rewards import reading_notes

READERS = {
    "clip-score": 20,
    "clip-embedded": 20,
    "judge": 20,
    "hps-v2": 77,
    "hps-v2.1": 77,
    "pickscore-v1": 77,
    "imagereward-v1": 35,
    "cyclereward-combo": 128,
    "cyclereward-i2t": 128,
    "cyclereward-t2i": 128,
    "mps-v1": 77,
    "lrm-1.5": 77,
    "lrm-xl": 77,
}


def of_length(words, last):
    return " ".join(["cat"] * (words - 1) + [last])


@pytest.mark.parametrize("name", READERS)
def test_unread_are_those_whose_last_word_changes_nothing(name, tmp_path):
    reward = make(name, tmp_path)
    limit, longer = reward.unread(["a cat", "a cat, " * 200])
    assert (limit, longer) == (READERS[name], ["a cat, " * 200])
    one = shown(reward, 1)
    # two marks stand around the words
    for words in (limit - 2, limit - 1):
        pair = [of_length(words, last) for last in ("bus", "cat")]
        with torch.no_grad():
            same = torch.equal(*(reward.score(one, [prompt]) for prompt in pair))
        assert reward.unread(pair)[1] == (pair if same else []) and same == (words > limit - 2)


def test_every_reward_of_the_table_that_reads_prompts_says_so(tmp_path):
    for name in NAMES:
        reward = make(name, tmp_path / name)
        one = shown(reward, 1)
        with torch.no_grad():
            reads = not torch.equal(*(reward.score(one, [text]) for text in ("a cat", "a bus")))
        assert name == "mixture" or reads == (name in READERS)
        assert not reads or hasattr(reward, "unread")


def test_the_list_says_who_reads_prompts_and_how_much():
    assert rewards.READS.keys() == READERS.keys()
    # of clip-score the tests have a smaller one
    assert {name: limit for name, limit in rewards.READS.items() if name != "clip-score"} == {
        name: limit for name, limit in READERS.items() if name != "clip-score"
    }


def test_tokenizers_of_other_kinds():
    from open_clip.tokenizer import SimpleTokenizer

    short = SimpleTokenizer(context_length=8)
    assert unread(short, ["a red bus", of_length(6, "red"), of_length(7, "red")]) == (8, [of_length(7, "red")])
    assert unread(short, []) == (0, [])


def test_the_sentence(tmp_path):
    mixed = make("mixture", tmp_path)
    long = of_length(60, "red")
    plain = make("colorfulness", tmp_path)
    said = reading_notes({"plain": plain, "mixed": mixed}, ["a tiger", long, long])
    assert said == [f"1 of 2 prompts: mixed reads 20 tokens and not what follows; the first: {long[:40]}…"]


def test_commands_of_other_programs_are_said_of_prompts_and_of_the_negative_prompt(small):
    family = load_family(str(small("sd15")))
    settings = DrawSettings("ddim", negative_prompt="(worst quality:1.4)")
    said = drawing_notes(family, (text for text in ["a (red:1.2) bus", "a bus"]), settings)
    assert said[0].startswith("1 of 2 prompts hold weights like (red:1.2): commands of other programs")
    assert said[1].startswith("negative_prompt: 1 of 1 prompts hold weights like (red:1.2)")


def test_every_command_says_it_once(tmp_path):
    long = "a (red:1.2) " + " ".join(["tiger"] * 60)
    (tmp_path / "p.csv").write_text(f"prompt,x\na tiger,1\n{long},2\n,3\n")
    words = ["--steps", 1, "--guidance", 1, "--out"]
    drawn = sdo("sample", "--prompts-file", "p.csv", *words, "s", cwd=tmp_path)
    clip = ["--rewards", "clip", "--option", "clip.model=embedded"]
    evaluated = sdo("eval", "--prompts", "p.csv", *clip, *words, "e", cwd=tmp_path)
    scored = sdo("eval", "--images", "s", *clip, "--out", "f", cwd=tmp_path)
    recipe = ["max_train_steps=1", "train_batch_size=1", "num_inference_steps=2", "prompts.file=p.csv"]
    recipe += ["rewards=[{name: clip, options: {model: embedded}}]", "validation.prompts={}", "validation.rewards=[]"]
    trained = sdo("finetune", "--recipe", "quickstart", *recipe, "--out", "r", cwd=tmp_path)
    for done in (drawn, evaluated, scored, trained):
        assert done.returncode == 0 and done.stderr.count("hold weights like (red:1.2)") == 1, done.stderr
    for done in (evaluated, scored, trained):
        assert done.stderr.count("reads 20 tokens and not what follows; the first: a (red:1.2)") == 1, done.stderr
    for done in (drawn, evaluated, trained):
        assert done.stderr.count("1 of 3 rows have no prompt and are left out") == 1, done.stderr
