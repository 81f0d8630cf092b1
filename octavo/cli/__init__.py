"""The command line: parse, call the Python API, render. One file for each group of commands."""

from octavo.cli import convert, evaluate, quantize, report
from octavo.cli.program import app, main

__all__ = ["app", "convert", "evaluate", "main", "quantize", "report"]
