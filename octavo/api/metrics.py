"""What Prometheus is told: requests and times as they happen, the engine's counts when it asks."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from octavo.engines.torch.runner import Stats

_FIRST_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120)
_NEXT_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1, 5)

# Paths whose requests are counted, and how they went by status, where that is not a refusal.
ENDPOINTS = ("/v1/completions", "/v1/chat/completions")
_OUTCOMES = {429: "busy", 500: "failed", 503: "busy"}

# What the engine counts: fields of Stats, and what they are.
_GAUGES = {
    "running": "Sequences that the engine computes.",
    "waiting": "Sequences that wait for their turn.",
    "blocks_total": "Blocks of the KV cache.",
    "blocks_used": "Blocks of the KV cache that sequences hold.",
    "blocks_cached": "Blocks of the KV cache that hold prefixes for requests to come.",
}
_COUNTERS = {
    "prompt_tokens": "Tokens of prompts.",
    "prefix_hit_tokens": "Tokens of prompts that were in the KV cache.",
    "generated_tokens": "New tokens.",
    "preemptions": "Sequences that gave their blocks to others and were computed again.",
    "finished": "Sequences that came to their end.",
    "cancelled": "Sequences whose clients went away, or that came upon a stop string.",
    "steps": "Batches that went through the model.",
}


class Metrics:
    """All that is counted of one server.

    Attributes:
        first: seconds from a request to its first token.
        next: seconds from a token to the one after it, in the same continuation.
    """

    def __init__(self, stats: Callable[[], Stats | None]) -> None:
        """
        Args:
            stats: the engine's counts; None while there is no engine.
        """
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "octavo_requests",
            "Requests by how they went: finished, cancelled, refused (4xx), busy (429, 503), failed.",
            ("endpoint", "outcome"),
            registry=self._registry,
        )
        self.first = Histogram(
            "octavo_time_to_first_token_seconds",
            "Seconds from a request to its first token.",
            buckets=_FIRST_SECONDS,
            registry=self._registry,
        )
        self.next = Histogram(
            "octavo_inter_token_seconds",
            "Seconds from a token to the next.",
            buckets=_NEXT_SECONDS,
            registry=self._registry,
        )
        self._registry.register(_Engine(stats))
        ProcessCollector(registry=self._registry)

    def count(self, endpoint: str, outcome: str) -> None:
        """Count a request that is over, by the path it came to."""
        self._requests.labels(endpoint, outcome).inc()

    def count_error(self, path: str, status: int) -> None:
        """Count a request that was answered with an error."""
        # Paths that do not exist would be metrics without end.
        if path in ENDPOINTS:
            self.count(path, _OUTCOMES.get(status, "refused"))

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self._registry)


class _Engine(Collector):
    def __init__(self, stats: Callable[[], Stats | None]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        if stats is None:
            return
        for name, what in _GAUGES.items():
            yield GaugeMetricFamily(f"octavo_{name}", what, value=getattr(stats, name))
        for name, what in _COUNTERS.items():
            yield CounterMetricFamily(f"octavo_{name}", what, value=getattr(stats, name))
