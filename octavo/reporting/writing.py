"""The report's three files, each written whole or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from octavo.errors import OctavoError
from octavo.files import write_whole
from octavo.reporting.card import model_card
from octavo.reporting.results import Results

FILES = ("README.md", "report.html", "results.json")


def check_report_target(output: Path, *, overwrite: bool) -> None:
    """Refuse what :func:`write_report` would refuse, before hours of measuring.

    Raises:
        OctavoError: ``output`` is no directory, holds a report already, or matplotlib is missing.
    """
    check_drawing()
    refuse_existing(output, FILES, overwrite=overwrite)


def check_drawing() -> None:
    """Raise if matplotlib is missing, before hours of measuring."""
    if find_spec("matplotlib") is None:
        raise OctavoError(
            "The report's figures need matplotlib, which is not installed. "
            "Install it: pip install 'octavo[report]'."
        )


def refuse_existing(output: Path, files: Sequence[str], *, overwrite: bool) -> None:
    """Raise if ``output`` is no directory, or holds one of ``files`` that may not be replaced."""
    if output.exists() and not output.is_dir():
        raise OctavoError(f"{output} is a file, expected a directory. Choose another -o.")
    existing = [file for file in files if (output / file).exists()]
    if existing and not overwrite:
        raise OctavoError(
            f"{output} holds {' and '.join(existing)} already. "
            "Choose another -o, or pass --overwrite to replace them."
        )


def write_report(results: Results, output: Path, *, overwrite: bool = False) -> list[Path]:
    """Write ``README.md`` (a model card), ``report.html`` and ``results.json``.

    Equal results give equal bytes.

    Args:
        results: what to report.
        output: the directory, created if need be.
        overwrite: replace files of these names.

    Returns:
        The paths written.

    Raises:
        OctavoError: as :func:`check_report_target`.
    """
    check_report_target(output, overwrite=overwrite)
    # After the check: it imports matplotlib.
    from octavo.reporting.html import html_report

    contents = (
        model_card(results),
        html_report(results),
        results.model_dump_json(indent=2) + "\n",
    )
    output.mkdir(parents=True, exist_ok=True)
    paths = [output / file for file in FILES]
    for path, content in zip(paths, contents, strict=True):
        write_whole(path, content.encode())
    return paths
