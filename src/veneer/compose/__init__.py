"""Composition: gates, mixtures, fusion, and trained adapters within new plans. Here: how each is written as data."""

from ..reading import Composer
from .fusion import fuse
from .held import frozen, use
from .mixture import mixture
from .paced import paced

COMPOSERS = {
    "frozen": Composer(frozen),
    "use": Composer(use, ("train",), named=True),
    "mixture": Composer(mixture, ("top_k", "per", "balance"), many=True),
    "fuse": Composer(fuse, (), many=True),
    "paced": Composer(paced, ("by",)),
}
