"""Reports of every kind with pictures drawn here."""

import math
from pathlib import Path

from PIL import Image, ImageDraw

from sdo_cli.reports.content import Case, Chart, Forest, Gallery, Interval, IntervalRow, Report, Series, Table

HOSTILE = '</script><img src=x onerror="document.title=1"> & "quotes" \'single\' 🦊 \u202eשלום\u2028\ud800\x00'


def picture(path: Path, number: int, side: int) -> Path:
    """Stripes and discs, no two alike."""
    image = Image.new("RGB", (side, side), ((37 * number) % 256, (91 * number) % 256, (53 * number) % 256))
    pen = ImageDraw.Draw(image)
    for k in range(12):
        x, y, r = (number * 7 + k * 31) % side, (number * 13 + k * 47) % side, 4 + (number + k * 5) % (side // 6)
        pen.ellipse(
            (x - r, y - r, x + r, y + r), fill=((k * 61 + number) % 256, (k * 17) % 256, (number * 3 + k) % 256)
        )
    pen.text((4, 4), str(number), fill="white")
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return path


def gallery(folder: Path, count: int, columns: list[str], side: int = 96) -> Gallery:
    cases = []
    for i in range(count):
        images = [picture(folder / name / f"{i:05d}.png", i * len(columns) + k, side) for k, name in enumerate(columns)]
        gain = math.sin(i * 1.7) / 10
        scores = {"clip-score": [0.3, *[0.3 + gain] * (len(columns) - 1)], "judge": [0.5 + gain / 2] * len(columns)}
        kind = ("animals", "plants", "")[i % 3]
        cases.append(
            Case(f"{i:05d}_00", f"prompt {i} about {kind or 'nothing'}", kind, images, scores, f"seed {i * 99}")
        )
    return Gallery(columns, ["clip-score", "judge"], cases)


def evaluation(folder: Path, count: int = 40, columns: tuple[str, ...] = ("base", "tuned"), side: int = 96) -> Report:
    x = [float(i) for i in range(50)]
    y = [math.tanh(i / 20) for i in x]
    rows = [
        IntervalRow(name, Interval(0.01 * i - 0.02, 0.01 * i - 0.04, 0.01 * i), "", "tuned")
        for i, name in enumerate(("all prompts", "sea animals and insects", "vehicles and buildings", "plants", "x"))
    ]
    return Report(
        title="Evaluation: base, tuned",
        subtitle=f"{count} prompts, 1 image each",
        verdict=["By clip-score, tuned is better than base: +0.0123 [+0.0100, +0.0146]."],
        blocks=[
            Table("Means", ["images of", "measure", "mean"], [["base", "clip-score", "0.3000"]], note="A note."),
            Forest("clip-score by category", "difference", rows),
            Chart(
                "reward",
                "step",
                "clip-score",
                [
                    Series("batches", x, [v + 0.05 * math.sin(9 * v) for v in y], pale=True),
                    Series("mean", x, y, [v - 0.05 for v in y], [v + 0.05 for v in y]),
                ],
            ),
            Chart(
                "scale",
                "LoRA scale",
                "judge",
                [Series("s", [0, 0.5, 1], [0.1, 0.2, 0.15], [0.05, 0.1, 0.1], [0.2, 0.3, 0.2])],
                markers=True,
            ),
        ],
        gallery=gallery(folder, count, list(columns), side),
        settings=[("model", "embedded"), ("steps", "50")],
        machine=[("torch", "2.6")],
        repeat=["sdo eval --prompts emoji-eval --out e"],
    )
