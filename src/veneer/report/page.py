"""One self-contained HTML page: sections of text, tables and plotly figures, which opens from a disk, offline."""

from __future__ import annotations

import base64
import functools
import hashlib
import html
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import ConfigError
from ..files import rehearsing, write_whole

HERE = Path(__file__).parent
PNG = re.compile(r"data:image/png;base64,[A-Za-z0-9+/]*={0,2}")
# What a figure shows of the user's own words stands under these keys; templates (hovertemplate, …) are written by us.
WORDS = {"name", "text", "hovertext", "ticktext", "customdata", "categoryarray", "x", "y"}


class Picture(NamedTuple):
    """A cell of a table: a PNG as a data URI, and the words that stand where it cannot."""

    uri: str
    words: str


class Page:
    """Collects sections, then `write`s them as one file.

    All text is escaped, in the page and in figures, where plotly would read HTML in it too. The page's policy allows no
    script but its own two, by their digests, and no connection, so even a label that slipped through could run nothing.

    title  of the page and of the browser's tab; lead: one line under it
    """

    def __init__(self, title: str, lead: str = "") -> None:
        self.title, self.lead = title, lead
        self._body: list[str] = []
        self._sections: list[str] = []
        self._figures: list[str] = []
        self._row: list[str] = []

    def section(self, title: str, note: str = "") -> None:
        """Begin a section with the heading `title`; `note` explains it in a line."""
        self._flush()
        self._sections.append(title)
        self._body.append(f'<h2 id="s{len(self._sections)}">{html.escape(title)}</h2>')
        if note:
            self._body.append(f'<p class="note">{html.escape(note)}</p>')

    def text(self, text: str) -> None:
        """A paragraph."""
        self._put(f"<p>{html.escape(text)}</p>")

    def code(self, text: str) -> None:
        """`text` as it is, in a fixed pitch: YAML, or a command."""
        self._put(f"<pre><code>{html.escape(text)}</code></pre>")

    def tiles(self, values: Mapping[str, Any]) -> None:
        """The few numbers to see first: name -> value."""
        cells = "".join(f'<div class="tile"><span>{html.escape(k)}</span><b>{html.escape(shown(v))}</b></div>' for k, v in values.items())
        self._put(f'<div class="tiles">{cells}</div>')

    def facts(self, values: Mapping[str, Any]) -> None:
        """A table of two columns: name -> value."""
        rows = "".join(f"<tr><th scope=row>{html.escape(k)}</th><td>{html.escape(shown(v))}</td></tr>" for k, v in values.items())
        self._put(f'<div class="scroll"><table>{rows}</table></div>')

    def table(self, heads: Sequence[str], rows: Iterable[Sequence[Any]], *, marked: Sequence[int] = ()) -> None:
        """A table that a click on a head sorts. A number is aligned right and sorted by its value; None is shown as a dash.

        A cell may be a pair (value to sort by, text to show) or a `Picture`. marked: indices of the rows that stand out.
        """
        rows = [list(r) for r in rows]
        numeric = [any(_value(r[i]) is not None for r in rows) and all(_value(r[i]) is not None or _text(r[i]) == "-" for r in rows) for i in range(len(heads))]
        kind = [' class="number"' if n else "" for n in numeric]
        head = "".join(f'<th scope="col"{k} aria-sort="none"><button>{html.escape(h)}</button></th>' for h, k in zip(heads, kind, strict=True))
        body = "".join(
            ('<tr class="marked">' if i in marked else "<tr>")
            + "".join(f"<td{k or _long(c)}{_sortable(c)}>{_cell(c)}</td>" for c, k in zip(r, kind, strict=True))
            + "</tr>"
            for i, r in enumerate(rows)
        )
        self._put(f'<div class="scroll"><table class="sortable"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>')

    def figure(self, figure: Any, title: str, caption: str = "", *, wide: bool = False) -> None:
        """A plotly figure under its `title`. Figures that follow each other share a row where the screen allows; wide: not.

        A line break in the user's words is one in the figure.
        """
        data = _escaped(json.loads(figure.to_json()))
        number = len(self._figures)
        # inside a script element only "</" and "<!--" end or change anything: no "<" is left
        self._figures.append(f'<script type="application/json" id="f{number}">{json.dumps(data, ensure_ascii=True).replace("<", chr(92) + "u003c")}</script>')
        height = int(data["layout"].get("height", 360))
        note = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
        chart = f'<div class="chart" data-figure="f{number}" style="height:{height}px" role="img" aria-label="{html.escape(title)}"></div>'
        self._row.append(f"{'<figure class=wide>' if wide else '<figure>'}<h3>{html.escape(title)}</h3>{chart}{note}</figure>")

    def html(self) -> str:
        """The whole page."""
        self._flush()
        style, own = ((HERE / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
        scripts = [_library(), own] if self._figures else [own]
        policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data: blob:; script-src {' '.join(map(_digest, scripts))}"
        links = "".join(f'<a href="#s{i}">{html.escape(s)}</a>' for i, s in enumerate(self._sections, 1))
        return "\n".join(
            [
                "<!doctype html>",
                '<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">',
                f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
                f"<title>{html.escape(self.title)}</title><style>{style}</style></head><body><main>",
                f"<h1>{html.escape(self.title)}</h1>",
                f'<p class="lead">{html.escape(self.lead)}</p>' if self.lead else "",
                f"<nav>{links}</nav>" if len(self._sections) > 2 else "",
                "<noscript><p>The charts need JavaScript, which this page carries in itself.</p></noscript>" if self._figures else "",
                *self._body,
                "</main>",
                *self._figures,
                *(f"<script>{s}</script>" for s in scripts),
                "</body></html>\n",
            ]
        )

    def write(self, path: str | Path) -> Path:
        """Write the page whole or not at all; in a rehearsal draw it, and keep nothing. Raises: StoreError where `path` cannot be written."""
        page = self.html().encode()
        if not rehearsing():
            write_whole(Path(path), page)
        return Path(path)

    def _put(self, block: str) -> None:
        self._flush()
        self._body.append(block)

    def _flush(self) -> None:
        if self._row:
            self._body.append(f'<div class="figures">{"".join(self._row)}</div>')
            self._row = []


def shown(value: Any) -> str:
    """A value as people read it: 4 significant digits, thousands apart, a dash for what is missing."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if 10_000 <= abs(value) < 1e15 else f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(shown(v) for v in value)
    return str(value)


def plotly() -> Any:
    """plotly.graph_objects. Raises: ConfigError where plotly is not installed."""
    try:
        import plotly.graph_objects as go
    except ImportError as e:
        raise ConfigError("pages with charts need plotly", fix='pip install "veneer[train]"') from e
    return go


@functools.cache
def _library() -> str:
    from plotly.offline import get_plotlyjs

    return get_plotlyjs().replace("</script", "<\\/script")


@functools.cache
def _digest(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _text(cell: Any) -> str:
    return cell[1] if isinstance(cell, tuple) else shown(cell)


def _cell(cell: Any) -> str:
    words = html.escape(_text(cell))
    if isinstance(cell, Picture) and PNG.fullmatch(cell.uri):
        return f'<img src="{cell.uri}" alt="{words}" title="{words}">'
    return words


def _value(cell: Any) -> float | None:
    value = cell[0] if isinstance(cell, tuple) else cell
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return value if good else None


def _long(cell: Any) -> str:
    """Sentences get room in a crowded table."""
    return ' class="long"' if len(_text(cell)) > 40 and not isinstance(cell, Picture) else ""


def _sortable(cell: Any) -> str:
    value = _value(cell)
    return f' data-value="{value!r}"' if value is not None else ' data-value=""' if _text(cell) == "-" else ""


def _escaped(value: Any, words: bool = False) -> Any:
    if isinstance(value, dict):
        return {k: _escaped(v, k in WORDS) for k, v in value.items()}
    if isinstance(value, list):
        return [_escaped(v, words) for v in value]
    if words and isinstance(value, str):
        return html.escape(value, quote=False).replace("\n", "<br>")
    return value
