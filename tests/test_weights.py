"""What a recipe needs, what is missing, and `sdo fetch` against a small hub on loopback."""

import hashlib
import io
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import entry
import pytest
from PIL import Image

from sdo_cli.recipe.load import load_recipe, shipped_recipes
from sdo_cli.weights.needs import is_whole, needs_of, revisions_of

COMMIT = "a" * 40


def sdo(*arguments, cwd, **environment):
    command = [sys.executable, "-m", "sdo_cli", *map(str, arguments)]
    everything = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"} | environment
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=everything)


def write_cache(home, repo, files, commit=COMMIT):
    """A repository as huggingface_hub keeps it."""
    folder = home / "hub" / f"models--{repo.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    for name, text in files.items():
        path = folder / "snapshots" / commit / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder / "snapshots" / commit


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    return tmp_path / "home"


INDEX = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "U"], "scheduler": ["diffusers", "S"]}
INDEX |= {"safety_checker": ["x", "y"]}


def test_needs_say_what_is_here(cache):
    words = ["model=a/b", "rewards=[hps, colorfulness]", "revision=main", "validation.rewards=[]"]
    recipe = load_recipe("quickstart", words).recipe
    found = {need.source: need.present for need in needs_of(recipe)}
    assert found == {"a/b": False, "xswu/HPSv2/HPS_v2.1_compressed.pt": False}
    write_cache(cache, "xswu/HPSv2", {"HPS_v2.1_compressed.pt": "x"}, commit="b" * 40)
    model = {"model_index.json": json.dumps(INDEX), "unet/config.json": "{}", "scheduler/scheduler_config.json": "{}"}
    folder = write_cache(cache, "a/b", model)
    assert {need.present for need in needs_of(recipe) if need.source == "a/b"} == {False}
    (folder / "unet" / "model.safetensors").write_text("x")
    assert all(need.present for need in needs_of(recipe))
    assert is_whole(folder, None) and not is_whole(folder, "fp16")
    (folder / "unet" / "model.safetensors").rename(folder / "unet" / "model-00001-of-00002.safetensors")
    assert not is_whole(folder, None)
    (folder / "unet" / "model-00002-of-00002.safetensors").write_text("x")
    assert is_whole(folder, None)
    (folder / "unet" / "model.fp16-00001-of-00001.safetensors").write_text("x")
    assert is_whole(folder, "fp16")
    # a part without the variant is taken plain, as diffusers does
    (folder / "vae").mkdir()
    (folder / "model_index.json").write_text(json.dumps(INDEX | {"vae": ["diffusers", "V"]}))
    assert not is_whole(folder, "fp16")
    (folder / "vae" / "model.safetensors").write_text("x")
    assert is_whole(folder, "fp16")
    assert revisions_of(recipe) == {"a/b": COMMIT, "xswu/HPSv2/HPS_v2.1_compressed.pt": "b" * 40}


def test_the_embedded_recipes_need_nothing():
    for name in ("quickstart", "bench", "guarded"):
        assert needs_of(load_recipe(name).recipe) == []


def test_local_paths_that_are_gone_are_told_before_anything_is_loaded(tmp_path):
    words = ["model=/models/gone.safetensors", "rewards=[{name: hps, options: {checkpoint: /gone.pt}}]"]
    done = entry.run(["finetune", "--recipe", "quickstart", *words, "--out", "r"], cwd=tmp_path)
    assert done.returncode == 2
    assert "/models/gone.safetensors  no such path  (model)" in done.stderr
    assert "/gone.pt                  no such path  (reward hps-v2.1)" in done.stderr
    assert not (tmp_path / "r").exists()


REAL = [name for name in shipped_recipes() if name not in ("quickstart", "bench", "guarded")]


@pytest.mark.parametrize(
    ("name", "way"), [*((n, "offline") for n in REAL), ("mixed", "no hub"), ("sd35-hps", "no hub")]
)
def test_without_weights_every_recipe_ends_on_one_screen(name, way, tmp_path, cache, monkeypatch):
    """What is missing, how large, the line that gets it, and a way to try sdo now."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    env = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
    env |= {"HF_HUB_OFFLINE": "1"} if way == "offline" else {}
    done = entry.run(["finetune", "--recipe", name, "--out", "r"], cwd=tmp_path, env=env)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) < 15
    assert "weights are not on this machine" in done.stderr and " GB " in done.stderr
    assert f"sdo fetch {name}" in done.stderr and "sdo finetune --recipe quickstart" in done.stderr
    assert not (tmp_path / "r").exists()


def test_a_file_that_serves_two_rewards_is_one_need():
    words = ["model=a/b", "rewards=[aesthetic]", "validation.rewards=[clip]"]
    needs = needs_of(load_recipe("quickstart", words).recipe)
    whats = {need.source.split("/")[-1]: need.what for need in needs}
    assert whats["open_clip_model.safetensors"] == "reward aesthetic-v2, reward clip-score" and len(needs) == 3


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as its client asks for: file heads, files, and a repository's list."""

    files: ClassVar[dict] = {}
    broken: ClassVar[set] = set()
    asked: ClassVar[list] = []

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self._answer(body=False)

    def do_GET(self):
        self._answer(body=True)

    def _answer(self, body):
        path = self.path.split("?")[0]
        if body:
            self.asked.append(path)
        if path.startswith(("/api/models/", "/api/datasets/")):
            repo = "/".join(path.split("/")[3:5])
            names = [name for name in self.files if name.startswith(repo + "/")]
            if "/tree/" in path:
                tree = [{"type": "file", "path": n.removeprefix(repo + "/"), "size": 1, "oid": "0"} for n in names]
                return self._send(json.dumps(tree).encode(), body)
            siblings = [{"rfilename": name.removeprefix(repo + "/")} for name in names]
            return self._send(json.dumps({"id": repo, "sha": COMMIT, "siblings": siblings}).encode(), body)
        owner, name, _, _, *rest = path.strip("/").removeprefix("datasets/").split("/")
        key = "/".join((owner, name, *rest))
        if key not in self.files:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.end_headers()
            return None
        return self._send(self.files[key], body, cut=key in self.broken)

    def _send(self, data, body, cut=False):
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        if body:
            self.wfile.write(data[: len(data) // 2] if cut else data)
        self.close_connection = True


@pytest.fixture
def hub():
    Hub.files, Hub.broken, Hub.asked = {}, set(), []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def serve(repo, files):
    Hub.files |= {f"{repo}/{name}": data for name, data in files.items()}


def test_fetch_downloads_what_is_missing_and_nothing_else(hub, tmp_path):
    serve("xswu/HPSv2", {"HPS_v2.1_compressed.pt": b"h" * 1000, "HPS_v2_compressed.pt": b"o" * 1000})
    unet = {"unet/diffusion_pytorch_model.safetensors": b"u" * 100, "unet/diffusion_pytorch_model.bin": b"b" * 100}
    unet |= {"unet/diffusion_pytorch_model.fp16.safetensors": b"f" * 100, "v1-5.safetensors": b"w" * 100}
    # the same weights for other programs, as in Stability's repositories
    unet |= {"text_encoders/t5xxl_fp16.safetensors": b"t" * 100, "vae_1_0/model.safetensors": b"v"}
    unet |= {"safety_checker/model.safetensors": b"s", "scheduler/scheduler_config.json": b"{}"}
    serve("a/b", unet | {"model_index.json": json.dumps(INDEX).encode(), "unet/config.json": b"{}"})
    words = ["quickstart", "model=a/b", "rewards=[hps]", "validation.rewards=[]"]
    settings = {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": hub, "HF_HUB_DISABLE_XET": "1"}
    listed = sdo("fetch", *words, "--list", cwd=tmp_path, **settings)
    assert listed.returncode == 0 and listed.stdout.count("missing ") == 2 and Hub.asked == []
    done = sdo("fetch", *words, "--json", cwd=tmp_path, **settings)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["fetched"] == ["a/b", "xswu/HPSv2/HPS_v2.1_compressed.pt"]
    folder = tmp_path / "home" / "hub" / "models--a--b" / "snapshots" / COMMIT
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert names == {
        "model_index.json", "unet/config.json", "scheduler/scheduler_config.json",
        "unet/diffusion_pytorch_model.safetensors",
    }  # fmt: skip
    Hub.asked.clear()
    again = sdo("fetch", *words, "--json", cwd=tmp_path, **settings)
    assert json.loads(again.stdout)["fetched"] == [] and Hub.asked == []
    # and offline everything is found
    listed = sdo("fetch", *words, "--list", cwd=tmp_path, HF_HUB_OFFLINE="1", **settings)
    assert listed.stdout.count("here ") == 2


def test_weights_of_rewards_are_fetched_without_a_recipe(hub, tmp_path):
    """For pictures that were made elsewhere."""
    serve("xswu/HPSv2", {"HPS_v2.1_compressed.pt": b"h" * 1000})
    settings = {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": hub, "HF_HUB_DISABLE_XET": "1"}
    listed = sdo("fetch", "--rewards", "hps,colorfulness", "--list", cwd=tmp_path, **settings)
    assert listed.returncode == 0 and listed.stdout.startswith("missing xswu/HPSv2/HPS_v2.1_compressed.pt")
    done = sdo("fetch", "--rewards", "hps", "--json", cwd=tmp_path, **settings)
    assert json.loads(done.stdout)["fetched"] == ["xswu/HPSv2/HPS_v2.1_compressed.pt"], done.stderr
    for words in ([], ["hps", "--rewards", "hps"], ["--rewards", "beauty"]):
        refused = sdo("fetch", *words, cwd=tmp_path, **settings)
        assert refused.returncode == 2 and "command line" in refused.stderr


def test_fetch_takes_a_variant_where_a_part_has_one(hub, tmp_path):
    files = {"unet/m.safetensors": b"u", "unet/m.fp16.safetensors": b"f", "scheduler/scheduler_config.json": b"{}"}
    index = INDEX | {"vae": ["diffusers", "V"]}
    serve("a/b", files | {"vae/m.safetensors": b"v", "model_index.json": json.dumps(index).encode()})
    serve("c/vae", {"config.json": b"{}"})
    settings = {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": hub, "HF_HUB_DISABLE_XET": "1"}
    words = ["fetch", "quickstart", "model=a/b", "rewards=[colorfulness]", "validation.rewards=[]"]
    done = sdo(*words, "variant=fp16", cwd=tmp_path, **settings)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "home" / "hub" / "models--a--b" / "snapshots" / COMMIT
    assert {p.name for p in folder.rglob("*.safetensors")} == {"m.fp16.safetensors", "m.safetensors"}
    assert not (folder / "unet" / "m.safetensors").exists()
    done = sdo(*words, "variant=bf16", cwd=tmp_path, **settings)
    assert done.returncode == 2 and "a/b has no bf16 files" in done.stderr
    # a config alone is no VAE
    done = sdo(*words, "vae=c/vae", cwd=tmp_path, **settings)
    assert done.returncode == 2 and "c/vae has no whole safetensors weights for vae" in done.stderr
    write_cache(tmp_path / "home", "c/vae", {"config.json": "{}"})
    listed = sdo(*words, "vae=c/vae", "--list", cwd=tmp_path, **settings)
    assert "missing " in next(line for line in listed.stdout.splitlines() if "c/vae" in line)


def test_loras_of_the_hub_are_fetched_and_found_offline(hub, small, tmp_path):
    """By repository, or by one of its files where it has many, as Lightning's and Hyper-SD's."""
    from test_fast_rollouts import fast_lora

    weights = (fast_lora(small("sd15"), tmp_path / "fast") / "pytorch_lora_weights.safetensors").read_bytes()
    serve("x/lcm", {"pytorch_lora_weights.safetensors": weights})
    serve("x/many", {"steps-4.safetensors": weights, "steps-8.safetensors": b"no"})
    settings = {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": hub, "HF_HUB_DISABLE_XET": "1"}
    words = ["quickstart", f"model={small('sd15')}", "rewards=[colorfulness]", "validation={}", "rollout.solver=lcm"]
    words += ["rollout.num_inference_steps=2", "lora.start_from=x/many/steps-4.safetensors", "rollout.lora=x/lcm"]
    offline = settings | {"HF_HUB_OFFLINE": "1"}
    refused = sdo("finetune", "--recipe", *words, "--out", "run", cwd=tmp_path, **offline)
    assert refused.returncode == 2 and "x/lcm/pytorch_lora_weights.safetensors" in refused.stderr
    assert "x/many/steps-4.safetensors" in refused.stderr and "sdo fetch quickstart" in refused.stderr
    fetched = sdo("fetch", *words, "--json", cwd=tmp_path, **settings)
    names = ["x/many/steps-4.safetensors", "x/lcm/pytorch_lora_weights.safetensors"]
    assert json.loads(fetched.stdout)["fetched"] == names
    more = ["max_train_steps=1", "train_batch_size=1", "num_inference_steps=2", "-q"]
    done = sdo("finetune", "--recipe", *words, *more, "--out", "run", cwd=tmp_path, **offline)
    assert done.returncode == 0, done.stderr
    for lora in ("x/lcm", "x/many/steps-4.safetensors", str(tmp_path / "fast")):
        out = f"out-{lora.replace('/', '-')}"
        drawing = ["a cat", "--model", small("sd15"), "--lora", lora, "--steps", "2", "--out", out, "-q"]
        assert sdo("sample", *map(str, drawing), cwd=tmp_path, **offline).returncode == 0
    pictures = {path.read_bytes() for path in tmp_path.glob("out-*/00000.png")}
    pixels = {Image.open(io.BytesIO(picture)).tobytes() for picture in pictures}
    assert len(pixels) == 1


def test_a_download_that_breaks_leaves_nothing_that_looks_whole(hub, tmp_path):
    serve("xswu/HPSv2", {"HPS_v2.1_compressed.pt": b"h" * 100_000})
    Hub.broken = set(Hub.files)
    settings = {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": hub, "HF_HUB_DISABLE_XET": "1"}
    words = ["fetch", "quickstart", "rewards=[hps]", "validation.rewards=[]"]
    done = sdo(*words, cwd=tmp_path, **settings)
    assert done.returncode == 2 and "cannot download xswu/HPSv2" in done.stderr and "Traceback" not in done.stderr
    listed = sdo(*words, "--list", cwd=tmp_path, **settings)
    assert "missing " in listed.stdout


def test_fetch_offline_and_unknown_repositories_are_one_sentence(hub, tmp_path):
    settings = {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": hub}
    words = ["fetch", "quickstart", "rewards=[hps]", "validation.rewards=[]"]
    done = sdo(*words, cwd=tmp_path, HF_HUB_OFFLINE="1", **settings)
    assert done.returncode == 2 and "HF_HUB_OFFLINE is set: nothing is fetched" in done.stderr
    done = sdo(*words, cwd=tmp_path, **settings)
    assert done.returncode == 2 and "the hub has no xswu/HPSv2/HPS_v2.1_compressed.pt" in done.stderr
    done = sdo("fetch", "quickstart", cwd=tmp_path, **settings)
    assert done.returncode == 0 and "nothing to fetch" in done.stdout
