"""Text edits, inversion and edits of inverted pictures on the embedded model, 32 cases each.

    python scripts/studies/steering_edits.py text --out work/edits-text.json
    python scripts/studies/steering_edits.py inversion --out work/edits-inversion.json      (needs the emoji font)
    python scripts/studies/steering_edits.py keep --out work/edits-keep.json                (needs the emoji font)

``text``: a background is asked for; judged by the judge, on the files' 8 bits. ``keep``: pictures are inverted part-way
and drawn more like their prompt; how much changes inside and outside the glyph.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from embedded import emoji_data  # noqa: E402

from sdo_cli.drawing.pictures import read_image, save_image  # noqa: E402
from sdo_cli.progress import Silent  # noqa: E402
from sdo_cli.recipe.steering import load_steering  # noqa: E402
from sdo_cli.scoring.rewards import build_reward, score_images  # noqa: E402
from sdo_cli.scoring.statistics import estimate, paired_gain  # noqa: E402
from sdo_cli.steering.job import begin, prepare, render  # noqa: E402
from sdo_cli.steering.run import optimize  # noqa: E402

COUNT = 32


def with_error(values: Tensor) -> list[float]:
    found = estimate(values)
    return [round(found.mean, 5), round(found.standard_error, 5)]


def files(folder: Path, count: int) -> Tensor:
    return torch.stack([read_image(folder / f"{j:05d}.png") for j in range(count)])


def text(out: Path, overrides: list[str]) -> dict[str, object]:
    """Prompts without a colour; a purple background is asked for."""
    prompts = [emoji_data.caption(noun, None) for noun in emoji_data.OBJECTS[::4][:COUNT]]
    wish = "{prompt} on a purple background"
    given = {"prompts": {"lines": prompts}, "objectives": [{"name": f"text:{wish}"}], "batch_size": 16}
    optimize(load_steering(None, given, overrides), out, Silent())
    judge = build_reward("judge", {}, torch.device("cpu"))
    before, after = files(out / "before", COUNT), files(out, COUNT)
    targets = [wish.replace("{prompt}", prompt) for prompt in prompts]
    found = paired_gain(*(score_images(judge, images, targets)[:, None] for images in (before, after)))
    away = (after - before).abs().flatten(1).mean(1)
    return {
        "judge against the text": [found.before.mean, found.after.mean],
        "gain": [found.difference.mean, found.difference.standard_error],
        "gain in standard errors": found.in_standard_errors,
        "L1 to the source": with_error(away),
        "largest L1": away.max().item(),
    }


def glyphs() -> tuple[Tensor, Tensor, list[str]]:
    """Rendered pictures ``[32, 3, 64, 64]``, their glyphs' alpha, their captions."""
    table = emoji_data.render_glyphs()
    objects = torch.arange(len(emoji_data.OBJECTS))[::4][:COUNT]
    colours = torch.arange(COUNT) % len(emoji_data.COLOUR_NAMES)
    images = emoji_data.compose(table, objects, colours, generator=torch.Generator().manual_seed(0))
    white = table.clone()
    white[:, :3] = white[:, 3:]
    # the same places, white glyphs on what is then black
    placed = emoji_data.compose(white, objects, colours, generator=torch.Generator().manual_seed(0))
    names = zip(objects.tolist(), colours.tolist(), strict=True)
    captions = [emoji_data.caption(emoji_data.OBJECTS[i], emoji_data.COLOUR_NAMES[j]) for i, j in names]
    return images, placed, captions


def save(images: Tensor, folder: Path) -> list[str]:
    for j, image in enumerate(images):
        save_image(image, folder / f"{j:05d}.png")
    return [str(folder / f"{j:05d}.png") for j in range(len(images))]


def inversion(out: Path, overrides: list[str]) -> dict[str, object]:
    """Error of drawing a picture again from its inversion, for pictures of the model and rendered ones."""
    rendered, _, captions = glyphs()
    bare = {"prompts": {"lines": captions}, "objectives": ["clip"], "batch_size": COUNT}
    job = prepare(load_steering(None, bare, overrides))
    begun = begin(job, range(COUNT))
    drawn = render(begun.canvas, begun.state).cpu()
    kinds = {"drawn": save(drawn, out / "drawn"), "rendered": save(rendered, out / "rendered")}
    found = {}
    for guidance, start, iterations in ((1, 0, 1), (1, 0, 5), (5, 25, 5), (5, 0, 1), (5, 0, 5)):
        for kind, names in kinds.items():
            given = {**bare, "images": names, "guidance_scale": float(guidance), "start": start}
            words = [f"inversion_iterations={iterations}", *overrides]
            errors = begin(prepare(load_steering(None, given, words)), range(COUNT)).errors
            key = f"{kind}, guidance {guidance}, from step {start}, {iterations} iterations"
            found[key] = {name: with_error(values) for name, values in errors.items()}
            print(key, found[key], flush=True)
    return found


def keep(out: Path, overrides: list[str]) -> dict[str, object]:
    """Change inside and outside the glyph when a rendered picture is drawn more like its prompt."""
    rendered, placed, captions = glyphs()
    with tempfile.TemporaryDirectory() as folder:
        given = {
            "prompts": {"lines": captions},
            "images": save(rendered, Path(folder)),
            "objectives": [{"name": "text:{prompt}"}],
            "batch_size": 16,
        }
        optimize(load_steering(None, given, overrides), out, Silent())
    before, after = files(out / "before", COUNT), files(out, COUNT)
    # the border of a glyph belongs to neither
    inside, outside = (placed.amin(1) > 0.95), (placed - placed.amin((2, 3), keepdim=True)).amax(1) < 0.02
    change = (after - before).abs().mean(1)
    parts = {"glyph": inside, "background": outside}
    rows = {name: (change * mask).flatten(1).sum(1) / mask.flatten(1).sum(1) for name, mask in parts.items()}
    results = json.loads((out / "results.json").read_text())["images"]
    wish = next(iter(results[0]["after"]))
    gained = torch.tensor([row["after"][wish] - row["before"][wish] for row in results])
    ratio = rows["glyph"] / rows["background"]
    return {
        **{name: with_error(values) for name, values in rows.items()},
        "glyph / background": with_error(ratio),
        "loss": with_error(gained),
        "inversion": with_error(torch.tensor([row["inversion"]["inversion"] for row in results])),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["text", "inversion", "keep"])
    parser.add_argument("--out", type=Path, required=True, help="JSON; pictures go into a folder beside it")
    parser.add_argument("--set", action="append", dest="overrides", default=[], metavar="KEY=VALUE")
    arguments = parser.parse_args()
    folder = arguments.out.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    found = {"text": text, "inversion": inversion, "keep": keep}[arguments.what](folder, arguments.overrides)
    arguments.out.write_text(json.dumps(found, indent=1))
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
