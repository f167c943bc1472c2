"""`sdo reward`, and rewards of plug-ins and installed packages through the commands."""

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import entry
import pytest
from small_rewards import make_small_reward

import rewards
from sdo_cli.cli.app import main
from sdo_cli.cli.reward import cost_line

PAGE = (Path(__file__).parent.parent / "docs" / "plugins.md").read_text().split("# A reward of your own")[1]
# warm.py and small.py, each with its two commands
EXAMPLE, NETWORK = re.findall(r"```python\n(.*?)```", PAGE, re.S)
BLOCKS = [block.splitlines() for block in re.findall(r"```console\n(.*?)```", PAGE, re.S)]
TINY = ["max_train_steps=2", "train_batch_size=2", "num_inference_steps=4", "validation.num_prompts=3"]


def run(words, cwd, site=None):
    """With packages that are installed in ``site``."""
    with pytest.MonkeyPatch.context() as patch:
        if site is not None:
            patch.syspath_prepend(site)
        return entry.run(words, cwd=cwd)


@dataclass
class Said:
    code: int
    out: str
    err: str


@pytest.fixture
def sdo(monkeypatch, capsys):
    """The command and its error boundary, in this process: for what runs nothing foreign."""

    def call(line):
        monkeypatch.setattr(sys, "argv", ["sdo", *line.split()])
        with pytest.raises(SystemExit) as ended:
            main()
        return Said(ended.value.code or 0, *capsys.readouterr())

    return call


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "warm.py").write_text(EXAMPLE)
    (tmp_path / "small.py").write_text(NETWORK)
    return tmp_path


# pass lines: all but what is only told, and for the first, which casts nothing, half precision
@pytest.mark.parametrize(("commands", "passed"), zip(BLOCKS, (11, 13), strict=True), ids=["warm", "small"])
def test_the_pages_rewards_pass_their_contract(commands, passed, folder):
    done = run(commands[0].split()[1:], folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "FAIL" not in done.stdout and done.stdout.count("pass  ") == passed


@pytest.mark.parametrize(
    ("commands", "name", "file"),
    [(BLOCKS[0], "warmth", "warm.py"), (BLOCKS[1], "small-network", "small.py")],
    ids=["warm", "small"],
)
def test_the_pages_rewards_train(commands, name, file, folder):
    words = [*commands[1].split()[1:], "--out", "run", "--json", *TINY, "validation.grid_prompts=0"]
    done = run([*words, "reward_precision=bf16"], folder)
    assert done.returncode == 0, done.stderr
    assert name in json.loads(done.stdout)["gains"]
    manifest = json.loads((folder / "run" / "manifest.json").read_text())
    assert manifest["plugins"][0]["path"].endswith(file)
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 2


def test_options_and_names_of_a_plugin_are_checked(folder):
    words = ["finetune", "--recipe", "quickstart", "--dry-run"]
    done = run([*words, "rewards=[warmth]"], folder)
    assert done.returncode == 2 and "unknown reward 'warmth'" in done.stderr
    words += ["--plugin", "warm.py", "rewards.0.name=warmth"]
    done = run([*words, "rewards.0.options.spread=wide", "rewards.0.options.centre=1"], folder)
    assert "rewards.0.options.spread: must be a number, not 'wide'" in done.stderr
    assert "rewards.0.options.centre: unknown option; known: spread" in done.stderr
    (folder / "warm.py").write_text(EXAMPLE.replace("spread: float = 0.5", "spread: float"))
    done = run(words, folder)
    assert done.returncode == 2 and "rewards.0.options: warmth needs the option spread" in done.stderr


def test_a_reward_without_gradient_only_measures(folder):
    text = EXAMPLE.replace('licence="none needed"', "differentiable=False")
    (folder / "warm.py").write_text(text)
    words = ["finetune", "--recipe", "quickstart", "--plugin", "warm.py", "--dry-run"]
    done = run([*words, "rewards=[warmth]"], folder)
    assert done.returncode == 2 and "warmth only measures" in done.stderr
    assert run([*words, "validation.rewards=[judge, warmth]"], folder).returncode == 0


@pytest.mark.slow
def test_what_breaks_the_contract_in_a_run_is_the_plugins(folder):
    (folder / "warm.py").write_text(EXAMPLE.replace("/ weight.sum()", "/ (0 * weight.sum())"))
    words = ["finetune", "--recipe", "quickstart", "--plugin", "warm.py", "rewards=[warmth]", "--out", "r", "-q", *TINY]
    done = run([*words, "validation.prompts={}", "validation.rewards=[]"], folder)
    assert done.returncode == 2 and "the plug-in's reward warmth returned a score that is no finite" in done.stderr
    assert "Traceback" not in done.stderr


WRONG = {
    "name is taken": (EXAMPLE.replace('"warmth"', '"hps"'), "there is a reward 'hps' already"),
    "option without type": (
        EXAMPLE.replace("spread: float", "spread: list"),
        "option spread of reward 'warmth' must be",
    ),
    "positional option": (EXAMPLE.replace("*, spread", "spread"), "spread of reward 'warmth' must be keyword-only"),
    "needs a look": ("1 / 0", "--plugin warm.py: ZeroDivisionError"),
    "no such class": (EXAMPLE.replace("class Warmth", "class Cold"), "registers no reward class Warmth"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_file_is_one_sentence(kind, folder):
    text, expected = WRONG[kind]
    (folder / "warm.py").write_text(text)
    done = run(["reward", "check", "warm.py:Warmth"], folder)
    assert done.returncode == 2 and expected in done.stderr and "Traceback" not in done.stderr


def test_an_installed_package_is_found_by_its_entry_point(folder):
    site = folder / "site"
    (site / "my_package").mkdir(parents=True)
    (site / "my_package" / "__init__.py").write_text("")
    (site / "my_package" / "warm.py").write_text(EXAMPLE)
    (site / "my_package" / "bad.py").write_text("import nothing_of_this_name")
    rule = (Path(__file__).parent.parent / "docs" / "plugins.md").read_text()
    (site / "my_package" / "middle.py").write_text(re.search(r"```python\n(.*?)```", rule, re.S).group(1))
    info = site / "my_package-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text(
        "[sdo.rewards]\nwarmth = my_package.warm\nbad = my_package.bad\n\n"
        "[sdo.gradient_rules]\nmiddle = my_package.middle\n"
    )
    words = ["finetune", "--recipe", "quickstart", "--out", "run", "-q", *TINY, "validation.grid_prompts=0"]
    done = run([*words, "rewards=[warmth]", "gradient.rule=middle"], folder, site=site)
    assert done.returncode == 0, done.stderr
    found = json.loads((folder / "run" / "manifest.json").read_text())["plugins"]
    assert {(entry["path"], entry["package"]) for entry in found} == {
        ("my_package.warm", "my-package 1.2"), ("my_package.middle", "my-package 1.2")
    }  # fmt: skip
    done = run(["recipe", "check", "quickstart", "rewards=[bad]"], folder, site=site)
    assert done.returncode == 2 and "the package my-package 1.2 (my_package.bad) cannot be loaded" in done.stderr
    # a recipe that uses none of it runs none of it, nor does a list of names
    (site / "my_package" / "__init__.py").write_text("raise SystemExit('ran')")
    assert run(["recipe", "check", "quickstart"], folder, site=site).returncode == 0
    done = run(["reward", "list", "--json"], folder, site=site)
    assert [row["name"] for row in json.loads(done.stdout) if row["use"] == "installed"] == ["bad", "warmth"]
    done = run(["recipe", "check", "quickstart", "rewards=[warmty]"], folder, site=site)
    assert done.returncode == 2 and "unknown reward 'warmty'; did you mean warmth?" in done.stderr


def install(site, package, text):
    info = site / f"{package}-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1\n")
    (info / "entry_points.txt").write_text(text)


def test_a_package_that_keeps_no_word_is_named(tmp_path):
    install(tmp_path, "empty", "[sdo.rewards]\nnothing = json\ntwice = json\n[sdo.gradient_rules]\nnothing = json\n")
    install(tmp_path, "other", "[sdo.rewards]\ntwice = json\n")
    for key, name, expected in (
        ("rewards", "[nothing]", "the package empty 1 (json) offers 'nothing' but registers nothing of that name"),
        ("gradient.rule", "nothing", "the package empty 1 (json) offers 'nothing' but registers nothing of that name"),
        ("rewards", "[twice]", "twice is offered by empty 1 and other 1"),
    ):
        done = run(["recipe", "check", "quickstart", f"{key}={name}"], tmp_path, site=tmp_path)
        assert done.returncode == 2 and expected in done.stderr, done.stderr


def test_list_and_show(sdo):
    listed = {row["name"]: row for row in json.loads(sdo("reward list --json").out)}
    assert set(listed) == set(rewards.TABLE) and listed["hps-v2.1"]["short"] == "hps"
    assert listed["jpeg-compressibility"]["use"] == "measures only" and listed["hps-v2.1"]["weights"] > 1e9
    assert listed["judge"]["differentiable"] and not listed["judge"]["trainable"]
    assert all(row["summary"] and row["licence"] for row in listed.values())
    assert (listed["hps-v2.1"]["sees"], listed["hps-v2.1"]["reads"]) == ("picture and prompt", 77)
    assert (listed["aesthetic-v2"]["sees"], listed["aesthetic-v2"]["reads"]) == ("the picture alone", None)
    assert "sees picture and prompt, reads 35 tokens" in sdo("reward list").out
    shown = sdo("reward show hps")
    assert shown.code == 0 and "xswu/HPSv2/HPS_v2.1_compressed.pt" in shown.out
    assert "option checkpoint: str, default None" in shown.out and "rewards: [{name: hps}]" in shown.out
    shown = json.loads(sdo("reward show hps-v2 --json").out)
    assert shown["name"] == "hps-v2" and shown["weights"][0]["filename"] == "HPS_v2_compressed.pt"
    shown = json.loads(sdo("reward show cyclereward-t2i --json").out)
    assert shown["name"] == "cyclereward-t2i" and shown["weights"][0]["repo"] == "carolineec/CycleReward-T2I"
    assert rewards.full_name("cyclereward") == "cyclereward-combo" and rewards.full_name("mps") == "mps-v1"
    shown = sdo("reward show mixture")
    assert shown.code == 0 and "option parts: list, needed" in shown.out
    assert "validation.rewards: [{name: judge}]" in sdo("reward show judge").out
    done = sdo("reward show hpz")
    assert done.code == 2 and "unknown reward 'hpz'; did you mean hps?" in done.err


def no_constants(word):
    raise AssertionError(f"{word} is no JSON")


def test_show_of_a_plugin(folder):
    done = run(["reward", "show", "small-network", "--plugin", "small.py", "--json"], folder)
    shown = json.loads(done.stdout, parse_constant=no_constants)
    assert shown["range"] == [None, None] and shown["licence"] == "none needed"
    assert shown["options"]["channels"] == {"type": "int", "default": 8, "needed": False}
    done = run(["reward", "list", "--plugin", "small.py"], folder)
    assert "small-network" in done.stdout and "what a random convolution responds to" in done.stdout


REFUSED = {
    "mixture": "mixture needs the option parts",
    "clip -o model": "argument 'model': not of the form key=value",
    "clip -o model=3": "--option model: must be text, not 3",
    "clip -o model=[": "no CLIP weights: '['",
    "jpeg-compressibility -o quality=0": "quality must be between 1 and 100",
    "clip --size 1": "--size: must be between 8 and 4096",
    "warm.py": "warm.py: name the class as well, like warm.py:MyReward",
    "gone.py:Warmth": "gone.py: no such Python file",
}


@pytest.mark.parametrize("words", REFUSED)
def test_bad_input_to_check_is_one_sentence(words, folder, sdo, monkeypatch):
    monkeypatch.chdir(folder)
    done = sdo(f"reward check {words}")
    assert done.code == 2 and REFUSED[words] in done.err, done.err


def test_the_list_counts_what_each_reward_costs(folder, sdo):
    """On tensors without data, as the estimate of a recipe does; what cannot be counted says why."""
    done = run(["reward", "list", "--costs", "--json", "--plugin", "warm.py"], folder)
    rows = {row["name"]: row["costs"] for row in json.loads(done.stdout)}
    assert set(rows) == {*rewards.TABLE, "warmth"} and rows["warmth"]["bytes"] > 0
    assert [name for name, costs in rows.items() if "unknown" in costs] == ["jpeg-compressibility", "mixture"]
    # ViT-H/14: 0.97 billion weights of which 0.63 see the picture, 2 operations each for 257 tokens, back as often
    assert 0.9 < rows["hps-v2.1"]["flops"] / (2 * 2 * 632e6 * 257) < 1.2
    assert rows["mps-v1"]["flops"] > rows["hps-v2.1"]["flops"] > rows["clip-score"]["flops"]
    assert rows["hps-v2.1"]["weights"] == pytest.approx(4 * 986e6, rel=0.01) and rows["colorfulness"]["weights"] == 0
    # a latent of 64 x 64 through half a UNet, twice
    assert 1e12 < rows["lrm-1.5"]["flops"] < 1.5e12
    assert cost_line(rows["jpeg-compressibility"]) == "costs: not counted, it leaves torch"
    assert cost_line({"flops": 1.2e12, "bytes": 3e8, "weights": 2e9}) == (
        "costs: 1,200 GFLOP and 300 MB a picture of 512 pixels with its gradient; weights 2.00 GB in fp32"
    )
    assert all("costs" not in row for row in json.loads(sdo("reward list --json").out))


@pytest.mark.parametrize("name", ["cyclereward", "cyclereward-t2i", "mps"])
def test_published_rewards_pass_their_contract(name, tmp_path):
    """Small random weights in the published form, resized on the way: no size of theirs is 64."""
    options = make_small_reward(rewards.full_name(name), tmp_path / "small")
    words = [word for option, value in options.items() for word in ("-o", f"{option}={value}")]
    done = run(["reward", "check", name, *words, "--json"], tmp_path)
    assert done.returncode == 0, done.stdout
    found = {finding["item"]: finding["passed"] for finding in json.loads(done.stdout)}
    assert sum(passed is True for passed in found.values()) == 13 and found["finite differences"] is True


def test_built_in_rewards_can_be_checked(tmp_path):
    done = run(["reward", "check", "clip", "-o", "model=embedded", "--json"], tmp_path)
    assert done.returncode == 0
    found = {finding["item"]: finding["passed"] for finding in json.loads(done.stdout)}
    assert found["finite differences"] is True and found["prompts"] is None
    done = run(["reward", "check", "clip", "-o", "modle=embedded"], tmp_path)
    assert done.returncode == 2 and "--option modle: unknown option; did you mean model?" in done.stderr
