"""Progress of calls from Python: bars as notebooks draw them, or a function of the caller's."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from sdo_cli.errors import Stopped
from sdo_cli.progress import Reporter, Silent


@dataclass(frozen=True)
class Told:
    """Attributes:
    phase: what is being done, ``training`` say; empty for a remark before the first.
    done, total: of the phase.
    text: figures of the moment, or a remark.
    is_note: a remark, which is no progress.
    """

    phase: str
    done: int
    total: int
    text: str
    is_note: bool = False


@contextmanager
def reporter_of(progress: bool | Callable[[Told], None]) -> Iterator[Reporter]:
    """Closed at the end, however that comes."""
    reporter: Reporter = Silent()
    if callable(progress):
        reporter = Callback(progress)
    elif progress:
        reporter = Bars()
    try:
        yield reporter
    finally:
        reporter.close()


class Callback:
    """Hands everything to a function."""

    def __init__(self, tell: Callable[[Told], None]) -> None:
        self._tell, self._phase, self._done, self._total = tell, "", 0, 0

    def phase(self, name: str, total: int, done: int = 0) -> None:
        self._phase, self._total, self._done = name, total, done
        self._tell(Told(name, done, total, ""))

    def advance(self, count: int = 1, text: str = "") -> None:
        self._done += count
        try:
            self._tell(Told(self._phase, self._done, self._total, text))
        except KeyboardInterrupt:
            # a safe point: what is done is saved
            raise Stopped("KeyboardInterrupt") from None

    def note(self, text: str) -> None:
        self._tell(Told(self._phase, self._done, self._total, text, is_note=True))

    def close(self) -> None:
        pass


class Bars:
    """A bar of tqdm for every phase: a widget in a notebook that has them, text elsewhere."""

    def __init__(self) -> None:
        self._bar: Any = None

    def phase(self, name: str, total: int, done: int = 0) -> None:
        from tqdm.auto import tqdm

        self.close()
        self._bar = tqdm(desc=name, total=total, initial=done)

    def advance(self, count: int = 1, text: str = "") -> None:
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update(count)

    def note(self, text: str) -> None:
        from tqdm.auto import tqdm

        tqdm.write(text)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._bar = None
