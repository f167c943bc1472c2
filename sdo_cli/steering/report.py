"""The page of a folder of steered images."""

from pathlib import Path
from typing import Any

import numpy as np
import yaml

from sdo_cli.files import read_json
from sdo_cli.reports import content
from sdo_cli.scoring.statistics import mean_interval
from sdo_cli.steering.curve import curves_of, whole_steps


def steering_report(folder: Path) -> content.Report:
    """What was reached by every image, the objective's way there, and the pictures."""
    manifest = read_json(folder / "manifest.json")
    spec = yaml.safe_load((folder / "resolved.yaml").read_text(encoding="utf-8"))
    rows = read_json(folder / "results.json")["images"]
    names = list(rows[0]["after"])
    status = "" if manifest["status"] == "finished" else f" ({manifest['status']})"
    wishes = ", ".join(item["name"] for item in spec["objectives"])
    return content.Report(
        title=f"Steered: {wishes}{status}",
        subtitle=f"{len(rows)} image{'s' * (len(rows) != 1)} of {spec['model']}: {', '.join(spec['variables'])} "
        f"by the rule {spec['rule']}, {spec['steps']} steps",
        verdict=[_sentence(name, rows) for name in names] + _inversion(rows),
        blocks=[*_curves(folder), _table(rows, names)],
        gallery=_gallery(folder, rows, names),
        settings=[(key, str(value)) for key, value in spec.items() if value not in (None, "", [], {})],
        machine=[*manifest["machine"].items(), *manifest["versions"].items(), ("started", manifest["started"])],
        repeat=[
            manifest["command"],
            " ".join([f"sdo optimize --recipe {folder.name}/resolved.yaml", *_plugins(manifest)]),
            f"sdo sample --variables {folder.name}/variables.safetensors",
        ],
    )


def _plugins(manifest: dict[str, Any]) -> list[str]:
    return [f"--plugin {plugin['path']}" for plugin in manifest["plugins"] if not plugin["package"]]


def _values(rows: list[dict[str, Any]], when: str, name: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.array([np.nan if row[when][name] is None else row[when][name] for row in rows], dtype=np.float64)


def _sentence(name: str, rows: list[dict[str, Any]]) -> str:
    before, after = _values(rows, "before", name), _values(rows, "after", name)
    text = f"{name}: {before.mean():.4f} before, {after.mean():.4f} after"
    return text + (f" ({mean_interval(after - before)} over {len(rows)} images)." if len(rows) > 1 else ".")


def _inversion(rows: list[dict[str, Any]]) -> list[str]:
    if not rows[0]["inversion"]:
        return []
    plain, whole = (
        np.nanmean([np.nan if row["inversion"][key] is None else row["inversion"][key] for row in rows])
        for key in ("autoencoder", "inversion")
    )
    return [f"Pictures drawn again from their inversion are off by {whole:.4f} (autoencoder alone: {plain:.4f})."]


def _curves(folder: Path) -> list[content.Chart]:
    found = []
    for name, values in curves_of(folder / "objective.jsonl").items():
        whole = whole_steps(values)
        x, mean = [float(i) for i in range(len(whole))], whole.mean(axis=1)
        error = whole.std(axis=1, ddof=1) / whole.shape[1] ** 0.5 if whole.shape[1] > 1 else np.zeros(len(whole))
        band = content.Series(name, x, mean.tolist(), (mean - error).tolist(), (mean + error).tolist())
        note = "Mean over the images at every step, with its standard error; each image keeps its best step."
        found.append(content.Chart(f"The way there: {name}", "step", name, [band], note=note))
    return found


def _table(rows: list[dict[str, Any]], names: list[str]) -> content.Table:
    head = ["image", "prompt", *(f"{name}: {when}" for name in names for when in ("before", "after")), "step", "L1"]
    cells = [
        [
            str(row["image"]),
            row["prompt"],
            *(_number(row[when][name]) for name in names for when in ("before", "after")),
            str(row["best_step"]),
            _number(row["L1"]),
        ]
        for row in rows
    ]
    return content.Table("Every image", head, cells, note="L1: mean absolute difference of pixels to before.")


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _gallery(folder: Path, rows: list[dict[str, Any]], names: list[str]) -> content.Gallery:
    pictures = (folder / "pictures").is_dir()
    places = {**({"picture": folder / "pictures"} if pictures else {}), "before": folder / "before", "after": folder}
    cases = []
    for row in rows:
        images: list[Path | None] = [place / f"{row['image']:05d}.png" for place in places.values()]
        scores = {name: [row[column].get(name) if column in row else None for column in places] for name in names}
        cases.append(content.Case(f"{row['image']:05d}", row["prompt"], "", images, scores))
    return content.Gallery(list(places), names, cases, title="Pictures")
