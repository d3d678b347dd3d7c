"""Records an OpenTelemetry span for each request, with a child span for each stage.

A span is made when its request has ended, from the fields of the request's log line, and a thread
of the exporter sends it: it delays no request. Names follow the semantic conventions of generative
AI. This module is imported only if tracing is configured.
"""

import time
from collections.abc import Iterator, Mapping
from typing import Any, Final

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, Status, StatusCode, format_trace_id, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from server import __version__

EXPORT_TIMEOUT: Final = 3.0  # seconds for a batch; an absent collector must not delay the exit
OPERATION_NAMES: Final = {"/v1/chat/completions": "chat", "/v1/completions": "text_completion"}
ATTRIBUTES: Final = {
    "model": "gen_ai.request.model",
    "prompt": "gen_ai.usage.input_tokens",
    "cached": "gen_ai.usage.cache_read.input_tokens",
    "completion": "gen_ai.usage.output_tokens",
    "reasoning": "gen_ai.usage.reasoning.output_tokens",
    "error": "error.type",
    "lambda": "mi.reasoning_lambda",
    "answer_lambda": "mi.answer_lambda",
    "source": "mi.routing.source",
    "cap": "mi.reasoning_cap",
    "forced_close": "mi.forced_close",
    "key": "mi.key_name",
    "id": "mi.request_id",
}
"""The attribute of each field of the log line."""
STAGES: Final = {
    "prepare": "prepare_s",
    "queue": "queue_s",
    "prefill": "prefill_s",
    "decode": "decode_s",
}
"""Child spans in order, with the fields of the log line that hold their seconds."""


class Tracing:
    """Sends spans to one URL; OpenTelemetry's own environment variables set everything else."""

    def __init__(self, endpoint: str) -> None:
        resource = Resource.create({"service.name": "mi-server", "service.version": __version__})
        self._provider = TracerProvider(resource=resource)
        exporter = OTLPSpanExporter(endpoint=endpoint, timeout=EXPORT_TIMEOUT)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("mi-server", __version__)
        self._propagator = TraceContextTextMapPropagator()

    def record(
        self,
        *,
        method: str,
        path: str,
        status: int,
        headers: Mapping[str, str],
        notes: Mapping[str, Any],
        seconds: float,
    ) -> str:
        """Records a request that has just ended, after `seconds`. Returns the id of its trace."""
        start = time.time_ns() - _nanoseconds(seconds)
        operation = OPERATION_NAMES.get(path)
        span = self._tracer.start_span(
            method if operation is None else f"{operation} {notes.get('model', '')}".strip(),
            self._propagator.extract(headers),
            SpanKind.SERVER,
            attributes=dict(_attributes(method, path, status, operation, notes)),
            start_time=start,
        )
        if status >= 500 or "error" in notes:
            span.set_status(Status(StatusCode.ERROR))
        self._stages(set_span_in_context(span, Context()), start, notes)
        span.end(start + _nanoseconds(seconds))
        return format_trace_id(span.get_span_context().trace_id)

    def close(self) -> None:
        """Sends the remaining spans. Blocks."""
        self._provider.shutdown()

    def _stages(self, parent: Context, start: int, notes: Mapping[str, Any]) -> None:
        for name, note in STAGES.items():
            if note not in notes:
                return
            end = start + _nanoseconds(notes[note])
            self._tracer.start_span(name, parent, start_time=start).end(end)
            start = end


def _attributes(
    method: str, path: str, status: int, operation: str | None, notes: Mapping[str, Any]
) -> Iterator[tuple[str, Any]]:
    yield "http.request.method", method
    yield "url.path", path
    yield "http.response.status_code", status
    if operation is not None:
        yield "gen_ai.operation.name", operation
        yield "gen_ai.provider.name", "mi-server"
    if "finish" in notes:
        yield "gen_ai.response.finish_reasons", notes["finish"].split(",")
    for note, attribute in ATTRIBUTES.items():
        if note in notes:
            yield attribute, notes[note]


def _nanoseconds(seconds: float) -> int:
    return max(0, int(seconds * 1e9))
