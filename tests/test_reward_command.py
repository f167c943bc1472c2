"""`sdo reward`, rewards of plug-ins and installed packages; the contract, each item with a reward that breaks it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import rewards
from rewards.base import RewardInfo
from sdo_cli.errors import PluginFault
from sdo_cli.scoring.contract import CHECKS, check_contract

PAGE = (Path(__file__).parent.parent / "docs" / "plugins.md").read_text().split("# A reward of your own")[1]
EXAMPLE = re.search(r"```python\n(.*?)```", PAGE, re.S).group(1)
COMMANDS = [line for line in re.search(r"```console\n(.*?)```", PAGE, re.S).group(1).splitlines() if line]
TINY = ["max_train_steps=2", "train_batch_size=2", "num_inference_steps=4", "validation.num_prompts=3"]


def run(words, cwd, **environment):
    command = [sys.executable, "-m", "sdo_cli", *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=os.environ | environment)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "warm.py").write_text(EXAMPLE)
    return tmp_path


def test_the_pages_reward_passes_its_contract(folder):
    done = run(COMMANDS[0].split()[1:], folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "FAIL" not in done.stdout and done.stdout.count("pass  ") >= 7


def test_the_pages_reward_trains(folder):
    words = [*COMMANDS[1].split()[1:], "--out", "run", "--json", *TINY, "validation.grid_prompts=0"]
    done = run(words, folder)
    assert done.returncode == 0, done.stderr
    assert "warmth" in json.loads(done.stdout)["gains"]
    manifest = json.loads((folder / "run" / "manifest.json").read_text())
    assert manifest["plugins"][0]["path"].endswith("warm.py")


def test_options_and_names_of_a_plugin_are_checked(folder):
    words = ["finetune", "--recipe", "quickstart", "--dry-run"]
    done = run([*words, "rewards=[warmth]"], folder)
    assert done.returncode == 2 and "unknown reward 'warmth'" in done.stderr
    words += ["--plugin", "warm.py", "rewards.0.name=warmth"]
    done = run([*words, "rewards.0.options.spread=wide", "rewards.0.options.centre=1"], folder)
    assert "rewards.0.options.spread: must be a number, not 'wide'" in done.stderr
    assert "rewards.0.options.centre: unknown option; known: spread" in done.stderr


def test_a_reward_without_gradient_only_measures(folder):
    text = EXAMPLE.replace('licence="none needed"', "differentiable=False")
    (folder / "warm.py").write_text(text)
    words = ["finetune", "--recipe", "quickstart", "--plugin", "warm.py", "--dry-run"]
    done = run([*words, "rewards=[warmth]"], folder)
    assert done.returncode == 2 and "warmth only measures" in done.stderr
    assert run([*words, "validation.rewards=[judge, warmth]"], folder).returncode == 0


BREAKS = {
    "returns [B, 1]": ("/ weight.sum()", "/ weight.sum() + torch.zeros(2, 1)", "returned a tensor of (2, 2)"),
    "detaches": ("images[:, 0] -", "images[:, 0].detach() - 0 *", "returned scores without a gradient: it detached"),
    "raises": ("height, width =", "1 / 0; height, width =", "failed: ZeroDivisionError"),
}


@pytest.mark.parametrize("kind", BREAKS)
def test_what_breaks_the_contract_in_a_run_is_the_plugins(kind, folder):
    old, new, expected = BREAKS[kind]
    text = EXAMPLE.replace(old, new)
    if kind == "detaches":
        text = text.replace("images[:, 2])", "images[:, 2].detach())")
    (folder / "warm.py").write_text(text)
    words = ["finetune", "--recipe", "quickstart", "--plugin", "warm.py", "rewards=[warmth]", "--out", "r", "-q", *TINY]
    done = run([*words, "validation.prompts={}", "validation.rewards=[]"], folder)
    assert done.returncode == 2 and f"the plug-in's reward warmth {expected}" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr


WRONG = {
    "name is taken": (EXAMPLE.replace('"warmth"', '"hps"'), "there is a reward 'hps' already"),
    "option without type": (
        EXAMPLE.replace("spread: float", "spread: list"),
        "option spread of reward 'warmth' must be",
    ),
    "positional option": (EXAMPLE.replace("*, spread", "spread"), "spread of reward 'warmth' must be keyword-only"),
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
    done = run([*words, "rewards=[warmth]", "gradient.rule=middle"], folder, PYTHONPATH=str(site))
    assert done.returncode == 0, done.stderr
    found = json.loads((folder / "run" / "manifest.json").read_text())["plugins"]
    assert {(entry["path"], entry["package"]) for entry in found} == {
        ("my_package.warm", "my-package 1.2"), ("my_package.middle", "my-package 1.2")
    }  # fmt: skip
    done = run(["recipe", "check", "quickstart", "rewards=[bad]"], folder, PYTHONPATH=str(site))
    assert done.returncode == 2 and "the package my-package 1.2 (my_package.bad) cannot be loaded" in done.stderr
    # a recipe that uses none of it runs none of it
    (site / "my_package" / "__init__.py").write_text("raise SystemExit('ran')")
    assert run(["recipe", "check", "quickstart"], folder, PYTHONPATH=str(site)).returncode == 0


class Plain:
    """Keeps the contract; the others below each break one item of it."""

    info = RewardInfo("plain", "", "", "", (0.0, 1.0))

    def score(self, images, prompts):
        return images.square().mean((1, 2, 3))


class Column(Plain):
    def score(self, images, prompts):
        return super().score(images, prompts)[:, None]


class Undefined(Plain):
    def score(self, images, prompts):
        return images.flatten(1).mean(1) / images.flatten(1).std(1)


class InPlace(Plain):
    def score(self, images, prompts):
        if images.requires_grad:
            return super().score(images, prompts)
        return images.mul_(0.5).square().mean((1, 2, 3))


class Random(Plain):
    def score(self, images, prompts):
        return super().score(images, prompts) + 0.1 * torch.rand(len(images))


class Batch(Plain):
    def score(self, images, prompts):
        scores = super().score(images, prompts)
        return scores - scores.mean() if len(scores) > 1 else scores


class Detached(Plain):
    def score(self, images, prompts):
        return super().score(images.detach(), prompts) + 0 * images.sum()


class Rounded(Plain):
    """A gradient that is not the score's."""

    def score(self, images, prompts):
        return super().score(images, prompts) + 3 * (images - images.detach()).mean((1, 2, 3))


class Fragile(Plain):
    def to(self, device, dtype=torch.float32):
        self.scale = 1.0 if dtype != torch.bfloat16 else float("inf")
        return self

    def score(self, images, prompts):
        return super().score(images, prompts) * self.scale


BREAKERS = {
    "shape": Column, "finite": Undefined, "input untouched": InPlace, "repeatable": Random, "each image alone": Batch,
    "gradient": Detached, "finite differences": Rounded, "half precision": Fragile,
}  # fmt: skip


def failing(reward):
    return {finding.item for finding in check_contract(reward) if finding.passed is False}


def test_a_reward_that_keeps_the_contract_passes():
    assert failing(Plain()) == set()


@pytest.mark.parametrize("item", BREAKERS)
def test_each_item_catches_what_breaks_it(item):
    assert item in failing(BREAKERS[item]())


def test_every_item_has_a_breaker():
    # the range and the reading of prompts are only told
    assert set(CHECKS) - {"range", "prompts"} == set(BREAKERS)


def test_list_and_show(tmp_path):
    listed = {row["name"]: row for row in json.loads(run(["reward", "list", "--json"], tmp_path).stdout)}
    assert set(listed) == set(rewards.TABLE) and listed["hps-v2.1"]["short"] == "hps"
    assert listed["jpeg-compressibility"]["use"] == "measures only" and listed["hps-v2.1"]["weights"] > 1e9
    shown = run(["reward", "show", "hps"], tmp_path)
    assert shown.returncode == 0 and "xswu/HPSv2/HPS_v2.1_compressed.pt" in shown.stdout
    for name in rewards.TABLE:
        assert run(["reward", "show", name, "--json"], tmp_path).returncode == 0, name
    done = run(["reward", "show", "hpz"], tmp_path)
    assert done.returncode == 2 and "unknown reward 'hpz'; did you mean hps?" in done.stderr


def test_built_in_rewards_can_be_checked(tmp_path):
    done = run(["reward", "check", "clip", "-o", "model=embedded", "--json"], tmp_path)
    assert done.returncode == 0
    found = {finding["item"]: finding["passed"] for finding in json.loads(done.stdout)}
    assert found["finite differences"] is True and found["prompts"] is None
    done = run(["reward", "check", "clip", "-o", "modle=embedded"], tmp_path)
    assert done.returncode == 2 and "--option modle: unknown; clip-score has model, pretrained" in done.stderr


def test_a_constructor_that_fails_is_the_plugins():
    try:

        @rewards.reward("failing", summary="")
        class Failing:
            def __init__(self):
                raise OSError("no weights")

        with pytest.raises(PluginFault, match="reward failing cannot be made: OSError: no weights"):
            rewards.build("failing")
    finally:
        del rewards.FOREIGN["failing"]
