"""What a reader should know about the numbers before believing them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from octavo.throughput.results import Pass

# From here on, tokens wait for the client now and then.
_BUSY = 0.8


def find_notes(passes: Sequence[Pass], output_len: int) -> Iterator[str]:
    """Sentences about what the passes show to be other than asked for or other than it seems."""
    for name in dict.fromkeys(one.name for one in passes):
        own = [one for one in passes if one.name == name]
        requests = [request for one in own for request in one.requests]
        tokens = sum(request.output_tokens for request in requests)
        chunks = sum(len(request.arrivals) for request in requests)
        short = sum(request.output_tokens != output_len for request in requests)
        busiest = max(own, key=lambda one: one.client_busy)
        if chunks < tokens:
            yield (
                f"{name} sent {tokens:,} tokens in {chunks:,} chunks; its inter-token latency is "
                "the time from chunk to chunk."
            )
        if short:
            yield (
                f"{name} did not generate {output_len} tokens in {short:,} of {len(requests):,} "
                "requests: it does not honour ignore_eos or max_tokens."
            )
        if busiest.client_busy > _BUSY:
            yield (
                f"The client itself was busy {busiest.client_busy:.0%} of the time with {name} at "
                f"concurrency {busiest.concurrency}; the server may be faster than it seems."
            )
