"""The command line: parse, call the Python API, render. One file for each group of commands."""

from octavo.cli import (
    analyze,
    bench,
    convert,
    evaluate,
    generate,
    inspect,
    plan,
    quantize,
    report,
    rotate,
    serve,
    synth,
    write_calibration,
)
from octavo.cli.program import app, main

__all__ = [
    "analyze",
    "app",
    "bench",
    "convert",
    "evaluate",
    "generate",
    "inspect",
    "main",
    "plan",
    "quantize",
    "report",
    "rotate",
    "serve",
    "synth",
    "write_calibration",
]
