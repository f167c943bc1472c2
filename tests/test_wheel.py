"""Slow: the built wheel, installed elsewhere, works without the repository and leaves the torch that is there."""

import json
import os
import shlex
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "build", "--wheel", "--outdir", str(folder), str(ROOT)], check=True)
    (found,) = folder.glob("sdo_diffusion-*.whl")
    return found


def test_the_wheel_carries_everything(wheel, tmp_path):
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

    def shell(line):
        return subprocess.run(line, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True)

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
    assert done.stderr.startswith("embedded on ")
    # what it says comes next runs as it is printed
    following = done.stdout.partition("next:\n")[2].splitlines()
    assert [line.split()[:2] for line in following] == [["venv/bin/sdo", "sample"], ["venv/bin/sdo", "eval"]]
    drawn = shell(following[0] + " --out drawn")
    assert drawn.returncode == 0, drawn.stderr
    assert (tmp_path / "drawn" / "00000.png").exists()
    line = [str(python), "-c", "from sdo_cli.installed import install_extra; print(install_extra('8bit'))"]
    assert shell(shlex.join(line)).stdout == "venv/bin/pip install 'sdo-diffusion[8bit]'\n"


def stub(site, name, version, *requires):
    """What an installer reads of an installed package, and no more."""
    folder = site / f"{name}-{version}.dist-info"
    folder.mkdir()
    lines = [
        "Metadata-Version: 2.1",
        f"Name: {name}",
        f"Version: {version}",
        *(f"Requires-Dist: {r}" for r in requires),
    ]
    (folder / "METADATA").write_text("\n".join(lines) + "\n")
    (folder / "INSTALLER").write_text("pip\n")
    (folder / "RECORD").write_text("")
    (site / f"{name}.py").write_text(f"__version__ = {version!r}\n")


@pytest.mark.parametrize("torchvision", [True, False])
def test_the_torch_that_is_there_stays(torchvision, wheel, tmp_path):
    """The README's two lines in an environment with torch 2.6 for CUDA: pip wants no other. Asks the registry."""
    venv.create(tmp_path / "venv", with_pip=True)
    (site,) = tmp_path.glob("venv/lib/python3*/site-packages")
    stub(site, "torch", "2.6.0+cu124")
    if torchvision:
        stub(site, "torchvision", "0.21.0+cu124", "torch==2.6.0")
    lines = [line.strip() for line in (ROOT / "README.md").read_text().splitlines() if "keep-torch.txt" in line][:2]
    assert lines[0].startswith("python -c ") and lines[1] == "pip install --constraint keep-torch.txt ."
    lines[1] = f"{lines[1].removesuffix('.')} {wheel} --quiet --dry-run --report report.json"
    path = {"PATH": f"{tmp_path / 'venv' / 'bin'}:{os.environ['PATH']}"}
    done = subprocess.run(
        " && ".join(lines), shell=True, cwd=tmp_path, env={**os.environ, **path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    wanted = json.loads((tmp_path / "report.json").read_text())["install"]
    found = {package["metadata"]["name"].lower(): package["metadata"]["version"] for package in wanted}
    assert "sdo-diffusion" in found and "diffusers" in found
    assert "torch" not in found and not [name for name in found if name.startswith("nvidia")]
    assert found.get("torchvision", "0.21.0") == "0.21.0" and ("torchvision" in found) is not torchvision
