"""`python -m qpcompile` is the command `qpcompile`."""

from qpcompile.cli.main import main

main()
