"""docs/evening.md, command by command, in a folder of its own."""

import shlex
from pathlib import Path

import entry
import pytest
from PIL import Image
from safetensors.torch import load_file

PAGE = Path(__file__).parent.parent / "docs" / "evening.md"


def commands():
    blocks = PAGE.read_text().split("```console\n")[1:]
    return [line for block in blocks for line in block.partition("```")[0].splitlines()]


@pytest.mark.slow
def test_every_command_of_the_evening_runs_in_its_order(tmp_path):
    said = {}
    for line in commands():
        done = entry.run(shlex.split(line)[1:], cwd=tmp_path)
        assert done.returncode == 0, f"{line}\n{done.stderr}"
        said[line] = done.stdout + done.stderr
    steps = "".join(text for line, text in said.items() if "first@all" in line)
    assert "checkpoint of runs/first" in steps and "first-32" in steps
    assert "training: 24/32" in "".join(said.values())
    (table,) = (text for line, text in said.items() if line == "sdo runs")
    assert "learning_rate 0.001" in table and "first" in table and "second" in table
    assert Image.open(tmp_path / "samples/scales/grid.png").size[0] > 400
    assert len(list((tmp_path / "samples/scales").glob("0*.png"))) == 9
    assert load_file(tmp_path / "runs/first/first-24-kohya.safetensors")
    for page in ("runs/first/report.html", "evals/steps/report.html", "runs.html"):
        assert (tmp_path / page).is_file()


def test_the_evening_has_every_step_a_lora_maker_takes():
    verbs = [shlex.split(line)[1] for line in commands()]
    assert {"recipe", "finetune", "sample", "eval", "runs", "compare", "export"} == set(verbs)
