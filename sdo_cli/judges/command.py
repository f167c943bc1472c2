"""A judge that is a command: a list of pictures in, a file of scores out, in a session of its own."""

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from sdo_cli.judges.answers import CONTRACT, Answer, CallFault, Picture, complete, counted, read_lines
from sdo_cli.judges.spec import JudgeSpec, words_of

# seconds between two looks at a command that runs
LOOK = 0.05


def call_command(
    spec: JudgeSpec,
    pictures: list[Picture],
    *,
    work: Path,
    log: Path,
    timeout: float,
    tick: Callable[[], None],
    keep: Callable[[Answer], None],
) -> None:
    """Run it once. What it has answered is handed to ``keep`` however the call ends, also when ``tick`` stops it.

    Args:
        work: an empty folder for the list and the scores.
        log: what the command says is added to it.

    Raises:
        CallFault: it did not answer for every picture.
    """
    images, out = work / "images.jsonl", work / "scores.jsonl"
    rows = [{"id": p.id, "image": str(p.file.resolve()), "prompt": p.prompt} for p in pictures]
    images.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    out.unlink(missing_ok=True)
    places = {"{images}": str(images.resolve()), "{out}": str(out.resolve())}
    words = [_filled(word, places) for word in words_of(spec.target)]
    with log.open("ab") as stream:
        begin = stream.tell()
        try:
            process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, start_new_session=True
            )
        except OSError as fault:
            text = f"could not be started: {fault.strerror or fault}"
            raise CallFault(text, "check the command", again=False) from fault
    try:
        code = _ended(process, timeout, tick)
    except BaseException:
        _end(process)
        # a judge whose answer breaks the contract has no say in how this ends
        try:
            keep(_answered(out, pictures, whole=False))
        except CallFault as fault:
            keep(fault.found)
        raise
    _end(process)
    # faults of the contract come first: they say more than an exit code
    answer = _answered(out, pictures, whole=code == 0)
    if code != 0:
        raise CallFault(*_why(code, timeout, answer, pictures, _last_words(log, begin), log), found=answer)
    if not out.exists():
        raise CallFault(f"ended well and wrote no {{out}}{_last_words(log, begin)}", CONTRACT)
    keep(complete(answer, pictures))


def _filled(word: str, places: dict[str, str]) -> str:
    for mark, path in places.items():
        word = word.replace(mark, path)
    return word


def _ended(process: subprocess.Popen[bytes], timeout: float, tick: Callable[[], None]) -> int | None:
    """Its exit code; None where it took too long."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        try:
            return process.wait(LOOK)
        except subprocess.TimeoutExpired:
            tick()
    return None


def _end(process: subprocess.Popen[bytes]) -> None:
    """It, and what it started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _answered(out: Path, pictures: list[Picture], *, whole: bool) -> Answer:
    return read_lines(out.read_bytes() if out.exists() else b"", pictures, whole=whole)


def _why(
    code: int | None, timeout: float, answer: Answer, pictures: list[Picture], said: str, log: Path
) -> tuple[str, str]:
    """Cause and remedy."""
    done = f"after {len(answer.scores)} of {counted(len(pictures))}"
    if code is None:
        return f"took longer than {timeout:g} seconds and was ended {done}", "give it more with --judge-timeout"
    if code < 0:
        what = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        return f"was killed by {what} {done}{said}", "is there memory enough? fewer pictures a call: --judge-batch"
    return f"ended with exit code {code} {done}{said}", f"what it said stands in {log}"


def _last_words(log: Path, begin: int) -> str:
    """The last line of what it said in this call, to append."""
    with log.open("rb") as stream:
        stream.seek(0, os.SEEK_END)
        stream.seek(max(begin, stream.tell() - 4096))
        lines = [line.strip() for line in stream.read().decode(errors="replace").splitlines() if line.strip()]
    return f", saying: {lines[-1][:160]}" if lines else ""
