"""Finished pieces of a job: whole or not there, of this job or refused."""

import json

import pytest
import torch

from sdo_cli.errors import RecipeFault
from sdo_cli.files import write_json
from sdo_cli.recipe.schema import RewardSpec
from sdo_cli.runs.kept import FOLDER, Kept, identity_of, status_in


def test_a_piece_comes_back_as_it_was(tmp_path):
    shared = torch.arange(12.0).view(3, 4)
    tree = {
        "rows": [{"loss": 0.1, "worst": float("inf"), 3: None}],
        "pair": (shared[1], shared.t()),
        "none": torch.zeros(0, 2, dtype=torch.bfloat16),
        "number": torch.tensor(7),
    }
    Kept(tmp_path).put("a", tree)
    found = Kept(tmp_path).get("a")
    assert found["rows"] == tree["rows"] and isinstance(found["pair"], tuple)
    for mine, theirs in (
        (found["pair"][0], shared[1]),
        (found["pair"][1], shared.t()),
        (found["number"], tree["number"]),
    ):
        assert torch.equal(mine, theirs) and mine.dtype == theirs.dtype
    assert found["none"].shape == (0, 2) and found["none"].dtype == torch.bfloat16
    assert Kept(tmp_path).get("b") is None
    Kept(tmp_path).clear()
    assert not (tmp_path / FOLDER).exists()


@pytest.mark.parametrize("harm", ["cut", "empty", "turned", "words"])
def test_a_damaged_piece_counts_as_missing(tmp_path, harm):
    Kept(tmp_path).put("a", {"x": torch.ones(64), "y": 0.5})
    path = tmp_path / FOLDER / "a.safetensors"
    content = bytearray(path.read_bytes())
    if harm == "cut":
        content = content[:-5]
    elif harm == "empty":
        # as a machine that lost its power leaves a file
        content[-256:] = bytes(256)
    elif harm == "turned":
        content[-7] ^= 1
    else:
        content = content.replace(b"0.5", b"0.6")
    path.write_bytes(content)
    assert Kept(tmp_path).get("a") is None


def test_a_piece_that_cannot_be_written_leaves_the_one_before(tmp_path):
    kept = Kept(tmp_path)
    kept.put("a", {"x": 1})
    with pytest.raises(TypeError):
        kept.put("a", {"x": object()})
    assert kept.get("a") == {"x": 1} and [p.name for p in (tmp_path / FOLDER).iterdir()] == ["a.safetensors"]


def test_what_a_job_is_tells_its_files_by_what_they_hold(tmp_path):
    picture = tmp_path / "p.png"
    picture.write_bytes(b"one")

    def found(**more):
        given = {"tree": {"steps": 3, "draw": {"eta": 0.0}}, "prompts": {"prompts": ["a"]}, "files": {"p": picture}}
        return identity_of(**{**given, **more}, rewards=[RewardSpec("clip-score")])

    first = found()
    assert first["draw.eta"] == 0.0 and first["prompts"].startswith("1 prompts, ")
    picture.write_bytes(b"two")
    assert {key for key in first if first[key] != found()[key]} == {"contents.p"}
    assert {key for key in first if first[key] != found(prompts={"prompts": ["b"]})[key]} == {"contents.p", "prompts"}


def test_another_job_is_refused_key_by_key(tmp_path):
    assert status_in(tmp_path / "none", {"steps": 3}) == "" == status_in(tmp_path, {"steps": 3})
    (tmp_path / ".lock").touch()
    assert status_in(tmp_path, {"steps": 3}) == ""
    (tmp_path / "mine.txt").touch()
    with pytest.raises(RecipeFault, match="holds no job to go on with"):
        status_in(tmp_path, {"steps": 3})
    write_json(tmp_path / "manifest.json", {"status": "running", "identity": {"steps": 3, "seed": 0}})
    assert status_in(tmp_path, {"steps": 3, "seed": 0}) == "running"
    with pytest.raises(RecipeFault) as caught:
        status_in(tmp_path, {"steps": 4, "eta": json.loads("0.5")})
    assert [line.split(":")[0] for line in caught.value.problems] == ["steps", "seed", "eta"]
    assert "steps: 3 there, 4 here" in caught.value.problems
