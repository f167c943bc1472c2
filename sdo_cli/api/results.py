"""What calls from Python give back: folders as objects, pictures as PIL's, tables as pandas'."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from PIL import Image

from sdo_cli.errors import EnvironmentFault, RecipeFault
from sdo_cli.files import read_json
from sdo_cli.installed import install_extra
from sdo_cli.models.lora_paths import ALL, BEST, adapter_steps, at_checkpoint
from sdo_cli.recipe.schema import Recipe
from sdo_cli.runs.again import load_run
from sdo_cli.runs.read import METRICS, read_lines
from sdo_cli.runs.table import RunGain, RunRow, run_row

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True)
class Run:
    """A run's folder, finished or not; what it holds is read when asked for.

    Attributes:
        folder: of the run; ``str(run)`` may stand wherever a LoRA is asked for.
    """

    folder: Path

    def __init__(self, folder: "str | Path | Run") -> None:
        object.__setattr__(self, "folder", Path(str(folder)))
        run_row(self.folder)

    def __str__(self) -> str:
        return str(self.folder)

    @property
    def row(self) -> RunRow:
        """Status, steps, gains and the guard's verdict, as `sdo runs` has them."""
        return run_row(self.folder)

    @property
    def status(self) -> str:
        """running, finished, interrupted, failed or killed."""
        return self.row.status

    @property
    def gains(self) -> dict[str, RunGain]:
        """On held-out prompts, by reward; empty before the run is finished."""
        return self.row.gains

    @property
    def recipe(self) -> Recipe:
        """What it was trained by; to go on give the run itself to ``finetune``."""
        return load_run(self.folder, checked=False).recipe

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """A dict per optimizer step: loss, rewards, grad_norm, learning_rate, seconds by stage, …"""
        return read_lines(self.folder / METRICS)

    @property
    def checkpoints(self) -> list[int]:
        """Steps whose LoRA is kept."""
        return adapter_steps(self.folder)

    def at(self, step: int | str) -> str:
        """The LoRA of a checkpoint (a step), or ``best`` (with a guard): a word for ``lora`` and ``loras``.

        Raises:
            RecipeFault: the run has none.
        """
        if step != BEST and step not in self.checkpoints:
            known = ", ".join(map(str, self.checkpoints)) or "none"
            raise RecipeFault([f"{self.folder} has no checkpoint {step}; there are: {known}"], what="call")
        if step == BEST and not (self.folder / BEST).is_dir():
            raise RecipeFault([f"{self.folder} has no best adapter: it has no guard"], what="call")
        return f"{self.folder}@{step}"

    @property
    def all_checkpoints(self) -> str:
        """Every checkpoint at once, for ``loras``."""
        return f"{self.folder}@{ALL}"

    @property
    def grid(self) -> Image.Image:
        """The newest picture of the grid prompts.

        Raises:
            EnvironmentFault: none was drawn.
        """
        found = sorted((self.folder / "samples").glob("step_*/grid.png"))
        if not found:
            raise EnvironmentFault(f"{self.folder} has no grid", remedy="give the recipe validation.prompts")
        return opened(found[-1])

    @property
    def report(self) -> Path:
        return self.folder / "report.html"

    def to_pandas(self) -> "pandas.DataFrame":
        """A row per step, rewards and seconds in columns of their own (``rewards.clip-score``)."""
        frame: pandas.DataFrame = _pandas().json_normalize(self.metrics)
        return frame


@dataclass(frozen=True)
class Sample:
    """Attributes:
    image: as 8-bit RGB.
    seed: it began from ``torch.Generator("cpu").manual_seed(seed)``.
    """

    image: Image.Image = field(repr=False)
    prompt: str
    seed: int


@dataclass(frozen=True)
class Evaluation:
    """Attributes:
    folder: with pictures, tables and ``report.html``.
    """

    folder: Path

    @property
    def summary(self) -> dict[str, Any]:
        """What ``summary.json`` holds.

        Raises:
            EnvironmentFault: the evaluation is not finished, or none.
        """
        path = Path(self.folder) / "summary.json"
        if not path.is_file():
            raise EnvironmentFault(f"{self.folder} holds no finished evaluation", remedy="call evaluate(out=…) again")
        tree: dict[str, Any] = read_json(path)
        return tree

    @property
    def means(self) -> dict[str, dict[str, float]]:
        """By variant and measure."""
        return {
            name: {measure: row["mean"] for measure, row in entry["measures"].items()}
            for name, entry in self.summary["variants"].items()
        }

    @property
    def differences(self) -> dict[str, dict[str, float]]:
        """To the first variant, by variant and measure; intervals stand in ``summary``."""
        return {
            name: {measure: row["difference"]["mean"] for measure, row in found.items()}
            for name, found in self.summary["differences"].items()
        }

    @property
    def report(self) -> Path:
        return self.folder / "report.html"

    def to_pandas(self, by: Literal["picture", "variant"] = "picture") -> "pandas.DataFrame":
        """A row per picture with a column per measure, or a row per variant and measure with mean and interval.

        Both say of every variant its LoRA (as ``sample`` takes it), scale, and the step of a checkpoint.
        """
        name = "scores.csv" if by == "picture" else "summary.csv"
        frame: pandas.DataFrame = _pandas().read_csv(self.folder / name)
        for at, (key, values) in enumerate(self._drawn_with().items(), 1):
            frame.insert(at, key, frame["variant"].map(values))
        return frame

    def _drawn_with(self) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {"lora": {}, "scale": {}, "step": {}}
        for name, entry in self.summary["variants"].items():
            lora = entry.get("lora")
            step = at_checkpoint(lora) if lora else None
            found["lora"][name] = lora
            found["scale"][name] = entry["scale"] if lora else 0.0
            found["step"][name] = int(step[1]) if step and step[1].isdecimal() else None
        return found


@dataclass(frozen=True)
class Comparison:
    """Attributes:
    summary: what ``comparison.json`` holds, or of runs, what `sdo compare --json` says.
    folder: with ``report.html``; None for runs, whose kept scores are compared.
    """

    summary: dict[str, Any] = field(repr=False)
    folder: Path | None = None

    def to_pandas(self) -> "pandas.DataFrame":
        """A row per variant and measure: mean difference to the first, its interval, win rate."""
        rows = []
        for name, found in self.summary["results"].items():
            for measure, row in found.items():
                if measure == "same_noise":
                    continue
                d, w = row["difference"], row["win_rate"]
                rows.append(
                    {
                        "variant": name,
                        "measure": measure,
                        "difference": d["mean"],
                        "low": d["low"],
                        "high": d["high"],
                        "win_rate": w["mean"],
                        "prompts": d["n"],
                    }
                )
        frame: pandas.DataFrame = _pandas().DataFrame(rows)
        return frame


@dataclass(frozen=True)
class Steered:
    """Attributes:
    folder: with pictures, report and variables.
    rows: per image: prompt, seed, objectives before and after.
    """

    folder: Path
    rows: list[dict[str, Any]] = field(repr=False)

    @property
    def images(self) -> list[Image.Image]:
        return [opened(path) for path in sorted(self.folder.glob("[0-9]*.png"))]

    @property
    def before(self) -> list[Image.Image]:
        return [opened(path) for path in sorted((self.folder / "before").glob("[0-9]*.png"))]

    def to_pandas(self) -> "pandas.DataFrame":
        frame: pandas.DataFrame = _pandas().json_normalize(self.rows)
        return frame


def opened(path: Path) -> Image.Image:
    """Whole in memory: its file may go."""
    with Image.open(path) as image:
        image.load()
        return image.copy()


def _pandas() -> Any:
    try:
        import pandas
    except ImportError as fault:
        raise EnvironmentFault("tables need pandas", remedy=install_extra("notebook")) from fault
    return pandas
