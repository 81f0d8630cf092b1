"""``python -m octavo.cli``."""

from octavo.cli import main

main()
