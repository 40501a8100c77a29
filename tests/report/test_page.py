"""One mechanism for pages: whole in one file, nothing of the user's runs, charts drawn."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

import veneer as vn
from browser import Elements, browser, check_drawn, dom, figures
from veneer.report import charts
from veneer.report.page import Page, Picture, shown

HOSTILE = [
    "</script><script>document.title='owned'</script>",
    "<img src=x onerror=\"document.title='owned'\">",
    '"><svg onload=document.title="owned">',
    "<a href=\"javascript:document.title='owned'\">x</a>",
    "<b>&amp;<br>'\"",
    "<!--",
]


def hostile_page() -> Page:
    k = len(HOSTILE)
    page = Page(HOSTILE[0], HOSTILE[1])
    for words in HOSTILE:
        page.section(words, words)
        page.text(words)
        page.code(words)
    page.tiles(dict.fromkeys(HOSTILE, HOSTILE[1]))
    page.facts(dict.fromkeys(HOSTILE, HOSTILE[1]))
    page.table(HOSTILE, [HOSTILE, [(1, h) for h in HOSTILE]])
    page.figure(charts.confusion(HOSTILE, [[1] * k] * k), HOSTILE[1], HOSTILE[0])
    page.figure(charts.curves({h: ([1, 2, 3], [1, 2, 3]) for h in HOSTILE}, y=HOSTILE[1], ends={HOSTILE[2]: HOSTILE[0]}), HOSTILE[2])
    page.figure(charts.bars(HOSTILE, list(range(1, k + 1)), x=HOSTILE[1]), HOSTILE[3])
    page.figure(charts.heat(HOSTILE, HOSTILE, [[0.5] * k] * k, [[0.1] * k] * k), HOSTILE[4])
    return page


def test_the_users_words_stay_words(tmp_path):
    path = hostile_page().write(tmp_path / "p.html")
    found = Elements(path.read_text())
    assert not found.all("img") and not found.all("svg") and len(found.all("a")) == len(HOSTILE)  # the links to sections
    assert [e["text"] for e in found.all("p", **{"class": "note"})] == HOSTILE
    assert len([e for e in found.all("script") if not e.get("type")]) == 2
    words = charts.short(HOSTILE[1]).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    assert figures(path.read_text())[1].data[1].name == words  # plotly reads HTML in names
    check_drawn(path)
    if browser() is not None:
        seen = Elements(dom(path))
        assert next(e for e in seen.all("title"))["text"] == HOSTILE[0]
        assert not seen.all("img") and not [e for e in seen.found if any(k.startswith("on") for k in e)]
        assert not [e for e in seen.all("a") if "javascript" in e.get("href", "") + e.get("xlink:href", "")]


def test_pictures_are_pngs_or_words(tmp_path):
    page = Page("title")
    good = "data:image/png;base64,iVBORw0KGgo="
    bad = [f'{good}" onerror="x', "javascript:x", "https://example.org/a.png", "data:image/svg+xml;base64,AAAA", *HOSTILE]
    page.table(["what"], [[Picture(u, h)] for u in (good, *bad) for h in HOSTILE])
    found = Elements(page.html())
    assert [(e["src"], e["alt"]) for e in found.all("img")] == [(good, h) for h in HOSTILE]
    assert [e["text"] for e in found.all("td")][len(HOSTILE) :] == HOSTILE * len(bad)


def test_charts_are_drawn_without_a_browser_of_this_machine(tmp_path, monkeypatch):
    """In the Chromium that comes from the package index: what a machine of plain Python has."""
    monkeypatch.setattr("browser.browser", lambda: None)
    page = Page("x")
    page.figure(charts.curves({"a": ([1, 2, 3], [1, 2, 3]), "b": ([1, 2], [2, 1])}, ends={"b": "out"}), "x")
    page.figure(charts.bars(["a", "b"], [1, 2], x="n"), "x")
    page.figure(charts.heat(["0"], ["a b"], [[0.5]], [[0.1]]), "x")
    assert len(check_drawn(page.write(tmp_path / "p.html"))) == 3


def test_the_page_needs_nothing_else(tmp_path):
    text = hostile_page().html()
    outside = re.sub(r"<script>.*?</script>", "", text, flags=re.S)  # plotly's own source names addresses it never asks here
    assert not re.search(r"(src|href)\s*=\s*[\"']?(https?:)?//", outside) and "@import" not in outside
    assert text.count("Plotly.newPlot(") >= 1 and len(re.findall(r"<script>/\*\*\n\* plotly\.js", text)) == 1
    policy = next(e for e in Elements(text).all("meta") if e.get("http-equiv") == "Content-Security-Policy")["content"]
    assert "default-src 'none'" in policy and policy.count("sha256-") == 2 and "script-src 'sha256-" in policy
    assert len(Page("no charts").html()) < 20_000


def test_a_script_that_is_not_the_pages_does_not_run(tmp_path):
    """The policy, tried: without a browser it is only read, above."""
    path = tmp_path / "p.html"
    path.write_text(hostile_page().html().replace("</body>", "<script>document.title = 'owned'</script></body>"))
    assert path.read_text().count("document.title = 'owned'") == 1
    if browser() is not None:
        seen = Elements(dom(path))
        assert next(e for e in seen.all("title"))["text"] == HOSTILE[0] and seen.all("path", **{"class": "js-line"})


def test_tables_sort_numbers_by_value(tmp_path):
    page = Page("t")
    page.table(("name", "share", "n"), [("a", (0.02, "2%"), 1000), ("b", (0.1, "10%"), None), ("c", (0.003, "0.3%"), 20)], marked=[1])
    text = page.html()
    rows = re.findall(r"<td[^>]*data-value=\"([^\"]*)\"[^>]*>([^<]*)</td>", text)
    assert rows == [("0.02", "2%"), ("1000", "1,000"), ("0.1", "10%"), ("", "-"), ("0.003", "0.3%"), ("20", "20")]
    assert text.count('<tr class="marked">') == 1
    node = "const go = (column) => document.querySelectorAll('th button')[column].click();"
    if browser() is not None:
        path = tmp_path / "t.html"
        # the policy forbids the test's own clicks, so it is taken out here
        path.write_text(re.sub(r"<meta http-equiv=[^>]*>", "", text).replace("</body>", f"<script>{node} go(2); go(2);</script></body>"))
        seen = re.findall(r"<td>([abc])</td>", dom(path))
        assert seen == ["c", "a", "b"]  # upwards, the missing one last


def test_values_are_shown_as_people_read_them():
    assert [shown(v) for v in (None, float("nan"), 1234567, 0.00012345, 123456.7, True, "x", [1, 2.5])] == [
        "-", "-", "1,234,567", "0.0001234", "123,457", "yes", "x", "1, 2.5",
    ]  # fmt: skip


def test_a_figure_with_what_plotly_cannot_read_is_found_without_a_browser():
    page = Page("x")
    page.figure(charts.curves({"a": ([1, 2], [1.0, None])}), "x")
    with pytest.raises(ValueError, match="Invalid property"):
        figures(page.html().replace('"mode"', '"moed"'))
    assert json.loads(figures(page.html())[0].to_json())["data"][0]["y"] == [1.0, None]


def test_written_whole_or_not_at_all(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(vn.VeneerError, match="file is where the folder should be"):
        Page("x").write(tmp_path / "file" / "p.html")


def test_the_package_carries_its_style_and_script(tmp_path):
    """A wheel without them would write pages without charts."""
    import tomllib

    data = tomllib.loads(Path("pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["veneer"]
    tracked = subprocess.run(["git", "ls-files", "src/veneer/report"], capture_output=True, text=True).stdout.split()
    assert {"report/*.css", "report/*.js"} <= set(data) and {p.rsplit(".")[-1] for p in tracked} <= {"py", "css", "js", ""}
