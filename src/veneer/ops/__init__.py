"""Arithmetic: plain torch references, each with a faster version beside it where there is one."""
