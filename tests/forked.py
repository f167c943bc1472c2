"""`sdo` in a process of its own without the ten seconds of imports: forked from one that has them.

    process = Forked(["finetune", "--recipe", "quickstart"])      # like subprocess.Popen with pipes and text
    done = run(["sample", "a tiger"])                             # like subprocess.run

The child runs the real entry point with its own arguments, environment, signals and exit code. Only where imports, the
launcher or the process's own command line matter a test starts Python anew.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

PRELOADED = [
    # first: says how torch's threads wait
    "sdo_cli",
    "accelerate",
    "diffusers.optimization",
    "diffusers.training_utils",
    "jinja2",
    "matplotlib.figure",
    "open_clip",
    "peft",
    "scipy.stats",
    "sdo_cli.cli.app",
    "sdo_cli.evaluation.run",
    "sdo_cli.training.run",
    "sdo_cli.prune.run",
    "sdo_cli.models.load",
    "sdo_cli.drawing.sample",
    "sdo_cli.parallel.world",
    "sdo_cli.parallel.stopping",
    "rewards.clip_score",
    "rewards.judge",
    "rewards.aesthetic",
    "transformers.models.clip.modeling_clip",
    "transformers.models.clip.tokenization_clip",
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
    "diffusers.schedulers.scheduling_ddim",
    "accelerate.utils",
]


def serve(path):
    """Import everything, then fork a child for every request."""
    from importlib import import_module

    for name in PRELOADED:
        import_module(name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    # a test run in the background of a script ignores Ctrl-C; those it starts must not
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
        server.bind(path)
        server.listen(64)
        print("ready", flush=True)
        while True:
            connection, _ = server.accept()
            if os.fork() == 0:
                server.close()
                _answer(connection)
                os._exit(0)
            connection.close()


def _answer(connection):
    """Fork once more, to be the one who waits for the child."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    content, fds, _, _ = socket.recv_fds(connection, 2**20, 2)
    pid = os.fork()
    if pid == 0:
        connection.close()
        _become(json.loads(content), fds)
    for fd in fds:
        os.close(fd)
    connection.sendall(f"{pid}\n".encode())
    _, status = os.waitpid(pid, 0)
    connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())


def _become(asked, fds):
    os.setsid()
    nowhere = os.open(os.devnull, os.O_RDONLY)
    for fd, target in ((nowhere, 0), (fds[0], 1), (fds[1], 2)):
        os.dup2(fd, target)
    os.chdir(asked["cwd"])
    os.environ.clear()
    os.environ.update(asked["env"])
    sys.argv = ["sdo", *asked["argv"]]
    _tell_coverage()
    code = 1
    try:
        from importlib import import_module

        module, _, name = asked["call"].partition(":")
        getattr(import_module(module), name)()
        code = 0
    except SystemExit as done:
        code = done.code if isinstance(done.code, int) else int(bool(done.code))
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _tell_coverage():
    """Where it looks on: for which test this process runs."""
    if (coverage := sys.modules.get("coverage")) and (running := coverage.Coverage.current()) is not None:
        running.switch_context(os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" (")[0])


_lock = threading.Lock()
_server = None


def address():
    """Where the process that forks listens; started by the first who asks."""
    global _server
    with _lock:
        if _server is None:
            path = str(Path(tempfile.mkdtemp(prefix="sdo-fork-")) / "socket")
            root = Path(__file__).parent.parent
            quiet = {f"{name}_VERBOSITY": "error" for name in ("DIFFUSERS", "TRANSFORMERS", "HF_HUB")}
            # last the caller's own: packages may lie there
            paths = [str(root), str(root / "tests"), os.environ.get("PYTHONPATH", "")]
            env = {**os.environ, **quiet, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
            code = f"import forked; forked.serve({path!r})"
            # it ends when this process closes its standard input: nobody asks any more
            process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=env, text=True)
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            _server = (process, path)
            import atexit

            atexit.register(process.kill)
        return _server[1]


class Forked:
    """``sdo argv`` with pipes; the part of ``subprocess.Popen`` that tests use.

    ``call`` names another function, ``module:function``, that finds its words in ``sys.argv``.
    """

    def __init__(self, argv, *, env=None, cwd=None, call="sdo_cli.cli.app:main"):
        self.args, self.returncode = ["sdo", *map(str, argv)], None
        self._connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._connection.connect(address())
        out, err = os.pipe(), os.pipe()
        where = {"env": dict(env or os.environ), "cwd": str(cwd or Path.cwd())}
        asked = {"argv": self.args[1:], "call": call, **where}
        socket.send_fds(self._connection, [json.dumps(asked).encode()], [out[1], err[1]])
        os.close(out[1])
        os.close(err[1])
        self.stdout, self.stderr = os.fdopen(out[0]), os.fdopen(err[0])
        self._answers = self._connection.makefile()
        self.pid = int(self._answers.readline())

    def wait(self, timeout=None):
        if self.returncode is None:
            self._connection.settimeout(timeout)
            self.returncode = int(self._answers.readline())
            self._connection.close()
        return self.returncode

    def poll(self):
        if self.returncode is None:
            import select

            if select.select([self._connection], [], [], 0)[0]:
                self.wait()
        return self.returncode

    def communicate(self, timeout=None):
        """What is left of both streams, read side by side."""
        found = {}
        readers = [
            threading.Thread(target=lambda name=name, stream=stream: found.update({name: stream.read()}))
            for name, stream in (("out", self.stdout), ("err", self.stderr))
        ]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join(timeout)
            if reader.is_alive():
                self.kill()
                raise subprocess.TimeoutExpired(self.args, timeout)
        self.wait(timeout)
        return found["out"], found["err"]

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)


def run(argv, *, timeout=300, **options):
    """To its end, with both streams; ``options`` are :class:`Forked`'s."""
    process = Forked(argv, **options)
    out, err = process.communicate(timeout)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)
