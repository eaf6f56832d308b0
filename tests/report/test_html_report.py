"""The HTML report: it needs nothing else, escapes everything, and says the same as the report."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from normconv.errors import UsageError
from normconv.report import Check, Report, SiteRow
from normconv.report.html import html_page, write_html

HOSTILE = "<script>alert(1)</script>\"'&<img src=x onerror=alert(1)>"
VOID = {"meta", "br", "img", "link", "input"}


class Page(HTMLParser):
    """The elements of a page, their attributes and text; fails on one that is not closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def site(name: str, error: float | None = 1e-7, fidelity: str = "exact") -> SiteRow:
    return SiteRow(name, "BatchNorm2d", "conv1", "wn: fold", fidelity, "into conv1", error, 1e-6)


REPORT = Report(
    "convert",
    "ResNet",
    "wn",
    (site("bn1"), site("layer1.bn1", 4e-7)),
    (Check.at_most("output", 2e-7, 1e-6), Check("repeats", True)),
    {"class": "my.models.ResNet", "source": "model.pt", "onnx norm_nodes": 0, "onnx bytes": 2048},
    ("take care",),
    {"steps": [{"site": "bn1"}]},
)


def test_the_summary_has_what_is_asked_first() -> None:
    words = Page(html_page(REPORT)).words
    assert "Passed. All 2 checks passed. It computes the same as the original" in words
    assert "What it was ResNet model.pt" in words
    assert "What it became wn 2 × wn: fold" in words
    assert "Norms before → after 2 → 0 0 in the ONNX file" in words
    assert "Worst error 4.0e-07 40% of the 1.0e-06 allowed: layer1.bn1" in words
    assert "ONNX file 2.0 KiB" in words
    assert "take care" in words


def test_every_site_is_there_with_its_reason() -> None:
    rows = tuple(site(f"block{i}.bn") for i in range(200))
    page = Page(html_page(Report("convert", "Net", "wn", rows)))
    assert all(f"block{i}.bn" in page.words for i in range(200))
    assert page.words.count("into conv1") == 200
    assert {"scope": "col"} in page.all("th")
    assert {"scope": "row"} in page.all("th")


def test_nothing_is_loaded_and_nothing_runs() -> None:
    page = html_page(REPORT)
    parsed = Page(page)
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in parsed.elements}
    assert "http://" not in page
    assert "https://" not in page
    assert "url(" not in page
    assert not re.search(r"\son\w+=", page)
    (policy,) = [m["content"] for m in parsed.all("meta") if "http-equiv" in m]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"
    assert parsed.all("html") == [{"lang": "en"}]


def test_light_dark_and_paper() -> None:
    page = html_page(REPORT)
    for words in ("color-scheme: light dark", "(prefers-color-scheme: dark)", "@media print"):
        assert words in page


def test_diagrams_have_words_for_who_does_not_see_them() -> None:
    drawn = Page(html_page(REPORT)).all("svg")
    assert len(drawn) == 2
    assert all(svg["role"] == "img" and svg["aria-label"] for svg in drawn)


def test_a_name_is_text_wherever_it_stands() -> None:
    row = SiteRow(HOSTILE, HOSTILE, HOSTILE, HOSTILE, HOSTILE, HOSTILE, 1.0, 0.5)
    stage = {"output": 0.1, "agreement": 0.5, "sites": {HOSTILE: {"snr_db": 3.0, "cosine": 1.0}}}
    timing = {
        "model": HOSTILE,
        "backend": HOSTILE,
        "batch_size": 1,
        "latency_ms": 1.0,
        "p95_ms": 2.0,
        "throughput": 1.0,
        "ratio": 1.0,
        "ratio_quartiles": [1.0, 1.0],
        "ratio_to": HOSTILE,
        "load_ms": None,
        "peak_bytes": None,
        "device_bytes": None,
        "nodes_by_provider": {HOSTILE: 1},
        "turns": 5,
    }
    model = {"form": HOSTILE, "bytes": 1, "nodes": 1, "norm_nodes": 0, "weight_arithmetic": 0}
    report = Report(
        HOSTILE,
        HOSTILE,
        HOSTILE,
        (row, row),
        (Check(HOSTILE, False, 1.0, 0.5, HOSTILE, HOSTILE), Check(HOSTILE, True)),
        {
            "class": HOSTILE,
            "source": HOSTILE,
            HOSTILE: HOSTILE,
            "deep": {HOSTILE: {HOSTILE: [HOSTILE]}},
            "after": stage,
            "timings": [timing],
            "models": {HOSTILE: model},
            "absent": [{"what": HOSTILE, "reason": HOSTILE}],
            "machine": {HOSTILE: HOSTILE},
        },
        (HOSTILE,),
        {HOSTILE: HOSTILE},
    )
    page = Page(html_page(report))
    assert not page.all("script")
    assert not page.all("img")
    assert HOSTILE in page.words


def test_a_failure_comes_first_with_its_way_out() -> None:
    checks = (Check("shape", True), Check("output", False, 3.0, 1.0, "far off", "use float64"))
    page = Page(html_page(Report("verify", "a against b", checks=checks)))
    assert "✗ Failed. 1 of 2 checks failed: output." in page.words
    assert "What failed output : 3 is not <= 1 (far off) → use float64" in page.words
    assert "Worst error 3.0e+00 more than the 1.0e+00 allowed: output" in page.words
    assert "computes the same" not in page.words


def test_nan_is_the_worst_error_and_is_told() -> None:
    checks = (Check.at_most("bad", float("nan"), 1.0), Check.at_most("off", 5.0, 1.0))
    words = Page(html_page(Report("verify", checks=checks))).words
    assert "Worst error not a number more than the 1.0e+00 allowed: bad" in words


def test_a_site_that_missed_its_bound_is_marked() -> None:
    page = html_page(Report("convert", "Net", "wn", (site("good"), site("bad", 1.0))))
    assert page.count('<tr class="failed">') == 1


def test_near_is_not_called_equal() -> None:
    drift = {"output": 3.0, "agreement": 0.25, "sites": {"bn1": {"snr_db": 1.0, "cosine": 0.9}}}
    after = {"output": 0.2, "agreement": 1.0, "sites": {"bn1": {"snr_db": 9.0, "cosine": 1.0}}}
    rows = (site("bn1", fidelity="calibrated"), site("bn2", fidelity=""))
    facts = {"before": drift, "after": after}
    report = Report("convert", "Net", "gn", rows, (Check("repeats", True),), facts)
    page = Page(html_page(report))
    assert "near the original, not equal to it" in page.words
    assert "2 → 2 1 look at each sample; kept: bn2" in page.words
    assert "Outputs differ by 0.2 3 before" in page.words
    assert "Same top-1 100.0% 25.0% before" in page.words
    assert len(page.all("polyline")) == 2  # errors and bounds; one point makes no line of drift
    assert len(page.all("circle")) == 4


def test_a_report_of_nothing_is_a_page() -> None:
    words = Page(html_page(Report("plan"))).words
    assert "Done. Nothing here was held against a bound." in words
    assert "Worst error" not in words


def test_long_lists_are_folded_up_and_whole() -> None:
    notes = tuple(f"note {i}" for i in range(30))
    page = Page(html_page(Report("plan", notes=notes)))
    assert all(note in page.words for note in notes)
    assert "22 more" in page.words


def test_it_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "report.html"
    write_html(REPORT, path)
    assert path.read_text(encoding="utf-8") == html_page(REPORT)
    assert [entry.name for entry in path.parent.iterdir()] == ["report.html"]
    with pytest.raises(UsageError, match="end its name in"):
        write_html(REPORT, tmp_path / "report.txt")
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(UsageError, match="it is a folder"):
        write_html(REPORT, tmp_path / "folder.html")
