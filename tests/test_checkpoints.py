"""Checkpoints and resuming: killed, stopped, damaged; what goes on is what would have been, bit for bit."""

import json
import os
import random
import re
import shutil
import signal
import time

import entry
import pytest
import torch
from forked import Forked
from safetensors.torch import load_file
from small_rewards import make_small_reward
from torch import nn

import rewards
from rewards.clip_encoder import ClipEncoder
from sdo_cli.cli.finetune import seconds_of
from sdo_cli.errors import CheckpointFault, RecipeFault, Stopped, TrainingFault
from sdo_cli.optimizers.stepper import Stepper
from sdo_cli.parallel.stopping import Stopping
from sdo_cli.progress import Silent
from sdo_cli.recipe.load import load_recipe
from sdo_cli.runs import checkpoint
from sdo_cli.runs.checkpoint import newest, restore, save
from sdo_cli.runs.resume import cut_lines, find, identity
from sdo_cli.training import prepare
from sdo_cli.training import run as running

STEPS = 4
TINY = [
    f"max_train_steps={STEPS}",
    "train_batch_size=2",
    "num_inference_steps=2",
    "checkpointing_steps=2",
    "validation.num_prompts=3",
    "validation.grid_prompts=1",
    "validation.grid_steps=2",
    "validation.batch_size=1",
]
# where nothing is said of held-out prompts
UNMEASURED = ["validation.prompts={}", "validation.rewards=[]"]


def command(out, *words):
    return ["finetune", "--recipe", "quickstart", "--out", str(out), *TINY, *words]


def run(out, *words):
    return entry.run(command(out, *words))


def outcome(folder):
    """What must be the same however often a run was stopped: weights, metrics but for the times, scores, pictures."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    weights = load_file(folder / "pytorch_lora_weights.safetensors")
    pictures = {str(p.relative_to(folder)): p.read_bytes() for p in sorted((folder / "samples").rglob("*.png"))}
    return (
        {name: tensor.numpy().tobytes() for name, tensor in weights.items()},
        [{key: value for key, value in row.items() if key != "seconds"} for row in rows],
        json.loads((folder / "validation.json").read_text()),
        pictures,
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that is never stopped."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    done = run(folder, "-q")
    assert done.returncode == 0, done.stderr
    return folder


def lines_until(process, wanted):
    """Read progress until a line holds ``wanted``; what was read."""
    read = []
    for line in process.stderr:
        read.append(line)
        if wanted in line:
            return read
    raise AssertionError("".join(read))


# stopped and resumed


@pytest.mark.parametrize(
    "wanted, delay, name",
    [
        ('"held-out, before", "done": 1', 0.0, "SIGKILL"),
        ('"training", "done": 3', 0.0, "SIGKILL"),
        ('"training", "done": 1', 0.05, "SIGTERM"),
        ('"held-out, after", "done": 1', 0.0, "SIGUSR1"),
        ('"training", "done": 2', 0.0, "SIGINT"),
    ],
)
def test_stopped_anywhere_and_resumed_it_is_what_it_would_have_been(whole, tmp_path, wanted, delay, name):
    folder = tmp_path / "run"
    process = Forked(command(folder, "--json"))
    lines_until(process, wanted)
    time.sleep(delay)
    process.send_signal(getattr(signal, name))
    _, rest = process.communicate(timeout=60)
    assert process.returncode == {"SIGKILL": -9, "SIGINT": 130}.get(name, 75), rest
    assert not (folder / "README.md").exists()
    if name != "SIGKILL":
        assert f"stopped ({name}); what is done is kept in {folder}/" in rest and "--resume" in rest
        assert json.loads((folder / "manifest.json").read_text())["status"] == "interrupted"
        steps = len((folder / "metrics.jsonl").read_text().splitlines())
    again = run(folder, "--resume")
    assert again.returncode == 0, again.stderr
    if "training" in wanted and name != "SIGKILL":
        # kept where it stopped, whichever step that is by now, not at the last regular checkpoint
        assert re.search(rf"resumed from .*checkpoint-{steps} ", again.stderr)
    assert outcome(folder) == outcome(whole)


@pytest.mark.slow
def test_killed_at_25_random_moments(whole, tmp_path):
    """Also while a checkpoint is written; one run, killed and resumed again and again."""
    seed = int(os.environ.get("SDO_SEED", time.time_ns() % 2**31))
    print(f"\nseed {seed}")
    moments, kills, rounds = random.Random(seed), 0, 0
    while kills < 25:
        folder = tmp_path / f"run{rounds}"
        rounds += 1
        for _ in range(12):
            process = Forked(command(folder, "--json", "--resume", "checkpointing_steps=1"))
            signs = moments.randint(1, 7)
            for _, line in zip(range(signs), process.stderr, strict=False):
                del line
            time.sleep(moments.uniform(0, 0.4))
            if process.poll() is not None:
                break
            process.send_signal(signal.SIGKILL)
            process.communicate()
            kills += 1
            if kills == 25:
                break
        again = run(folder, "--resume", "-q", "checkpointing_steps=1")
        assert again.returncode == 0, again.stderr
        assert outcome(folder) == outcome(whole)
    print(f"{kills} kills over {rounds} runs")


class StopsAt(Stopping):
    """Asks to stop at one of the safe points."""

    def __init__(self, point):
        super().__init__()
        self.left = point

    def check(self):
        super().check()
        self.left -= 1
        if self.left == 0:
            raise Stopped("SIGTERM")


# all built-in ones that read prompts
READERS = ("clip-score", "hps-v2.1", "pickscore-v1", "imagereward-v1", "cyclereward-combo", "mps-v1")


@pytest.fixture
def readers(tmp_path, tables):
    """Overrides of a run on every reward that reads prompts, a plug-in's too; three prompts come over and over."""
    del tables

    @rewards.reward("nearness", summary="a plug-in on the package's own encoder")
    class Nearness:
        def __init__(self):
            self.encoder = ClipEncoder("embedded")

        def score(self, images, prompts):
            return (self.encoder.images(images) * self.encoder.prompts(prompts)).sum(-1)

    specs = [{"name": name, "options": make_small_reward(name, tmp_path / name)} for name in READERS]
    told = json.dumps([*specs, {"name": "nearness"}])
    lines = ["a tiger on a teal background", "a red bus", "two cats asleep on a sofa"]
    return [*TINY, *UNMEASURED, f"rewards={told}", f"prompts={{lines: {json.dumps(lines)}}}", "max_train_steps=5"]


def trained_on(words, folder, point=0, **more):
    """Weights and metrics of a run, stopped at a safe point and resumed where one is given."""
    loaded = load_recipe("quickstart", words)
    if point:
        with pytest.raises(Stopped):
            running.finetune(loaded, folder, Silent(), stopping=StopsAt(point))
    running.finetune(loaded, folder, Silent(), resume=bool(point))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    weights = load_file(folder / "pytorch_lora_weights.safetensors")
    return {name: tensor.numpy().tobytes() for name, tensor in weights.items()}, [
        {key: value for key, value in row.items() if key != "seconds"} for row in rows
    ]


def test_prompts_that_come_again_are_read_as_before_a_stop(readers, tmp_path):
    """What rewards keep of a prompt does not hang on the batch that first asked: a resumed run has seen fewer."""
    left_alone = trained_on(readers, tmp_path / "whole")
    for point in (2, 4):
        assert trained_on(readers, tmp_path / f"cut{point}", point) == left_alone


def test_a_time_limit_saves_before_the_wall_and_resume_finds_the_run(tmp_path, whole):
    """So short a limit leaves no room for anything but the first safe point; the folder's name has the time in it."""
    words = [arg for arg in command("x", f"output_dir={tmp_path}") if arg not in ("--out", "x")]
    first = entry.run([*words, "--resume", "--time-limit", "0:00:01"])
    assert first.returncode == 75 and "stopped (time limit)" in first.stderr
    (folder,) = tmp_path.iterdir()
    second = entry.run([*words, "--resume"])
    assert second.returncode == 0, second.stderr
    assert [p.name for p in tmp_path.iterdir()] == [folder.name] and outcome(folder) == outcome(whole)
    third = run(folder, "--resume")
    assert third.returncode == 0 and "is finished already" in third.stdout


def test_more_steps_for_a_finished_run(tmp_path):
    """A constant rate: two runs of two steps are one of four, held-out scores of the beginning kept."""
    folder = tmp_path / "run"
    words = ["lr_scheduler=constant", "validation.num_prompts=1", "validation.grid_prompts=0"]
    assert run(folder, "-q", "max_train_steps=2", *words).returncode == 0
    more = run(folder, "--resume", *words)
    assert more.returncode == 0 and "resumed from" in more.stderr and "step 2 of 4" in more.stderr
    straight = tmp_path / "straight"
    assert run(straight, "-q", *words).returncode == 0
    assert outcome(folder)[:3] == outcome(straight)[:3]


def test_another_recipe_is_refused_with_what_differs(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    before = outcome(tmp_path / "run")
    words = ["learning_rate=0.5", "lora.rank=2", "prompts={lines: [a tiger]}", "max_train_steps=9"]
    done = run(tmp_path / "run", "--resume", *words)
    assert done.returncode == 2
    for said in ("learning_rate: 0.0004 there, 0.5 here", "lora.rank: 16 there, 2 here", "prompts: ", "is another run"):
        assert said in done.stderr, done.stderr
    assert "max_train_steps:" not in done.stderr and outcome(tmp_path / "run") == before
    done = run(tmp_path / "run", "--resume", "max_train_steps=4", "learning_rate=0.001")
    assert done.returncode == 2 and "learning_rate: 0.0004 there, 0.001 here" in done.stderr
    done = run(tmp_path / "run", "--resume", "max_train_steps=4")
    assert done.returncode == 0 and "is finished already" in done.stdout


def test_a_run_that_is_still_running_is_not_resumed(tmp_path):
    # long enough to be there when the second one comes
    words = command(tmp_path / "r", "-q", "max_train_steps=4000", "checkpointing_steps=500", *UNMEASURED)
    process = Forked(words)
    while not (tmp_path / "r" / ".lock").exists() and process.poll() is None:
        time.sleep(0.1)
    second = run(tmp_path / "r", "--resume", "max_train_steps=4000", *UNMEASURED)
    assert second.returncode == 2 and "another process works in" in second.stderr
    process.kill()
    process.communicate()
    third = run(tmp_path / "r", "--resume", "-q", "max_train_steps=1", *UNMEASURED)
    assert third.returncode == 0, "a killed one holds no lock"


def test_a_folder_of_something_else_is_not_resumed(tmp_path):
    (tmp_path / "mine.txt").write_text("x")
    done = run(tmp_path, "--resume")
    assert done.returncode == 2 and "is not empty and holds no run" in done.stderr


@pytest.mark.parametrize(
    "text, seconds",
    [("3:50:00", 13800), ("50:00", 3000), ("90", 5400), ("1-12", 129600), ("1-0:30", 88200), ("2-1:00:01", 176401)],
)
def test_times_are_read_as_slurm_writes_them(text, seconds):
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "1:2:3:4", "-5", "1.5", "x-1"])
def test_what_is_no_time_is_refused(text):
    with pytest.raises(RecipeFault, match="is no time"):
        seconds_of(text)


# steps that are not finite


class Sometimes:
    """Clip-score, but NaN in some of its calls, and with it the gradient."""

    def __init__(self, reward, bad):
        self.reward, self.bad, self.calls = reward, bad, 0

    def score(self, images, prompts):
        self.calls += 1
        return self.reward.score(images, prompts) * (float("nan") if self.calls in self.bad else 1.0)


def run_with(monkeypatch, folder, bad, *words):
    """In this process: what the run said."""
    real, said = prepare.reward_of, []
    monkeypatch.setattr(prepare, "reward_of", lambda *a: Sometimes(real(*a), bad))

    class Notes(Silent):
        def note(self, text):
            said.append(text)

    # every step scores
    words = ("rollout={}", *words)
    loaded = load_recipe("quickstart", [*TINY, *UNMEASURED, "checkpointing_steps=1", *words])
    running.finetune(loaded, folder, Notes())
    return said


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(tmp_path, monkeypatch):
    """Step 3 of 4: no checkpoint of it, the rate stays; the run goes on to its end."""
    said = run_with(monkeypatch, tmp_path / "r", [3], "checkpoints_total_limit=0")
    assert "step 3 skipped: a reward or the gradient was not finite" in said
    text = (tmp_path / "r" / "metrics.jsonl").read_text()
    rows = [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]
    assert [row["skipped"] for row in rows] == [False, False, True, False]
    assert rows[2]["rewards"] == {"clip-embedded": None} and rows[3]["learning_rate"] == rows[2]["learning_rate"]
    kept = {path.name for path in (tmp_path / "r" / "checkpoints").glob("checkpoint-*")}
    assert kept == {f"checkpoint-{step}" for step in (1, 2, 4)}
    weights = load_file(tmp_path / "r" / "pytorch_lora_weights.safetensors")
    ups = [v for k, v in weights.items() if ".up." in k or ".lora_B." in k]
    assert all(torch.isfinite(value).all() for value in ups) and any(value.any() for value in ups)
    assert "<h1>Run: quickstart</h1>" in (tmp_path / "r" / "report.html").read_text()


def test_too_many_in_a_row_end_the_run_with_the_last_good_checkpoint(tmp_path, monkeypatch):
    with pytest.raises(TrainingFault, match="step 4: the reward clip-embedded is not a finite number for the third"):
        run_with(monkeypatch, tmp_path / "r", [2, 3, 4], "max_skipped_steps=3")
    assert json.loads((tmp_path / "r" / "manifest.json").read_text())["status"] == "failed"
    found, damaged = newest(tmp_path / "r")
    assert found.step == 1 and damaged == []
    assert not (tmp_path / "r" / "pytorch_lora_weights.safetensors").exists()


@pytest.mark.parametrize("words", [[], ["mixed_precision=fp16"]])
def test_gradients_that_are_not_finite_move_nothing(tmp_path, words):
    one = stepper(tmp_path, "max_skipped_steps=3", "ema_decay=0.5", *words)
    before = walk(one, range(2))
    rate = one.rate.get_last_lr()
    for number in (2, 3):
        for parameter in one.parameters:
            parameter.grad = torch.full_like(parameter, float("inf"))
        assert one.step(number).skipped
    assert (
        all(torch.equal(a, b) for a, b in zip(one.parameters, before, strict=True)) and one.rate.get_last_lr() == rate
    )
    walk(one, range(4, 5))
    assert not torch.equal(one.parameters[0], before[0]), "a good step in between begins the count anew"
    for number in (5, 6):
        one.parameters[0].grad = torch.full_like(one.parameters[0], float("nan"))
        one.step(number)
    with pytest.raises(TrainingFault, match=r"step 7: the gradient is not finite.* for the third time in a row"):
        one.parameters[0].grad = torch.full_like(one.parameters[0], float("nan"))
        one.step(7)


# signals


def test_ctrl_c_twice_stops_at_once():
    notes = []
    with Stopping(note=notes.append) as stopping:
        os.kill(os.getpid(), signal.SIGINT)
        # a scheduler's signal comes twice, to the process and through its parent
        os.kill(os.getpid(), signal.SIGINT)
        assert len(notes) == 1 and "Ctrl-C again" in notes[0]
        time.sleep(0.6)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)
        with pytest.raises(Stopped, match="SIGINT"):
            stopping.check()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_the_time_limit_leaves_room_for_the_longest_step(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("sdo_cli.parallel.stopping.time.monotonic", lambda: clock[0])
    stopping = Stopping(100.0)
    for now in (10.0, 20.0, 40.0, 60.0):
        clock[0] = now
        stopping.check()
    clock[0] = 66.0
    with pytest.raises(Stopped, match="time limit"):
        stopping.check()


# what a checkpoint holds


def stepper(tmp_path, *words, seed=0):
    recipe = load_recipe("quickstart", ["max_train_steps=20", "lr_warmup_steps=2", *words]).recipe
    generator = torch.Generator().manual_seed(seed)
    parameters = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((3, 2), (4,))]
    return Stepper(recipe, parameters)


def walk(stepper, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for parameter in stepper.parameters:
            gradient = torch.randn(parameter.shape, generator=generator)
            # one that overflows: the scaler halves its scale
            parameter.grad = gradient * stepper.scale * (float("inf") if stepper.scaler and step == 3 else 1.0)
        stepper.step(step)
    return [parameter.detach().clone() for parameter in stepper.parameters]


@pytest.mark.parametrize("words", [[], ["ema_decay=0.9"], ["mixed_precision=fp16"], ["lr_scheduler=linear"]])
def test_what_goes_on_from_a_checkpoint_goes_the_same_way(tmp_path, words):
    straight = stepper(tmp_path, *words)
    expected = walk(straight, range(8))
    straight.finish()
    first = stepper(tmp_path, *words)
    walk(first, range(5))
    save(tmp_path, 5, first, {}, keep=2)
    second = stepper(tmp_path, *words, seed=9)
    found, damaged = newest(tmp_path)
    assert found.step == 5 and damaged == []
    restore(found, second)
    assert all(torch.equal(a, b) for a, b in zip(walk(second, range(5, 8)), expected, strict=True))
    assert second.rate.get_last_lr() == straight.rate.get_last_lr() and second.scale == straight.scale
    second.finish()
    assert all(torch.equal(a, b) for a, b in zip(second.parameters, straight.parameters, strict=True))


def test_random_states_come_back(tmp_path):
    import numpy as np

    kept = stepper(tmp_path)
    save(tmp_path, 1, kept, {}, keep=1)
    first = (torch.rand(3).tolist(), random.random(), np.random.rand(2).tolist())
    restore(newest(tmp_path)[0], kept)
    assert (torch.rand(3).tolist(), random.random(), np.random.rand(2).tolist()) == first


def test_a_checkpoint_of_other_parameters_is_refused(tmp_path):
    save(tmp_path, 1, stepper(tmp_path), {}, keep=1)
    other = stepper(tmp_path)
    other.parameters.append(nn.Parameter(torch.zeros(2)))
    with pytest.raises(CheckpointFault, match="does not fit this run: it holds 2 trained tensors, this run has 3"):
        restore(newest(tmp_path)[0], other)


def test_old_ones_go_and_the_newest_complete_one_never(tmp_path):
    one = stepper(tmp_path)
    for step in (1, 2, 3, 4):
        save(tmp_path, step, one, {}, keep=2)
    folder = tmp_path / "checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == ["checkpoint-3", "checkpoint-4"]
    # a damaged newer one does not push the older ones out
    (folder / "checkpoint-4" / "complete.json").unlink()
    save(tmp_path, 5, one, {}, keep=2)
    assert {p.name for p in folder.iterdir()} == {"checkpoint-3", "checkpoint-4", "checkpoint-5"}
    assert newest(tmp_path)[0].step == 5
    for step in (6, 7):
        save(tmp_path, step, one, {}, keep=0)
    assert newest(tmp_path)[0].step == 7 and (folder / "checkpoint-5").exists()


def test_what_is_half_written_is_never_picked_up(tmp_path, monkeypatch):
    one = stepper(tmp_path)
    save(tmp_path, 1, one, {}, keep=2)
    for broken in ("save_file", "write_json", "_describe"):
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, broken, lambda *a, **k: (_ for _ in ()).throw(OSError(28, "No space left")))
            with pytest.raises(OSError, match="No space"):
                save(tmp_path, 2, one, {}, keep=2)
        assert newest(tmp_path)[0].step == 1
    save(tmp_path, 2, one, {}, keep=2)
    assert newest(tmp_path)[0].step == 2 and not list((tmp_path / "checkpoints").glob(".partial*"))


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Two checkpoints, of steps 3 and 5."""
    folder = tmp_path_factory.mktemp("two")
    one = stepper(folder)
    for step in (3, 5):
        walk(one, range(step - 2, step))
        save(folder, step, one, {"seed": 0}, keep=2)
    return folder


NAMES = ("state.safetensors", "state.json", "complete.json")


def truncated(path, share):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def flipped(path, share):
    content = bytearray(path.read_bytes())
    content[min(len(content) - 1, int(len(content) * share))] ^= 0x10
    path.write_bytes(bytes(content))


DAMAGE = {
    **{f"{n} truncated to {s}": (n, lambda p, s=s: truncated(p, s)) for n in NAMES for s in (0.1, 0.5, 0.99)},
    **{f"{n} emptied": (n, lambda p: p.write_bytes(b"")) for n in NAMES},
    **{f"{n} removed": (n, lambda p: p.unlink()) for n in NAMES},
    **{f"{n} longer": (n, lambda p: p.write_bytes(p.read_bytes() + b"\0")) for n in NAMES[:2]},
    **{
        f"{n} flipped at {s}": (n, lambda p, s=s: flipped(p, s))
        for n in NAMES[:2]
        for s in (0, 0.02, 0.2, 0.4, 0.6, 0.8, 1)
    },
    **{f"{n} of the other": (n, lambda p: shutil.copy(p.parent.parent / "checkpoint-3" / p.name, p)) for n in NAMES},
    **{
        f"{a} swapped with {b}": (a, lambda p, b=b: swapped(p, p.with_name(b)))
        for a, b in ((NAMES[0], NAMES[1]), (NAMES[1], NAMES[2]), (NAMES[0], NAMES[2]))
    },
    **{f"{n} a folder": (n, lambda p: (p.unlink(), p.mkdir())) for n in NAMES},
    "marker of nonsense": (NAMES[2], lambda p: p.write_text('["no"]')),
    "marker without hashes": (NAMES[2], lambda p: p.write_text('{"step": 5, "files": {}}')),
    "marker of another step": (NAMES[2], lambda p: p.write_text(p.read_text().replace('"step": 5', '"step": 6'))),
}


def swapped(a, b):
    one, other = a.read_bytes(), b.read_bytes()
    a.write_bytes(other)
    b.write_bytes(one)


def test_there_are_forty_ways_to_damage_one():
    assert len(DAMAGE) >= 40


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_older_one_taken(two, tmp_path, name):
    shutil.copytree(two, tmp_path / "run")
    file, harm = DAMAGE[name]
    harm(tmp_path / "run" / "checkpoints" / "checkpoint-5" / file)
    found, damaged = newest(tmp_path / "run")
    assert found.step == 3 and len(damaged) == 1 and "checkpoint-5: " in damaged[0]
    again = stepper(tmp_path)
    restore(found, again)
    assert torch.equal(again.parameters[0], found.tensors["/stepper/parameters/0"])


def test_a_damaged_one_is_said_when_a_run_is_resumed(two, tmp_path):
    shutil.copytree(two, tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "checkpoint-5" / "state.json").write_text("{}")
    notes = []

    class Notes(Silent):
        def note(self, text):
            notes.append(text)

    with pytest.raises(RecipeFault, match="is another run"):
        find(load_recipe("quickstart", TINY), tmp_path / "run", Notes())
    assert "passed over" in notes[0] and "state.json is damaged" in notes[0]


def test_a_run_begun_before_the_toys_had_names_goes_on_under_its_own(tmp_path, monkeypatch):
    """Its tables hold clip-score; those of a new run clip-embedded."""
    words = ["checkpointing_steps=1", "guard.steps=1", "guard.prompts={lines: [a tiger, a rose]}", "guard.seeds=1"]
    words += ["guard.rewards=[aesthetic]", "validation.rewards=[judge]"]
    with monkeypatch.context() as before:
        before.setattr("sdo_cli.recipe.load.with_toys_named", lambda recipe: (recipe, ""))
        done = run(tmp_path / "run", *words, "max_train_steps=1")
        assert done.returncode == 0, done.stderr
    done = run(tmp_path / "run", *words, "max_train_steps=2", "--resume")
    assert done.returncode == 0 and "resumed from" in done.stderr, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [list(row["rewards"]) for row in rows] == [["clip-score"]] * 2
    held_out = json.loads((tmp_path / "run" / "validation.json").read_text())
    assert set(held_out["before"]) == set(held_out["after"]) == {"clip-score", "judge"}
    checks = [json.loads(line) for line in (tmp_path / "run" / "guard.jsonl").read_text().splitlines()]
    assert len(checks) == 3 and {check["untrained"][0] for check in checks} == {"aesthetic"}
    # in the new spelling it is the same run, too
    done = run(tmp_path / "run", *words, "max_train_steps=3", "rewards=[clip-embedded]", "--resume")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [list(row["rewards"]) for row in rows] == [["clip-score"]] * 3


def test_metrics_are_cut_where_the_checkpoint_was(tmp_path):
    rows = [{"step": step, "loss": step / 7} for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 4, "lo')
    assert cut_lines(tmp_path / "metrics.jsonl", 2) == rows[:2]
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == rows[:2]


def test_what_a_run_is_leaves_budget_and_logging_out():
    def of(*words):
        return identity(load_recipe("quickstart", list(words)))

    plain = of()
    assert of("max_train_steps=7", "checkpointing_steps=1", "validation.grid_steps=3", "output_dir=x") == plain
    assert of("validation.prompts.file=emoji-heldout.txt") == plain
    for word in ("seed=1", "train_batch_size=3", "gradient.options={step_choice: last}", "lora.alpha=3", "model=a/b"):
        assert of(word) != plain, word
