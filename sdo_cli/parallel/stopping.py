"""When a run has to stop: a signal, Ctrl-C, or a time limit; looked at where stopping is safe, never in the handler."""

import signal
import threading
import time
from types import FrameType
from typing import Any

from sdo_cli.errors import Stopped
from sdo_cli.parallel.world import SINGLE, World
from sdo_cli.progress import Reporter, Silent

SIGNALS = (signal.SIGTERM, signal.SIGINT, getattr(signal, "SIGUSR1", signal.SIGTERM))
# seconds kept free for saving when a time limit comes near, and the share of the longest step added to it
RESERVE, MARGIN = 5.0, 1.5
# the most urgent last: processes agree on the largest
REASONS = ("", "time limit", "SIGUSR1", "SIGTERM", "SIGINT")
# a scheduler's signal reaches a process twice: from itself, and from the process that started it
SAME = 0.5


class Stopping:
    """Collects reasons to stop while it is entered; what one process is told, all stop for.

    Args:
        time_limit: seconds from now until the run must have ended, None for none.
    """

    def __init__(self, time_limit: float | None = None, note: Any = None, world: World = SINGLE) -> None:
        self._limit, self._note, self._world = time_limit, note, world
        self._interrupted = 0.0
        self._begin = self._last = time.monotonic()
        self._longest = 0.0
        self._reason = ""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Stopping":
        # only the main thread may
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._on_signal) for number in dict.fromkeys(SIGNALS)}
        return self

    def __exit__(self, *_: object) -> None:
        if self._world.size > 1:
            # to its end: when another process fails, a launcher sends SIGTERM to this one, which has something to say
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        del frame
        if number == signal.SIGINT:
            again, self._interrupted = self._interrupted, time.monotonic()
            if again and self._interrupted - again > SAME:
                raise KeyboardInterrupt
            if again:
                return
        self._reason = signal.Signals(number).name
        if self._note is not None and number == signal.SIGINT:
            self._note("stopping at the next safe point; Ctrl-C again stops at once")

    def check(self) -> None:
        """A safe point has been reached, by all processes.

        Raises:
            Stopped: there is a reason to.
        """
        now = time.monotonic()
        self._longest = max(self._longest, now - self._last)
        self._last = now
        reason = self._reason
        if self._limit is not None and now - self._begin + MARGIN * self._longest + RESERVE > self._limit:
            reason = reason or "time limit"
        if agreed := REASONS[self._world.largest(REASONS.index(reason))]:
            raise Stopped(agreed)


class SafePoints:
    """A reporter whose every sign of progress is a safe point: all processes make the same ones."""

    def __init__(self, reporter: Reporter, stopping: Stopping) -> None:
        self._reporter, self._stopping = reporter, stopping

    def phase(self, name: str, total: int, done: int = 0) -> None:
        self._reporter.phase(name, total, done)

    def advance(self, count: int = 1, text: str = "") -> None:
        self._reporter.advance(count, text)
        self._stopping.check()

    def quiet(self) -> "SafePoints":
        """The same safe points without a word."""
        return SafePoints(Silent(), self._stopping)

    def note(self, text: str) -> None:
        self._reporter.note(text)

    def close(self) -> None:
        self._reporter.close()
