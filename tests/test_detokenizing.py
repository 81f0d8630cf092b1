"""Text that comes token by token is the text of all tokens, and no character is given out by halves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

import tiny
from octavo.detokenizing import Detokenizer, StopStrings
from octavo.tokenizer import load_tokenizer

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


@pytest.fixture(scope="module")
def by_bytes(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A token for each byte, as in GPT-2's vocabulary."""
    return load_tokenizer(tiny.save_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def by_pieces() -> Any:
    """Llama 2's way: words that begin with a mark for the space before them, and bytes for what is no word."""
    words = ["▁a", "▁bc", "d", "▁", "é"]
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)}
    vocab |= {word: 256 + number for number, word in enumerate(words)} | {"<s>": 261}
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    fast: Any = PreTrainedTokenizerFast
    return fast(tokenizer_object=tokenizer, bos_token="<s>")


def pieces(tokenizer: Any, prompt: Sequence[int], tokens: Sequence[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer, prompt)
    return [*map(detokenizer.add, tokens), detokenizer.end()]


def together(tokenizer: Any, prompt: Sequence[int], tokens: Sequence[int]) -> str:
    before = tokenizer.decode([*prompt], skip_special_tokens=True)
    text: str = tokenizer.decode([*prompt, *tokens], skip_special_tokens=True)
    return text[len(before) :]


def utf8(text: str) -> list[int]:
    return list(text.encode())


TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)


@given(prompt=TEXT, text=TEXT)
@example(prompt="x", text="e\u0301 你好 👩‍👩‍👧 \N{REPLACEMENT CHARACTER}!")
def test_text_of_bytes(prompt: str, text: str, by_bytes: Any) -> None:
    ids = by_bytes(prompt)["input_ids"]
    found = pieces(by_bytes, ids, by_bytes(text)["input_ids"])
    assert "".join(found) == text
    if REPLACEMENT not in text:
        assert all(REPLACEMENT not in piece for piece in found)


@given(
    tokens=st.lists(
        st.one_of(
            st.integers(256, 260).map(lambda token: [token]),
            st.sampled_from("é你😀").map(utf8),
            st.just([261]),
        ),
        max_size=12,
    ).map(lambda parts: [token for part in parts for token in part])
)
@example(tokens=[*utf8("你"), *utf8("好"), 256, *utf8("😀😀"), 261, 257])
def test_text_of_pieces(tokens: list[int], by_pieces: Any) -> None:
    prompt = [261, 257, 256]
    found = pieces(by_pieces, prompt, tokens)
    assert "".join(found) == together(by_pieces, prompt, tokens)
    assert all(REPLACEMENT not in piece for piece in found)


@given(tokens=st.lists(st.integers(0, 255), max_size=200))
def test_bytes_that_are_no_text(tokens: list[int], by_bytes: Any) -> None:
    """Whatever a model says comes out; a long run of no characters may be cut elsewhere than all at once."""
    found = "".join(pieces(by_bytes, [10], tokens))
    expected = together(by_bytes, [10], tokens)
    assert found.replace(REPLACEMENT, "") == expected.replace(REPLACEMENT, "")
    if len(tokens) < 50:
        assert found == expected


def test_a_character_comes_when_it_is_complete(by_bytes: Any) -> None:
    tokens = by_bytes("a€b")["input_ids"]
    assert pieces(by_bytes, [10], tokens) == ["a", "", "", "€", "b", ""]
    # Half of one at the end is what it is anywhere else.
    assert pieces(by_bytes, [10], tokens[:3]) == ["a", "", "", REPLACEMENT]


def test_special_tokens_are_no_text(by_pieces: Any) -> None:
    assert pieces(by_pieces, [261], [256, 261, 261, 258]) == ["a", "", "", "d", ""]
    assert pieces(by_pieces, [261], [261] * 300) == [""] * 301


@given(
    text=st.text("ab", max_size=30),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
)
@example(text="aabaab", stops=["aab", "ba"])
def test_stop_strings(text: str, stops: list[str]) -> None:
    filtering = StopStrings(stops)
    found = "".join([*map(filtering.add, text), filtering.end()])
    places = [text.find(stop) for stop in stops if stop in text]
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    if not places:
        assert (found, filtering.found) == (text, False)
    else:
        # The first one that is complete.
        assert filtering.found
        assert found == min(
            text[: text[: min(ends)].find(stop)] for stop in stops if stop in text[: min(ends)]
        )


def test_what_may_be_the_beginning_of_a_stop_string_waits() -> None:
    filtering = StopStrings(["</end>", "\n\n"])
    given = ["a <", "/e", "x</", "end", "> never", "more"]
    assert list(map(filtering.add, given)) == ["a ", "", "</ex", "", "", ""]
    assert filtering.found
    filtering = StopStrings(["</end>"])
    assert [filtering.add("a\n</en"), filtering.end()] == ["a\n", "</en"]


@pytest.mark.real_model
def test_the_sample_models_tokenizer(sample: Path) -> None:
    tokenizer: Any = load_tokenizer(sample)
    text = "Zwölf Boxkämpfer jagen 😀 Viktor 你好 über den\n\n  Sylter Deich"
    tokens = tokenizer(text)["input_ids"]
    found = "".join(pieces(tokenizer, tokens[:3], tokens[3:]))
    assert found == together(tokenizer, tokens[:3], tokens[3:])
