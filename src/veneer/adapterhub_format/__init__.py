"""AdapterHub's adapter files, read: a table of its methods, and what their tensors are here.

    files.py    a folder, its keys, what is refused     methods.py  bottleneck, LoRA, (IA)³, prefix: options and tensors
    heads.py    prediction heads that lie beside it

A file becomes an ordinary plan: from then on nothing remembers where it came from.
"""

from __future__ import annotations

from .files import about, load, owns

__all__ = ["about", "load", "owns"]
