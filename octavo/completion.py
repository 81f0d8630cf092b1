"""Text in, text out: a prompt continued by an engine, for a quick look at what an edition says."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

from octavo.checkpoint import read_json
from octavo.checkpoint.hub import resolve_model
from octavo.engines import open_engine
from octavo.errors import OctavoError
from octavo.tokenizer import load_tokenizer


def complete(
    model: str | Path,
    prompt: str,
    *,
    max_tokens: int = 64,
    temperature: float = 0.0,
    engine: str = "transformers",
    device: str = "auto",
) -> str:
    """Continue a text.

    Args:
        model: a checkpoint, BF16 or FP8: a directory, or a hub id.
        prompt: the text, at least one token of it.
        max_tokens: new tokens, at most; the model's end-of-sequence tokens end it before.
        temperature: 0 takes the likeliest token each time.
        engine: a key of :data:`octavo.engines.ENGINES`.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.

    Returns:
        What follows the prompt.

    Raises:
        OctavoError: the model cannot be opened, or the prompt is empty or too long.
    """
    path = resolve_model(model)
    tokenizer: Any = load_tokenizer(path)
    ids = tokenizer(prompt)["input_ids"]
    with closing(open_engine(engine, path, device)) as running:
        if not ids or len(ids) + max_tokens > running.max_positions:
            raise OctavoError(
                f"The prompt has {len(ids)} tokens; expected at least 1, and with {max_tokens} new ones "
                f"(--max-tokens) at most the model's {running.max_positions} positions."
            )
        (added,) = running.generate(
            [ids], max_tokens=max_tokens, stop=_ends(path, tokenizer), temperature=temperature
        )
    # Decoded together: what a token means may depend on those before it.
    before = tokenizer.decode(ids, skip_special_tokens=True)
    after: str = tokenizer.decode([*ids, *added], skip_special_tokens=True)
    return after[len(before) :]


def _ends(model: Path, tokenizer: Any) -> list[int]:
    """Token ids that end a text, by the model's generation config and its tokenizer."""
    path = model / "generation_config.json"
    named = read_json(path).get("eos_token_id") if path.exists() else None
    ids = named if isinstance(named, list) else [named]
    return [one for one in {*ids, tokenizer.eos_token_id} if isinstance(one, int)]
