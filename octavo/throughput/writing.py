"""The files of a comparison, each written whole or not at all."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from octavo.errors import OctavoError
from octavo.files import write_whole
from octavo.reporting.writing import refuse_existing
from octavo.throughput.results import BenchResults

FILES = ("results.json", "throughput.png", "throughput.svg")


def check_output(output: Path, *, overwrite: bool) -> None:
    """Refuse what :func:`write_results` would refuse, before anything is measured.

    Raises:
        OctavoError: ``output`` is no directory, holds results already, or matplotlib is missing.
    """
    if find_spec("matplotlib") is None:
        raise OctavoError(
            "The figure needs matplotlib, which is not installed. Install it: "
            "pip install 'octavo[report]'. Without -o, results are printed only."
        )
    refuse_existing(output, FILES, overwrite=overwrite)


def write_results(results: BenchResults, output: Path) -> list[Path]:
    """Write ``results.json``, ``throughput.png`` and ``throughput.svg``.

    Args:
        results: what to write.
        output: the directory, created if need be; files of these names are replaced.

    Returns:
        The paths written.
    """
    from octavo.throughput.plot import draw

    figure = draw(results)
    contents = (results.model_dump_json(indent=2).encode() + b"\n", figure["png"], figure["svg"])
    output.mkdir(parents=True, exist_ok=True)
    paths = [output / file for file in FILES]
    for path, content in zip(paths, contents, strict=True):
        write_whole(path, content)
    return paths
