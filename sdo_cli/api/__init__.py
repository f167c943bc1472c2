"""sdo from Python, as in a notebook: what the commands do, with their settings by name (docs/api.md).

    from sdo_cli import Run, evaluate, finetune, load_recipe, sample

    run = finetune(load_recipe("quickstart", max_train_steps=60), progress=True)
    sample("a tiger on a teal background", lora=run)[0].image
    evaluate(loras=[run.at(20), run]).to_pandas()

Errors a user can act on are :class:`sdo_cli.errors.SdoError`, with cause (``message``) and ``remedy``. Everything runs
in this process, on its GPU if there is one; several GPUs are for the commands.
"""

from sdo_cli.api.calls import compare, evaluate, export, optimize, sample
from sdo_cli.api.progress import Told
from sdo_cli.api.results import Comparison, Evaluation, Run, Sample, Steered
from sdo_cli.api.train import finetune, load_recipe

__all__ = [
    "Comparison",
    "Evaluation",
    "Run",
    "Sample",
    "Steered",
    "Told",
    "compare",
    "evaluate",
    "export",
    "finetune",
    "load_recipe",
    "optimize",
    "sample",
]
