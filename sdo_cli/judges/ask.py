"""Every picture to one judge: in batches, again where a call failed, with every score handed on as it is known."""

import queue
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

from sdo_cli.errors import EnvironmentFault
from sdo_cli.judges.answers import Answer, CallFault, Picture, counted
from sdo_cli.judges.command import LOOK, call_command
from sdo_cli.judges.server import call_server
from sdo_cli.judges.spec import COMMAND, Asking, JudgeSpec, unsaid_version

# seconds before another try, doubled each time, and the most
PAUSE, LONGEST = 0.5, 30.0
# seconds that calls under way get to end when the job is stopped
GRACE = 3.0


def ask(
    name: str,
    spec: JudgeSpec,
    pictures: list[Picture],
    folder: Path,
    asking: Asking,
    *,
    keep: Callable[[dict[str, float], str], None],
    tick: Callable[[], None],
    note: Callable[[str], None],
) -> None:
    """Ask for every picture.

    Args:
        spec: with the version that scores there are by, if any: another one is refused.
        folder: of the evaluation; a command's list and scores lie in ``.judge`` inside it, its words in a log.
        keep: is handed new scores by id and the version they are by, at once.
        tick: is called often and may raise to stop.

    Raises:
        EnvironmentFault: the judge failed for good; what it said before is kept.
    """
    missing, tries, version = {picture.id: picture for picture in pictures}, 0, spec.version
    work = folder / ".judge"
    # of a job that was killed
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)

    def take(answer: Answer) -> None:
        nonlocal version
        unsaid = unsaid_version(spec)
        said = answer.version or (version if answer.partial and version else unsaid)
        if not answer.scores:
            return
        # the same judge may say its version at the end, and not have come to it before
        if version and said != version and version != unsaid:
            raise EnvironmentFault(
                f"judge {name} is now {said!r}, and the scores there are by {version!r}",
                remedy="give it another name (--judge NAME=…) or another --out: versions are not mixed",
            )
        version = said
        fresh = {key: score for key, score in answer.scores.items() if key in missing}
        keep(fresh, version)
        for key in fresh:
            del missing[key]

    try:
        while missing:
            before, fault = len(missing), None
            fault = _round(spec, list(missing.values()), work, folder / f"judge-{name}.log", asking, take, tick)
            if fault is None:
                continue
            failed, reason = fault
            # last next time: those that were not asked yet come first
            for picture in failed:
                if picture.id in missing:
                    missing[picture.id] = missing.pop(picture.id)
            tries = 0 if len(missing) < before else tries + 1
            if missing and (not reason.again or tries > asking.retries):
                raise EnvironmentFault(
                    f"judge {name} {reason.cause}",
                    remedy=f"{reason.remedy}; {len(pictures) - len(missing)} of {len(pictures)} scores are kept, "
                    "and the same sdo eval goes on",
                )
            if missing:
                note(f"judge {name} {reason.cause}; asked again for {counted(len(missing))}")
                _rest(min(PAUSE * 2**tries, LONGEST), tick)
    finally:
        shutil.rmtree(work, ignore_errors=True)


Failed = tuple[list[Picture], CallFault]


def _round(
    spec: JudgeSpec,
    pictures: list[Picture],
    work: Path,
    log: Path,
    asking: Asking,
    take: Callable[[Answer], None],
    tick: Callable[[], None],
) -> Failed | None:
    """Ask for all of them, up to the first call that fails: its pictures and why."""
    size = asking.size(spec.kind)
    batches = [pictures[start : start + size] for start in range(0, len(pictures), size)]
    if spec.kind != COMMAND:
        return _by_workers(spec, batches, asking, take, tick)
    for batch in batches:
        try:
            call_command(spec, batch, work=work, log=log, timeout=asking.timeout, tick=tick, keep=take)
        except CallFault as fault:
            take(fault.found)
            return batch, fault
        tick()
    return None


Done = tuple[list[Picture], Answer | CallFault | BaseException]


def _by_workers(
    spec: JudgeSpec,
    batches: list[list[Picture]],
    asking: Asking,
    take: Callable[[Answer], None],
    tick: Callable[[], None],
) -> Failed | None:
    """A server's calls, several at a time; answers are taken here, in this thread."""
    waiting, answers = queue.SimpleQueue[list[Picture]](), queue.SimpleQueue[Done | None]()
    for batch in batches:
        waiting.put(batch)
    over = threading.Event()

    def work() -> None:
        try:
            while not over.is_set():
                batch = waiting.get_nowait()
                answers.put((batch, _tried(spec, batch, asking.timeout)))
        except queue.Empty:
            pass
        finally:
            answers.put(None)

    # a call that hangs must not keep this process from ending
    running = min(asking.workers, len(batches))
    for _ in range(running):
        threading.Thread(target=work, daemon=True).start()
    failed: Failed | None = None
    try:
        while running:
            found = _next(answers, tick)
            running -= found is None
            if found is not None and (fault := _taken(found, take)) is not None:
                over.set()
                failed = failed or (found[0], fault)
    except BaseException:
        over.set()
        _last_answers(answers, running, take)
        raise
    return failed


def _tried(spec: JudgeSpec, batch: list[Picture], timeout: float) -> Answer | BaseException:
    try:
        return call_server(spec, batch, timeout=timeout)
    # raised again in the thread that asks
    except BaseException as fault:
        return fault


def _next(answers: "queue.SimpleQueue[Done | None]", tick: Callable[[], None]) -> Done | None:
    while True:
        try:
            return answers.get(timeout=LOOK)
        except queue.Empty:
            tick()


def _taken(done: Done, take: Callable[[Answer], None]) -> CallFault | None:
    _, answer = done
    if isinstance(answer, Answer):
        take(answer)
        return None
    if not isinstance(answer, CallFault):
        raise answer
    take(answer.found)
    return answer


def _last_answers(answers: "queue.SimpleQueue[Done | None]", running: int, take: Callable[[Answer], None]) -> None:
    """Of calls that were under way when the job was stopped."""
    end = time.monotonic() + GRACE
    while running and (left := end - time.monotonic()) > 0:
        try:
            found = answers.get(timeout=left)
        except queue.Empty:
            return
        running -= found is None
        if found is not None and isinstance(found[1], Answer):
            take(found[1])


def _rest(seconds: float, tick: Callable[[], None]) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        tick()
        time.sleep(LOOK)
