"""The library's docstrings as Markdown: 'name  what it is' becomes an entry of a definition list, equations stay as they are."""

from __future__ import annotations

import re
from typing import Any

import griffe

# a name (or several, or a quoted value), two spaces or more, and what it is
ENTRY = re.compile(r"(?P<name>['\w][\w'.,:=*<>\[\]/ -]*?)(?: {2,}|(?<=') )(?P<text>\S.*)")


def markdown(text: str) -> str:
    """`text` with its lists of parameters marked up; indented blocks (equations) are code already."""
    out: list[str] = []
    inside = False
    for line in text.splitlines():
        entry = ENTRY.fullmatch(line) if line and not line[0].isspace() else None
        if entry is not None and "  " in line:
            out += [""] if out and out[-1] else []
            out += [f"`{entry['name'].strip()}`", f":   {entry['text']}"]
            inside = True
        elif inside and line.startswith("  "):
            out.append("    " + line.strip())
        else:
            if inside and line:
                out.append("")
            inside = False if line else inside
            out.append(line)
        if inside and not line:
            inside = False
    return "\n".join(out)


class OurDocstrings(griffe.Extension):
    """Rewrites every docstring before mkdocstrings renders it."""

    def on_object(self, *, obj: Any, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)
