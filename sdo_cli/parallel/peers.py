"""Nobody waits for the dead: every process holds a connection to the first, which the kernel closes when it ends.

A process that fails says so over it; the first passes it on. Collectives alone would let the others wait for minutes:
NCCL does not notice a process that is gone.
"""

import json
import os
import secrets
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from sdo_cli.errors import EnvironmentFault

# a folder of our launcher's: who runs, and with which code each ended
LAUNCHED = "SDO_LAUNCHED"
# set by launchers that stay the parent of their workers: ours, torchrun and accelerate
LAUNCHERS = (LAUNCHED, "TORCHELASTIC_RUN_ID")

# seconds a process gets to say what is wrong itself, when it hears that another failed: the fault may be the same
GRACE = 1.5
# a machine that is gone closes nothing: the kernel asks it after so many seconds, so often
KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 4, "TCP_KEEPCNT": 3}


class Peers:
    """Connections to the other processes: the first has one to each, the others one to the first.

    Args:
        links: by rank; none for a single process.
    """

    def __init__(self, rank: int = 0, links: dict[int, socket.socket] | None = None) -> None:
        self.rank, self._links = rank, dict(links or {})
        self._gone: set[int] = set()
        self._heard: dict[int, bytes] = dict.fromkeys(self._links, b"")
        self._claim, self._news = threading.Lock(), threading.Event()
        self._parent, self.met = os.getppid(), bool(self._links)
        self.before_the_end: Callable[[], None] | None = None
        if self._links:
            threading.Thread(target=self._watch, name="sdo-peers", daemon=True).start()

    @property
    def linked(self) -> bool:
        """Whether there are others, who have not all ended well."""
        return bool(self._links)

    def leave(self) -> None:
        """All is well: what is closed from now on is no failure."""
        self._tell({"kind": "bye", "rank": self.rank})
        self._links = {}

    def fail(self, message: str, code: int) -> None:
        """Tell the others; they end too."""
        self._tell({"kind": "failed", "rank": self.rank, "message": message, "code": code, "said": True})

    def claim(self) -> bool:
        """Whether the caller is the one that ends this process; False when the watcher does already."""
        return self._claim.acquire(blocking=False)

    def news(self, seconds: float) -> bool:
        """Wait whether another process is found to have failed; an error here is then only its consequence."""
        return bool(self._links) and self._news.wait(seconds)

    def _tell(self, message: dict[str, Any]) -> None:
        line = (json.dumps(message) + "\n").encode()
        for link in self._links.values():
            # one that is gone needs no news
            with suppress(OSError):
                link.sendall(line)

    def _watch(self) -> None:
        chosen = selectors.DefaultSelector()
        for peer, connection in self._links.items():
            chosen.register(connection, selectors.EVENT_READ, peer)
        while self._links:
            for key, _ in chosen.select(timeout=1.0):
                rank = key.data
                if (link := self._links.get(rank)) is None:
                    # left meanwhile
                    return
                try:
                    content = link.recv(65536)
                except OSError:
                    content = b""
                *lines, self._heard[rank] = (self._heard[rank] + content).split(b"\n")
                for line in lines:
                    self._hear(json.loads(line))
                if not content:
                    chosen.unregister(link)
                    if rank not in self._gone and self._links:
                        self._lost(rank, "ended without a word (killed, or out of memory?)", 1, said=False)
            if any(map(os.environ.get, LAUNCHERS)) and os.getppid() != self._parent:
                # whoever started us is gone: save and stop
                self._parent = os.getppid()
                os.kill(os.getpid(), signal.SIGTERM)

    def _hear(self, message: dict[str, Any]) -> None:
        self._gone.add(message["rank"])
        if message["kind"] == "failed":
            self._lost(message["rank"], message["message"], message["code"], said=message["said"])

    def _lost(self, rank: int, what: str, code: int, *, said: bool) -> None:
        """Another process is gone, and may have said why: end this one too, unless it is ending by itself."""
        self._news.set()
        if self.rank == 0:
            self._tell({"kind": "failed", "rank": rank, "message": what, "code": code, "said": said})
        time.sleep(GRACE)
        if not self.claim():
            return
        # the first speaks, unless it is the one that is gone without a word
        if self.rank == (0 if rank or said else 1):
            sys.stderr.write(f"sdo: process {rank}: {what}\n")
        if self.before_the_end is not None:
            with suppress(Exception):
                self.before_the_end()
        leave_process(code)


def leave_process(code: int) -> NoReturn:
    """End at once, whatever other threads wait for."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    os._exit(exit_code(code))


def exit_code(code: int) -> int:
    """``code``, or 0 after it was written down for our launcher: the one it uses knows no codes but 0 and 1.

    Before the processes have met, the launcher has to end the others: then it gets the code itself.
    """
    if folder := os.environ.get(LAUNCHED):
        with suppress(OSError):
            (Path(folder) / f"exit-{os.environ.get('RANK', '0')}").write_text(str(code))
        return 0 if _current.met else code
    return code


def connect(rank: int, size: int, share: Callable[[Callable[[], Any]], Any]) -> Peers:
    """Every process calls it.

    Args:
        share: gives all what the first process makes.
    """
    server = _listen() if rank == 0 else None

    def offer() -> tuple[str, int, str]:
        assert server is not None
        return os.environ["MASTER_ADDR"], server.getsockname()[1], secrets.token_hex(16)

    host, port, token = share(offer)
    try:
        return _made(_links(rank, size, server, (host, port), token))
    except TimeoutError as fault:
        raise EnvironmentFault(
            f"process {rank}: the processes of this job cannot reach {host}:{port}",
            remedy="let the machines talk to each other on all ports, as NCCL needs too",
        ) from fault


def _links(rank: int, size: int, server: socket.socket | None, place: tuple[str, int], token: str) -> Peers:
    if server is None:
        link = socket.create_connection(place, timeout=60)
        link.sendall(f"{token} {rank}\n".encode())
        return Peers(rank, {0: _kept_alive(link)})
    links: dict[int, socket.socket] = {}
    server.settimeout(60)
    with server:
        while len(links) < size - 1:
            link, _ = server.accept()
            said, _, who = _greeting(link).partition(b" ")
            # anybody may call; only our own know the word
            if secrets.compare_digest(said, token.encode()):
                links[int(who)] = _kept_alive(link)
            else:
                link.close()
    return Peers(rank, links)


def _greeting(link: socket.socket) -> bytes:
    """The first line, and nothing of what follows; what is there of one that is no greeting."""
    link.settimeout(10)
    said = b""
    with suppress(OSError):
        while len(said) < 64 and (byte := link.recv(1)) and byte != b"\n":
            said += byte
    return said


_current = Peers()


def current() -> Peers:
    """Those of this process; without links when it is alone."""
    return _current


def _made(peers: Peers) -> Peers:
    global _current
    _current = peers
    return peers


def _listen() -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def _kept_alive(link: socket.socket) -> socket.socket:
    link.settimeout(None)
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEPALIVE.items():
        if hasattr(socket, name):
            link.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return link
