"""Text in, text out: a prompt continued by an engine, for a quick look at what an edition says."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from octavo.checkpoint.hub import resolve_model
from octavo.detokenizing import Detokenizer
from octavo.engines import check_engine, open_engine
from octavo.engines.torch import open_runner
from octavo.engines.torch.request import Output, Request, Sampling
from octavo.errors import OctavoError
from octavo.generation import default_sampling, end_tokens
from octavo.tokenizer import load_tokenizer


class Writer:
    """A checkpoint on the embedded engine, for one text at a time.

    Attributes:
        tokenizer: the checkpoint's.
        sampling: how the checkpoint wants its tokens chosen.
    """

    def __init__(self, model: str | Path, device: str = "auto") -> None:
        """
        Args:
            model: a checkpoint, BF16 or FP8: a directory, or a hub id.
            device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.

        Raises:
            OctavoError: it cannot be opened.
        """
        path = resolve_model(model)
        self.tokenizer: Any = load_tokenizer(path)
        self.sampling = Sampling(**default_sampling(path))
        self._ends = end_tokens(path, self.tokenizer)
        self._runner = open_runner(path, device, max_running=1)

    def write(self, prompt: Sequence[int], max_tokens: int, sampling: Sampling) -> Generator[str]:
        """Continue token ids up to an end-of-sequence token; whoever stops listening ends it too.

        Raises:
            OctavoError: there are none, or too many.
        """
        outputs: SimpleQueue[Output | Exception] = SimpleQueue()
        ticket = self._runner.submit(Request(prompt, max_tokens, sampling, self._ends), outputs.put)
        detokenizer = Detokenizer(self.tokenizer, prompt)
        try:
            finish = None
            while finish is None:
                output = outputs.get()
                if isinstance(output, Exception):
                    raise output
                finish = output.finish
                if finish != "stop":
                    yield detokenizer.add(output.token)
            yield detokenizer.end()
        finally:
            self._runner.cancel(ticket)

    def close(self) -> None:
        """Free what the engine holds."""
        self._runner.close()


def with_fields(sampling: Sampling, fields: Mapping[str, Any]) -> Sampling:
    """``sampling`` with other values in some fields; None leaves a field as it is."""
    return sampling._replace(**{name: value for name, value in fields.items() if value is not None})


def complete(
    model: str | Path,
    prompt: str,
    *,
    max_tokens: int = 64,
    engine: str = "torch",
    device: str = "auto",
    on_text: Callable[[str], None] = lambda text: None,
    **sampling: Any,
) -> str:
    """Continue a text.

    Args:
        model: a checkpoint, BF16 or FP8: a directory, or a hub id.
        prompt: the text, at least one token of it.
        max_tokens: new tokens, at most; the model's end-of-sequence tokens end it before.
        engine: a key of :data:`octavo.engines.ENGINES`. All but ``torch`` choose tokens by the temperature only.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        on_text: called with what follows the prompt, piece by piece as it comes.
        sampling: fields of :class:`octavo.engines.torch.request.Sampling`, such as ``temperature``; None leaves
            a field. By default the likeliest token is taken each time.

    Returns:
        All that follows the prompt.

    Raises:
        OctavoError: the model cannot be opened, the prompt is empty or too long, or the engine cannot choose
            tokens so.
    """
    chosen = with_fields(Sampling(temperature=0.0), sampling)
    if engine != "torch":
        text = _complete_at_once(model, prompt, max_tokens, chosen, engine, device)
        on_text(text)
        return text
    pieces = []
    with closing(Writer(model, device)) as writer:
        for piece in writer.write(writer.tokenizer(prompt)["input_ids"], max_tokens, chosen):
            pieces.append(piece)
            on_text(piece)
    return "".join(pieces)


def _complete_at_once(
    model: str | Path, prompt: str, max_tokens: int, sampling: Sampling, engine: str, device: str
) -> str:
    check_engine(engine)
    if sampling != Sampling(temperature=sampling.temperature):
        raise OctavoError(
            f"The engine {engine} chooses tokens by --temperature only. Leave the other options out, or use the "
            "engine torch."
        )
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
            [ids],
            max_tokens=max_tokens,
            stop=sorted(end_tokens(path, tokenizer)),
            temperature=sampling.temperature,
        )
    # Decoded together: what a token means may depend on those before it.
    before = tokenizer.decode(ids, skip_special_tokens=True)
    after: str = tokenizer.decode([*ids, *added], skip_special_tokens=True)
    return after[len(before) :]
