"""Composition: gates, mixtures, fusion, and trained adapters within new plans. Here: how each is written as data."""

from ..reading import Composer
from .fusion import fuse
from .held import frozen
from .mixture import mixture

COMPOSERS = {
    "frozen": Composer(frozen),
    "mixture": Composer(mixture, ("top_k", "per", "balance"), many=True),
    "fuse": Composer(fuse, (), many=True),
}
