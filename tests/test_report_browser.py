"""The page in headless Chromium: controls by mouse and keyboard, no request, no violation, thousands of pictures."""

import math
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from report_samples import evaluation

from sdo_cli.reports.page import write_report

pytestmark = pytest.mark.slow
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
FLAGS += ["--disable-sync", "--no-first-run", "--disable-quic"]
# (colours, width, height)
VIEWS = {"light": ("light", 1280, 900), "dark": ("dark", 1280, 900), "narrow": ("light", 390, 844)}


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    program = shutil.which("chromium")
    assert program, "needs Chromium: apt-get install chromium"
    with sync_playwright() as play:
        started = play.chromium.launch(executable_path=program, args=FLAGS)
        yield started
        started.close()


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    return write_report(evaluation(folder / "pictures"), folder / "report.html")


@pytest.fixture
def opened(browser, page_file):
    """open(view, file) -> page; at the end: no error, and no request left the page."""
    contexts, wrong = [], []

    def open_(view="light", file=page_file):
        scheme, width, height = VIEWS[view]
        context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": height}, offline=True)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda m: m.type in ("error", "warning") and wrong.append(m.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda r: r.url.startswith(("data:", "file:")) or wrong.append(r.url))
        page.goto(file.as_uri())
        page.wait_for_selector(".card img")
        return page

    yield open_
    for context in contexts:
        context.close()
    assert wrong == []


def shot(page, name):
    if folder := os.environ.get("SDO_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)


def cut(card):
    """Where the line between the two pictures stands, in per cent, as drawn."""
    return float(
        card.locator(".pair").evaluate("e => parseFloat(getComputedStyle(e).getPropertyValue('--at') || '50')")
    )


def count(page):
    return int(re.match(r"(\d+) of 40", page.locator("#count").inner_text())[1])


@pytest.mark.parametrize("view", VIEWS)
def test_it_fits_and_shows_its_parts(opened, view):
    page = opened(view)
    assert page.evaluate("document.scrollingElement.scrollWidth <= innerWidth")
    assert page.locator("svg:visible").count() == 3 and page.locator("#cards .card").count() >= 24
    assert page.locator("h1").inner_text() == "Evaluation: base, tuned"
    # nothing of a chart lies outside its frame, and its words are as large as they were drawn
    for chart in page.locator(".chart").all():
        assert chart.evaluate("e => e.scrollWidth <= e.clientWidth")
        svg = chart.locator("svg:visible")
        assert svg.evaluate("e => e.getBoundingClientRect().width / e.viewBox.baseVal.width") > 0.9
        outside = "e => [...e.querySelectorAll('text')].filter(t => { const a = t.getBoundingClientRect(), b = "
        outside += "e.getBoundingClientRect(); return a.left < b.left - 1 || a.right > b.right + 1 }).length"
        assert svg.evaluate(outside) == 0
    image = page.locator("#cards .card img").first
    assert image.evaluate("e => e.complete && e.naturalWidth > 0")
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (max(map(int, re.findall(r"\d+", background))) < 64) == (view == "dark")
    shot(page, view)


@pytest.mark.parametrize("view", VIEWS)
def test_links_of_the_page_reach_what_they_name(opened, view):
    """Cards above have their height only once they were seen: the first jump fell hundreds of pixels short."""
    page = opened(view)
    for name in ("settings", "figures", "pictures", "settings"):
        page.locator(f'nav a[href="#{name}"]').click()
        page.wait_for_timeout(2000)
        top = page.locator(f"#{name}").evaluate("e => e.getBoundingClientRect().top")
        # a short last part cannot get higher than the page's end lets it
        at_end = page.evaluate("scrollY + innerHeight >= document.scrollingElement.scrollHeight - 2")
        assert -2 <= top < (page.viewport_size["height"] if at_end else 120), name


def test_the_slider_by_mouse_and_by_keyboard(opened):
    page = opened()
    card = page.locator("#cards .card").first
    card.scroll_into_view_if_needed()
    box = card.locator(".pair").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 30)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.2, box["y"] + 40, steps=4)
    page.mouse.up()
    assert cut(card) == pytest.approx(20, abs=1.5)
    clip = card.locator("img.top").evaluate("e => getComputedStyle(e).clipPath")
    assert re.search(r"20(\.\d+)?%|19", clip), clip
    page.mouse.move(box["x"] + box["width"] * 0.9, box["y"] + 40)
    assert cut(card) == pytest.approx(20, abs=1.5), "without a pressed button nothing moves"
    card.locator("input[type=range]").focus()
    for _ in range(5):
        page.keyboard.press("ArrowRight")
    assert cut(card) == pytest.approx(25, abs=1.5)
    page.keyboard.press("End")
    assert cut(card) == 100


def test_filters_order_and_search(opened):
    page = opened()
    assert count(page) == 40
    page.select_option("#category", "animals")
    assert count(page) == 14 and page.locator("#cards .card").count() == 14
    page.select_option("#gain", "better")
    better = count(page)
    page.select_option("#gain", "worse")
    assert 0 < better < 14 and better + count(page) == 13, "the first gains nothing"
    assert page.locator("#cards .gain-down").first.is_visible()
    page.select_option("#gain", "best")
    assert count(page) == 2
    page.click("button[type=reset]")
    page.wait_for_timeout(50)
    assert count(page) == 40
    page.select_option("#order", "most")
    gains = page.locator("#cards .scores dd:nth-of-type(2)").all_text_contents()
    assert gains == sorted(gains, key=float, reverse=True) and float(gains[0]) > 0
    page.fill("#search", "PROMPT 7 ")
    assert count(page) == 1 and "prompt 7" in page.locator("#cards .card .prompt").inner_text()
    page.fill("#search", "no such words")
    assert count(page) == 0 and page.locator("#cards .card").count() == 0


def test_a_view_is_in_the_address(opened, page_file):
    page = opened()
    page.select_option("#category", "plants")
    address = page.evaluate("location.href")
    assert "category=plants" in address
    again = opened()
    again.goto("about:blank")
    again.goto(address)
    again.wait_for_selector(".card img")
    assert count(again) == 13


def test_best_and_worst_are_shown_first(opened):
    page = opened()
    gain = "#{} .scores dd:nth-of-type(2)"
    most, least = (page.locator(gain.format(i)).all_text_contents() for i in ("most", "least"))
    every = sorted(float(f"{math.sin(i * 1.7) / 10:.4f}") for i in range(40))
    assert [float(v) for v in most] == every[::-1][:4] and [float(v) for v in least] == every[:4]


def test_a_picture_enlarged_by_keyboard(opened):
    page = opened()
    page.locator("#cards .card").first.locator("button").focus()
    page.keyboard.press("Enter")
    dialog = page.locator("#zoom")
    assert dialog.is_visible() and page.locator("#zoom-pictures img").count() == 2
    assert page.locator("#zoom-title").inner_text().startswith("prompt 0 ")
    page.keyboard.press("ArrowRight")
    assert page.locator("#zoom-title").inner_text().startswith("prompt 1 ")
    page.keyboard.press("Escape")
    assert not dialog.is_visible()
    assert page.evaluate("document.activeElement.textContent") == "Larger"


@pytest.mark.parametrize("view", ["light", "narrow"])
def test_larger_opens_at_the_top_with_the_pair_side_by_side(opened, view):
    page = opened(view)
    page.evaluate("scrollTo(0, document.body.scrollHeight / 2)")
    page.locator("#cards .card").nth(5).locator("button").click()
    dialog = page.locator("#zoom")
    assert dialog.bounding_box()["y"] < 20 and dialog.evaluate("e => e.scrollTop") == 0
    one, two = (image.bounding_box() for image in page.locator("#zoom-pictures img").all())
    assert one["y"] == two["y"] and two["x"] >= one["x"] + one["width"]
    assert one["y"] + one["height"] <= page.viewport_size["height"]
    # as large as the window lets them be
    assert two["x"] + two["width"] - one["x"] > 0.85 * page.viewport_size["width"]
    shot(page, f"larger-{view}")


@pytest.mark.parametrize("view", ["light", "narrow"])
def test_charts_are_as_wide_as_the_page_and_settings_a_table(opened, view):
    page = opened(view)
    for chart in page.locator(".chart").all():
        svg, figure = chart.locator("svg:visible").bounding_box(), chart.locator("xpath=..").bounding_box()
        assert svg["width"] > 0.9 * figure["width"]
    assert page.locator("#settings th").all_text_contents() == ["model", "steps", "torch"]


@pytest.mark.parametrize("view", VIEWS)
def test_several_columns_stand_in_one_row(opened, tmp_path, view):
    """Of a run, pictures first: before, trained, before with guidance; the slider's pair is what is enlarged."""
    from axe_playwright_python.sync_playwright import Axe

    report = evaluation(tmp_path / "p", 4, ("before", "step 300", "before, guidance 5"))
    report = replace(report, gallery=replace(report.gallery, row=True, right=1), pictures_first=True)
    page = opened(view, write_report(report, tmp_path / "row.html"))
    tops = [page.locator(f"#{name}").bounding_box()["y"] for name in ("pictures", "figures", "settings", "repeat")]
    assert tops == sorted(tops)
    assert page.locator("nav a").all_text_contents() == ["Pictures", "Figures", "Settings", "Repeat it"]
    boxes = [image.bounding_box() for image in page.locator("#cards .card").first.locator("img").all()]
    assert len(boxes) == 3 and len({box["y"] for box in boxes}) == 1
    assert [box["x"] for box in boxes] == sorted(box["x"] for box in boxes) and boxes[0]["width"] > 80
    assert page.evaluate("document.scrollingElement.scrollWidth <= innerWidth")
    # four pictures need no search
    assert not page.locator("#search").is_visible() and page.locator("#right").input_value() == "1"
    shot(page, f"row-{view}")
    page.locator("#cards .card button").first.click()
    assert page.locator("#zoom-pictures figcaption").all_text_contents() == ["before", "step 300"]
    found = Axe().run(page).response["violations"]
    assert [v["id"] for v in found if v["impact"] in ("serious", "critical")] == []


def test_every_control_is_reached_by_tab(opened):
    page = opened()
    reached = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
    wanted = {"theme", "left", "right", "measure", "category", "gain", "order", "search", "A", "SUMMARY", "INPUT"}
    assert wanted <= reached, wanted - reached


def test_colours_by_the_button(opened):
    page = opened()
    before = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.click("#theme")
    after = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert before != after and page.get_attribute("#theme", "aria-pressed") == "true"


@pytest.mark.parametrize("view", VIEWS)
def test_axe_finds_nothing_serious(opened, view):
    from axe_playwright_python.sync_playwright import Axe

    page = opened(view)
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    found = Axe().run(page).response["violations"]
    bad = [
        (v["id"], [n["html"][:120] for n in v["nodes"][:3]]) for v in found if v["impact"] in ("serious", "critical")
    ]
    assert bad == []
    page.locator("#cards .card button").first.click()
    found = Axe().run(page).response["violations"]
    assert [v["id"] for v in found if v["impact"] in ("serious", "critical")] == []


def test_two_thousand_pictures(opened, tmp_path):
    """Under 30 MB, and within 3 s of opening it shows decoded pictures and a filter answers."""
    file = write_report(evaluation(tmp_path / "p", 1000, side=512), tmp_path / "large.html")
    size = file.stat().st_size
    page = opened(file=file)
    page.wait_for_function(
        "() => [...document.querySelectorAll('.card img')].filter(i => i.complete && i.naturalWidth > 0).length >= 12"
    )
    page.select_option("#category", "animals")
    page.wait_for_function("() => document.querySelector('#count').textContent.startsWith('334 of 1000')")
    seconds = page.evaluate("performance.now()") / 1000
    held = page.evaluate("JSON.parse(document.getElementById('data').textContent).images.length")
    print(f"\n2,000 pictures: {size / 1e6:.1f} MB, usable after {seconds:.2f} s")
    assert held == 2000 and size < 30e6 and seconds < 3
    for _ in range(6):
        page.mouse.wheel(0, 6000)
        page.wait_for_timeout(100)
    assert page.locator("#cards .card").count() > 24, "more come while one scrolls"
