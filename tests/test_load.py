"""The load benchmark, in small: mixed requests against the real server on the real engine, and nothing left of them."""

from __future__ import annotations

from pathlib import Path

import tiny
from benchmarks.load import measure


def test_nothing_is_left_of_requests(tmp_path: Path) -> None:
    model = tiny.save_tokenizer(tiny.build("llama", tmp_path / "tiny"))
    (model / "chat_template.jinja").write_text("{{ messages[0].content }}")
    found = measure(model, requests=150, cache="128KiB")
    assert found["wrong"] == []
    assert sum(found["outcomes"].values()) == 150
    # A full line sends some away, who come again; those that leave are forgotten by the engine.
    assert {outcome.partition(": ")[2] for outcome in found["outcomes"]} >= {
        "answered",
        "left",
        "400",
    }
    engine = found["engine"]
    assert engine["running"] == engine["waiting"] == engine["blocks_used"] == 0
    assert engine["cancelled_total"] > 0
    assert engine["prefix_hit_tokens_total"] > 0
    assert found["exit_code"] == 0
