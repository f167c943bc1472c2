"""The page as a file: inert, self-contained, within its budget, whatever it is given."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from PIL import Image
from report_samples import HOSTILE, evaluation, picture

from sdo_cli.reports.charts import NARROW, WIDTH, forest_chart, line_chart, numbers_of, ticks
from sdo_cli.reports.content import Case, Chart, Forest, Gallery, Interval, IntervalRow, Report, Series, Table
from sdo_cli.reports.page import write_report

NAN = float("nan")


class Seen(HTMLParser):
    """Tags, their attributes, and the text of scripts."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.inside, self.texts = [], [], {}
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.inside.append(dict(attrs).get("id", tag))

    def handle_data(self, data):
        if self.inside:
            self.texts[self.inside[-1]] = self.texts.get(self.inside[-1], "") + data


def written(report, path, **options):
    return write_report(report, path, **options).read_text(encoding="utf-8")


def data_of(page):
    return json.loads(Seen(page).texts["data"])


def test_words_of_others_are_only_words(tmp_path):
    case = Case("k", HOSTILE, HOSTILE, [None], {HOSTILE: [0.5]}, HOSTILE)
    table = Table(HOSTILE, [HOSTILE], [[HOSTILE]], note=HOSTILE)
    chart = Chart(HOSTILE, HOSTILE, HOSTILE, [Series(HOSTILE, [0, 1], [0, 1]), Series("b", [0], [1])], note=HOSTILE)
    forest = Forest(HOSTILE, HOSTILE, [IntervalRow(HOSTILE, Interval(0, -1, 1), HOSTILE, HOSTILE)])
    words = [HOSTILE]
    report = Report(
        HOSTILE, HOSTILE, words, [table, chart, forest], Gallery([HOSTILE], [HOSTILE], [case], HOSTILE),
        [(HOSTILE, HOSTILE)], [(HOSTILE, HOSTILE)], words,
    )  # fmt: skip
    page = written(report, tmp_path / "r.html")
    tags = Seen(page).tags
    assert [tag for tag, _ in tags].count("script") == 2 and not [a for t, a in tags if t == "img" or "onerror" in a]
    assert data_of(page)["cases"][0]["prompt"] == HOSTILE.encode("utf-8", "replace").decode()
    plain = Seen(written(replace(evaluation(tmp_path, 1)), tmp_path / "p.html")).tags
    assert {tag for tag, _ in tags} <= {tag for tag, _ in plain}


def test_nothing_is_fetched(tmp_path):
    page = written(evaluation(tmp_path, 3), tmp_path / "r.html")
    for _, attributes in Seen(page).tags:
        for name in ("src", "href", "action", "srcset"):
            assert (attributes.get(name) or "#").startswith("#"), attributes
    assert "url(" not in page and "@import" not in page and "fetch(" not in page
    assert "default-src 'none'" in page
    assert all(address.startswith("data:image/webp;base64,") for address in data_of(page)["images"])


def test_the_page_stays_in_its_budget(tmp_path):
    """Noise does not compress: large pictures, many of them; the side goes down until they fit."""
    import numpy as np

    generator = np.random.default_rng(0)
    images = []
    for i in range(60):
        path = tmp_path / f"{i}.png"
        Image.fromarray(generator.integers(0, 256, (256, 256, 3), dtype=np.uint8)).save(path)
        images.append(path)
    cases = [Case(str(i), f"prompt {i}", "", [path], {}) for i, path in enumerate(images)]
    report = Report("t", "s", [], [], Gallery(["a"], [], cases))
    sizes = [len(written(report, tmp_path / "r.html", budget=budget)) for budget in (400_000, 1_500_000)]
    assert 150_000 < sizes[0] <= 400_000 < sizes[1] <= 1_500_000
    assert len(data_of((tmp_path / "r.html").read_text())["images"]) == 60


def test_equal_pictures_are_held_once_and_missing_ones_have_a_place(tmp_path):
    path = picture(tmp_path / "a.png", 1, 64)
    (tmp_path / "b.png").write_bytes(path.read_bytes())
    (tmp_path / "broken.png").write_bytes(b"\x89PNG no")
    shown = [path, tmp_path / "b.png", None, tmp_path / "gone.png", tmp_path / "broken.png"]
    report = Report("t", "s", [], [], Gallery(list("abcde"), [], [Case("k", "p", "", shown, {})]))
    data = data_of(written(report, tmp_path / "r.html"))
    assert len(data["images"]) == 1 and data["cases"][0]["images"] == [0, 0, None, -1, -1]


def test_pictures_beside_the_page(tmp_path):
    report = evaluation(tmp_path / "pictures", 3)
    page = written(report, tmp_path / "r.html", images="beside")
    addresses = data_of(page)["images"]
    assert len(addresses) == 6 and all((tmp_path / address).is_file() for address in addresses)
    assert not any(address.startswith("/") for address in addresses)
    # written again inline, nothing of them is left, and all of what is not theirs
    (tmp_path / "r_images" / "mine.webp").write_bytes(b"x")
    written(report, tmp_path / "r.html")
    assert [p.name for p in (tmp_path / "r_images").iterdir()] == ["mine.webp"]


def test_more_pictures_than_fit_lie_beside_the_page(tmp_path):
    report = evaluation(tmp_path / "pictures", 30, side=96)
    page = written(report, tmp_path / "r.html", budget=64_000)
    assert len(page.encode()) < 66_000 and len(list((tmp_path / "r_images").iterdir())) == 60
    assert len(written(report, tmp_path / "r.html", images="inline", budget=64_000).encode()) > 64_000


def test_the_same_report_is_the_same_page(tmp_path):
    report = evaluation(tmp_path, 4)
    assert written(report, tmp_path / "a.html") == written(report, tmp_path / "b.html")


ODD = {
    "one point": [Series("a", [3.0], [0.5])],
    "constant": [Series("a", [0, 1, 2], [0.5, 0.5, 0.5], [0.5] * 3, [0.5] * 3)],
    "gaps": [Series("a", [0, 1, 2, 3], [0.1, None, NAN, 0.4], [0.0, None, 0.1, 0.2], [0.2, None, 0.3, 0.6])],
    "nothing": [Series("a", [], [])],
    "no series": [],
    "negative and tiny": [Series("a", [-5, -4], [-1e-7, -3e-7])],
    "huge": [Series("a", [0, 1e9], [1e12, -1e12])],
    "infinite": [Series("a", [0, 1], [float("inf"), 1.0])],
    "long": [Series("a", [float(i) for i in range(20_000)], [i % 7 for i in range(20_000)])],
}


@pytest.mark.parametrize("width", [WIDTH, NARROW])
@pytest.mark.parametrize("markers", [False, True])
@pytest.mark.parametrize("name", ODD)
def test_charts_of_odd_numbers_are_drawings(name, markers, width):
    chart = Chart("t", "x", "y", ODD[name], markers=markers)
    text = str(line_chart(chart, width))
    tree = ElementTree.fromstring(text)
    assert tree.get("role") == "img" and tree.find("title").text == "t"
    numbers = [float(n) for n in re.findall(r'(?:cx|cy|points)="([-\d.]+)', text)]
    assert all(-1 <= n <= width + 1 for n in numbers) and "nan" not in text and "inf" not in text.replace("info", "")
    assert len(text) < 60_000
    head, rows = numbers_of(chart)
    assert all(len(row) == len(head) for row in rows)


def test_the_last_number_of_an_axis_is_not_cut_off():
    rows = [IntervalRow("one", Interval(0.0015, 0.0005, 0.0024))]
    series = Chart("t", "x", "y", [Series("a", [0, 1_000_000], [1.0, 2.0])])
    for width in (WIDTH, NARROW):
        for drawn in (forest_chart(Forest("t", "x", rows), width), line_chart(series, width)):
            ticks = [text for text in ElementTree.fromstring(str(drawn)).findall("text") if text.get("class") == "tick"]
            middle = [text for text in ticks if text.get("text-anchor") == "middle"]
            assert max(len(text.text) for text in middle) > 4
            assert all(float(text.get("x")) + 4 * len(text.text) <= width for text in middle)


def test_a_forest_with_ends_that_cannot_be_told():
    rows = [IntervalRow("one", Interval(0.1, NAN, NAN)), IntervalRow("two", Interval(-0.2, -0.3, -0.1), "", "g")]
    tree = ElementTree.fromstring(str(forest_chart(Forest("t", "x", rows))))
    assert len(tree.findall("circle")) == 2 and len([p for p in tree.findall("path") if "bar" in p.get("class")]) == 1
    assert numbers_of(Forest("t", "x", rows))[1][0] == ["", "one", "0.1", "–", "–"]


@pytest.mark.parametrize("low, high", [(0.0, 1.0), (-0.013, 0.05), (3.0, 3.0), (0.0, 0.0), (1e-9, 3e-9), (-1e6, 5e5)])
def test_ticks_are_round_and_hold_the_data(low, high):
    found = ticks(low, high)
    step = found[1] - found[0]
    assert found[0] <= low and found[-1] >= high and 2 <= len(found) <= 12
    mantissa = step / 10 ** __import__("math").floor(__import__("math").log10(step) + 1e-9)
    assert round(mantissa, 6) in (1, 2, 5, 10)
