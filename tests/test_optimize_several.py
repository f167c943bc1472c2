"""`sdo optimize` by several processes, stopped, killed, and gone on with: the same files every time."""

import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import time

import entry
import pytest
from safetensors import safe_open
from test_parallel import environment, finish, lightly, start

PROMPTS = [f"a {name} on a teal background" for name in ("tiger", "rocket", "fish", "rose", "bus")]
# three groups: a pair, a pair, and one alone
QUICK = ["num_inference_steps=2", "batch_size=2", "measures=[judge]", "strip=3", "variables=[latent,guidance]"]
# enough to be met in the middle of a group
STEPS = 4


def words(out, *more, steps=STEPS):
    named = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    return ["optimize", *named, "-o", "clip", "--steps", str(steps), "--lr", "0.03", *QUICK, *more, "--out", str(out)]


def content(folder):
    """Everything but times, by path."""
    found = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.png")}
    found |= {name: (folder / name).read_text() for name in ("results.json", "resolved.yaml")}
    lines = [json.loads(line) for line in (folder / "objective.jsonl").read_text().splitlines()]
    found["steps"] = [{key: value for key, value in line.items() if key != "seconds"} for line in lines]
    with safe_open(folder / "variables.safetensors", "pt") as file:
        found["note"] = dict(file.metadata())
        found |= {name: file.get_tensor(name).numpy().tobytes() for name in file.keys()}  # noqa: SIM118
    return found


def assert_same(folder, other):
    mine, theirs = content(folder), content(other)
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if mine[name] != theirs[name]] == []
    assert not (folder / "kept").exists()
    assert json.loads((folder / "manifest.json").read_text())["status"] == "finished"


def done_by(size, argv):
    codes, outs, errs = finish(start(size, argv))
    assert set(codes) == {codes[0]} and not any(outs[1:]) and not any(errs[1:]), (codes, errs)
    return codes[0], outs[0], errs[0]


def wait_for(path, process, seconds=120):
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.02)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Left alone in one process."""
    out = tmp_path_factory.mktemp("whole") / "out"
    code, _, err = done_by(1, words(out))
    assert code == 0, err
    return out


@pytest.mark.parametrize("size", [2, 4])
def test_the_same_files_by_any_number_of_processes(whole, tmp_path, size):
    """One of four has no group at all."""
    code, out, err = done_by(size, words(tmp_path / "out"))
    assert code == 0 and "5 images" in out, err
    assert_same(tmp_path / "out", whole)
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["processes"] == size


def test_killed_in_the_middle_it_goes_on_as_if_left_alone(whole, tmp_path):
    """Two processes, without a word; then one, which finds what they had finished."""
    out = tmp_path / "out"
    processes = start(2, words(out, "--resume"))
    wait_for(out / "kept" / "group-00000.safetensors", processes[0])
    for process in processes:
        process.kill()
    assert finish(processes)[0] == [-9, -9]
    # half a file, as a kill may leave it
    (out / "strips" / ".00004.partial-1.png").write_bytes(b"")
    assert json.loads((out / "manifest.json").read_text())["status"] == "running"
    left = len(list((out / "kept").glob("group-*")))
    code, _, err = done_by(1, words(out, "--resume"))
    assert code == 0 and f"going on: {left} of 3 groups of images are finished" in err, err
    assert_same(out, whole)


def test_a_damaged_group_is_begun_again(whole, tmp_path):
    out = tmp_path / "out"
    processes = start(1, words(out))
    wait_for(out / "kept" / "group-00000.safetensors", processes[0])
    processes[0].kill()
    finish(processes)
    path = out / "kept" / "group-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    code, _, err = done_by(1, words(out, "--resume"))
    assert code == 0 and "going on" not in err, err
    assert_same(out, whole)


def test_what_one_is_told_all_stop_for_and_the_line_that_is_printed_goes_on(whole, tmp_path):
    out = tmp_path / "out"
    processes = start(2, words(out))
    wait_for(out / "kept" / "group-00000.safetensors", processes[0])
    processes[1].send_signal(signal.SIGTERM)
    codes, _, errs = finish(processes)
    assert codes == [75, 75] and "stopped (SIGTERM); what is done is kept in" in errs[0] and errs[1] == ""
    assert json.loads((out / "manifest.json").read_text())["status"] == "interrupted"
    line = shlex.split(errs[0].strip().splitlines()[-1].partition("go on with: ")[2])
    assert line[-3:] == ["--resume", "--out", str(out)]
    code, _, err = done_by(2, line[line.index("optimize") :])
    assert code == 0 and "going on:" in err, err
    assert_same(out, whole)
    again = entry.run(line[line.index("optimize") :])
    assert again.returncode == 0 and "is finished already" in again.stdout


def test_what_was_reached_is_there_when_it_is_stopped(tmp_path):
    """The first group in the middle, and by the other process the second: pictures of both, and their variables."""
    out = tmp_path / "out"
    processes = start(2, words(out, steps=4000))
    end = time.monotonic() + 120
    while not (out / "objective.jsonl").exists() or len((out / "objective.jsonl").read_text().splitlines()) < 6:
        assert time.monotonic() < end
        time.sleep(0.02)
    processes[0].send_signal(signal.SIGUSR1)
    codes, _, errs = finish(processes)
    assert codes == [75, 75] and "holds 4 of 5 images as far as they came" in errs[0]
    assert len(json.loads((out / "results.json").read_text())["images"]) == 4 and (out / "report.html").exists()
    done = entry.run(["sample", "--variables", str(out), "--out", str(tmp_path / "again")])
    assert done.returncode == 0, done.stderr
    for name in ("00000.png", "00003.png"):
        assert (tmp_path / "again" / name).exists()
    # they are begun anew, not gone on with
    assert not list((out / "kept").glob("group-*"))


def test_killed_before_its_report_it_is_not_finished(whole, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    (out / "report.html").unlink()
    done = entry.run(words(out, "--resume"))
    assert done.returncode == 0 and "is finished already" not in done.stdout and (out / "report.html").exists()
    assert_same(out, whole)


def test_another_job_does_not_go_on_in_the_folder(whole, tmp_path):
    before = content(whole)
    done = entry.run(words(whole, "--resume", "--seed", "7", steps=5))
    assert done.returncode == 2 and "steps: 4 there, 5 here" in done.stderr and "seed: 0 there, 7 here" in done.stderr
    assert "holds another job" in done.stderr and content(whole) == before
    full = entry.run(words(whole))
    assert full.returncode == 2 and "is not empty" in full.stderr and "--resume" in full.stderr
    (tmp_path / "mine.txt").touch()
    other = entry.run(words(tmp_path, "--resume"))
    assert other.returncode == 2 and "holds no job to go on with" in other.stderr
    nowhere = entry.run(words(tmp_path, "--resume")[:-2])
    assert nowhere.returncode == 2 and "--resume: says to go on with --out FOLDER" in nowhere.stderr


def test_the_launcher_starts_stops_and_goes_on(whole, tmp_path):
    """`--processes 2`, told by the one that was typed."""
    out, script = tmp_path / "out", tmp_path / "sdo"
    process = lightly(words(out, "--processes", "2"), script)
    wait_for(out / "kept" / "group-00000.safetensors", process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(120)
    assert process.returncode == 75, err
    line = shlex.split(err.strip().splitlines()[-1].partition("go on with: ")[2])
    process = lightly(line[line.index("optimize") :], script)
    _, err = process.communicate(120)
    assert process.returncode == 0 and "--processes" in line and "going on:" in err, err
    assert_same(out, whole)


def killed_until_done(argv, **how):
    """With one, two or three processes, any of them, with SIGKILL, ever later; how often."""
    seed = int(os.environ.get("SDO_SEED", time.time_ns() % 2**31))
    print(f"\nseed {seed}")
    moments, longest, kills = random.Random(seed), 4.0, 0
    while True:
        processes = start(moments.randint(1, 3), argv, **how)
        end = time.monotonic() + moments.uniform(0, longest)
        while time.monotonic() < end and processes[0].poll() is None:
            time.sleep(0.01)
        if processes[0].poll() is None:
            moments.choice(processes).kill()
        codes, _, errs = finish(processes)
        if set(codes) == {0}:
            return kills
        assert -signal.SIGKILL in codes and set(codes) <= {-signal.SIGKILL, 1}, (codes, errs)
        kills, longest = kills + 1, 1.5 * longest


@pytest.mark.slow
def test_killed_at_random_moments_it_is_as_if_left_alone(whole, tmp_path):
    out = tmp_path / "out"
    assert killed_until_done(words(out, "--resume")) >= 3
    assert_same(out, whole)


@pytest.mark.slow
def test_the_line_that_is_printed_can_be_typed(whole, tmp_path):
    out = tmp_path / "out"
    processes = start(1, words(out))
    wait_for(out / "kept" / "group-00000.safetensors", processes[0])
    processes[0].send_signal(signal.SIGTERM)
    _, _, errs = finish(processes)
    line = errs[0].strip().splitlines()[-1].partition("go on with: ")[2]
    done = subprocess.run(line, shell=True, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    assert_same(out, whole)
