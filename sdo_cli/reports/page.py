"""A report to one HTML file that needs no network."""

import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from sdo_cli.files import write_text
from sdo_cli.reports.charts import NARROW, WIDTH, forest_chart, line_chart, numbers_of
from sdo_cli.reports.content import Chart, Forest, Gallery, Report, Table
from sdo_cli.reports.pictures import Thumbnails, remove_pictures

IMAGES = ("auto", "inline", "beside")


def write_report(report: Report, path: Path, *, images: str = "auto", budget: int = 28 * 2**20) -> Path:
    """Write the page.

    Args:
        images: ``inline`` holds every picture in the page, as large as ``budget`` bytes allow; ``beside`` writes them
            into the folder ``<name>_images``; ``auto`` is inline where they fit, however small, else beside.
        budget: of the whole page, in bytes, when pictures are inline.
    """
    gallery = report.gallery
    beside = path.with_name(f"{path.stem}_images")
    remove_pictures(beside)
    paths = [image for case in gallery.cases for image in case.images if image] if gallery else []
    if images == "beside":
        return _write_beside(report, path, paths)
    # words and scores take part of it
    thumbnails = Thumbnails(paths, budget - len(_render(report, _data(gallery, [], {})).encode()))
    while len((page := _render(report, _data(gallery, *thumbnails.inline()))).encode()) > budget:
        if not thumbnails.smaller():
            if images == "auto":
                return _write_beside(report, path, paths)
            break
    write_text(path, page)
    return path


def _write_beside(report: Report, path: Path, paths: list[Path]) -> Path:
    addresses, place = Thumbnails(paths, 10.0**12).beside(path.with_name(f"{path.stem}_images"))
    write_text(path, _render(report, _data(report.gallery, addresses, place)))
    return path


def _data(gallery: Gallery | None, addresses: list[str], place: dict[Path, int]) -> dict[str, Any]:
    """What the page's script reads."""
    if gallery is None:
        return {}
    return {
        "columns": gallery.columns,
        "measures": gallery.measures,
        "row": gallery.row,
        "right": len(gallery.columns) - 1 if gallery.right is None else gallery.right,
        "images": addresses,
        "cases": [
            {
                "key": case.key,
                "prompt": case.prompt,
                "category": case.category,
                "details": case.details,
                # -1: there should be one, null: there is none
                "images": [None if image is None else place.get(image, -1) for image in case.images],
                "scores": [case.scores.get(name, [None] * len(gallery.columns)) for name in gallery.measures],
            }
            for case in gallery.cases
        ],
    }


def _render(report: Report, data: dict[str, Any]) -> str:
    environment = Environment(
        loader=PackageLoader("sdo_cli.reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    source, _, _ = environment.loader.get_source(environment, "style.css")  # type: ignore[union-attr]
    script, _, _ = environment.loader.get_source(environment, "script.js")  # type: ignore[union-attr]
    # no end tag of a script may be read out of a prompt
    safe = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c").replace("\u2028", "\\u2028")
    page = environment.get_template("report.html.j2").render(
        report=report,
        blocks=[_block(block) for block in report.blocks],
        style=Markup(source),
        script=Markup(script),
        data=Markup(safe),
        has_gallery=report.gallery is not None and bool(report.gallery.cases),
        categories=list(dict.fromkeys(case.category for case in report.gallery.cases if case.category))
        if report.gallery
        else [],
    )
    # JSON may hold half a character, which no file can
    return page.encode("utf-8", "replace").decode()


def _block(block: Chart | Forest | Table) -> dict[str, Any]:
    """A block as the template takes it: a drawing with its numbers, or a table."""
    if isinstance(block, Table):
        columns = range(len(block.head))
        right = [all(_is_number(row[i]) for row in block.rows) for i in columns]
        return {
            "title": block.title,
            "svg": None,
            "head": block.head,
            "rows": block.rows,
            "right": right,
            "note": block.note,
        }
    # the style shows one of the two
    drawn = [line_chart(block, w) if isinstance(block, Chart) else forest_chart(block, w) for w in (WIDTH, NARROW)]
    head, rows = numbers_of(block)
    legend = [(s.name, s.pale) for s in block.series] if isinstance(block, Chart) and len(block.series) > 1 else []
    right = [i >= len(head) - 3 for i in range(len(head))]
    return {
        "title": block.title,
        "svg": drawn[0] + drawn[1],
        "head": head,
        "rows": rows,
        "right": right,
        "note": block.note,
        "legend": legend,
    }


def _is_number(text: str) -> bool:
    return not text.strip(" +-–.,%[]0123456789e")
