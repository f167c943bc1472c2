"""Slow: the built wheel, installed elsewhere, works without the repository."""

import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_the_wheel_carries_everything(tmp_path):
    subprocess.run([sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path), str(ROOT)], check=True)
    (wheel,) = tmp_path.glob("sdo_cli-*.whl")
    # its dependencies are gigabytes and tested by `make setup`; the environment borrows those of this one
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", str(wheel)], check=True)
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], capture_output=True, text=True
    ).stdout.strip()
    borrowed = next(p for p in sys.path if p.endswith("site-packages"))
    own = [site, borrowed]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PYTHONPATH": ":".join(own)}

    def sdo(*arguments):
        return subprocess.run(
            [python, "-m", "sdo_cli", *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True
        )

    where = subprocess.run(
        [python, "-c", "import sdo_cli, rewards; print(sdo_cli.__file__, rewards.__file__)"],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    ).stdout  # fmt: skip
    assert str(ROOT) not in where and where.count(str(tmp_path)) == 2
    assert "quickstart" in sdo("recipe", "list").stdout
    done = sdo(
        "finetune", "--recipe", "quickstart", "--out", "run", "max_train_steps=1", "train_batch_size=1",
        "num_inference_steps=2", "validation.num_prompts=2", "lr_warmup_steps=0",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    drawn = sdo("sample", "a tiger on a teal background", "--lora", "run", "--steps", "2", "--out", "drawn")
    assert drawn.returncode == 0, drawn.stderr
    assert (tmp_path / "drawn" / "00000.png").exists()
