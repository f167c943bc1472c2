"""Seeding, atomic files, statistics."""

import json
import math

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from sdo_cli.files import sort_metadata, write_atomic, write_json
from sdo_cli.scoring.statistics import estimate, paired_gain
from sdo_cli.seeding import key_to_seed, keyed_generator


def test_keys_give_different_streams_and_the_same_key_the_same():
    seeds = {key_to_seed(r, p, s, j) for r in range(3) for p in ("noise", "plan") for s in range(20) for j in range(20)}
    assert len(seeds) == 3 * 2 * 20 * 20
    assert max(seeds) < 2**32 and max(seeds) > 2**31
    first = torch.randn(5, generator=keyed_generator(1, "noise", 2, 3))
    assert torch.equal(first, torch.randn(5, generator=keyed_generator(1, "noise", 2, 3)))


def test_neighbouring_keys_are_independent():
    draws = torch.stack([torch.randn(64, generator=keyed_generator(0, "noise", 0, j)) for j in range(200)])
    correlation = torch.corrcoef(draws) - torch.eye(200)
    assert correlation.abs().max() < 0.65
    assert abs(draws.mean().item()) < 0.05


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})

    def fail(temporary):
        temporary.write_text("half")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_atomic(path, fail)
    assert json.loads(path.read_text()) == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_the_unit_is_the_prompt():
    """Two seeds of one prompt are no two observations."""
    scores = torch.tensor([[1.0, 3.0], [2.0, 2.0], [5.0, 7.0]])
    got = estimate(scores)
    means = torch.tensor([2.0, 2.0, 6.0], dtype=torch.float64)
    assert got.n == 3
    assert got.mean == pytest.approx(means.mean().item())
    assert got.standard_error == pytest.approx(means.std().item() / math.sqrt(3))


def test_pairing_removes_what_prompts_share():
    prompt = torch.linspace(0, 10, 50)
    noise = 0.01 * torch.randn(50, generator=torch.Generator().manual_seed(0))
    gain = paired_gain(prompt, prompt + 0.1 + noise)
    assert gain.difference.mean == pytest.approx(0.1, abs=0.01)
    assert gain.in_standard_errors > 20
    assert gain.before.standard_error > 0.3


def test_unequal_shapes_are_no_pairs():
    with pytest.raises(ValueError, match="not paired"):
        paired_gain(torch.zeros(3), torch.zeros(4))


def test_equal_tensors_and_metadata_are_equal_files(tmp_path):
    tensors = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.ones(3, dtype=torch.float16)}
    # the writer's order differs from file to file: of 20 files with 4 keys some would differ
    said = {"format": "pt", "ß": 'a "quoted"\nline\t\x01 \\ é', "a": "1", "z": "{}"}
    for number in range(20):
        write_atomic(tmp_path / f"{number}.safetensors", lambda path: save_file(tensors, path, metadata=said))
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1
    with safe_open(tmp_path / "0.safetensors", "pt") as stream:
        assert stream.metadata() == said
        assert all(torch.equal(stream.get_tensor(name), value) for name, value in tensors.items())


def test_a_file_without_metadata_keeps_its_bytes(tmp_path):
    save_file({"a": torch.ones(3)}, tmp_path / "a.safetensors")
    before = (tmp_path / "a.safetensors").read_bytes()
    sort_metadata(tmp_path / "a.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == before
