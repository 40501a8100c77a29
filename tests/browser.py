"""Pages as a browser sees them: a Chromium of this machine, or else the headless one that the package kaleido 0.2 carries.

The first opens the whole page. The second has no pages: it is given the page's own plotly and its figures.
"""

from __future__ import annotations

import functools
import html.parser
import importlib.util
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "chrome-headless-shell", "microsoft-edge")
VOID = {"meta", "br", "img", "link", "input", "hr"}


@functools.cache
def browser() -> str | None:
    """A Chromium of this machine: $BROWSER_PATH, on the path, or one that playwright or puppeteer fetched."""
    found = [os.environ.get("BROWSER_PATH"), *map(shutil.which, BROWSERS)]
    for root in (Path.home() / ".cache" / "ms-playwright", Path.home() / ".cache" / "puppeteer"):
        found += [str(p) for name in ("chrome", "headless_shell", "chrome-headless-shell") for p in sorted(root.glob(f"**/{name}")) if os.access(p, os.X_OK)]
    return next((p for p in found if p and Path(p).is_file()), None)


@functools.cache  # a page is looked at by several checks
def dom(page: Path, *, size: str = "1200,900") -> str:
    """The page's elements after its scripts have run, from the disk, without a network."""
    binary = browser()
    assert binary is not None
    with tempfile.TemporaryDirectory() as profile:
        command = [binary, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}", "--proxy-server=127.0.0.1:9"]
        command += [f"--window-size={size}", "--virtual-time-budget=10000", "--dump-dom", page.resolve().as_uri()]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


class Elements(html.parser.HTMLParser):
    """Tags with their attributes, the text directly in them, and `inside`, the classes of what they stand in; in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[dict[str, Any]] = []
        self.open: list[tuple[str, str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        inside = " ".join(c for _, c in self.open).split()
        self.found.append({"tag": tag, "text": "", "inside": inside, **{k: v or "" for k, v in attrs}})
        if tag not in VOID:
            self.open.append((tag, dict(attrs).get("class") or ""))

    def handle_endtag(self, tag: str) -> None:
        self.found.append({"tag": "", "text": ""})  # what follows is not in that element
        while any(t == tag for t, _ in self.open) and self.open.pop()[0] != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self.found:
            self.found[-1]["text"] += data

    def all(self, tag: str, **attributes: str) -> list[dict[str, Any]]:
        return [e for e in self.found if e["tag"] == tag and all(v in e.get(k, "").split() for k, v in attributes.items())]


def figures(text: str) -> list[Any]:
    """The figures in the page, each checked by plotly against its schema: an unknown key or a bad value raises."""
    import plotly.graph_objects as go

    found = Elements(text)
    data = [json.loads(e["text"]) for e in found.found if e["tag"] == "script" and e.get("type") == "application/json"]
    places = {e["data-figure"] for e in found.all("div") if "data-figure" in e}
    assert places == {e["id"] for e in found.found if e.get("type") == "application/json"}
    return [go.Figure(d, skip_invalid=False) for d in data]


def points(trace: Any) -> int:
    """How many marks the trace has to draw."""
    values = trace.z if trace.type == "heatmap" else (trace.x if trace.x is not None else trace.y)
    flat = [v for row in values for v in row] if trace.type == "heatmap" else trace.y if trace.type == "scatter" else values
    return sum(v is not None for v in flat)


def svgs(page: str) -> list[str]:
    """The figures in the page as kaleido's Chromium draws them with the page's own plotly."""
    spec = importlib.util.find_spec("kaleido")
    assert spec is not None and spec.origin is not None
    library = max((e["text"] for e in Elements(page).all("script") if not e.get("type")), key=len)
    out = []
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "plotly.js"
        script.write_text(library, encoding="utf-8")
        command = [str(Path(spec.origin).parent / "executable" / "kaleido"), "plotly", f"--plotlyjs={script}"]
        command += ["--disable-gpu", "--no-sandbox", "--allow-file-access-from-files", "--disable-breakpad", "--disable-dev-shm-usage", "--single-process"]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
            assert process.stdin is not None and process.stdout is not None
            ready = json.loads(process.stdout.readline())
            assert ready["code"] == 0, ready["message"]
            for figure in figures(page):
                request = {"data": json.loads(figure.to_json()), "format": "svg", "width": 700, "height": figure.layout.height, "scale": 1}
                process.stdin.write(json.dumps(request) + "\n")
                process.stdin.flush()
                answer = json.loads(process.stdout.readline())
                assert answer["code"] == 0, answer["message"]
                out.append(answer["result"])
            process.stdin.close()
    return out


def check_marks(seen: Elements, found: list[Any]) -> None:
    """That what was drawn has a line, a mark, a bar and a map for each that the figures say."""
    traces = [t for f in found for t in f.data]
    lines = sum(points(t) > 1 for t in traces if t.type == "scatter" and "lines" in (t.mode or "lines"))
    marks = sum(points(t) for t in traces if t.type == "scatter" and "markers" in (t.mode or ""))
    paths = [e for e in seen.all("path") if "scatterlayer" in e["inside"]]
    assert sum("js-line" in e.get("class", "") and any(c in e["d"] for c in "LCHV") for e in paths) == lines
    assert sum("point" in e.get("class", "").split() for e in paths) == marks
    assert sum("barlayer" in e["inside"] for e in seen.all("g", **{"class": "point"})) == sum(points(t) for t in traces if t.type == "bar")
    assert len(seen.all("g", **{"class": "hm"})) == sum(t.type == "heatmap" for t in traces)


def check_drawn(page: Path) -> list[Any]:
    """The figures of the page, each with something to draw, and drawn. Returns them."""
    text = page.read_text(encoding="utf-8")
    found = figures(text)
    assert found and all(f.data and any(points(t) for t in f.data) for f in found)
    if browser() is None:
        for svg, figure in zip(svgs(text), found, strict=True):
            check_marks(Elements(svg), [figure])
        return found
    seen = Elements(dom(page))
    charts = seen.all("div", **{"class": "chart"})
    assert len(charts) == len(found) and all(c.get("data-drawn") == "yes" for c in charts)
    check_marks(seen, found)
    return found
