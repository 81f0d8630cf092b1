"""The embedded engine behind its own API: ``python -m octavo.api``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from octavo.checkpoint import Checkpoint
from octavo.edition import Edition
from octavo.errors import OctavoError
from octavo.servers.server import Flags, ServerCommand, model_name

# What the API is made with.
_PACKAGES = ("fastapi", "prometheus_client", "uvicorn")
_INSTALL = "`pip install 'octavo[serve]'`"


def command(edition_dir: Path, *, host: str, port: int, extra: Sequence[str]) -> ServerCommand:
    """See :func:`octavo.servers.server_command`.

    Raises:
        OctavoError: the checkpoint cannot be read, or packages that the API needs are not installed.
    """
    # Everything that Octavo reads; what the engine does not run it refuses itself.
    Edition(Checkpoint(edition_dir))
    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if missing:
        raise OctavoError(
            f"The engine torch is served with packages that are not installed: {', '.join(missing)}. "
            f"Install them with {_INSTALL}."
        )
    ours = {"--host": host, "--port": str(port), "--served-model-name": model_name(edition_dir)}
    flags = Flags(ours, extra)
    return ServerCommand(
        name="Octavo",
        argv=(sys.executable, "-m", "octavo.api", str(edition_dir), *flags.words()),
        env={"PYTHONUNBUFFERED": "1"},
        url=flags.url(),
        health="/health",
        install=_INSTALL,
        model=flags.get("--served-model-name"),
    )
