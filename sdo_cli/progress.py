"""How a long job tells what it is doing. The library never prints; a command hands in one of these."""

from typing import Protocol


class Reporter(Protocol):
    """Receives progress. Phases follow each other; ``advance`` moves the current one on."""

    def phase(self, name: str, total: int, done: int = 0) -> None:
        """``done`` of the total were done before, in an earlier run."""
        ...

    def advance(self, count: int = 1, text: str = "") -> None: ...

    def note(self, text: str) -> None: ...

    def close(self) -> None:
        """The job is over, well or not."""
        ...


class Silent:
    """A reporter that tells nothing."""

    def phase(self, name: str, total: int, done: int = 0) -> None:
        del name, total, done

    def advance(self, count: int = 1, text: str = "") -> None:
        del count, text

    def note(self, text: str) -> None:
        del text

    def close(self) -> None:
        pass
