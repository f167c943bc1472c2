"""Writing so that nothing half-written ever looks whole."""

import fcntl
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sdo_cli.errors import EnvironmentFault


def file_hash(path: Path) -> str:
    """SHA-256 of a file's content."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_atomic(path: Path, write: Callable[[Path], None]) -> None:
    """``write`` fills a neighbouring temporary file, which is then renamed onto ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # the suffix stays last: image and safetensors writers look at it
    temporary = path.with_name(f".{path.stem}.partial-{os.getpid()}{path.suffix}")
    try:
        write(temporary)
        if path.suffix == ".safetensors":
            sort_metadata(temporary)
        as_others(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def as_others(path: Path) -> None:
    """Readable for whom the user's umask lets read: safetensors writes files for their owner alone."""
    now = os.umask(0)
    os.umask(now)
    path.chmod(0o666 & ~now)


def sort_metadata(path: Path) -> None:
    """Puts a safetensors file's metadata in order, in place: its writer has another in every process.

    Equal tensors and metadata are to be equal files.
    """
    with path.open("r+b") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
        if len(header.get("__metadata__", {})) < 2:
            return
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        # the same characters in another order, and spaces to a multiple of eight as the writer has them
        if len(text) <= length:
            stream.seek(8)
            stream.write(text.ljust(length))


def remove_partial(folder: Path) -> None:
    """What processes that were killed had begun to write; nobody else may be writing there."""
    for path in folder.rglob(".*.partial-*"):
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    write_atomic(path, lambda temporary: _write_text(temporary, text))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def without_nan(value: Any) -> Any:
    """JSON knows no NaN: what cannot be told is null."""
    if isinstance(value, dict):
        return {key: without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold a lock on ``folder``; it ends with the process, however that ends.

    Raises:
        EnvironmentFault: another process holds it.
    """
    path = folder / ".lock"
    with path.open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as fault:
            raise EnvironmentFault(
                f"another process works in {folder}/", remedy="wait for it, stop it, or give another folder"
            ) from fault
        except OSError:
            # a file system without locks
            pass
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def is_held(folder: Path) -> bool:
    """Whether a process works in a folder, on this machine or where locks of the file system say so."""
    try:
        with (folder / ".lock").open() as stream:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def append_json_line(path: Path, value: Any) -> None:
    with path.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(value) + "\n")
