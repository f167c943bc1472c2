"""What rewards read: which files they need, and one sentence for every way in which a file can be wrong."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import entry
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_rewards import WITH_WEIGHTS, make_small_reward, published_imagereward

import rewards
from rewards.checkpoints import read_state
from sdo_cli.errors import EnvironmentFault, RecipeFault
from sdo_cli.hub import MissingWeights
from sdo_cli.recipe.schema import PromptSource, Recipe, RewardSpec
from sdo_cli.weights.needs import needs_of, reward_options


def test_options_replace_files_of_the_hub():
    assert [str(file) for file in rewards.needed_files("hps", {})] == ["xswu/HPSv2/HPS_v2.1_compressed.pt"]
    assert rewards.needed_files("hps", {"checkpoint": "x.pt"}) == ()
    aesthetic = {str(file) for file in rewards.needed_files("aesthetic", {})}
    head = rewards.needed_files("aesthetic", {"pretrained": "ViT-L-14.safetensors"})
    assert len(aesthetic) == 2 and {str(file) for file in head} < aesthetic and head[0].filename.endswith(".pth")
    assert len(rewards.needed_files("aesthetic", {"head": "x"})) == 1
    assert rewards.needed_files("aesthetic", rewards.embedded_options("aesthetic")) == ()
    # OpenAI's architecture with weights of one's own
    assert rewards.needed_files("clip", {"pretrained": "ViT-L-14.safetensors"}) == ()
    parts = [{"name": "hps"}, {"name": "clip", "options": {"model": "embedded"}}]
    assert len(rewards.needed_files("mixture", {"parts": parts})) == 1


def test_a_mixture_is_looked_into(tmp_path):
    parts = [{"name": "hps", "options": {"checkpoint": str(tmp_path / "gone.pt")}}, {"name": "colorfulness"}]
    assert rewards.missing_paths("mixture", {"parts": parts}) == [str(tmp_path / "gone.pt")]


def test_the_embedded_model_goes_with_embedded_rewards_in_a_mixture_too():
    parts = [{"name": "clip", "weight": 2.0}, {"name": "aesthetic"}, {"name": "clip-score", "options": {"model": "x"}}]
    spec = RewardSpec("mixture", options={"parts": parts})
    recipe = Recipe(model="embedded", rewards=[spec], prompts=PromptSource(lines=["a bus"]))
    filled = [part["options"] for part in reward_options(spec, recipe)["parts"]]
    assert filled == [rewards.embedded_options("clip"), rewards.embedded_options("aesthetic"), {"model": "x"}]
    assert needs_of(replace(recipe, rewards=[RewardSpec("mixture", options={"parts": parts[:2]})])) == []


@pytest.mark.parametrize("name", WITH_WEIGHTS)
def test_published_weights_that_are_not_here_are_one_sentence(name, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(MissingWeights, match="is not on this machine and HF_HUB_OFFLINE is set"):
        rewards.build(name)


def damaged(path: Path) -> None:
    path.write_bytes(b"no weights")


def without_weights(path: Path) -> None:
    torch.save([1, 2], path)


def foreign(path: Path) -> None:
    torch.save({"state_dict": {"visual.proj": torch.zeros(2, 2)}}, path)


def absent(path: Path) -> None:
    path.unlink()


def imagerewards(path: Path) -> None:
    """Its head is another one."""
    save_file({k: v.contiguous() for k, v in published_imagereward().items()}, path)


def without_cross(path: Path) -> None:
    save_file({k: v for k, v in load_file(path).items() if "cross_model" not in k}, path)


def other_sizes(path: Path) -> None:
    config = json.loads(path.read_text())
    config["vision_config"]["hidden_size"] = 32
    path.write_text(json.dumps(config))


# reward, option, how its file is spoilt, what is said
SPOILT = [
    ("hps-v2.1", "checkpoint", damaged, "cannot read the HPS checkpoint .*HPS_small.pt: it is damaged"),
    ("hps-v2.1", "checkpoint", without_weights, "HPS_small.pt is no table of weights"),
    ("hps-v2.1", "checkpoint", foreign, "the HPS checkpoint HPS_small.pt does not fit"),
    ("hps-v2.1", "checkpoint", absent, "no HPS checkpoint at"),
    ("aesthetic-v2", "head", damaged, "cannot read the aesthetic head .*head.pth: it is damaged"),
    ("aesthetic-v2", "head", without_weights, "head.pth is no table of weights"),
    ("aesthetic-v2", "head", foreign, "the head head.pth does not fit a CLIP of width 32"),
    ("aesthetic-v2", "head", absent, "no aesthetic head at"),
    ("imagereward-v1", "checkpoint", damaged, "cannot read the ImageReward checkpoint .*ImageReward.pt: it is damaged"),
    ("imagereward-v1", "checkpoint", foreign, "ImageReward.pt does not fit med_config.json"),
    ("imagereward-v1", "checkpoint", absent, "no ImageReward file at"),
    ("imagereward-v1", "config", damaged, "cannot read .*med_config.json: "),
    ("imagereward-v1", "config", lambda path: path.write_text("[]"), "med_config.json is no table of settings"),
    ("imagereward-v1", "config", absent, "no ImageReward file at"),
    ("imagereward-v1", "tokenizer/vocab.txt", absent, "no vocab.txt in"),
    ("imagereward-v1", "tokenizer/vocab.txt", lambda p: p.write_text(p.read_text() + "zebra\n"), "has 121 words"),
    (
        "cyclereward-combo",
        "checkpoint",
        damaged,
        "cannot read the CycleReward checkpoint .*model.safetensors: it is damaged",
    ),
    ("cyclereward-combo", "checkpoint", imagerewards, "the CycleReward checkpoint model.safetensors does not fit"),
    ("cyclereward-combo", "checkpoint", absent, "no CycleReward file at"),
    ("mps-v1", "checkpoint", damaged, "cannot read the MPS checkpoint .*mps.safetensors: it is damaged"),
    ("mps-v1", "checkpoint", without_cross, "the MPS checkpoint mps.safetensors does not fit"),
    ("mps-v1", "checkpoint", absent, "no MPS checkpoint at"),
    ("mps-v1", "config", damaged, "the MPS checkpoint|cannot read .*config.json: "),
    ("mps-v1", "config", lambda path: path.write_text("[]"), "config.json is no table of settings"),
    ("mps-v1", "config", other_sizes, "the MPS checkpoint mps.safetensors does not fit .*config.json"),
    ("pickscore-v1", "model/model.safetensors", damaged, "cannot load PickScore from .*: it is damaged"),
    ("pickscore-v1", "model/config.json", damaged, "cannot load PickScore from"),
    ("pickscore-v1", "model/config.json", absent, "no CLIPModel at"),
    ("clip-score", "model/open_clip_model.safetensors", damaged, "cannot load the CLIP model .*: it is damaged"),
    ("clip-score", "model/open_clip_config.json", damaged, "cannot load the CLIP model"),
]


@pytest.mark.parametrize(("name", "place", "spoil", "said"), SPOILT)
def test_files_that_are_wrong_are_one_sentence(name, place, spoil, said, tmp_path):
    options = make_small_reward(name, tmp_path)
    option, _, inside = place.partition("/")
    spoil(Path(options[option]) / inside if inside else Path(options[option]))
    with pytest.raises(EnvironmentFault, match=said) as fault:
        rewards.build(name, options)
    assert fault.value.remedy and "\n" not in fault.value.message


def test_pickscore_does_not_make_up_weights_that_are_not_in_the_file(tmp_path):
    folder = Path(make_small_reward("pickscore-v1", tmp_path)["model"])
    state = load_file(folder / "model.safetensors")
    state.pop("visual_projection.weight")
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EnvironmentFault, match=r"lack 1 of CLIPModel's, for example visual_projection\.weight"):
        rewards.build("pickscore-v1", {"model": str(folder)})


def test_the_vocabulary_may_be_given_as_its_file(tmp_path):
    options = make_small_reward("imagereward-v1", tmp_path)
    images, prompts = torch.rand(2, 3, 48, 48), ["a photo of the cat", "bus"]
    scores = rewards.build("imagereward-v1", options).score(images, prompts)
    named = options | {"tokenizer": str(Path(options["tokenizer"]) / "vocab.txt")}
    assert torch.equal(scores, rewards.build("imagereward-v1", named).score(images, prompts))


def test_mps_as_it_was_published_is_not_read_and_the_way_is_named(tmp_path):
    """A pickled module; a table of its weights under its own names is read like the copy on the hub."""
    options = make_small_reward("mps-v1", tmp_path)
    state = load_file(options["checkpoint"])
    table = {name.removeprefix("mps."): value for name, value in state.items()}
    torch.save(torch.nn.Linear(2, 2), tmp_path / "MPS_overall_checkpoint.pth")
    with pytest.raises(EnvironmentFault, match="cannot read the MPS checkpoint") as fault:
        rewards.build("mps-v1", options | {"checkpoint": str(tmp_path / "MPS_overall_checkpoint.pth")})
    assert "MPS_overall_checkpoint.pth has to be made a table first" in fault.value.remedy
    # older libraries saved a table of places, too
    table["model.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    torch.save(table, tmp_path / "mine.pth")
    mine = rewards.build("mps-v1", options | {"checkpoint": str(tmp_path / "mine.pth")})
    images, prompts = torch.rand(2, 3, 64, 64), ["a red cat", "a bus"]
    assert torch.equal(mine.score(images, prompts), rewards.build("mps-v1", options).score(images, prompts))


@pytest.mark.parametrize(
    ("given", "said"),
    [({"threshold": 1.0}, "threshold must be from 0 to below 1, not 1.0"), ({"condition": " "}, "at least one aspect")],
)
def test_mps_refuses_options_under_which_nothing_is_looked_at(given, said, tmp_path):
    with pytest.raises(RecipeFault, match=said):
        rewards.build("mps-v1", make_small_reward("mps-v1", tmp_path) | given)


def test_no_code_is_run_from_a_weight_file(tmp_path):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "sprung",))

    torch.save({"state_dict": Trap()}, tmp_path / "trap.pt")
    with pytest.raises(EnvironmentFault, match="something else than weights"):
        read_state(tmp_path / "trap.pt", "HPS checkpoint")
    assert not (tmp_path / "sprung").exists()


def test_the_command_says_it_in_one_sentence(tmp_path):
    options = make_small_reward("aesthetic-v2", tmp_path / "small")
    damaged(Path(options["head"]))
    recipe = {"model": "embedded", "rewards": [{"name": "aesthetic", "options": options}]}
    recipe |= {"prompts": {"lines": ["a bus"]}, "max_train_steps": 1}
    # JSON is YAML too
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    done = entry.run(["finetune", "--recipe", "recipe.yaml"], cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "cannot read the aesthetic head" in " ".join(done.stderr.split())
    shutil.rmtree(tmp_path / "small")
    assert {path.name for path in tmp_path.iterdir()} <= {"recipe.yaml", "runs"}
