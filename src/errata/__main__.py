"""`python -m errata` is `errata`."""

from errata.cli import main

main()
