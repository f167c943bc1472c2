"""`sdo prune` by several processes, stopped, killed, and gone on with: the same scores, plans and figures."""

import json
import shlex
import signal
import subprocess
from dataclasses import replace

import entry
import pytest
import torch
from safetensors.torch import load_file
from test_optimize_several import done_by, killed_until_done, wait_for
from test_parallel import environment, finish, lightly, start
from test_prune import setting  # noqa: F401

from sdo_cli.files import alone_in
from sdo_cli.parallel.world import World
from sdo_cli.prune.search import SearchSettings, search
from sdo_cli.runs.kept import Kept

NAMES = ("tiger", "bus", "dog", "rose", "boat", "cat", "fish", "tree")
UPDATES = 5
ARMS = 10


@pytest.fixture(scope="module")
def words(small, tmp_path_factory):
    """words(out, …): a search with three prompts an update, a plan, and its controls, in batches of one picture."""
    prompts = tmp_path_factory.mktemp("prompts") / "mine.txt"
    prompts.write_text("".join(f"a {name} on the cat\n" for name in NAMES))

    def command(out, *more, updates=UPDATES):
        given = ["-m", small("sd15"), "-p", prompts, "--steps", 3, "--guidance", 3, "--ratio", 0.6, "--lr", 0.4]
        given += ["--updates", updates, "--search-batch", 3, "--live-calls", 1, "--num-prompts", 3, "--rounds", 1]
        given += ["--batch-size", 1, "--reward", "colorfulness", *more, "--out", out]
        return ["prune", *map(str, given)]

    return command


def content(folder):
    """Everything but times."""
    lines = [json.loads(line) for line in (folder / "search.jsonl").read_text().splitlines()]
    figures = json.loads((folder / "measures.json").read_text())
    plans = {path.name: json.loads(path.read_text()) for path in folder.glob("plan-*.json")}
    for tree in (*figures["arms"], *plans.values()):
        del tree["cost"]["speed_up"]
    return {
        "scores": load_file(folder / "scores.safetensors")["scores"].numpy().tobytes(),
        "steps": [{key: value for key, value in line.items() if key != "seconds"} for line in lines],
        "figures": {key: value for key, value in figures.items() if key not in ("written", "machine", "versions")},
        "plans": plans,
        "files": {path.name for path in folder.iterdir()},
    }


def assert_same(folder, other):
    mine, theirs = content(folder), content(other)
    assert [name for name in mine if mine[name] != theirs[name]] == []
    assert json.loads((folder / "manifest.json").read_text())["status"] == "finished"


@pytest.fixture(scope="module")
def whole(words, tmp_path_factory):
    """Left alone in one process."""
    out = tmp_path_factory.mktemp("whole") / "out"
    code, _, err = done_by(1, words(out))
    assert code == 0, err
    arms = [arm["name"] for arm in json.loads((out / "measures.json").read_text())["arms"]]
    # those of few steps once more where less guidance is nearer
    assert len([name for name in arms if " guidance " not in name]) == ARMS
    return out


@pytest.mark.parametrize("size", [2, 4])
def test_the_same_by_any_number_of_processes(words, whole, tmp_path, size):
    """One of four has neither a sample of an update nor a picture."""
    code, said, err = done_by(size, words(tmp_path / "out"))
    assert code == 0 and "optimal-steps-1" in said, err
    assert_same(tmp_path / "out", whole)
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["processes"] == size


def counts_of(argv, where):
    """What each of two processes did itself."""
    codes, _, errs = finish(start(2, argv, cwd=where, call="several:counting"))
    assert codes == [0, 0], errs
    return [json.loads((where / f"counts-{rank}.json").read_text()) for rank in range(2)]


def test_each_does_its_share(words, tmp_path):
    """Of two updates with three samples, of two samplers' three batches; of a schedule's nodes: 4, 3 and 2 calls."""
    first, second = counts_of(words(tmp_path / "out", "--no-controls", updates=2), tmp_path)
    assert (first["shortcut_update"], second["shortcut_update"]) == (4, 2)
    assert (first["pictures"], second["pictures"]) == (4, 2)
    steps = ["--method", "optimal-steps", "--steps", "5", "--ratio", "0.1", "--num-prompts", "0"]
    first, second = counts_of(words(tmp_path / "steps", *steps), tmp_path)
    assert (first["_output"], second["_output"]) == (5, 4)
    alone = entry.run(words(tmp_path / "alone", *steps))
    assert alone.returncode == 0, alone.stderr
    for name in ("plan-0.10.json", "plan-0.60.json"):
        assert (tmp_path / "steps" / name).read_text() == (tmp_path / "alone" / name).read_text()


def test_killed_in_the_search_and_while_measuring_it_is_as_if_left_alone(words, whole, tmp_path):
    """By two processes, which lose the search after its last kept update; by one, which loses the arm it was at."""
    out, told = tmp_path / "out", []
    for size, piece, said in ((2, "search", ""), (1, "arm-002", "going on after update"), (2, None, "")):
        processes = start(size, words(out, "--resume"), call="several:saving")
        if piece is not None:
            wait_for(out / "kept" / f"{piece}.safetensors", processes[0])
            for process in processes:
                process.kill()
        codes, _, errs = finish(processes)
        assert codes == [-9 if piece else 0] * size and said in errs[0], errs
        told.append(errs[0])
        if piece == "search":
            # an update after the kept one, and a line that was cut off
            later = json.dumps({"update": 99, "distance": 0.0, "kept": 1.0, "seconds": 0.0})
            lines = (out / "search.jsonl").read_text()
            (out / "search.jsonl").write_text(f'{lines}{later}\n{{"update": 100, "dist')
    # what was found before is not looked for again
    for what in ("times: ", "optimal-steps: ", "images: full: "):
        assert what in told[1] and what not in told[2]
    assert_same(out, whole)


def test_what_one_is_told_all_stop_for_and_the_line_that_is_printed_goes_on(words, tmp_path):
    """In the search, after whichever update it is."""
    out = tmp_path / "out"
    processes = start(2, words(out, "--num-prompts", "0", updates=8))
    wait_for(out / "search.jsonl", processes[0])
    processes[1].send_signal(signal.SIGTERM)
    codes, _, errs = finish(processes)
    assert codes == [75, 75] and "stopped (SIGTERM); what is done is kept in" in errs[0] and errs[1] == ""
    assert json.loads((out / "manifest.json").read_text())["status"] == "interrupted"
    taken = len((out / "search.jsonl").read_text().splitlines())
    line = shlex.split(errs[0].strip().splitlines()[-1].partition("go on with: ")[2])
    assert line[-3:] == ["--resume", "--out", str(out)]
    code, _, err = done_by(2, line[line.index("prune") :])
    assert code == 0 and f"going on after update {taken} of 8" in err, err
    alone = tmp_path / "alone"
    assert done_by(1, words(alone, "--num-prompts", "0", updates=8))[0] == 0
    scores = [load_file(folder / "scores.safetensors")["scores"] for folder in (out, alone)]
    assert torch.equal(*scores)
    assert (out / "plan-0.60.json").read_text() == (alone / "plan-0.60.json").read_text()
    again = entry.run(line[line.index("prune") :])
    assert again.returncode == 0 and "is finished already" in again.stdout


def test_another_job_does_not_go_on_in_the_folder(words, whole, tmp_path):
    before = content(whole)
    other = tmp_path / "other.txt"
    other.write_text("".join(f"a {name}\n" for name in NAMES))
    done = entry.run(words(whole, "--resume", "--seed", "7", "-p", other, updates=6))
    assert done.returncode == 2 and "holds another job" in done.stderr and content(whole) == before
    for said in ("seed: 0 there, 7 here", "search.updates: 5 there, 6 here", "prompts: ", "measure.prompts: "):
        assert said in done.stderr, done.stderr
    full = entry.run(words(whole))
    assert full.returncode == 2 and "is not empty" in full.stderr and "--resume" in full.stderr
    assert entry.run(words(tmp_path, "--resume")).returncode == 2
    nowhere = entry.run(words(tmp_path, "--resume")[:-2])
    assert nowhere.returncode == 2 and "--resume: says to go on with --out FOLDER" in nowhere.stderr
    batch = entry.run(words(tmp_path / "x", "--search-batch", "0"))
    assert batch.returncode == 2 and "--search-batch: must be at least 1" in batch.stderr


def test_one_job_at_a_time_in_a_folder(words, tmp_path):
    with alone_in(tmp_path):
        done = entry.run(words(tmp_path, "--resume"))
    assert done.returncode == 2 and "another process works in" in done.stderr
    assert not list(tmp_path.iterdir())


def test_the_launcher_starts_and_stops_them(words, whole, tmp_path):
    """`--processes 2`, told by the one that was typed while it measures."""
    out, script = tmp_path / "out", tmp_path / "sdo"
    process = lightly(words(out, "--processes", "2"), script)
    wait_for(out / "kept" / "arm-001.safetensors", process)
    process.send_signal(signal.SIGUSR1)
    _, err = process.communicate(120)
    assert process.returncode == 75, err
    line = shlex.split(err.strip().splitlines()[-1].partition("go on with: ")[2])
    process = lightly(line[line.index("prune") :], script)
    _, err = process.communicate(120)
    assert process.returncode == 0 and "--processes" in line, err
    assert_same(out, whole)


@pytest.mark.slow
def test_killed_at_random_moments_it_is_as_if_left_alone(words, whole, tmp_path):
    out = tmp_path / "out"
    assert killed_until_done(words(out, "--resume"), call="several:saving") >= 3
    assert_same(out, whole)


@pytest.mark.slow
def test_the_line_that_is_printed_can_be_typed(words, whole, tmp_path):
    out = tmp_path / "out"
    processes = start(1, words(out))
    wait_for(out / "kept" / "arm-001.safetensors", processes[0])
    processes[0].send_signal(signal.SIGTERM)
    _, _, errs = finish(processes)
    line = errs[0].strip().splitlines()[-1].partition("go on with: ")[2]
    done = subprocess.run(line, shell=True, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    assert_same(out, whole)


# the search alone


@pytest.mark.parametrize(("pruner", "optimizer"), [("attention", "sgd"), ("table", "adam")])
def test_a_search_goes_on_from_any_update(setting, tmp_path, pruner, optimizer):  # noqa: F811
    few = replace(setting, settings=replace(setting.settings, num_inference_steps=4))
    wanted = SearchSettings(pruner, "shortcut", updates=4, batch=2, learning_rate=0.3, optimizer=optimizer)
    alone = list(search(few, wanted))
    first = next(found for found in search(few, wanted) if found.number == 2)
    Kept(tmp_path).put("search", first.state)
    rest = list(search(few, wanted, state=Kept(tmp_path).get("search")))
    assert [found.number for found in rest] == [3, 4]
    assert [found.distance for found in rest] == [found.distance for found in alone[2:]]
    assert torch.equal(rest[-1].scores, alone[-1].scores)
    assert not torch.equal(rest[-1].scores, first.scores)


class Two(World):
    """As two processes gather: the samples of the first, then those of the second."""

    def gather(self, value):
        return [{k: v for k, v in value.items() if k % 2 == rank} for rank in range(2)]


def test_gradients_are_added_in_the_order_of_the_samples(setting, monkeypatch):  # noqa: F811
    """In another order these three give 1 instead of 0."""
    import sdo_cli.prune.search as module

    def by_hand(setting, wanted, number, gates, sample):
        gates.grad = torch.full_like(gates, (1e8, 1.0, -1e8)[sample])
        return (1e16, 1.0, -1e16)[sample]

    monkeypatch.setattr(module, "shortcut_update", by_hand)
    wanted = SearchSettings("table", "shortcut", updates=1, batch=3, sparsity=0.0, learning_rate=1.0)
    for world in (World(), Two()):
        (found,) = search(setting, wanted, world=world)
        assert bool((found.scores == 1.0).all()) and found.distance == 0.0


def test_an_update_is_the_mean_of_its_samples(setting, monkeypatch):  # noqa: F811
    """Each with a prompt, noise and live calls of its own."""
    import sdo_cli.prune.search as module

    def by_hand(setting, wanted, number, gates, sample):
        gates.grad = torch.full_like(gates, float(sample + 1))
        return 10.0 * sample

    monkeypatch.setattr(module, "shortcut_update", by_hand)
    wanted = SearchSettings("table", "shortcut", updates=1, batch=3, sparsity=0.0, learning_rate=1.0)
    (found,) = search(setting, wanted)
    ahead = torch.tensor(1.0)
    moved = ahead - 2 * torch.sigmoid(ahead) * (1 - torch.sigmoid(ahead))
    assert torch.allclose(found.scores[1:], moved.expand_as(found.scores[1:])) and found.distance == 10.0
    monkeypatch.undo()
    paths = [setting.update_path(5, 3, sample) for sample in range(3)]
    assert not torch.equal(paths[0].x_0, paths[1].x_0)
    calls = {
        tuple(module._live_calls(setting, replace(wanted, live_calls=2), n, s)) for n in range(3) for s in range(3)
    }
    assert len(calls) > 3
