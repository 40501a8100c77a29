"""`python -m veneer`."""

from .cli import main

main()
