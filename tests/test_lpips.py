"""LPIPS as a measure of `sdo eval`: the package's own figures, from a local file, in columns of their own."""

import json
from pathlib import Path

import entry
import pytest
import torch
import torchvision
from PIL import Image

from sdo_cli.drawing.pictures import read_image
from sdo_cli.errors import EnvironmentFault, RecipeFault, SdoError
from sdo_cli.scoring import perceptual
from sdo_cli.scoring.measure_names import LPIPS
from sdo_cli.scoring.perceptual import Backbone, backbones, build, distance

lpips = pytest.importorskip("lpips")
CPU = torch.device("cpu")


def make_weights(net, seed, path):
    """torchvision's architecture with random weights, as torchvision saves it."""
    torch.manual_seed(seed)
    model = getattr(torchvision.models, {"alex": "alexnet", "squeeze": "squeezenet1_1"}[net])(weights=None)
    torch.save(model.state_dict(), path)
    return model


@pytest.fixture(scope="module")
def alex(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "alex.pth"
    return path, make_weights("alex", 0, path)


def theirs(net, model, monkeypatch):
    """The package's own network by its own way of loading, whose download is replaced with ``model``."""
    name = {"alex": "alexnet", "squeeze": "squeezenet1_1"}[net]
    monkeypatch.setattr(torchvision.models, name, lambda pretrained: model if pretrained else None)
    return lpips.LPIPS(net=net, verbose=False)


def pictures(folder, count, *, seed, size=(40, 48), prompts=2):
    """``count`` pictures of each prompt, of noise; they state their seeds."""
    folder.mkdir(parents=True)
    generator, rows = torch.Generator().manual_seed(seed), []
    for prompt in range(prompts):
        for index in range(count):
            pixels = (torch.rand(*size[::-1], 3, generator=generator) * 255).byte().numpy()
            name = f"{prompt}-{index}.png"
            Image.fromarray(pixels).save(folder / name)
            rows.append({"file_name": name, "prompt": f"field {prompt}", "seed": index})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def sdo_eval(tmp_path, *words, expect=0):
    asked = ["eval", "--rewards", "clip-embedded", "--no-embedding", "--no-report", "--out", "e", *words]
    found = entry.run(asked, cwd=tmp_path)
    assert found.returncode == expect, found.stderr
    return found


@pytest.mark.parametrize("kind", ["lpips-alex", "lpips-squeeze"])
def test_a_figure_is_the_packages_own(kind, tmp_path, monkeypatch):
    net = LPIPS[kind]
    model = make_weights(net, 3, tmp_path / "w.pth")
    ours = build(Backbone(kind, tmp_path / "w.pth"), CPU)
    published = theirs(net, model, monkeypatch)
    a, b = torch.rand(2, 3, 40, 56, generator=torch.Generator().manual_seed(1))
    expected = published(2 * a[None] - 1, 2 * b[None] - 1).item()
    assert expected > 1e-4
    assert distance(ours, a, b) == pytest.approx(expected, rel=1e-6)
    assert distance(ours, a, a) == 0
    assert distance(ours, a, b[:, :32]) is None
    with pytest.raises(RecipeFault, match="needs 32 pixels a side, pictures have 24 × 32"):
        distance(ours, a[:, :32, :24], b[:, :32, :24])


def test_the_command_measures_both_in_columns_of_their_own(alex, tmp_path, monkeypatch):
    one, two = pictures(tmp_path / "one", 3, seed=1), pictures(tmp_path / "two", 3, seed=2)
    words = ["--images", one, "--images", two, "--distance", "lpips", "--lpips-weights", alex[0]]
    found = sdo_eval(tmp_path, *words)
    assert "diversity-lpips-alex" in found.stdout and "distance-from-base-lpips-alex" in found.stdout
    tree = json.loads((tmp_path / "e" / "summary.json").read_text())
    rows = tree["variants"]["two"]["measures"]
    assert list(rows) == ["clip-embedded", "diversity-lpips-alex", "distance-from-base-lpips-alex"]
    assert "distance-from-base-lpips-alex" not in tree["variants"]["one"]["measures"]
    network = theirs("alex", alex[1], monkeypatch)

    def apart(a, b):
        with torch.no_grad():
            return network(*(read_image(path)[None] * 2 - 1 for path in (a, b))).item()

    names = [f"{prompt}-{index}.png" for prompt in range(2) for index in range(3)]
    to_base = [apart(two / name, one / name) for name in names]
    assert rows["distance-from-base-lpips-alex"]["mean"] == pytest.approx(sum(to_base) / 6, rel=1e-5)
    between = [apart(two / f"{p}-{i}.png", two / f"{p}-{j}.png") for p in range(2) for i, j in ((0, 1), (0, 2), (1, 2))]
    assert rows["diversity-lpips-alex"]["mean"] == pytest.approx(sum(between) / 6, rel=1e-5)


def test_what_is_known_is_not_measured_again_and_other_weights_are_refused(alex, tmp_path):
    one, two = pictures(tmp_path / "one", 2, seed=1), pictures(tmp_path / "two", 2, seed=2)
    words = ["--images", one, "--images", two, "--distance", "lpips-alex"]
    sdo_eval(tmp_path, *words, "--lpips-weights", alex[0])
    lines = (tmp_path / "e" / "scores.jsonl").read_bytes()
    # cut off as by a kill, in the last prompt's lines
    (tmp_path / "e" / "scores.jsonl").write_bytes(lines[:-30])
    sdo_eval(tmp_path, *words, "--lpips-weights", alex[0])
    assert (tmp_path / "e" / "scores.jsonl").read_bytes() == lines
    make_weights("alex", 1, tmp_path / "other.pth")
    found = sdo_eval(tmp_path, *words, "--lpips-weights", tmp_path / "other.pth", expect=2)
    assert "lpips-alex is by lpips" in " ".join(found.stderr.split())
    sdo_eval(tmp_path, *words, "--lpips-weights", tmp_path / "other.pth", "--out", "f")
    compared = entry.run(["compare", "e", "f"], cwd=tmp_path)
    assert compared.returncode == 2 and "lpips-alex by lpips" in " ".join(compared.stderr.split())
    # without the option nothing is measured, and what is there stays in the tables
    tree = json.loads((tmp_path / "e" / "summary.json").read_text())
    sdo_eval(tmp_path, "--images", one, "--images", two)
    assert json.loads((tmp_path / "e" / "summary.json").read_text()) == tree


def test_pictures_of_two_sizes_are_counted_and_left_out(alex, tmp_path):
    one, two = pictures(tmp_path / "one", 2, seed=1), pictures(tmp_path / "two", 2, seed=2)
    Image.new("RGB", (64, 64), "red").save(two / "0-0.png")
    words = ["--images", one, "--images", two, "--distance", "lpips", "--lpips-weights", alex[0]]
    found = sdo_eval(tmp_path, *words)
    assert "lpips-alex: 2 pairs of pictures of two sizes left out" in " ".join(found.stderr.split())
    rows = json.loads((tmp_path / "e" / "summary.json").read_text())["variants"]["two"]["measures"]
    assert rows["distance-from-base-lpips-alex"]["scores"] == 3 and rows["diversity-lpips-alex"]["n"] == 1


def test_a_baseline_that_comes_later_is_what_distances_are_to(alex, tmp_path):
    words = ["-p", "animals", "--limit", 2, "--steps", 1, "--distance", "lpips", "--lpips-weights", alex[0]]
    lora = ["--lora", "embedded:student", "--lora-scale", "0.5,1"]
    name = "distance-from-base-lpips-alex"
    rewards = ["--rewards", "clip"]
    sdo_eval(tmp_path, *words, *rewards, *lora, "--no-base")
    before = json.loads((tmp_path / "e" / "summary.json").read_text())["variants"]
    assert [name in entry["measures"] for entry in before.values()] == [False, True]
    sdo_eval(tmp_path, *words, *rewards, *lora)
    tree = json.loads((tmp_path / "e" / "summary.json").read_text())
    after = tree["variants"]
    assert tree["baseline"] == "base" and name in after[next(iter(before))]["measures"]
    last = list(before)[-1]
    assert after[last]["measures"][name]["mean"] != before[last]["measures"][name]["mean"]


def test_weights_that_are_not_here_are_one_sentence_before_anything_is_drawn(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    found = entry.run(["eval", "-p", "animals", "--limit", 1, "--distance", "lpips-vgg"], cwd=tmp_path)
    text = " ".join(found.stderr.split())
    assert found.returncode == 2 and "Traceback" not in text
    assert "lpips-vgg needs" in text and "vgg16-" in text and "--lpips-weights FILE" in text
    assert not (tmp_path / "evals").exists()


def test_a_file_in_torchs_own_cache_is_taken(alex, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    name = torchvision.models.AlexNet_Weights.IMAGENET1K_V1.url.rpartition("/")[2]
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / name).write_bytes(alex[0].read_bytes())
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *a, **k: pytest.fail("downloads"))
    assert backbones(["lpips-alex"], None)["lpips-alex"].path == tmp_path / "checkpoints" / name


def test_a_download_is_asked_for_by_its_hash_and_its_failure_is_one_sentence(tmp_path, monkeypatch):
    asked = []

    def download(url, to, hash_prefix, *, progress):
        asked.append((Path(to).name, hash_prefix))
        raise OSError("no route to host\nmore")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with pytest.raises(EnvironmentFault, match=r"cannot download squeezenet1_1-\w+.pth to .*: no route to host"):
        backbones(["lpips-squeeze"], None)
    assert asked == [(asked[0][0], asked[0][0].removesuffix(".pth").split("-")[1])] and len(asked[0][1]) == 8


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no such file"),
        (b"not a file of weights", "is no table of weights"),
        ({"features.0.weight": torch.zeros(1)}, "holds no alex"),
    ],
)
def test_a_file_that_is_no_networks_is_named(tmp_path, content, said):
    path = tmp_path / "w.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(SdoError, match=said):
        build(backbones(["lpips-alex"], path)["lpips-alex"], CPU)


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(perceptual, "find_spec", lambda name: None)
    with pytest.raises(EnvironmentFault, match="needs the package lpips") as fault:
        backbones(["lpips-alex"], None)
    assert "[lpips]" in fault.value.remedy


def test_options_that_cannot_be_are_said(tmp_path):
    words = ["eval", "-p", "animals", "--distance", "dreamsim", "--distance", "lpips-vgg", "--lpips-weights", "w.pth"]
    found = entry.run([*words, "--judge", "diversity-lpips-vgg=true {images} {out}"], cwd=tmp_path)
    text = " ".join(found.stderr.split())
    assert found.returncode == 2
    assert "--distance: 'dreamsim' is none of lpips, lpips-alex, lpips-vgg, lpips-squeeze" in text
    assert "--lpips-weights: is of one network" in text and "is a measure of sdo's own" in text
