"""Trains the models that ship in sdo_cli/embedded/weights, on pictures made on the spot (sdo_cli/embedded/README.md).

    python scripts/embedded/train.py --work work            every stage in order, resumable
    python scripts/embedded/train.py --work work unet pack  some stages
    python scripts/embedded/train.py --work work student tiny    from the packed pipeline alone

All but `student` and `tiny` need the Debian package fonts-noto-color-emoji. Each stage keeps its state in the work
folder and continues from there; delete the stage's file to start it anew. `pack`, `student` and `tiny` write into the
package.
"""

import argparse
import sys
from pathlib import Path

import torch
from transformers import CLIPTokenizer

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from embedded import emoji_data as data  # noqa: E402
from embedded.clip import train_aesthetic, train_clip  # noqa: E402
from embedded.pack import averaged, pack  # noqa: E402
from embedded.student import train_student  # noqa: E402
from embedded.tiny import train_tiny  # noqa: E402
from embedded.unet import TextToImage, train_tokenizer, train_unet  # noqa: E402
from embedded.vae import build_vae, train_vae  # noqa: E402

STEPS = {"vae": 2200, "unet": 2800, "clip": 500, "judge": 500, "aesthetic": 400, "student": 1000, "tiny": 1000}
STAGES = ("tokenizer", "vae", "unet", "clip", "judge", "aesthetic", "pack", "student", "tiny")


def load_vae(work: Path) -> torch.nn.Module:
    """The averaged weights of stage ``vae``."""
    return averaged(build_vae(), work, "vae")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", help=f"some of: {', '.join(STAGES)}")
    parser.add_argument("--work", type=Path, default=Path("work"))
    parser.add_argument("--steps", type=int, help="instead of the stage's own number")
    options = parser.parse_args()
    if unknown := set(options.stages) - set(STAGES):
        parser.error(f"unknown stage {', '.join(unknown)}; there are {', '.join(STAGES)}")
    work: Path = options.work
    work.mkdir(parents=True, exist_ok=True)
    stages = options.stages or STAGES
    # the font is asked for only where pictures are drawn from it
    glyphs = data.render_glyphs() if set(stages) - {"tokenizer", "pack", "student", "tiny"} else torch.empty(0)

    def steps(stage: str) -> int:
        return options.steps or STEPS[stage]

    for stage in stages:
        if stage == "tokenizer":
            train_tokenizer(work / "tokenizer")
        elif stage == "vae":
            train_vae(glyphs, steps=steps(stage), work=work)
        elif stage == "student":
            train_student(steps=steps(stage), work=work)
        elif stage == "tiny":
            train_tiny(steps=steps(stage), work=work)
        else:
            tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
            vae = load_vae(work)
            if stage == "unet":
                model = train_unet(vae, tokenizer, glyphs, steps=steps(stage), work=work)
                assert isinstance(model, TextToImage)
            elif stage in ("clip", "judge"):
                train_clip(stage, vae, tokenizer, glyphs, steps=steps(stage), work=work)
            elif stage == "aesthetic":
                clip = train_clip("clip", vae, tokenizer, glyphs, steps=0, work=work)
                train_aesthetic(clip, vae, glyphs, steps=steps(stage), work=work)
            else:
                pack(vae, tokenizer, work)


if __name__ == "__main__":
    main()
