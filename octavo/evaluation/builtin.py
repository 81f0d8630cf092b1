"""A held-out text that needs no network: what CPython's standard library says about itself.

Calibration's built-in text is the language reference; these are the docstrings of library modules,
by other authors on other subjects. A different CPython has a slightly different text.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from pathlib import Path

# Modules written in Python with much prose in them, in no particular order: windows taken from the
# front are about different things.
_MODULES = (
    "argparse",
    "statistics",
    "logging",
    "difflib",
    "threading",
    "pathlib",
    "smtplib",
    "fractions",
    "subprocess",
    "configparser",
    "random",
    "_pydecimal",
    "textwrap",
    "doctest",
    "_pydatetime" if importlib.util.find_spec("_pydatetime") else "datetime",
    "typing",
    "imaplib",
    "calendar",
    "functools",
    "ipaddress",
    "tarfile",
    "optparse",
    "unittest.case",
    "turtle",
)


def documents() -> Iterator[str]:
    """The docstrings of one module after another, in the order of their source."""
    for name in _MODULES:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
            continue
        tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
        found = [
            ast.get_docstring(node)
            for node in ast.walk(tree)
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        ]
        yield "\n\n".join(text for text in found if text)
