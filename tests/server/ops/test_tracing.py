"""Each request is a span, which a collector on loopback receives."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from starlette.testclient import TestClient

from server.service import Service
from tests.server.chat_requests import MakeClient, chat

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


class Collector:
    """Receives spans by OTLP over HTTP."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        spans = self.spans

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                    for scope in resource.scope_spans:
                        spans.extend(scope.spans)
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1/traces"


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()
    thread = threading.Thread(target=collector.server.serve_forever, args=(0.01,))
    thread.start()
    yield collector
    collector.server.shutdown()
    thread.join()
    collector.server.server_close()


@pytest.fixture
def client(collector: Collector, make_client: MakeClient) -> TestClient:
    return make_client(otlp_traces_endpoint=collector.url, api_key=["sk-one"])


def received_spans(client: TestClient, collector: Collector) -> list[Any]:
    """Returns the spans that the collector has once the app has sent all of them."""
    service: Service = client.app_state["service"]
    assert service.tracing is not None
    service.tracing._provider.force_flush()
    return collector.spans


def attributes(span: Any) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        kind = value.WhichOneof("value")
        if kind == "array_value":
            return [plain(it) for it in value.array_value.values]
        return getattr(value, kind)

    return {it.key: plain(it.value) for it in span.attributes}


KEY = {"Authorization": "Bearer sk-one"}


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_is_a_span_in_its_callers_trace(
    stream: bool, client: TestClient, collector: Collector, caplog: pytest.LogCaptureFixture
) -> None:
    headers = KEY | {"traceparent": f"00-{TRACE}-{PARENT}-01"}
    with caplog.at_level("INFO", "server.ops.request_log"):
        response = chat(
            client, "say <think>\na=6\n</think>\n\n6", headers, model="pair@0.6", stream=stream
        )
    assert response.status_code == 200
    (span,) = [it for it in received_spans(client, collector) if it.name == "chat pair@0.6"]
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE, PARENT)
    got = attributes(span)
    assert got["gen_ai.operation.name"] == "chat"
    assert got["gen_ai.request.model"] == "pair@0.6"
    assert got["gen_ai.response.finish_reasons"] == ["stop"]
    assert got["gen_ai.usage.reasoning.output_tokens"] == 5
    assert got["gen_ai.usage.output_tokens"] > 5
    assert got["gen_ai.usage.input_tokens"] > 0
    assert got["http.response.status_code"] == 200
    assert (got["mi.reasoning_lambda"], got["mi.key_name"]) == ("0.6", "key1")
    assert "sk-one" not in str(span)
    lines = [it.fields for it in caplog.records if it.name == "server.ops.request_log"]
    assert lines[-1]["trace_id"] == TRACE


def test_the_stages_lie_one_after_the_other_inside_their_request(
    client: TestClient, collector: Collector
) -> None:
    chat(client, "say hello", KEY)
    *stages, span = received_spans(client, collector)
    assert [it.name for it in stages] == ["prepare", "queue", "prefill", "decode"]
    assert {it.parent_span_id for it in stages} == {span.span_id}
    times = [time for it in stages for time in (it.start_time_unix_nano, it.end_time_unix_nano)]
    assert times == sorted(times)
    assert times[0] == span.start_time_unix_nano
    assert times[-1] <= span.end_time_unix_nano + 1_000_000  # stages are rounded to a tenth of a ms


def test_a_refused_and_a_failed_request_are_spans_with_an_error(
    client: TestClient, collector: Collector
) -> None:
    chat(client, "say x", {})
    chat(client, "fail", KEY)
    refused, *_, failed = received_spans(client, collector)
    assert attributes(refused)["error.type"] == "invalid_api_key"
    assert attributes(failed)["error.type"] == "internal_error"
    assert refused.status.code == failed.status.code == 2


def test_health_checks_and_metrics_have_no_span(client: TestClient, collector: Collector) -> None:
    for path in ("/health", "/ready", "/metrics"):
        client.get(path)
    assert received_spans(client, collector) == []


def test_a_caller_that_does_not_sample_its_trace_gets_no_span(
    client: TestClient, collector: Collector
) -> None:
    chat(client, "say x", KEY | {"traceparent": f"00-{TRACE}-{PARENT}-00"})
    assert received_spans(client, collector) == []


def test_requests_succeed_without_a_reachable_collector(make_client: MakeClient) -> None:
    client = make_client(otlp_traces_endpoint="http://127.0.0.1:9/v1/traces")
    assert chat(client, "say x", {}).status_code == 200
