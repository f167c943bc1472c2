"""A worker of `sdo … --processes N`, forked from one that has imported everything instead of importing it all again.

The launcher starts this file as it would start `sdo`: by its name, with the command line and the variables of a worker.
Signals of the launcher go to the fork, which tells its own number; those of others are passed on.
"""

import json
import os
import signal
import socket
import sys
from pathlib import Path


def main():
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
        server.connect(os.environ["SDO_TEST_SERVER"])
        asked = {"argv": sys.argv[1:], "call": "sdo_cli.cli.app:main", "env": dict(os.environ), "cwd": str(Path.cwd())}
        socket.send_fds(server, [json.dumps(asked).encode()], [1, 2])
        answers = server.makefile()
        child = int(answers.readline())
        Path(sys.argv[0]).with_name(f"child-{os.environ['RANK']}").write_text(str(child))
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, frame: os.kill(child, number))
        code = int(answers.readline())
    if code < 0:
        os.kill(os.getpid(), -code)
    sys.exit(code)


main()
