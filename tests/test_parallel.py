"""Several processes: the same draws, gradients and files as one; what happens when one fails or is told to stop."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from forked import Forked, address
from safetensors.torch import load_file
from test_checkpoints import TINY, UNMEASURED, lines_until

from sdo_cli.errors import EnvironmentFault, RecipeFault
from sdo_cli.parallel.launch import wants_several
from sdo_cli.parallel.world import World, joined

HERE = Path(__file__).parent
# one pass over one sample; dealt out over 1, 2 or 4 processes these are always steps of four samples
SPLIT = {1: "gradient_accumulation_steps=4", 2: "gradient_accumulation_steps=2", 4: "gradient_accumulation_steps=1"}
BATCH = [*TINY, "train_batch_size=1", "checkpointing_steps=2"]
# nothing but training
BARE = [*BATCH, *UNMEASURED]


def environment(rank=None, size=None, port=None):
    paths = filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    if rank is not None:
        env |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return env


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def start(size, argv, **how):
    """So many processes with torchrun's variables, by rank, without a launcher."""
    port = free_port()
    return [Forked(argv, env=environment(rank, size, port), **how) for rank in range(size)]


def finish(processes, timeout=120):
    """Exit codes and what was said, by rank."""
    said = [process.communicate(timeout) for process in processes]
    return [p.returncode for p in processes], [out for out, _ in said], [err for _, err in said]


def words_of(out, *words):
    return ["finetune", "--recipe", "quickstart", "--out", str(out), *words]


def run(out, *words, size=2):
    """By ``size`` processes; what the first one said, and that the others said nothing and ended alike."""
    codes, outs, errs = finish(start(size, words_of(out, *words)))
    assert set(codes) == {codes[0]} and not any(outs[1:]) and not any(errs[1:]), (codes, errs)
    return subprocess.CompletedProcess(words, codes[0], outs[0], errs[0])


def launched(out, *words):
    """``sdo finetune --processes 2`` with everything that starts: a launcher, and workers with a command line."""
    argv = [sys.executable, "-m", "sdo_cli", *words_of(out, *words), "--processes", "2", "--json"]
    return subprocess.Popen(argv, stderr=subprocess.PIPE, text=True, env=environment())


def lightly_launched(out, *words):
    """The same, but all three are forks."""
    return lightly([*words_of(out, *words), "--processes", "2", "--json"], out.with_name("sdo"))


def lightly(argv, script):
    """``sdo argv``, where the launcher starts ``light_worker.py``, written to ``script``, for ``sdo``."""
    if not script.exists():
        script.write_text(f"#!{sys.executable}\n{(HERE / 'light_worker.py').read_text()}")
        script.chmod(0o755)
    env = environment() | {"SDO_TEST_SERVER": address(), "SDO_TEST_WORKER": str(script)}
    return Forked(argv, env=env, call="several:launching")


def alive(folder):
    """Processes that name this run folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(folder).encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found + [pid for pid in forks(folder).values() if Path(f"/proc/{pid}").exists()]


def forks(folder):
    """Of light workers, by rank."""
    return {int(path.name[6:]): int(path.read_text()) for path in folder.parent.glob("child-*")}


def workers(folder):
    """By rank."""
    found = forks(folder)
    if found:
        return found
    for pid in alive(folder):
        entries = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        if ranks := [int(entry[5:]) for entry in entries if entry.startswith(b"RANK=")]:
            found[ranks[0]] = pid
    return found


def metrics(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def weights(folder):
    return load_file(folder / "pytorch_lora_weights.safetensors")


# the same whatever the number of processes


def test_draws_and_the_first_gradient(tmp_path):
    found, gradients = {}, {}
    for size in (1, 2, 4):
        out = tmp_path / str(size)
        out.mkdir()
        codes, _, errs = finish(start(size, ["draws", out, *BARE, SPLIT[size]], call="several:main"))
        assert not any(codes), errs
        parts = [json.loads((out / f"draws-{rank}.json").read_text()) for rank in range(size)]
        assert all(len(part) == 4 // size for part in parts)
        found[size] = {number: slice_ for part in parts for number, slice_ in part.items()}
        every = [torch.load(out / f"gradient-{rank}.pt", weights_only=True) for rank in range(size)]
        assert all(torch.equal(every[0], other) for other in every)
        gradients[size] = every[0]
    assert len({slice_["noise"] for slice_ in found[1].values()}) == 4
    assert found[1] == found[2] == found[4]
    assert gradients[1].norm() > 0
    for size in (2, 4):
        assert (gradients[size] - gradients[1]).norm() <= 1e-6 * gradients[1].norm()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same six steps by 1, 2 and 4 processes."""
    root = tmp_path_factory.mktemp("runs")
    for size in (1, 2, 4):
        done = run(root / str(size), *BATCH, SPLIT[size], "max_train_steps=6", "-q", size=size)
        assert done.returncode == 0, done.stderr
        assert "held-out prompts (3)" in done.stdout and done.stdout.count("pytorch_lora_weights") == 1
    return root


def test_six_steps(runs):
    one = metrics(runs / "1")
    assert len(one) == 6
    for size in (2, 4):
        other = metrics(runs / str(size))
        assert [row["calls"] for row in other] == [row["calls"] for row in one]
        for mine, theirs in zip(one, other, strict=True):
            assert theirs["loss"] == pytest.approx(mine["loss"], abs=1e-4)
        assert json.loads((runs / str(size) / "manifest.json").read_text())["processes"] == size
        names = [{p.relative_to(runs / str(n)) for p in (runs / str(n)).rglob("*") if p.is_file()} for n in (1, size)]
        assert names[0] == names[1]


def cut_back(whole, folder):
    """A copy of the run as it was when it was killed after step 4 of 6."""
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "checkpoints" / "checkpoint-6")
    (folder / "pytorch_lora_weights.safetensors").unlink()
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "status": "running"}))


def test_a_run_goes_on_with_another_number_of_processes(runs, tmp_path):
    """Four samples a step, by one process and then by two; another number of samples is another run."""
    folder = tmp_path / "run"
    cut_back(runs / "1", folder)
    words = [*BATCH, "max_train_steps=6", "--resume"]
    refused = run(folder, *words, SPLIT[1])
    assert refused.returncode == 2 and "global_batch: 4 there, 8 here" in refused.stderr
    assert refused.stderr.count("is another run") == 1 and "train_batch_size ×" in refused.stderr
    done = run(folder, *words, SPLIT[2])
    assert done.returncode == 0, done.stderr
    assert "resumed from" in done.stderr and "2 processes; a step is 4 samples" in done.stderr
    for name, value in weights(runs / "1").items():
        assert torch.allclose(weights(folder)[name], value, atol=1e-6), name


def test_evaluation_is_shared(tmp_path, runs):
    words = ["eval", "--prompts", "emoji-eval", "--limit", "3", "--seeds", "2"]
    words += ["--lora", str(runs / "1"), "--steps", "2", "--batch-size", "2"]
    for size in (1, 2):
        codes, outs, errs = finish(start(size, [*words, "--out", str(tmp_path / str(size))]))
        assert not any(codes), errs
        assert outs[0].count("distance-from-base") == 1 and not any(outs[1:])
    one, two = tmp_path / "1", tmp_path / "2"
    names = [sorted(p.relative_to(f) for p in f.rglob("*") if p.is_file()) for f in (one, two)]
    assert names[0] == names[1] and len([n for n in names[0] if n.suffix == ".png"]) == 12
    from PIL import Image, ImageChops

    for name in names[0]:
        if name.suffix == ".png":
            pair = [Image.open(f / name).convert("RGB") for f in (one, two)]
            assert max(high for _, high in ImageChops.difference(*pair).getextrema()) <= 1
    tables = [[json.loads(line) for line in (f / "scores.jsonl").read_text().splitlines()] for f in (one, two)]
    assert len(tables[0]) == len(tables[1]) > 24
    for mine, theirs in zip(*tables, strict=True):
        assert theirs["score"] == pytest.approx(mine["score"], abs=1e-5)
        assert {**theirs, "score": 0} == {**mine, "score": 0}


def test_samples_are_shared(tmp_path):
    words = ["sample", "a tiger", "a rose", "-n", "3", "--batch-size", "2", "--steps", "2", "--grid"]
    for size in (1, 2):
        codes, _, errs = finish(start(size, [*words, "--out", str(tmp_path / str(size))]))
        assert not any(codes), errs
    one, two = (sorted((tmp_path / name).iterdir()) for name in ("1", "2"))
    assert [p.name for p in one] == [p.name for p in two] and len(one) == 7
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(one, two, strict=True))


def test_gradients_are_added_up_and_objects_gathered(tmp_path):
    codes, _, errs = finish(start(3, ["add", tmp_path], call="several:main"))
    assert not any(codes), errs
    assert len(list(tmp_path.glob("added-*"))) == 3


def test_gradients_are_sent_while_the_last_backward_pass_still_runs(tmp_path):
    codes, _, errs = finish(start(2, ["overlap", tmp_path], call="several:main"))
    assert not any(codes), errs
    assert len(list(tmp_path.glob("overlapped-*"))) == 2


def test_one_process_is_the_usual_case():
    world = World()
    assert world.is_main and world.gather(3) == [3] and world.share(lambda: 4) == 4 and world.largest(5) == 5
    assert [list(round_) for round_ in World(0, 2).rounds(5)] == [[0, 1], [2, 3], [4]]
    assert [World(1, 2).mine(n) for n in range(4)] == [False, True, False, True]


# started by others


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_started_by_torchrun_or_accelerate(tmp_path, launcher):
    starting = {
        "torchrun": ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port())],
        "accelerate": [
            *["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"],
            *["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"],
        ],
    }[launcher]
    words = [sys.executable, *starting, "-m", "sdo_cli", *words_of(tmp_path / "run", *BATCH, SPLIT[2])]
    done = subprocess.run([*words, "max_train_steps=1"], capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    assert "2 processes; a step is 4 samples" in done.stderr and len(metrics(tmp_path / "run")) == 1


def test_variables_that_are_missing_are_named(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(EnvironmentFault, match="RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT are not"), joined():
        pass


def test_a_model_in_shards_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(EnvironmentFault, match="asks for FSDP"), joined():
        pass


def test_more_than_there_is_is_refused(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for asked, said in (((2, None), "this machine has 0"), ((None, 0), "at least 1"), ((1, 1), "is for the CPU")):
        with pytest.raises(RecipeFault, match=said):
            wants_several(*asked)
    assert wants_several(None, 3) == 3 and wants_several(None, None) == 1


# failures


PLUGIN = """
import os
from rewards import reward

@reward("fragile", summary="fails on one process", licence="none needed")
class Fragile:
    calls = 0

    def score(self, images, prompts):
        self.calls += 1
        mean = images.flatten(1).mean(1)
        if os.environ.get("RANK", "0") == "1" and self.calls == 4:
            raise ValueError("the sky fell")
        return mean
"""
FRAGILE = ["rewards=[fragile]", "max_train_steps=5"]


def fragile(tmp_path):
    (tmp_path / "fragile.py").write_text(PLUGIN)
    return ["--plugin", str(tmp_path / "fragile.py"), *BARE, *FRAGILE, SPLIT[2]]


def test_one_that_raises_ends_all_with_its_message(tmp_path):
    words = fragile(tmp_path)
    processes = start(2, words_of(tmp_path / "run", "--json", *words))
    lines_until(processes[0], '"training", "done": 1')
    begin = time.monotonic()
    codes, _, errs = finish(processes)
    assert time.monotonic() - begin < 30 and codes == [2, 2]
    assert "process 1: " in errs[0] and errs[0].count("the sky fell") == 1 and errs[1] == ""
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["status"] == "failed"


def test_one_with_nan_makes_all_skip_the_step(tmp_path):
    words = [*BARE, "rollout={}", "max_train_steps=3", SPLIT[2]]
    codes, _, errs = finish(start(2, words_of(tmp_path / "run", *words), call="several:sick"))
    assert codes == [0, 0] and "step 2 skipped" in errs[0], errs
    assert [row["skipped"] for row in metrics(tmp_path / "run")] == [False, True, False]


def test_one_that_is_killed_ends_all(tmp_path):
    """The first, whose place another takes to say so."""
    processes = start(2, words_of(tmp_path / "run", "--json", *BARE, SPLIT[2], "max_train_steps=4000"))
    lines_until(processes[0], '"training", "done": 3')
    processes[0].kill()
    begin = time.monotonic()
    codes, _, errs = finish(processes)
    assert time.monotonic() - begin < 30 and codes == [-9, 1]
    assert "process 0: ended without a word" in errs[1] and "Traceback" not in errs[1]
    more = len(metrics(tmp_path / "run")) + 1
    done = run(tmp_path / "run", "--resume", *BARE, SPLIT[2], f"max_train_steps={more}")
    assert done.returncode == 0 and "resumed from" in done.stderr, done.stderr


def test_what_one_is_told_all_stop_for(tmp_path):
    folder = tmp_path / "run"
    words = [*BARE, SPLIT[2], "max_train_steps=4000", "trackers=[tensorboard]"]
    processes = start(2, words_of(folder, "--json", *words))
    lines_until(processes[0], '"training", "done": 1')
    processes[1].send_signal(signal.SIGTERM)
    codes, _, errs = finish(processes)
    assert codes == [75, 75] and "stopped (SIGTERM); what is done is kept" in errs[0] and errs[1] == ""
    assert saved_at_its_last_step(folder)


def saved_at_its_last_step(folder):
    kept = sorted((folder / "checkpoints").glob("checkpoint-*"), key=lambda path: path.stat().st_mtime)
    interrupted = json.loads((folder / "manifest.json").read_text())["status"] == "interrupted"
    return interrupted and kept[-1].name == f"checkpoint-{len(metrics(folder))}"


@pytest.mark.parametrize("launching", [lightly_launched, pytest.param(launched, marks=pytest.mark.slow)])
def test_the_launcher_passes_signals_on_and_codes_back(tmp_path, launching):
    folder = tmp_path / "run"
    process = launching(folder, *BARE, SPLIT[2], "max_train_steps=4000")
    lines_until(process, '"training", "done": 2')
    process.send_signal(signal.SIGUSR1)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 75 and "stopped (SIGUSR1); what is done is kept" in said
    assert "--processes 2" in said.splitlines()[-1] and "--resume" in said.splitlines()[-1]
    assert saved_at_its_last_step(folder) and alive(folder) == []
    # and goes on, until one of its workers is killed
    process = launching(folder, *BARE, SPLIT[2], "max_train_steps=4000", "--resume")
    lines_until(process, '"training", "done": 1')
    os.kill(workers(folder)[1], signal.SIGKILL)
    begin = time.monotonic()
    _, said = process.communicate(timeout=120)
    assert time.monotonic() - begin < 30 and process.returncode == 1
    assert said.count("process 1: ended without a word") == 1 and "Traceback" not in said
    assert alive(folder) == []


@pytest.mark.slow
def test_ctrl_c_reaches_workers_that_only_draw(tmp_path):
    argv = [sys.executable, "-m", "sdo_cli", "sample", "a tiger", "-n", "4000", "--batch-size", "1", "--json"]
    process = subprocess.Popen(
        [*argv, "--processes", "2", "--out", str(tmp_path / "s")], stderr=subprocess.PIPE, text=True, env=environment()
    )
    lines_until(process, '"images", "done": 4')
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and "what was drawn is in" in said and "Traceback" not in said
    assert alive(tmp_path / "s") == []


@pytest.mark.slow
def test_a_signal_before_they_listen_comes_back_as_its_code(tmp_path):
    """While Python is still importing: Slurm's scripts requeue 138 and 143."""
    process = launched(tmp_path / "run", *BATCH, SPLIT[2])
    wait_until(lambda: len(workers(tmp_path / "run")) == 2)
    for pid in workers(tmp_path / "run").values():
        os.kill(pid, signal.SIGUSR1)
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=90)
    assert process.returncode == 138 and alive(tmp_path / "run") == []


@pytest.mark.slow
def test_without_their_launcher_they_save_and_stop(tmp_path):
    folder = tmp_path / "run"
    process = launched(folder, *BATCH, SPLIT[2], "max_train_steps=4000")
    lines_until(process, '"training", "done": 2')
    process.kill()
    wait_until(lambda: alive(folder) == [])
    assert alive(folder) == [] and saved_at_its_last_step(folder)


def wait_until(holds, seconds=30):
    end = time.monotonic() + seconds
    while not holds() and time.monotonic() < end:
        time.sleep(0.2)


@pytest.mark.slow
def test_killed_at_random_moments_two_processes_end_as_if_left_alone(tmp_path):
    """One or both, with SIGKILL; within 1e-6 of the unbroken run."""
    seed = int(os.environ.get("SDO_SEED", time.time_ns() % 2**31))
    print(f"\nseed {seed}")
    moments, kills, folder = random.Random(seed), 0, tmp_path / "run"
    words = [*BATCH, SPLIT[2], "max_train_steps=20", "checkpointing_steps=1", "--resume"]
    whole = tmp_path / "whole"
    assert run(whole, *words, "-q").returncode == 0
    for _ in range(8):
        processes = start(2, words_of(folder, "--json", *words))
        for _, line in zip(range(moments.randint(2, 8)), processes[0].stderr, strict=False):
            del line
        time.sleep(moments.uniform(0, 0.5))
        if processes[0].poll() is not None:
            break
        moments.choice(processes).kill()
        kills += 1
        finish(processes)
    done = run(folder, *words, "-q")
    assert done.returncode == 0, done.stderr
    print(f"{kills} kills")
    assert kills >= 4
    for name, value in weights(whole).items():
        assert torch.allclose(weights(folder)[name], value, atol=1e-6), name
    assert [row["loss"] for row in metrics(folder)] == pytest.approx([r["loss"] for r in metrics(whole)], abs=1e-6)
