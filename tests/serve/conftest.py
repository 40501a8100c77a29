"""The small finished runs, for this folder."""

from using import bases, runs

__all__ = ["bases", "runs"]
