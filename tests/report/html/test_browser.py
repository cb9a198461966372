"""The page in a browser: what a visitor does with it, without a complaint of the console or of axe."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from qexp.report.html.page import render_page
from tests.report.html.browser import SIZES, Opened, chromium, find_chromium, open_report
from tests.report.html.made_sweeps import (
    HOSTILE,
    document_of,
    sweep_of_failures,
    sweep_of_layers,
    sweep_of_many,
    sweep_of_texts,
    sweep_with_pictures,
)

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.external
SWEEPS = {
    "pictures": sweep_with_pictures, "layers": sweep_of_layers, "texts": sweep_of_texts, "many": sweep_of_many,
    "failures": sweep_of_failures,
}  # fmt: skip


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    program = find_chromium()
    if program is None:
        pytest.skip("chromium is missing: apt-get install chromium")
    with chromium(program) as opened:
        yield opened


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    outputs = tmp_path_factory.mktemp("outputs")
    for name, make in SWEEPS.items():
        make(outputs)
        (outputs / "sweeps" / name / "report.html").write_text(
            render_page(document_of(outputs, name)), encoding="utf-8"
        )
    return {name: outputs / "sweeps" / name / "report.html" for name in SWEEPS}


@pytest.fixture
def visit(browser: Browser, reports: dict[str, Path]) -> Iterator[Any]:
    """Open a report; at the end nothing may have complained, and nothing but the page may have been asked for."""
    visits: list[Opened] = []

    def start(name: str, size: str = "desk", scheme: str = "light") -> Page:
        visits.append(open_report(browser, reports[name], size, scheme))
        return visits[-1].page

    yield start
    for opened in visits:
        assert opened.complaints == []
        assert opened.requests == []
        opened.page.context.close()


def backends(page: Page) -> list[str]:
    return [text.strip() for text in page.locator("#table tbody th[scope=row]").all_inner_texts()]


def column_texts(page: Page, label: str) -> list[str]:
    heads = [
        text.splitlines()[0].strip(" ↑↓") for text in page.locator("#table thead tr:first-child th").all_inner_texts()
    ]
    place = heads.index(label) + 1
    return page.locator(f"#table tbody tr[data-row] > :nth-child({place})").all_inner_texts()


def test_rows_are_sorted_by_a_click_with_failures_last(visit: Any) -> None:
    page = visit("pictures")
    assert len(backends(page)) == 25
    page.get_by_role("button", name="PSNR").first.click()
    psnr = column_texts(page, "PSNR")
    numbers = [float(text.split()[0]) for text in psnr if re.match(r"\d", text)]
    assert psnr[:2] == ["exact", "exact"]  # higher is better, so the best come first
    assert numbers == sorted(numbers, reverse=True) and len(numbers) == 21
    assert psnr[-2:] == ["", ""]
    page.get_by_role("button", name="PSNR").first.click()
    assert page.locator("th[aria-sort=ascending]").inner_text().startswith("PSNR")
    assert column_texts(page, "PSNR")[0].startswith(f"{min(numbers)}")


def test_rows_are_filtered_by_words_and_by_columns(visit: Any) -> None:
    page = visit("pictures")
    page.locator("#filter").fill("torchao leaf")
    assert backends(page) == ["torchao float8wo_e4m3", "torchao int8wo"]
    assert page.locator("#shown").inner_text() == "2 of 25 rows pass the filter"
    assert page.locator("#scatter .point").count() == 2
    page.locator("#filter").fill("")
    page.get_by_role("button", name="Filter columns").click()
    page.get_by_label("Filter weights").fill("<2")
    assert set(backends(page)) == {"quanto int2"}
    page.get_by_label("Filter weights").fill("2-3")
    others = {"qexp_packed uint3wo", "quanto int4", "gguf Q4_0"}
    assert set(backends(page)) == {*others, "bitsandbytes nf4", "bitsandbytes fp4"}
    page.get_by_label("Filter backend").fill("!bitsandbytes")
    assert set(backends(page)) == others


def test_columns_are_chosen_and_rows_are_grouped(visit: Any) -> None:
    page = visit("pictures")
    page.locator("#columns summary").click()
    page.get_by_label("load seconds").check()
    page.keyboard.press("Escape")
    assert set(column_texts(page, "load seconds")) == {"0.40", ""}
    page.locator("#group").select_option("offload")
    groups = page.locator("#table .group").all_inner_texts()
    assert [re.sub(r"\s+", " ", text) for text in groups][:2] == ["none 13 rows", "leaf→disk 10 rows"]


def test_the_table_is_copied_as_it_stands(visit: Any) -> None:
    page = visit("pictures")
    page.locator("#filter").fill("gguf leaf")
    copied = {}
    for name in ("CSV", "LaTeX", "Markdown"):
        page.locator("#copy summary").click()
        page.get_by_role("button", name=name, exact=True).click()
        page.wait_for_function("document.getElementById('announcer').textContent.endsWith('copied')")
        copied[name] = page.evaluate("navigator.clipboard.readText()")
        page.keyboard.press("Escape")
    lines = copied["LaTeX"].splitlines()
    assert (
        lines[1].startswith(r"\begin{tabular}{l")
        and lines[2] == r"\toprule"
        and lines[-2:] == [r"\bottomrule", r"\end{tabular}"]
    )
    assert r"gguf Q4\_0 & leaf$\to$disk" in copied["LaTeX"]
    assert copied["CSV"].count("\n") == 2  # the header and one row
    assert "weights MiB" in copied["CSV"].splitlines()[0]
    assert copied["Markdown"].splitlines()[1].startswith("| :-- |")


def test_a_row_lights_its_point_and_a_point_its_row(visit: Any) -> None:
    page = visit("pictures")
    row = page.locator("#table tbody tr").nth(3)
    row.hover()
    number = row.get_attribute("data-row")
    assert page.locator("#scatter .point.lit").get_attribute("data-row") == number
    page.locator("#scatter .point").last.hover(force=True)
    assert page.locator("#table tr.lit").count() == 1
    assert page.locator("#tip").is_visible()


def test_any_metric_is_drawn_against_any(visit: Any) -> None:
    page = visit("pictures")
    assert page.locator("#scatter .front").count() == 1
    page.locator("#plot-x").select_option("time/step_ms")
    page.locator("#plot-y").select_option("quality/ssim")
    label = page.locator("#scatter svg").first.get_attribute("aria-label")
    assert label is not None and label.startswith("SSIM against") and "23 points" in label
    page.get_by_role("button", name="weights – PSNR").click()
    assert page.locator("#scatter .bar").count() > 20  # 95 % intervals


def test_failures_have_their_reason_as_text(visit: Any) -> None:
    page = visit("pictures")
    assert page.locator("#failed li").count() == 2
    assert page.locator("#failed .message").first.inner_text() == HOSTILE.replace("\u2028", "\u2028")
    assert page.locator("b").count() == 0


def test_the_slider_moves_the_border(visit: Any) -> None:
    page = visit("pictures")
    slider = page.get_by_label("Border between reference and candidate")
    slider.scroll_into_view_if_needed()
    box = slider.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.9, box["y"] + box["height"] / 2, steps=5)
    page.mouse.up()
    split = page.locator(".split").evaluate("frame => frame.style.getPropertyValue('--split')")
    assert 80 <= float(split.rstrip("%")) <= 95
    slider.press("Home")
    assert page.locator(".split").evaluate("frame => frame.style.getPropertyValue('--split')") == "0%"
    page.locator("#picture-sample").select_option("1")
    assert "number 1" in page.locator("#comparison .prompt").inner_text()
    assert re.search(r"Difference × \d+: white is", page.locator("#comparison").inner_text())
    assert page.locator("#all-pictures li").count() == 23


def test_the_blind_test_counts_right_answers(visit: Any) -> None:
    page = visit("pictures")
    page.locator("#blind-row").select_option(label="quanto int2")
    page.locator("#blind-test").get_by_role("button", name="Start").click()
    document = json.loads(page.locator("#data").inner_text())
    candidates = {
        document["pictures"]["images"][shot["image"]]
        for shot in document["pictures"]["shots"]
        if not shot["is_identical"]
    }
    for _ in range(8):
        first = page.locator(".choice img").first.get_attribute("src")
        page.keyboard.press("a" if first in candidates else "b")
    text = page.locator("#blind-place").inner_text()
    assert "8 of 8 right, p = 0.004: the pictures can be told apart." in text  # 2^-8 = 0.0039


@pytest.mark.parametrize(("right", "count"), [(0, 1), (5, 10), (8, 10), (12, 12), (110, 200), (300, 400)])
def test_p_values_are_those_of_the_binomial_test(visit: Any, right: int, count: int) -> None:
    from scipy.stats import binomtest

    page = visit("texts")
    script = page.locator("script[type=module]").inner_text()
    code = script[script.index("function binomialTail") :].partition("\n}\n")[0] + "\n}"
    found = page.evaluate(f"(() => {{ {code}; return binomialTail({right}, {count}); }})()")
    assert found == pytest.approx(binomtest(right, count, 0.5, alternative="greater").pvalue, rel=1e-9)


def test_texts_show_their_differences(visit: Any) -> None:
    page = visit("texts")
    assert page.locator("#all-texts del").all_inner_texts()[0].startswith("Paris")
    assert page.locator("#all-texts ins").all_inner_texts()[0].startswith("Lyon")
    page.locator("#text-different").check()
    assert page.locator("article.text").count() == 2


def test_layers_are_a_map(visit: Any) -> None:
    page = visit("layers")
    assert page.locator("table.heat tbody tr").count() == 12
    page.locator("#map").select_option("1")
    assert page.locator("table.heat td").all_inner_texts()[:2] == ["0.100", "0.0100"]


def test_two_runs_differ_in_their_settings(visit: Any) -> None:
    page = visit("pictures")
    page.locator("#first-run").select_option("1")
    page.locator("#second-run").select_option("14")
    rows = {row.split("\t")[0]: row.split("\t")[1:] for row in page.locator("#two-runs tbody tr").all_inner_texts()}
    assert rows == {"offload.strategy": ["none", "leaf"], "offload.to": ["auto", "disk"]}
    assert "The same in both." in page.locator("#two-runs").inner_text()


def test_a_row_opens_with_all_of_its_numbers(visit: Any) -> None:
    page = visit("pictures")
    page.get_by_role("button", name="gguf Q8_0").first.click()
    text = page.locator("#dialog").inner_text()
    assert "python -m qexp rerun" in text and "structural similarity" in text
    page.keyboard.press("Escape")
    assert not page.locator("#dialog").is_visible()


def test_500_runs_are_painted_within_a_second(visit: Any) -> None:
    page = visit("many")
    paints = page.evaluate("performance.getEntriesByType('paint').map((entry) => [entry.name, entry.startTime])")
    first = dict(paints)["first-contentful-paint"]
    print(f"first paint of 500 runs: {first:.0f} ms")
    assert first <= 1000
    assert len(backends(page)) == 500


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", SWEEPS)
def test_nothing_is_wider_than_the_window(visit: Any, name: str, size: str) -> None:
    page = visit(name, size)
    assert page.evaluate("document.documentElement.scrollWidth") <= SIZES[size][0]


@pytest.mark.parametrize(("size", "scheme"), [("desk", "light"), ("desk", "dark"), ("phone", "light")])
@pytest.mark.parametrize("name", ["pictures", "layers", "texts", "failures"])
def test_axe_finds_nothing_serious(visit: Any, name: str, size: str, scheme: str) -> None:
    import axe_playwright_python

    page = visit(name, size, scheme)
    page.evaluate((Path(axe_playwright_python.__file__).parent / "axe.min.js").read_text(encoding="utf-8"))
    found = page.evaluate("axe.run()")["violations"]
    serious = [
        (each["id"], [node["html"][:120] for node in each["nodes"][:3]])
        for each in found
        if each["impact"] in ("serious", "critical")
    ]
    assert serious == []
    assert len(page.evaluate("axe.run()")["passes"]) > 15


def test_it_prints_without_controls(visit: Any) -> None:
    page = visit("pictures", "desk", "dark")
    page.emulate_media(media="print")
    assert not page.locator("#filter").is_visible()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.locator("#table tbody tr").count() == 25
