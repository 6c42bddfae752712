"""`python -m vistok` is the command `vistok`."""

from vistok.cli.main import main

main()
