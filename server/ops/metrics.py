"""The metrics that Prometheus scrapes, prefixed `mi_`. Names and buckets are vLLM's if it has them,
except `kv_cache_usage_ratio`, which is `kv_cache_usage_perc` there.

Gauges and the engine's counters are read from the engine's last report at each scrape, and cost
nothing in between. A `RequestMeter` follows each request. Every server has its own registry.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from mi_runtime.request import EngineInfo, EngineStats
from server.routing.lambda_buckets import lambda_bucket
from server.routing.routing_decision import RoutingDecision

TTFT_SECONDS: Final = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
INTER_TOKEN_SECONDS: Final = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
REQUEST_SECONDS: Final = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
TOKENS: Final = tuple(
    float(step * 10**power) for power in range(6) for step in (1, 2, 5) if step * 10**power <= 2e5
)
SHARES: Final = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)
FINISHED: Final = frozenset({"stop", "length", "tool_calls"})
"""Reasons of answers that were completed."""


class Metrics:
    """The metrics of one server."""

    def __init__(self, model_name: str) -> None:
        self.model_name = model_name
        self.registry = CollectorRegistry()
        self._prompt_tokens = self._counter("prompt_tokens", "Tokens of accepted prompts.")
        self._generation_tokens = self._counter("generation_tokens", "Tokens of answers.")
        self._reasoning_tokens = self._counter("reasoning_tokens", "Tokens inside think blocks.")
        self._success = self._counter("request_success", "Requests that ended.", "finished_reason")
        self._rejections = self._counter(
            "admission_rejections", "Requests that were refused.", "reason"
        )
        self._ttft = self._histogram(
            "time_to_first_token_seconds", "Seconds from arrival to the first token.", TTFT_SECONDS
        )
        self._answer_ttft = self._histogram(
            "time_to_first_answer_token_seconds",
            "Seconds from arrival to the first text after the reasoning.",
            TTFT_SECONDS,
        )
        self._inter_token = self._histogram(
            "inter_token_latency_seconds",
            "Seconds between two tokens of an answer.",
            INTER_TOKEN_SECONDS,
        )
        self._e2e = self._histogram(
            "e2e_request_latency_seconds",
            "Seconds from arrival to the last token.",
            REQUEST_SECONDS,
        )
        self._queue = self._histogram(
            "request_queue_time_seconds",
            "Seconds from submission to the first step.",
            REQUEST_SECONDS,
        )
        self._request_prompt = self._histogram(
            "request_prompt_tokens", "Tokens of a prompt.", TOKENS
        )
        self._request_generation = self._histogram(
            "request_generation_tokens", "Tokens of an answer.", TOKENS
        )
        self._request_reasoning = self._histogram(
            "request_reasoning_tokens", "Tokens of a think block.", TOKENS
        )
        self._decisions = self._counter(
            "router_decisions", "Routing decisions, by the source of λ.", "source", "lambda_bucket"
        )
        self._budget_used = self._histogram(
            "budget_used_ratio", "Reasoning tokens of an answer divided by its budget.", SHARES
        )

    def follow_engine(self, read: "Callable[[], EngineState]") -> None:
        """Adds the engine's gauges and counters; `read` is called at each scrape."""
        self.registry.register(_EngineCollector(self.model_name, read))

    def rejected(self, reason: str) -> None:
        """Counts a request that was refused with the error code `reason`."""
        self._rejections.labels(self.model_name, reason).inc()

    def routed(self, decision: RoutingDecision) -> None:
        """Counts the λ of an accepted request; in a fan-out each λ."""
        source = "elastic" if decision.elastic else decision.source
        for dial in decision.dials:
            bucket = lambda_bucket(dial.reasoning_lambda)
            self._decisions.labels(self.model_name, source, bucket).inc()

    def meter(
        self,
        reasoning_lambda: float,
        prompt_tokens: int,
        arrived: float,
        *,
        cap: int | None = None,
    ) -> "RequestMeter":
        """Returns a meter for one engine request; `arrived` is by `time.perf_counter`."""
        self._prompt_tokens.labels(self.model_name).inc(prompt_tokens)
        bucket = lambda_bucket(reasoning_lambda)
        return RequestMeter(self, bucket, prompt_tokens, arrived, cap=cap)

    def exposition(self) -> bytes:
        """Returns all metrics in Prometheus' text format."""
        return generate_latest(self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"mi_{name}", text, ("model_name", *labels), registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        labels = ("model_name", "lambda_bucket")
        return Histogram(f"mi_{name}", text, labels, buckets=buckets, registry=self.registry)


class RequestMeter:
    """Adds one engine request to the histograms, at each token and at the end."""

    def __init__(
        self,
        metrics: Metrics,
        bucket: str,
        prompt_tokens: int,
        arrived: float,
        *,
        cap: int | None = None,
    ) -> None:
        self._metrics = metrics
        self._labels = (metrics.model_name, bucket)
        self._inter_token = metrics._inter_token.labels(*self._labels)
        self._generated = metrics._generation_tokens.labels(metrics.model_name)
        self._prompt_tokens = prompt_tokens
        self._arrived = arrived
        self._cap = cap
        self._last_token: float | None = None
        self._first_answer_seen = False
        self._closed = False
        self._first_token: float | None = None
        self._queue_seconds = 0.0

    def token(self, at: float, *, queue_seconds: float, answers: bool) -> None:
        """Counts a token that arrived at `at`.

        `answers` says whether text after the reasoning came with it.
        """
        self._generated.inc()
        if self._last_token is None:
            self._first(at, queue_seconds)
        else:
            self._inter_token.observe(at - self._last_token)
        self._last_token = at
        if answers and not self._first_answer_seen:
            self._first_answer_seen = True
            self._metrics._answer_ttft.labels(*self._labels).observe(at - self._arrived)

    def close(self, reason: str, *, generation_tokens: int, reasoning_tokens: int) -> None:
        """Counts the end of the request, once.

        `reason` is its finish reason, or `abort`, `error` or `deadline`.
        """
        if self._closed:
            return
        self._closed = True
        metrics, name = self._metrics, self._metrics.model_name
        metrics._success.labels(name, reason).inc()
        metrics._reasoning_tokens.labels(name).inc(reasoning_tokens)
        # The time when the last token was generated, not when a slow client read it.
        ended = self._last_token or time.perf_counter()
        metrics._e2e.labels(*self._labels).observe(ended - self._arrived)
        metrics._request_prompt.labels(*self._labels).observe(self._prompt_tokens)
        metrics._request_generation.labels(*self._labels).observe(generation_tokens)
        metrics._request_reasoning.labels(*self._labels).observe(reasoning_tokens)
        if self._cap and reason in FINISHED:
            metrics._budget_used.labels(*self._labels).observe(reasoning_tokens / self._cap)

    def stages(self, *, prepared: float) -> dict[str, float]:
        """Returns the seconds of each stage; empty before the first token.

        The request was submitted to the engine `prepared` seconds after its arrival.
        """
        if self._first_token is None or self._last_token is None:
            return {}
        first = self._first_token - self._arrived
        stages = {
            "queue_s": self._queue_seconds,
            "prefill_s": max(0.0, first - prepared - self._queue_seconds),
            "first_token_s": first,
            "decode_s": self._last_token - self._first_token,
        }
        return {name: round(seconds, 4) for name, seconds in stages.items()}

    def _first(self, at: float, queue_seconds: float) -> None:
        self._first_token = at
        self._queue_seconds = queue_seconds
        self._metrics._ttft.labels(*self._labels).observe(at - self._arrived)
        self._metrics._queue.labels(*self._labels).observe(queue_seconds)


@dataclass(frozen=True, slots=True)
class EngineState:
    """The engine's state at a scrape."""

    stats: EngineStats = field(default_factory=EngineStats)
    info: EngineInfo | None = None  # None: loading
    max_lambdas: int = 0  # maximum number of λ values that can run at once


class _EngineCollector(Collector):
    def __init__(self, model_name: str, read: Callable[[], EngineState]) -> None:
        self._model_name = model_name
        self._read = read

    def collect(self) -> Iterator[Metric]:
        state = self._read()
        stats = state.stats
        yield self._gauge("num_requests_running", "Requests that are running.", stats.running)
        yield self._gauge("num_requests_waiting", "Requests that wait to run.", stats.waiting)
        usage = stats.used_blocks / stats.total_blocks if stats.total_blocks else 0.0
        yield self._gauge("kv_cache_usage_ratio", "Share of KV blocks in use.", usage)
        yield self._lambdas(state)
        if state.info is not None:
            yield self._cache_config(state.info)
        yield self._counter(
            "prefix_cache_queries",
            "Prompt tokens looked up in the prefix cache.",
            stats.prefix_queried_tokens,
        )
        yield self._counter(
            "prefix_cache_hits", "Prompt tokens found in the prefix cache.", stats.prefix_hit_tokens
        )
        yield self._counter("num_preemptions", "Sequences preempted.", stats.preemptions)
        yield self._executions(stats)
        yield self._counter(
            "blend_cache_hits", "Blended weights found in the cache.", stats.blend_hits
        )
        yield self._counter("blend_cache_builds", "Blended weights built.", stats.blend_builds)
        yield self._counter(
            "blend_cache_evictions", "Blended weights replaced by others.", stats.blend_evictions
        )
        yield self._gauge(
            "blend_cache_bytes", "Bytes of blended weights in the cache.", stats.blend_bytes
        )
        yield self._counter(
            "forced_close", "Think blocks that the engine closed.", stats.forced_closes
        )

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(f"mi_{name}", text, labels=["model_name"])
        family.add_metric([self._model_name], value)
        return family

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(f"mi_{name}", text, labels=["model_name"])
        family.add_metric([self._model_name], value)
        return family

    def _lambdas(self, state: EngineState) -> Metric:
        """Returns λ values in the form of vLLM's `lora_requests_info`: as labels, with the time."""
        family = GaugeMetricFamily(
            "mi_lambda_blends_info",
            "Aliases of the λ values of running and waiting requests.",
            labels=["model_name", "max", "running", "waiting"],
        )
        running, waiting = (
            ",".join(f"{self._model_name}@{value:g}" for value in values)
            for values in (state.stats.running_lambdas, state.stats.waiting_lambdas)
        )
        labels = [self._model_name, str(state.max_lambdas), running, waiting]
        family.add_metric(labels, time.time())
        return family

    def _cache_config(self, info: EngineInfo) -> Metric:
        family = GaugeMetricFamily(
            "mi_cache_config_info",
            "Shape of the KV cache.",
            labels=["model_name", "block_size", "num_gpu_blocks", "max_model_len", "dtype"],
        )
        shape = (info.block_size, info.num_blocks, info.max_model_len, info.dtype)
        family.add_metric([self._model_name, *map(str, shape)], 1)
        return family

    def _executions(self, stats: EngineStats) -> Metric:
        family = CounterMetricFamily(
            "mi_layer_executions",
            "Blend groups (embeddings, head; attention and FFN of each layer) that forwards ran, "
            "by how their weights were computed.",
            labels=["model_name", "way"],
        )
        family.add_metric([self._model_name, "endpoint"], stats.endpoint_executions)
        family.add_metric([self._model_name, "blended"], stats.blended_executions)
        family.add_metric([self._model_name, "pair"], stats.pair_executions)
        return family
