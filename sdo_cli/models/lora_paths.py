"""From the name of a LoRA to where it lies: a path, an embedded one, or one of a run's checkpoints. Imports no torch.

``runs/x`` is a run's last adapter, ``runs/x@20`` that of its checkpoint at step 20, ``runs/x@best`` the one its guard
liked most, ``runs/x@last`` the newest checkpoint's; ``runs/x@all`` stands for all of them, where several are asked for.
"""

import re
from pathlib import Path

from sdo_cli import embedded
from sdo_cli.models.catalog import LORA_FILE

# in every run's folder, and within it
RUN_MARK = "resolved.yaml"
CHECKPOINTS, BEST = "checkpoints", "best"
ALL, LAST = "all", "last"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def lora_place(name: str) -> str:
    """The folder of an embedded LoRA (``embedded:student``) or of a run's checkpoint; any other name as it is."""
    which = name.partition(":")[2]
    if embedded.is_embedded(name) and which in embedded.LORAS:
        return str(embedded.WEIGHTS / which)
    if (found := at_checkpoint(name)) is None:
        return name
    run, mark = found
    if mark == BEST:
        return str(run / BEST)
    steps = adapter_steps(run)
    step = (steps[-1] if steps else 0) if mark == LAST else mark
    return str(checkpoint_folder(run, int(step))) if mark != ALL else name


def at_checkpoint(name: str) -> tuple[Path, str] | None:
    """Run folder and mark of ``RUN@MARK``; None for any other name, and for a path that is there as it stands."""
    before, at, mark = name.rpartition("@")
    if not at or not before or not re.fullmatch(r"[0-9]+|best|last|all", mark):
        return None
    run = Path(before).expanduser()
    return None if Path(name).expanduser().exists() or not run.is_dir() else (run, mark)


def checkpoint_folder(run: Path, step: int) -> Path:
    return run / CHECKPOINTS / f"checkpoint-{step}"


def step_of(folder: Path) -> int | None:
    """Of a checkpoint's folder; None for another one."""
    found = _CHECKPOINT.fullmatch(folder.name)
    return int(found[1]) if found else None


def adapter_steps(run: Path) -> list[int]:
    """Steps whose adapter is kept, ascending."""
    files = (run / CHECKPOINTS).glob(f"checkpoint-*/{LORA_FILE}")
    return sorted(step for path in files if (step := step_of(path.parent)) is not None)


def written_out(names: list[str]) -> list[str]:
    """``RUN@all`` as one name for each of its checkpoints; of a run without any, its adapter."""
    found = []
    for name in names:
        place = at_checkpoint(name)
        if place is None or place[1] != ALL:
            found.append(name)
            continue
        run, steps = name.rpartition("@")[0], adapter_steps(place[0])
        found += [f"{run}@{step}" for step in steps]
        if not steps:
            found.append(run)
    return found


def what_there_is(run: Path) -> str:
    """For a message: the marks that a run's folder has adapters for."""
    marks = [f"@{step}" for step in adapter_steps(run)]
    marks += [f"@{BEST}"] if (run / BEST / LORA_FILE).is_file() else []
    return ", ".join(marks)
