"""The page: one file, nothing that text in it could become, small."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from qexp.report.html.page import HERE, SCRIPTS, STYLES, render_page, to_embedded_json
from tests.fresh_process import imported_by
from tests.report.html.made_sweeps import HOSTILE, document_of, sweep_of_many, sweep_of_texts, sweep_with_pictures


class Page(HTMLParser):
    """Elements and their texts. Embedded data and scripts end where a browser would end them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.open = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.open = tag

    def handle_data(self, data: str) -> None:
        self.texts.setdefault(self.open, []).append(data)


def page_of(outputs: Path, name: str) -> str:
    return render_page(document_of(outputs, name))


def test_hostile_texts_stay_texts(tmp_path: Path) -> None:
    page = Page(page_of(tmp_path, sweep_with_pictures(tmp_path, side=8, images=2)))
    scripts = [attributes.get("type") for tag, attributes in page.tags if tag == "script"]
    assert scripts == ["application/json", "module"]
    assert "b" not in {tag for tag, _ in page.tags}
    document = json.loads(page.texts["script"][0])
    assert document["pictures"]["samples"][0]["name"] == f"image 0: {HOSTILE}"
    assert HOSTILE in page.texts["p"]  # the reason of a failure


def test_nothing_is_loaded_and_the_script_is_the_one_that_the_policy_names(tmp_path: Path) -> None:
    import base64
    import hashlib

    text = page_of(tmp_path, sweep_with_pictures(tmp_path, side=8, images=2))
    page = Page(text)
    assert not [attributes for tag, attributes in page.tags if "src" in attributes or tag == "link"]
    (policy,) = [attributes["content"] or "" for tag, attributes in page.tags if "http-equiv" in attributes]
    script = re.findall(r'<script type="module">(.*?)</script>', text, re.DOTALL)[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert f"script-src 'sha256-{digest}';" in policy


def test_json_survives_embedding() -> None:
    value = {"text": f"{HOSTILE} <!-- \u2029", "numbers": [1.5, None, True]}
    text = to_embedded_json(value)
    assert json.loads(text) == value
    assert not set(text) & set("<>&\u2028\u2029")
    with pytest.raises(ValueError, match="JSON"):
        to_embedded_json(float("nan"))


def test_scripts_and_styles_are_all_in_the_page_and_end_nothing() -> None:
    assert sorted(SCRIPTS) == sorted(path.name for path in (HERE / "scripts").iterdir())
    assert sorted(STYLES) == sorted(path.name for path in (HERE / "styles").iterdir())
    for name in SCRIPTS:
        text = (HERE / "scripts" / name).read_text(encoding="utf-8")
        assert "</" not in text.replace("</>", "") and "<!--" not in text, name
        assert "innerHTML" not in text and "document.write" not in text, name


def test_500_runs_take_less_than_a_megabyte(tmp_path: Path) -> None:
    assert len(page_of(tmp_path, sweep_of_many(tmp_path)).encode()) < 1_000_000


@pytest.mark.exhaustive
def test_forty_image_pairs_take_less_than_five_megabytes(tmp_path: Path) -> None:
    sweep_with_pictures(tmp_path, side=768, images=2)  # 46 pairs of large images
    page = page_of(tmp_path, "pictures")
    document = json.loads(Page(page).texts["script"][0])
    assert len(document["pictures"]["shots"]) >= 40
    assert len(page.encode()) < 5_000_000


def test_a_file_name_that_is_no_text_is_written(tmp_path: Path) -> None:
    sweep_of_texts(tmp_path)
    document = document_of(tmp_path, "texts") | {"warnings": ["bad \udcff name"]}
    assert "bad ? name" in render_page(document)


def test_the_page_is_made_without_torch_and_matplotlib(tmp_path: Path) -> None:
    sweep_with_pictures(tmp_path, side=8, images=2)
    code = f"""
from pathlib import Path
from qexp.report.comparison import prepare_compared, read_all_samples
from qexp.report.html.page import write_html_report
from qexp.results.rows import read_manifest, rows_of_sweep
outputs = Path({str(tmp_path)!r})
rows = rows_of_sweep(outputs, "pictures")
list(read_all_samples(rows))
sweeps = [(read_manifest(outputs, "pictures"), rows)]
write_html_report(outputs / "sweeps/pictures", "Sweep pictures", sweeps, rows, prepare_compared(rows))
"""
    assert {"torch", "matplotlib", "scipy", "pandas"}.isdisjoint(imported_by(code))
