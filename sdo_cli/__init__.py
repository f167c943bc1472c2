"""sdo: fine-tune Stable Diffusion on differentiable rewards.

From Python: ``from sdo_cli import load_recipe, finetune, sample, evaluate, compare, optimize, export, Run``;
``help(finetune)`` and docs/api.md say more. ``sdo --help`` lists the commands.
"""

import os
from typing import TYPE_CHECKING, Any

from sdo_cli.threads import set_up

if TYPE_CHECKING:
    from sdo_cli.api import Evaluation, Run, compare, evaluate, export, finetune, load_recipe, optimize, sample

__all__ = [
    "Evaluation",
    "Run",
    "__version__",
    "compare",
    "evaluate",
    "export",
    "finetune",
    "load_recipe",
    "optimize",
    "sample",
]

__version__ = "0.1.0"

# before anything below can import torch
set_up()


def __getattr__(name: str) -> Any:
    """The Python interface, loaded when it is asked for: the command line needs none of it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    for library in ("DIFFUSERS", "TRANSFORMERS", "HF_HUB"):
        # their remarks on sdo's code are no user's business; read when they are imported
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    from sdo_cli import api

    return getattr(api, name)
