"""The files of an analysis."""

from __future__ import annotations

from pathlib import Path

from octavo.checkpoint.disk import explained, sync, write_file
from octavo.reporting.analysis import Analysis
from octavo.reporting.writing import check_drawing


def write_analysis(analysis: Analysis, directory: Path) -> None:
    """Write ``analysis.json`` and ``analysis.html`` and bring them to the disk. Equal analyses give equal bytes.

    Args:
        analysis: what to write.
        directory: an existing one.

    Raises:
        OctavoError: matplotlib is missing.
        WriteError: the disk does not take them.
    """
    check_drawing()
    # After the check: it imports matplotlib.
    from octavo.reporting.analysis_page import analysis_page

    contents = {
        "analysis.json": analysis.model_dump_json(indent=2) + "\n",
        "analysis.html": analysis_page(analysis),
    }
    with explained(directory, 0):
        for name, content in contents.items():
            write_file(directory / name, content.encode())
            sync(directory / name)
