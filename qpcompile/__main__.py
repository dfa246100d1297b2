"""`python -m qpcompile` is the command `qpcompile`."""

from qpcompile.cli import main

main()
