"""Prometheus's metrics of the server: requests, queue, slots, tokens, and the time to the first token."""

from collections.abc import Iterator, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from gptjax.serving.served import Served

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class ServerMetrics:
    """What is counted per request, and what the engines tell when they are asked."""

    def __init__(self, models: Sequence[Served]) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_Engines(models))
        self.requests = Counter(
            "gptjax_requests",
            "Requests by their HTTP status; 499: the client left",
            ["model", "status"],
            registry=self._registry,
        )
        self.first_token = Histogram(
            "gptjax_time_to_first_token_seconds",
            "From the arrival of a request to its first text",
            ["model"],
            registry=self._registry,
            buckets=SECONDS,
        )

    def text(self) -> bytes:
        """The metrics in Prometheus's text format."""
        return generate_latest(self._registry)


class _Engines(Collector):
    """The engines' own numbers."""

    def __init__(self, models: Sequence[Served]) -> None:
        self._models = models

    def collect(self) -> Iterator[Any]:
        gauges = {
            "gptjax_slots": ("Slots of the engine", lambda engine: engine.n_slots),
            "gptjax_slots_in_use": ("Slots that answer a request", lambda engine: engine.n_in_use),
            "gptjax_queue_length": ("Requests that wait for a slot", lambda engine: engine.n_waiting),
            "gptjax_tokens_per_second": ("Tokens drawn in the last 10 s", lambda engine: engine.tokens_per_second),
            "gptjax_cache_tokens": (
                "Tokens for which each slot has room",
                lambda engine: engine.cache_length,
            ),
        }
        counters = {
            "gptjax_generated_tokens": ("Tokens drawn", lambda engine: engine.n_drawn),
            "gptjax_prompt_tokens": ("Tokens of prompts", lambda engine: engine.n_prompt),
            "gptjax_cached_prompt_tokens": ("Tokens of prompts found in the cache", lambda engine: engine.n_cached),
            "gptjax_engine_failures": ("Failures of the device", lambda engine: engine.n_failures),
        }
        for family, metrics in ((GaugeMetricFamily, gauges), (CounterMetricFamily, counters)):
            for name, (text, value) in metrics.items():
                metric = family(name, text, labels=["model"])
                for served in self._models:
                    metric.add_metric([served.name], value(served.engine))
                yield metric
