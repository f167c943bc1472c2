"""The contract of rewards, each item with a reward that breaks it; in a run the fault is said to be the plug-in's."""

import re
import shlex
from pathlib import Path

import forked
import pytest
import torch
from small_rewards import make_small_reward

import rewards
from rewards.base import RewardInfo
from sdo_cli.errors import PluginFault
from sdo_cli.plugins import load_plugins
from sdo_cli.scoring.contract import CHECKS, check_contract

PAGE = (Path(__file__).parent.parent / "docs" / "plugins.md").read_text().split("# A reward of your own")[1]
PARTS = [{"name": "colorfulness"}, {"name": "clip", "options": {"model": "embedded"}}]
EMBEDDED = {
    "colorfulness": {},
    "jpeg-compressibility": {},
    "judge": {},
    "clip-embedded": {},
    "aesthetic-embedded": {},
    "mixture": {"parts": PARTS},
}


def test_the_page_explains_every_item():
    cells = re.findall(r"^\| (`.*?) \|", PAGE, re.M)
    assert {name for cell in cells for name in re.findall("`(.*?)`", cell)} == set(CHECKS)


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


class Elsewhere(Plain):
    def score(self, images, prompts):
        return super().score(images, prompts).to("meta")


class Bytes(Plain):
    """Takes pixels for 0 … 255."""

    def score(self, images, prompts):
        return super().score((images / 255 * 16).round() / 16, prompts)


class InPlace(Plain):
    def score(self, images, prompts):
        scores = super().score(images, prompts)
        if not images.requires_grad:
            images.mul_(0.5)
        return scores


class Random(Plain):
    def score(self, images, prompts):
        return super().score(images, prompts) + 0.1 * torch.rand(len(images))


class Batch(Plain):
    def score(self, images, prompts):
        scores = super().score(images, prompts)
        return scores - 0.5 * scores.mean()


class Remembering(Plain):
    """Keeps what it made of a prompt in the batch that first asked for it."""

    def __init__(self):
        self.kept = {}

    def score(self, images, prompts):
        for prompt in prompts:
            self.kept.setdefault(prompt, 1e-5 * len(prompts))
        return super().score(images, prompts) + torch.tensor([self.kept[prompt] for prompt in prompts])


class Detached(Plain):
    def score(self, images, prompts):
        return super().score(images.detach(), prompts) + 0 * images.sum()


class Wrong(Plain):
    """A gradient that is not the score's."""

    def score(self, images, prompts):
        return super().score(images, prompts) + 3 * (images - images.detach()).mean((1, 2, 3))


class Fragile(Plain):
    """Of no use in one precision."""

    def __init__(self, bad):
        self.bad, self.dtype = bad, torch.float32

    def to(self, device, dtype=torch.float32):
        self.dtype = dtype
        return self

    def score(self, images, prompts):
        return super().score(images, prompts) * (float("inf") if self.dtype == self.bad else 1.0)


BREAKERS = {
    "shape": Column(), "device": Elsewhere(), "finite": Undefined(), "tells images apart": Bytes(),
    "input untouched": InPlace(), "repeatable": Random(), "each image alone": Batch(),
    "whatever came before": Remembering(), "gradient": Detached(),
    "finite differences": Wrong(), "bf16": Fragile(torch.bfloat16), "fp16": Fragile(torch.float16),
}  # fmt: skip
# a reward without the one thing cannot have these either
ALONG = {
    "tells images apart": {"gradient", "finite differences"},
    "gradient": {"finite differences"},
    "input untouched": {"repeatable", "each image alone"},
}
# scores on no device at all can be compared with nothing; chance is seen by whatever scores twice
BLINDING = ("device", "repeatable")


def failing(reward):
    return {finding.item for finding in check_contract(reward) if finding.passed is False}


def test_a_reward_that_keeps_the_contract_passes():
    assert failing(Plain()) == set()


@pytest.mark.parametrize("item", BREAKERS)
def test_each_item_catches_what_breaks_it_and_no_other(item):
    failed = failing(BREAKERS[item])
    assert item in failed
    assert item in BLINDING or failed == {item} | ALONG.get(item, set())


def test_every_item_has_a_breaker():
    # these are only told
    assert set(CHECKS) - {"range", "prompts", "memory"} == set(BREAKERS)


def findings(reward, **more):
    return {finding.item: finding for finding in check_contract(reward, **more)}


def test_what_fails_says_what_to_change():
    found = findings(Random())
    assert "eval()" in found["repeatable"].remedy and found["shape"].remedy == ""
    assert list(findings(Column())) == ["shape"]


class Outside(Plain):
    info = RewardInfo("outside", "", "", "", (5.0, 6.0))


def test_a_score_out_of_its_usual_range_is_told_and_no_fault():
    found = findings(Outside())["range"]
    assert found.passed is None and "NOT as said: 5 … 6" in found.figure


class Tower(Plain):
    """A network that cannot be moved, and keeps activations."""

    def __init__(self):
        self.layer = torch.nn.Conv2d(3, 4, 3, padding=1)
        torch.nn.init.dirac_(self.layer.weight)

    def score(self, images, prompts):
        return self.layer(images).square().mean((1, 2, 3))


def test_a_network_that_stays_in_float32_is_tried_in_it():
    found = findings(Tower())["finite differences"]
    assert found.passed and "float32" in found.figure and "bytes" not in found.figure


def test_memory_is_of_what_the_backward_pass_keeps():
    # images in float32, and four channels of activations
    assert findings(Tower(), size=100)["memory"].figure.startswith(f"{(3 + 4) * 4 * 100 * 100 / 1e6:.2f} MB")


class Straight(Plain):
    """Rounds to bytes, with the gradient straight through, as encoders with PIL's resizing do."""

    slope = 1.0

    def score(self, images, prompts):
        rounded = images + ((images * 255).round() / 255 - images).detach()
        return super().score(rounded + (self.slope - 1) * (images - images.detach()), prompts)


class TooSteep(Straight):
    slope = 1.3


def test_finite_differences_see_past_rounding_to_bytes_and_not_past_a_wrong_gradient():
    found = findings(Straight())["finite differences"]
    assert found.passed and "across bytes" in found.figure
    assert not findings(TooSteep())["finite differences"].passed


@pytest.mark.parametrize("name", [name for name in rewards.TABLE if name not in EMBEDDED])
def test_built_in_rewards_keep_the_contract(name, tmp_path):
    assert failing(rewards.build(name, make_small_reward(name, tmp_path))) == set()


@pytest.mark.parametrize("name", EMBEDDED)
def test_rewards_with_embedded_models_keep_the_contract(name):
    assert failing(rewards.build(name, EMBEDDED[name])) == set()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_contract_on_a_gpu():
    found = findings(rewards.build("clip", {"model": "embedded"}), device=torch.device("cuda"))
    assert all(finding.passed is not False for finding in found.values()), found


class Dividing(Plain):
    def score(self, images, prompts):
        return super().score(images, prompts) / 0


class Raising(Plain):
    def score(self, images, prompts):
        raise IndexError("no such layer")


class Listing(Plain):
    def score(self, images, prompts):
        return super().score(images, prompts).tolist()


class Severed(Plain):
    def score(self, images, prompts):
        return super().score(images.detach(), prompts)


BREAKS = {
    "a column": (Column, "returned a tensor of (2, 1), not one score per image (2,)"),
    "a list": (Listing, "returned a list, not one score per image"),
    "no number": (Dividing, "returned a score that is no finite number, of images that are"),
    "an error": (Raising, "failed: IndexError: no such layer"),
}


@pytest.mark.usefixtures("tables")
def test_a_reward_that_detaches_says_what_can_be_done():
    rewards.reward("mine", summary="")(Severed)
    with pytest.raises(PluginFault, match="the reward mine has no gradient: it detached the images") as fault:
        rewards.build("mine").score(torch.rand(2, 3, 8, 8).requires_grad_(), ["a", "b"])
    assert "validation.rewards" in fault.value.remedy and "policy gradient" in fault.value.remedy


@pytest.mark.parametrize("kind", BREAKS)
@pytest.mark.usefixtures("tables")
def test_what_breaks_the_contract_in_a_run_is_the_plugins(kind):
    made, expected = BREAKS[kind]
    rewards.reward("mine", summary="")(made)
    with pytest.raises(PluginFault, match=re.escape(f"the plug-in's reward mine {expected}")):
        rewards.build("mine").score(torch.rand(2, 3, 8, 8).requires_grad_(), ["a", "b"])


@pytest.mark.usefixtures("tables")
def test_a_constructor_that_fails_is_the_plugins():
    @rewards.reward("failing", summary="")
    class Failing:
        def __init__(self):
            raise OSError("no weights")

    with pytest.raises(PluginFault, match="reward failing cannot be made: OSError: no weights"):
        rewards.build("failing")


@pytest.mark.usefixtures("tables")
def test_what_else_a_plugins_reward_has_is_passed_on_and_held_to_account():
    calls = []

    class Extra(Plain):
        def gradient_checkpointing(self):
            calls.append("checkpointing")

        def to(self, device, dtype):
            raise MemoryError("no room")

    rewards.reward("extra", summary="")(Extra)
    rewards.reward("bare", summary="")(Plain)
    extra = rewards.build("extra")
    extra.gradient_checkpointing()
    assert calls == ["checkpointing"] and not hasattr(extra, "parts")
    with pytest.raises(PluginFault, match=r"reward extra failed in to\(\): MemoryError: no room"):
        extra.to(torch.device("cpu"), torch.float32)
    bare = rewards.build("bare")
    assert not hasattr(bare, "to") and not hasattr(bare, "gradient_checkpointing")
    # the model's fault, not the plug-in's
    assert bare.score(torch.full((1, 3, 8, 8), torch.nan), ["x"]).isnan().all()


@pytest.mark.usefixtures("tables")
def test_the_remedy_is_the_whole_command(tmp_path):
    """Typed as it stands, with the file it came from, and it finds the same fault."""
    file = tmp_path / "rewards of mine.py"
    file.write_text(
        "from rewards import reward\n"
        "@reward('severed', summary='')\n"
        "class Severed:\n"
        "    def score(self, images, prompts):\n"
        "        return images.detach().flatten(1).mean(1)\n"
    )
    load_plugins([file])
    with pytest.raises(PluginFault) as fault:
        rewards.build("severed").score(torch.rand(2, 3, 8, 8).requires_grad_(), ["a", "b"])
    command = shlex.split(re.search(r"`(.*)`", fault.value.remedy)[1])
    assert command[-4:] == ["check", "severed", "--plugin", str(file)]
    done = forked.run(command[1:])
    assert done.returncode != 0 and "gradient" in done.stdout + done.stderr and "Usage" not in done.stderr
