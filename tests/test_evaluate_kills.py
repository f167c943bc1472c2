"""A killed evaluation goes on: real processes, SIGKILL at random moments."""

import json
import random
import signal
import subprocess
import sys
import time

import pytest
from test_evaluate import content, lora  # noqa: F401

pytestmark = pytest.mark.slow
KILLS = 10


def command(lora_folder, out):
    words = ["--prompts", "emoji-eval", "--limit", 60, "--seeds", 2, "--lora", lora_folder, "--steps", 8]
    words += ["--guidance", 2, "--rewards", "clip,judge,colorfulness", "--batch-size", 8, "--json", "--out", out]
    return [sys.executable, "-m", "sdo_cli", "eval", *map(str, words)]


def state(folder):
    """Every image with what changes when it is written again."""
    return {p: (p.stat().st_ino, p.stat().st_mtime_ns) for p in folder.glob("*/0*.png")}


def drawn(stderr):
    """(images a session set out to draw, images it reported as drawn)."""
    rows = [json.loads(line) for line in stderr.splitlines() if line.startswith('{"phase": "images"')]
    return (rows[-1]["total"], rows[-1]["done"]) if rows else (None, 0)


def killed_at(arguments, folder, work, delay):
    """Start it, wait for so many images and scores and the delay, kill it; what it set out to draw and drew."""
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    while process.poll() is None and len(state(folder)) + lines_of(folder) < work:
        time.sleep(0.002)
    time.sleep(delay)
    assert process.poll() is None, "it ended before it was killed"
    process.send_signal(signal.SIGKILL)
    lines = process.stderr.readlines()
    process.wait()
    # the last line may be cut off
    return drawn("".join(line for line in lines if line.endswith("}\n")))


def lines_of(folder):
    path = folder / "scores.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_killed_ten_times_it_is_what_it_would_have_been(lora, tmp_path):  # noqa: F811
    whole = subprocess.run(command(lora, tmp_path / "whole"), capture_output=True, text=True)
    assert whole.returncode == 0, whole.stderr
    total = 240
    assert drawn(whole.stderr) == (total, total)
    moments = random.Random(4)
    folder, before, counted, log = tmp_path / "e", {}, 0, []
    # 240 images, 240 scores by each of three rewards: drawing, moving files, every reward, what lies between them
    for work in sorted(moments.sample(range(total + 3 * total), KILLS)):
        set_out, done = killed_at(command(lora, folder), folder, work, moments.uniform(0, 0.05))
        after = state(folder)
        assert {path: after.get(path) for path in before} == before, "an image was drawn again or lost"
        if set_out is not None:
            assert set_out == total - len(before)
        counted += done
        log.append(f"at {work}: {len(after)} images, {lines_of(folder)} scores")
        before = after
    last = subprocess.run(command(lora, folder), capture_output=True, text=True)
    assert last.returncode == 0, last.stderr
    counted += drawn(last.stderr)[1]
    print("\n" + "\n".join([*log, f"drawn and reported {counted} of {total}"]))
    # a chunk may be finished and not yet reported when the kill comes: fewer, never more
    assert total - 8 * KILLS <= counted <= total
    assert {path: state(folder)[path] for path in before} == before
    assert content(folder) == content(tmp_path / "whole")
