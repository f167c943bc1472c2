"""`sdo` by its real entry point inside this process: what most tests of commands want, at half a fork's cost.

    done = run(["sample", "a tiger"])        # like subprocess.run with text: returncode, stdout, stderr

Arguments, environment, folder and streams are the call's own; afterwards everything is as it was, also what plug-ins
registered. Where the process is the subject (signals, locks, several processes, imports) take ``forked.Forked``.
"""

import gc
import io
import os
import random
import subprocess
import sys
import traceback
import warnings
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

# tables that plug-ins and installed packages put their own into
TABLES = [
    ("rewards", ("FOREIGN", "OPTIONS", "REQUIRED", "TYPES")),
    ("sdo_cli.gradients.rules", ("RULES",)),
    ("sdo_cli.plugins", ("_loaded", "_installed")),
    ("os", ("environ",)),
    ("sys", ("modules",)),
]


def run(argv, *, env=None, cwd=None, timeout=None):
    """To its end, with both streams; ``timeout`` is for those who may need a process."""
    del timeout
    out, err = io.StringIO(), io.StringIO()
    with ExitStack() as stack:
        for step in (_tables(), _folder(cwd), _draws(), warnings.catch_warnings()):
            stack.enter_context(step)
        words = ["sdo", *map(str, argv)]
        before, sys.argv = sys.argv, words
        stack.callback(lambda: setattr(sys, "argv", before))
        if env is not None:
            os.environ.clear()
            os.environ.update(env)
        stack.enter_context(redirect_stdout(out))
        stack.enter_context(redirect_stderr(err))
        code = _main()
    # models hold themselves in circles
    gc.collect(1)
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())


def _main():
    from sdo_cli.cli.app import main

    try:
        main()
    except SystemExit as done:
        return done.code if isinstance(done.code, int) else int(bool(done.code))
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


@contextmanager
def _tables():
    """What is put into them meanwhile is forgotten; of new modules those that the test wrote."""
    from importlib import import_module

    from sdo_cli import plugins

    tables = [getattr(import_module(module), name) for module, names in TABLES for name in names]
    kept = [dict(table) for table in tables]
    # a process of its own has loaded no plug-in yet
    plugins._loaded.clear()
    plugins._installed.clear()
    try:
        yield
    finally:
        for table, before in zip(tables, kept, strict=True):
            if table is sys.modules:
                for name in table.keys() - before.keys():
                    if "pytest-of-" in str(getattr(table[name], "__file__", None)):
                        del table[name]
            elif dict(table) != before:
                table.clear()
                table.update(before)


@contextmanager
def _folder(cwd):
    before = Path.cwd()
    os.chdir(cwd or before)
    try:
        yield
    finally:
        os.chdir(before)


@contextmanager
def _draws():
    """Global generators as in a process of its own: sdo keys its draws, plug-ins need not."""
    import numpy as np
    import torch

    kept = torch.get_rng_state(), np.random.get_state(), random.getstate()
    torch.manual_seed(0)
    try:
        yield
    finally:
        torch.set_rng_state(kept[0])
        np.random.set_state(kept[1])
        random.setstate(kept[2])
