"""Hugging Face PEFT's adapter files, in and out: one codec for each PEFT type, and what they share.

    config.py   which fields a file may have, and what they mean     places.py   module paths <-> sites and patterns
    lora.py  ia3.py  soft.py  whole.py    codecs of their own         files.py    reading and writing a folder
    forms.py    the other types, each a table                         layouts.py  tensors that it lays out in another way
    table.py    what reads and writes such a table

A file becomes an ordinary plan: from then on nothing remembers where it came from.
"""

from __future__ import annotations

from .files import about, load, owns, save_peft

__all__ = ["about", "load", "owns", "save_peft"]
