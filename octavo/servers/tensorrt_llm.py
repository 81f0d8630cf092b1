"""``trtllm-serve``, and for TensorRT-LLM's own checkpoints ``trtllm-build`` before it.

Flags: tensorrt_llm/commands/serve.py and build.py.

Releases without the TensorRT backend have no ``trtllm-build``; they run Hugging Face checkpoints
only (docs/source/legacy/tensorrt-backend-removal.md).
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from octavo.checkpoint import Checkpoint
from octavo.edition import Edition
from octavo.errors import OctavoError
from octavo.servers.reads import TENSORRT_LLM
from octavo.servers.server import (
    Build,
    Flags,
    ServerCommand,
    convert_command,
    refuse_unreadable,
)

# Configs that it takes an FP8 KV cache from.
_TAKES_KV_CACHE = frozenset({"modelopt", "compressed-tensors", "tensorrt-llm"})
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")


def command(edition_dir: Path, *, host: str, port: int, extra: Sequence[str]) -> ServerCommand:
    """See :func:`octavo.servers.server_command`.

    Raises:
        OctavoError: TensorRT-LLM cannot read the checkpoint; or beside one of its own lies something
            that is not an engine built from it, or there is no tokenizer in it.
    """
    edition = Edition(Checkpoint(edition_dir))
    refuse_unreadable("TensorRT-LLM", TENSORRT_LLM, edition_dir, edition.dialect, edition.scheme)
    ours = {"--backend": "pytorch", "--host": host, "--port": str(port)}
    served, build = edition_dir, None
    notes = []
    if edition.dialect == "tensorrt-llm":
        served = edition_dir.with_name(f"{edition_dir.name}-engine")
        ours |= {"--backend": "tensorrt", "--tokenizer": str(edition_dir)}
        build = _build(edition_dir, served)
        if build is not None:
            notes.append(
                "TensorRT-LLM runs an engine built from its checkpoint, with "
                f"`{shlex.join([*build.argv, str(build.output)])}`. It is built once, for this "
                "machine's GPU and this release."
            )
    promised = edition.scheme is not None and edition.scheme.kv_cache == "fp8"
    if promised and edition.dialect not in _TAKES_KV_CACHE:
        notes.append(
            "the edition has scales for an FP8 KV cache, which TensorRT-LLM does not take from a "
            f"{edition.dialect} config: its cache is in the model's dtype."
        )
    flags = Flags(ours, extra)
    if flags.added("--tokenizer"):
        _refuse_without_tokenizer(edition_dir)
    return ServerCommand(
        name="TensorRT-LLM",
        argv=("trtllm-serve", "serve", str(served), *flags.words()),
        env={"PYTHONUNBUFFERED": "1"},
        url=flags.url(),
        health="/health",
        install="`pip install tensorrt-llm` on Linux with an NVIDIA GPU",
        # What it calls a model in a directory, and no older release can be told otherwise.
        model=flags.get("--served-model-name", served.name),
        notes=tuple(notes),
        build=build,
    )


def _build(checkpoint: Path, engine: Path) -> Build | None:
    """How ``engine`` is built from ``checkpoint``; None if it has been.

    Raises:
        OctavoError: ``engine`` is something else, or older than the checkpoint.
    """
    config, source = engine / "config.json", checkpoint / "config.json"
    shards = list(checkpoint.glob("rank*.safetensors"))
    if not engine.exists():
        return Build(
            argv=("trtllm-build", "--checkpoint_dir", str(checkpoint), "--output_dir"),
            output=engine,
            missing="It comes with the releases of TensorRT-LLM that have a TensorRT backend. Later "
            f"ones run Hugging Face checkpoints only: `{convert_command(checkpoint, 'modelopt')}`.",
        )
    wanted = [config, *(engine / f"{shard.stem}.engine" for shard in shards)]
    absent = [file.name for file in wanted if not file.is_file()]
    if absent:
        raise OctavoError(
            f"{engine} is where the engine built from {checkpoint} belongs, and it has no "
            f"{', '.join(absent)}. Remove or rename it."
        )
    if config.stat().st_mtime < source.stat().st_mtime:
        raise OctavoError(
            f"The engine in {engine} is older than {source}, so it was built from another checkpoint. "
            "Remove it; it will be built again."
        )
    return None


def _refuse_without_tokenizer(directory: Path) -> None:
    if not any((directory / name).exists() for name in _TOKENIZER_FILES):
        raise OctavoError(
            f"{directory} has no tokenizer ({', '.join(_TOKENIZER_FILES)}), which the engine is served "
            "with. Copy the original checkpoint's files there, or name it with `-- --tokenizer DIR`."
        )
