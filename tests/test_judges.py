"""Judges outside the process: `sdo eval --judge` and `--scores`, against a stand-in that fails."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import entry
import pytest
from forked import Forked
from PIL import Image

from sdo_cli import evaluate
from sdo_cli.errors import RecipeFault
from sdo_cli.judges.answers import CallFault, Picture, read_lines, read_rows
from sdo_cli.judges.server import post, yes_of
from sdo_cli.judges.spec import Asking, JudgeSpec, kind_of, read_judge

ROOT = Path(__file__).parent.parent
STANDIN = ROOT / "scripts" / "judges" / "standin.py"
COUNT = 12
BRIGHT = f"bright={sys.executable} {STANDIN} {{images}} {{out}}"


def grey(number):
    return 20 * number / 255


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Twelve grey pictures, of which brightness is known."""
    folder = tmp_path_factory.mktemp("judged") / "pics"
    folder.mkdir()
    rows = []
    for number in range(COUNT):
        Image.new("RGB", (16, 16), (20 * number,) * 3).save(folder / f"{number:03}.png")
        rows.append(json.dumps({"file_name": f"{number:03}.png", "prompt": f"grey {number}"}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(rows))
    return folder


def judged(pictures, out, *words, rewards="colorfulness"):
    plain = ["--rewards", rewards, "--no-embedding", "--no-report", "--out", out]
    return entry.run(["eval", "--images", pictures, *plain, *words])


def kept(out, name="bright"):
    """Score by file; each picture has one line at most."""
    rows = [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]
    found = [row for row in rows if row["measure"] == name]
    assert len({row["image"] for row in found}) == len(found)
    return {row["image"]: row["score"] for row in found}


def is_whole(out, name="bright"):
    return kept(out, name) == pytest.approx({f"{i:03}.png": grey(i) for i in range(COUNT)}, abs=1e-9)


class Server:
    def __init__(self, *words):
        self.process = subprocess.Popen(
            [sys.executable, str(STANDIN), "--serve", "0", *words], stdout=subprocess.PIPE, text=True
        )
        self.address = self.process.stdout.readline().strip()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()


def test_a_command_is_a_measure_like_any_other(pictures, tmp_path):
    done = judged(pictures, tmp_path / "e", "--judge", BRIGHT, "--judge-batch", 5, "--json")
    assert done.returncode == 0, done.stderr
    tree = json.loads(done.stdout)
    row = tree["variants"]["pics"]["measures"]["bright"]
    assert row["mean"] == pytest.approx(sum(map(grey, range(COUNT))) / COUNT) and row["scores"] == COUNT
    assert is_whole(tmp_path / "e") and not (tmp_path / "e" / ".judge").exists()
    settings = json.loads((tmp_path / "e" / "settings.json").read_text())
    assert settings["judges"]["bright"] == tree["judges"]["bright"]
    assert settings["judges"]["bright"]["version"] == "brightness 1"
    with (tmp_path / "e" / "scores.csv").open() as stream:
        assert float(list(csv.DictReader(stream))[7]["bright"]) == pytest.approx(grey(7))


def test_folders_without_a_judge_are_what_they_were(pictures, tmp_path):
    assert judged(pictures, tmp_path / "e").returncode == 0
    assert "judges" not in json.loads((tmp_path / "e" / "settings.json").read_text())
    assert "judges" not in json.loads((tmp_path / "e" / "summary.json").read_text())


SENTENCES = {
    "killed": "was killed by SIGKILL after 0 of 12 pictures",
    "slow": "took longer than 1.5 seconds and was ended after 0 of 12 pictures",
    "few": "gave 0 scores for 12 pictures; the first without one is pics/000.png",
    "exit": "ended with exit code 3 after 0 of 12 pictures, saying: out of luck",
    "half": "left its answer half written",
    "nan": "gave no finite number for pics/000.png",
}


@pytest.mark.parametrize("fault", SENTENCES)
def test_a_command_that_fails_loses_nothing_and_is_gone_on_with(pictures, tmp_path, fault):
    words = ["--judge-timeout", 1.5 if fault == "slow" else 60, "--judge-retries", 0]
    through, out = tmp_path / "through", tmp_path / "e"
    # every call brings three scores before it fails, which is no reason to give up
    done = judged(pictures, through, "--judge", f"{BRIGHT} --fault {fault} --after 3", *words)
    assert done.returncode == 0 and is_whole(through), done.stderr
    assert f"asked again for {'1 picture' if fault == 'nan' else '9 pictures'}" in done.stderr
    # now at its first picture
    lost = judged(pictures, out, "--judge", f"{BRIGHT} --fault {fault}", *words)
    assert lost.returncode == 2
    cause, remedy = lost.stderr.strip().splitlines()[-2:]
    assert cause == f"sdo: judge bright {SENTENCES[fault]}"
    assert len(kept(out)) == (COUNT - 1 if fault == "nan" else 0)
    assert remedy.endswith(f"; {len(kept(out))} of 12 scores are kept, and the same sdo eval goes on")
    again = judged(pictures, out, "--judge", BRIGHT, *words)
    assert again.returncode == 0 and is_whole(out), again.stderr


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        ("twice", "gave two scores for pics/003.png"),
        ("stranger", "gave a score for 'nobody', which it was not asked for"),
        ("words", "wrote a line 5 that is no JSON: the picture is nice"),
        ("silent", "ended well and wrote no {out}"),
    ],
)
def test_of_an_answer_that_mixes_things_up_nothing_is_kept(pictures, tmp_path, fault, cause):
    words = ["--judge", f"{BRIGHT} --fault {fault} --after 3", "--judge-retries", 1]
    done = judged(pictures, tmp_path / "e", *words)
    assert done.returncode == 2 and f"sdo: judge bright {cause}\n" in done.stderr
    assert done.stderr.count("asked again") == 1 and kept(tmp_path / "e") == {}
    assert judged(pictures, tmp_path / "e", "--judge", BRIGHT).returncode == 0 and is_whole(tmp_path / "e")


def test_another_version_is_refused_and_scores_stay(pictures, tmp_path):
    out = tmp_path / "e"
    half = ["--judge", f"{BRIGHT} --fault exit --after 5", "--judge-retries", 0, "--judge-batch", 6]
    assert judged(pictures, out, *half).returncode == 0
    content = (out / "scores.jsonl").read_text().splitlines()
    (out / "scores.jsonl").write_text("\n".join(content[:-4]) + "\n")
    done = judged(pictures, out, "--judge", BRIGHT + " --version 'brightness 2'")
    assert done.returncode == 2
    assert "judge bright is now 'brightness 2', and the scores there are by 'brightness 1'" in done.stderr
    assert len(kept(out)) == COUNT - 4
    assert judged(pictures, out, "--judge", BRIGHT).returncode == 0 and is_whole(out)


def test_a_judge_that_says_no_version_has_that_of_its_files(pictures, tmp_path):
    assert judged(pictures, tmp_path / "e", "--judge", BRIGHT + " --version ''").returncode == 0
    version = json.loads((tmp_path / "e" / "settings.json").read_text())["judges"]["bright"]["version"]
    assert re.fullmatch("not said, files [0-9a-f]{16}", version)


def test_nothing_is_asked_twice_nor_unasked(pictures, tmp_path):
    out, calls = tmp_path / "e", tmp_path / "calls"
    script = tmp_path / "j.sh"
    script.write_text(f'echo x >> {calls}; exec {sys.executable} {STANDIN} "$@"\n')
    words = ["--judge", f"bright=sh {script} {{images}} {{out}}"]
    assert judged(pictures, out, *words).returncode == 0
    assert judged(pictures, out, *words).returncode == 0
    # what a folder names is foreign code
    assert judged(pictures, out).returncode == 0
    assert calls.read_text() == "x\n"


def test_stopped_in_the_middle_of_a_call_it_keeps_what_was_said(pictures, tmp_path):
    out = tmp_path / "e"
    words = ["eval", "--images", pictures, "--rewards", "colorfulness", "--no-embedding", "--no-report", "--out", out]
    slow = Forked([*words, "--judge", BRIGHT + " --pause 0.4"])
    wait_for(lambda: (out / ".judge" / "scores.jsonl").exists() and lines(out / ".judge" / "scores.jsonl") > 4)
    slow.send_signal(signal.SIGTERM)
    _, said = slow.communicate(60)
    assert slow.returncode == 75, said
    assert 3 < len(kept(out)) < COUNT and not (out / ".judge").exists()
    assert json.loads((out / "settings.json").read_text())["judges"]["bright"]["version"] == "brightness 1"
    assert judged(pictures, out, "--judge", BRIGHT).returncode == 0 and is_whole(out)


def test_killed_in_the_middle_it_goes_on_and_leaves_nothing_behind(pictures, tmp_path):
    out = tmp_path / "e"
    words = ["eval", "--images", pictures, "--rewards", "colorfulness", "--no-embedding", "--no-report", "--out", out]
    slow = Forked([*words, "--judge", BRIGHT + " --pause 0.3", "--judge-batch", 2])
    wait_for(lambda: (out / "scores.jsonl").exists() and lines(out / "scores.jsonl") >= COUNT + 4)
    slow.kill()
    slow.communicate(60)
    before = kept(out)
    assert 4 <= len(before) < COUNT
    assert judged(pictures, out, "--judge", BRIGHT).returncode == 0 and is_whole(out)
    assert not (out / ".judge").exists()


def lines(path):
    return path.read_bytes().count(b"\n")


def wait_for(found, seconds=60):
    end = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_command_ends_with_what_it_started(pictures, tmp_path):
    script = tmp_path / "j.sh"
    script.write_text(f"sleep 3599 & echo $! > {tmp_path}/pid; wait\n")
    done = judged(
        pictures,
        tmp_path / "e",
        "--judge",
        f"sh {script} {{images}} {{out}}",
        "--judge-timeout",
        1,
        "--judge-retries",
        0,
    )
    assert done.returncode == 2
    with pytest.raises(ProcessLookupError):
        for _ in range(100):
            os.kill(int((tmp_path / "pid").read_text()), 0)
            time.sleep(0.02)


def test_a_server_and_questions_to_a_model(pictures, tmp_path):
    with Server() as server:
        words = ["--judge", f"bright={server.address}/score", "--judge-batch", 5]
        yes = ["--judge", f"yes=openai+{server.address}/v1#standin"]
        done = judged(pictures, tmp_path / "e", *words, *yes)
    assert done.returncode == 0 and is_whole(tmp_path / "e"), done.stderr
    assert is_whole(tmp_path / "e", "yes")
    judges = json.loads((tmp_path / "e" / "settings.json").read_text())["judges"]
    assert judges["yes"]["version"] == "standin brightness 1" and "{prompt}" in judges["yes"]["question"]


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        ("killed", "broke off its answer"),
        ("slow", "did not answer within 1 seconds"),
        ("few", "gave 0 scores for 1 picture; the first without one is pics/010.png"),
        ("nan", "gave no finite number for"),
        ("exit", 'answered with HTTP 503 Service Unavailable: {"error": "starting"}'),
        ("half", "answered something that is no JSON, or half of it"),
        ("key", "answered with HTTP 401"),
    ],
)
def test_a_server_that_fails_loses_nothing_and_is_gone_on_with(pictures, tmp_path, fault, cause):
    out, words = tmp_path / "e", ["--judge-batch", 5, "--judge-workers", 1]
    with Server("--fault", fault, "--after", "1") as server:
        more = ["--judge-retries", 0, "--judge-timeout", 1 if fault == "slow" else 60]
        done = judged(pictures, out, "--judge", f"bright={server.address}/score", *words, *more)
    assert done.returncode == 2 and cause in done.stderr.strip().splitlines()[-2], done.stderr
    assert 5 <= len(kept(out)) < COUNT
    with Server() as server:
        # it may have moved: its version is what counts
        assert judged(pictures, out, "--judge", f"bright={server.address}/score", *words).returncode == 0
    assert is_whole(out)


def test_a_server_of_which_every_third_call_fails_gets_through(pictures, tmp_path):
    with Server("--every", "3") as server:
        done = judged(pictures, tmp_path / "e", "--judge", f"bright={server.address}/score", "--judge-batch", 1)
    assert done.returncode == 0 and is_whole(tmp_path / "e"), done.stderr


def test_no_server_and_a_model_that_says_no_probabilities(pictures, tmp_path):
    with Server("--fault", "words") as server:
        gone = server.address
        done = judged(pictures, tmp_path / "e", "--judge", f"yes=openai+{gone}/v1#m")
        assert done.returncode == 2 and "answered without log-probabilities" in done.stderr
    done = judged(pictures, tmp_path / "e2", "--judge", f"bright={gone}/score", "--judge-retries", 1)
    assert done.returncode == 2 and f"cannot be reached at {gone}/score: [Errno" in done.stderr
    assert done.stderr.count("asked again") == 1


def test_a_key_is_sent_and_kept_nowhere(pictures, tmp_path, monkeypatch):
    monkeypatch.setenv("SDO_JUDGE_KEY", "very-secret")
    seen = []

    def opened(self, request, timeout=None):
        seen.append((request.get_header("Authorization"), timeout))
        raise TimeoutError

    monkeypatch.setattr("urllib.request.OpenerDirector.open", opened)
    with pytest.raises(CallFault, match="within 5 seconds"):
        post("http://127.0.0.1:1/score", {}, timeout=5)
    assert seen == [("Bearer very-secret", 5)]
    judged(pictures, tmp_path / "e", "--judge", "http://127.0.0.1:1/score", "--judge-retries", 0)
    assert not [p for p in (tmp_path / "e").rglob("*") if p.is_file() and b"very-secret" in p.read_bytes()]


def test_yes_is_what_it_is_of_yes_and_no():
    picture = Picture("a", Path("a.png"), "a")

    def answer(**tokens):
        top = [{"token": token.replace("_", " "), "logprob": value} for token, value in tokens.items()]
        return {"choices": [{"logprobs": {"content": [{"token": "x", "top_logprobs": top}]}}]}

    import math

    logs = {"Yes": math.log(0.4), "_yes": math.log(0.2), "NO": math.log(0.2), "Perhaps": math.log(0.2)}
    assert yes_of(answer(**logs), picture) == pytest.approx(0.75)
    with pytest.raises(CallFault, match="answered 'perhaps' for a, and neither yes nor no is likely"):
        yes_of(answer(Perhaps=-0.1), picture)


def test_lines_that_were_cut_off_are_left_out_or_a_fault():
    pictures = [Picture("a", Path("a"), ""), Picture("b", Path("b"), "")]
    cut = b'{"id": "a", "score": 1}\n{"id": "b", "sco'
    assert read_lines(cut, pictures, whole=False).scores == {"a": 1.0}
    with pytest.raises(CallFault, match="half written") as found:
        read_lines(cut, pictures, whole=True)
    assert found.value.found.scores == {"a": 1.0}
    # without the last line's end it is whole
    assert read_lines(cut[:-4] + b'"score": 2}', pictures, whole=True).scores == {"a": 1.0, "b": 2.0}
    for value in (None, "0.5", True, float("inf"), 10**400):
        with pytest.raises(CallFault, match="no finite number for b") as found:
            read_rows([{"id": "a", "score": 1}, {"id": "b", "score": value}], pictures)
        assert found.value.found.scores == {"a": 1.0}
    for name in (["a"], None, {}, 3):
        with pytest.raises(CallFault, match="which it was not asked for"):
            read_rows([{"id": name, "score": 1}], pictures)
    with pytest.raises(CallFault, match="no JSON"):
        read_lines(b"[" * 10**5 + b"\n", pictures, whole=True)


def test_a_judge_may_say_its_version_at_the_end(pictures, tmp_path):
    script = tmp_path / "late.py"
    script.write_text(
        "import json, os, sys\n"
        "rows = [json.loads(line) for line in open(sys.argv[1])]\n"
        "with open(sys.argv[2], 'w') as out:\n"
        "    for number, row in enumerate(rows):\n"
        "        if number == int(sys.argv[3]):\n"
        "            out.flush(); os.kill(os.getpid(), 9)\n"
        "        out.write(json.dumps({'id': row['id'], 'score': 1}) + '\\n')\n"
        "    out.write(json.dumps({'version': sys.argv[4]}))\n"
    )

    def judge(after, version):
        words = f"late={sys.executable} {script} {{images}} {{out}} {after} {version}"
        return judged(pictures, tmp_path / "e", "--judge", words, "--judge-batch", 7)

    # killed after five, again after five, and then it comes to its end
    done = judge(5, "one")
    assert done.returncode == 0 and done.stderr.count("asked again") == 2, done.stderr
    version = json.loads((tmp_path / "e" / "settings.json").read_text())["judges"]["late"]["version"]
    assert version == "one" and len(kept(tmp_path / "e", "late")) == COUNT


def test_a_server_that_trickles_is_late(pictures, tmp_path):
    import socket
    import threading

    with socket.create_server(("127.0.0.1", 0)) as server:

        def trickle():
            connection, _ = server.accept()
            connection.recv(2**20)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n")
            try:
                while True:
                    connection.sendall(b" ")
                    time.sleep(0.05)
            except OSError:
                pass

        threading.Thread(target=trickle, daemon=True).start()
        begin = time.monotonic()
        with pytest.raises(CallFault, match=r"did not answer within 0\.5 seconds"):
            post(f"http://127.0.0.1:{server.getsockname()[1]}/", {}, timeout=0.5)
        assert time.monotonic() - begin < 5


def test_a_judge_alone_needs_no_reward(pictures, tmp_path):
    done = judged(pictures, tmp_path / "e", "--judge", BRIGHT, rewards="")
    assert done.returncode == 0 and is_whole(tmp_path / "e"), done.stderr


WRONG = [
    (["--judge", "true {images}"], "--judge outside: has no {out}"),
    (["--judge", "no-such-program {images} {out}"], "--judge outside: there is no program no-such-program"),
    (["--judge", "x=sh '{images} {out}"], "--judge x: cannot be read as a command"),
    (["--judge", "clip=true {images} {out}"], "--judge clip: is a measure of sdo's own"),
    (["--judge", "diversity=true {images} {out}"], "--judge diversity: is a measure of sdo's own"),
    (["--judge", "true {images} {out}", "--judge", "true {images} {out} 2"], "there are two of this name"),
    (["--judge", "http://me:secret@localhost/x"], "put a key into SDO_JUDGE_KEY"),
    (["--judge", "http:///x"], "names no host"),
    (["--judge", "openai+http://localhost:1/v1"], "names no model"),
    (["--judge", "openai+http://localhost:1/v1#m", "--judge-question", "Nice?"], "--judge-question: has no {prompt}"),
    (["--judge-batch", "0"], "--judge-batch: must be at least 1"),
    (["--judge-timeout", "0"], "--judge-timeout: must be above 0"),
    (["--judge-timeout", "nan"], "--judge-timeout: must be above 0"),
    (["--judge-retries", "-1"], "--judge-retries: must not be negative"),
    (["--judge-workers", "0"], "--judge-workers: must be between 1 and 64"),
    (["--scores", "nowhere.csv"], "--scores nowhere.csv: no such file"),
    (["--judge", "a=true {images} {out}", "--select-by", "a"], "--select-by: a only measures"),
]


@pytest.mark.parametrize(("words", "sentence"), WRONG, ids=[sentence for _, sentence in WRONG])
def test_what_is_wrong_is_said_before_anything_is_done(pictures, tmp_path, words, sentence):
    done = judged(pictures, tmp_path / "e", *words)
    assert done.returncode == 2 and sentence in done.stderr, done.stderr
    assert not (tmp_path / "e").exists()


def test_nobody_trains_on_a_judge(tmp_path):
    done = entry.run(["recipe", "check", "quickstart", "rewards=[{name: bright}]"])
    assert done.returncode == 2 and "bright" in done.stderr


def test_kinds_of_judges():
    kinds = ["http://a/b", "HTTPS://a", "openai+https://a/v1#m", "sh http://a {images} {out}", "./a {images} {out}"]
    assert [kind_of(text) for text in kinds] == ["json", "json", "openai", "command", "command"]
    wrong = []
    name, spec = read_judge("a.b-1=http://h/x?y=z", None, wrong)
    assert (name, spec, wrong) == ("a.b-1", JudgeSpec("json", "http://h/x?y=z"), [])
    assert read_judge("http://h/x?y=z", None, wrong) == ("outside", JudgeSpec("json", "http://h/x?y=z"))
    assert [Asking().size(kind) for kind in ("command", "json", "openai")] == [500, 8, 1]


def table(path, rows):
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows(rows)
    return path


def test_scores_made_elsewhere(pictures, tmp_path):
    """sdo's own table with a column more comes back."""
    out = tmp_path / "e"
    assert judged(pictures, out).returncode == 0
    with (out / "scores.csv").open(newline="") as stream:
        rows = list(csv.reader(stream))
    mine = table(tmp_path / "mine.csv", [[*rows[0], "mine"], *[[*row, 0.5 + i] for i, row in enumerate(rows[1:])]])
    done = judged(pictures, out, "--scores", mine)
    assert done.returncode == 0, done.stderr
    assert kept(out, "mine") == {f"{i:03}.png": 0.5 + i for i in range(COUNT)}
    assert "left out colorfulness" in done.stderr
    judge = json.loads((out / "settings.json").read_text())["judges"]["mine"]
    assert judge["kind"] == "table" and judge["version"].startswith("sha256 ")
    assert judged(pictures, out, "--scores", mine).returncode == 0 and len(kept(out, "mine")) == COUNT
    changed = table(tmp_path / "mine.csv", [["image", "mine"], *[[f"{i:03}.png", i] for i in range(COUNT)]])
    done = judged(pictures, out, "--scores", changed)
    assert done.returncode == 2 and "mine of pics/000.png is 0.0, and 0.5 in the folder" in done.stderr


ROWS = [[f"{i:03}.png", i] for i in range(COUNT)]
BAD = [
    ([["file", "mine"], *ROWS], "has no column image"),
    ([["image", "prompt"], *ROWS], "has no column with scores"),
    ([["image", "clip-score"], *ROWS], "has no column with scores"),
    ([["image", "mine", "mine"], *[[*row, 1] for row in ROWS]], "has two columns called 'mine'"),
    ([["image", "mine"], *ROWS[:-2]], "mine is missing for 2 pictures of pics; the first is 010.png"),
    ([["image", "mine"], *ROWS, ROWS[3]], "line 14: pics/003.png has a second mine"),
    ([["image", "mine"], ["nobody.png", 1], *ROWS], "line 2: pics has no picture 'nobody.png'"),
    ([["image", "mine"], ["000.png", "good"], *ROWS[1:]], "line 2: mine is 'good', which is no number"),
    ([["image", "mine"], ["000.png", "nan"], *ROWS[1:]], "line 2: mine is nan, which is not finite"),
    ([["variant", "image", "mine"], *[["other", *row] for row in ROWS]], "line 2: there is no variant 'other'"),
    ([["image", "mine"], *[[row[0], ""] for row in ROWS]], "column mine is empty"),
    ([], "has no column image"),
]


@pytest.mark.parametrize(("rows", "sentence"), BAD, ids=[sentence for _, sentence in BAD])
def test_a_table_that_does_not_fit(pictures, tmp_path, rows, sentence):
    done = judged(pictures, tmp_path / "e", "--scores", table(tmp_path / "mine.csv", rows))
    assert done.returncode == 2 and sentence in done.stderr, done.stderr
    assert not (tmp_path / "e").exists()


def test_evaluations_by_two_versions_are_not_compared_unsaid(pictures, tmp_path):
    for name, version in (("a", "1"), ("b", "2")):
        done = judged(pictures, tmp_path / name, "--judge", BRIGHT + f" --version {version}")
        assert done.returncode == 0, done.stderr
    done = entry.run(["compare", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "c"])
    assert done.returncode == 2 and "the version of judge bright is '1' and '2'" in done.stderr


@pytest.fixture
def no_hpsv3(tmp_path):
    """A package that has HPSv3's interface and knows brightness only."""
    package = tmp_path / "site" / "hpsv3"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(
        "import torch\n"
        "from PIL import Image\n"
        "class HPSv3RewardInferencer:\n"
        "    def __init__(self, config_path=None, checkpoint_path=None, device='cuda', differentiable=False):\n"
        "        assert device == 'cpu'\n"
        "    def reward(self, image_paths, prompts):\n"
        "        assert not torch.is_grad_enabled() and len(image_paths) == len(prompts) <= 3\n"
        "        bright = [Image.open(path).convert('L').getpixel((0, 0)) / 255 for path in image_paths]\n"
        "        return torch.tensor([[value, 9.0] for value in bright], dtype=torch.float64)\n"
    )
    return tmp_path / "site"


def test_the_wrapper_of_hpsv3(pictures, tmp_path, no_hpsv3, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", f"{no_hpsv3}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    weights = tmp_path / "HPSv3.safetensors"
    weights.write_bytes(b"none")
    judge = f"{sys.executable} {ROOT}/scripts/judges/hpsv3/judge.py"
    words = f"--batch 3 --device cpu --checkpoint {weights}"
    done = judged(pictures, tmp_path / "e", "--judge", f"hpsv3={judge} {{images}} {{out}} {words}")
    assert done.returncode == 0 and is_whole(tmp_path / "e", "hpsv3"), done.stderr
    version = json.loads((tmp_path / "e" / "settings.json").read_text())["judges"]["hpsv3"]["version"]
    assert version == "hpsv3 not installed, HPSv3.safetensors of 4 bytes"
    process = subprocess.Popen([*f"{judge} --serve 0 {words}".split()], stdout=subprocess.PIPE, text=True)
    try:
        address = process.stdout.readline().strip()
        done = judged(pictures, tmp_path / "e2", "--judge", f"hpsv3={address}")
    finally:
        process.kill()
        process.wait()
    assert done.returncode == 0 and is_whole(tmp_path / "e2", "hpsv3"), done.stderr


def test_python_asks_judges_and_reads_tables_as_the_command_does(pictures, tmp_path):
    table = tmp_path / "made.csv"
    table.write_text("image,mine\n" + "".join(f"{number:03}.png,{number}\n" for number in range(COUNT)))
    asked = {"judges": {"bright": BRIGHT.removeprefix("bright=")}, "scores": [table]}
    more = {"rewards": "colorfulness", "embedding": False}
    found = evaluate(images=[pictures], out=tmp_path / "e", judge_batch=5, **asked, **more)
    assert is_whole(tmp_path / "e") and found.means["pics"]["mine"] == pytest.approx((COUNT - 1) / 2)
    tree = json.loads((tmp_path / "e" / "settings.json").read_text())
    assert tree["judges"]["bright"]["version"].startswith("brightness") and tree["judges"]["mine"]["version"]
    with pytest.raises(RecipeFault, match=r"--judge bright: has no \{out\}"):
        evaluate(images=[pictures], judges=["bright=true {images}"], out=tmp_path / "f", **more)
    with pytest.raises(RecipeFault, match="only measures, nothing is chosen by a judge"):
        evaluate(images=[pictures], select_by="bright", out=tmp_path / "f", **asked, **more)
