"""When a run has to stop: a signal, Ctrl-C, or a time limit; looked at where stopping is safe, never in the handler."""

import signal
import threading
import time
from types import FrameType
from typing import Any

from sdo_cli.progress import Reporter

SIGNALS = (signal.SIGTERM, signal.SIGINT, getattr(signal, "SIGUSR1", signal.SIGTERM))
# seconds kept free for saving when a time limit comes near, and the share of the longest step added to it
RESERVE, MARGIN = 5.0, 1.5


class Stopped(Exception):
    """Raised at a safe point; ``reason`` is a signal's name or ``time limit``."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Stopping:
    """Collects reasons to stop while it is entered.

    Args:
        time_limit: seconds from now until the run must have ended, None for none.
    """

    def __init__(self, time_limit: float | None = None, note: Any = None) -> None:
        self._limit, self._note = time_limit, note
        self._begin = self._last = time.monotonic()
        self._longest = 0.0
        self._reason: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Stopping":
        # only the main thread may
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._on_signal) for number in dict.fromkeys(SIGNALS)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        del frame
        if number == signal.SIGINT and self._reason == "SIGINT":
            raise KeyboardInterrupt
        self._reason = signal.Signals(number).name
        if self._note is not None and number == signal.SIGINT:
            self._note("stopping at the next safe point; Ctrl-C again stops at once")

    def check(self) -> None:
        """A safe point has been reached.

        Raises:
            Stopped: there is a reason to.
        """
        now = time.monotonic()
        self._longest = max(self._longest, now - self._last)
        self._last = now
        if self._reason is not None:
            raise Stopped(self._reason)
        if self._limit is not None and now - self._begin + MARGIN * self._longest + RESERVE > self._limit:
            raise Stopped("time limit")


class SafePoints:
    """A reporter whose every sign of progress is a safe point."""

    def __init__(self, reporter: Reporter, stopping: Stopping) -> None:
        self._reporter, self._stopping = reporter, stopping

    def phase(self, name: str, total: int) -> None:
        self._reporter.phase(name, total)

    def advance(self, count: int = 1, text: str = "") -> None:
        self._reporter.advance(count, text)
        self._stopping.check()

    def note(self, text: str) -> None:
        self._reporter.note(text)

    def close(self) -> None:
        self._reporter.close()
