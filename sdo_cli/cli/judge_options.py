"""Options of `sdo eval` for scores from outside this process."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from sdo_cli.judges.spec import Asking, JudgeSpec, Outside, read_judge


@dataclass(frozen=True)
class JudgeOptions:
    judge: Annotated[
        list[str] | None,
        typer.Option(metavar="[NAME=]JUDGE", help='"command {images} {out}", http://…, or openai+http://…/v1#MODEL.'),
    ] = None
    judge_question: Annotated[
        str | None, typer.Option(help="Asked by openai+http, with {prompt}; the score is P(yes).")
    ] = None
    judge_batch: Annotated[
        int | None, typer.Option(help="Pictures a call; default 500 of a command, 8 of a server.")
    ] = None
    judge_timeout: Annotated[float, typer.Option(help="Seconds a call may take.")] = 600.0
    judge_retries: Annotated[int, typer.Option(help="More calls after one that failed without any score.")] = 2
    judge_workers: Annotated[int, typer.Option(help="Calls that a server gets at a time.")] = 2
    scores: Annotated[
        list[Path] | None, typer.Option(help="A CSV of scores made elsewhere: image, variant, a column a measure.")
    ] = None

    def outside(self, own: Collection[str], wrong: list[str]) -> Outside:
        """The judges and tables; everything that is wrong with them goes into ``wrong``.

        Args:
            own: names of measures of sdo's own.
        """
        asking = Asking(self.judge_batch, self.judge_timeout, self.judge_retries, self.judge_workers)
        wrong += asking.problems()
        judges: dict[str, JudgeSpec] = {}
        for text in self.judge or []:
            if (found := read_judge(text, self.judge_question, wrong)) is None:
                continue
            name, spec = found
            if name in own:
                wrong.append(f"--judge {name}: is a measure of sdo's own; give another name, NAME=…")
            elif name in judges:
                wrong.append(f"--judge {name}: there are two of this name; write --judge NAME=… for each")
            judges[name] = spec
        tables = tuple(dict.fromkeys(self.scores or []))
        wrong += [f"--scores {path}: no such file" for path in tables if not path.is_file()]
        return Outside(judges, tables, asking)
