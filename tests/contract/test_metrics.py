"""Every metric of a real server changes under traffic, and agrees with what its client saw.

The list of metrics is read from docs/operations.md: a new one fails here until the traffic below
changes it.
"""

import asyncio
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.contract.conftest import ROOT, ServerProcess, wait_until

CHAT = "/v1/chat/completions"
ENDLESS = 200  # tokens
QUESTION = "a=6,b=a-2,c=b+6,d=c-3. d?"
ROWS = re.findall(
    r"^\| `(mi_\w+)` \| (\w+) \| (.*?) \|",
    (ROOT / "docs" / "operations.md").read_text(),
    re.MULTILINE,
)
KINDS = {name: kind for name, kind, _ in ROWS}
LABELS = {name: set(re.findall(r"`(\w+)`", labels)) for name, _, labels in ROWS}
BUCKETS = {f"{low / 10:.1f}-{(low + 1) / 10:.1f}" for low in range(10)}
FLAGS = (
    *("--max-num-seqs", "4", "--max-waiting", "6", "--num-blocks", "48", "--max-model-len", "512"),
    *("--blend-policy", "blended", "--blend-cache-bytes", "6000000"),
    *("--elastic", "--elastic-waiting", "2", "--elastic-dwell", "0"),
    *("--adapt", "--adapt-min-samples", "2"),
    *("--api-key", "sk-1", "--rate-limit-requests", "1000"),
)


def metrics_of_kind(kind: str) -> list[str]:
    return [name for name, it in KINDS.items() if it == kind]


class Scrape:
    """The samples of one scrape."""

    def __init__(self, server: ServerProcess) -> None:
        self.text = server.get("/metrics").text
        self.families = list(text_string_to_metric_families(self.text))
        self.samples = [sample for family in self.families for sample in family.samples]

    def total(self, name: str, **labels: str) -> float:
        """Returns the sum over all label values that are not given."""
        return sum(
            it.value
            for it in self.samples
            if it.name == name and labels.items() <= it.labels.items()
        )

    def by(self, name: str, label: str) -> Counter[str]:
        """Returns the counts of a metric by the value of one label."""
        counted = Counter[str]()
        for it in self.samples:
            if it.name == name:
                counted[it.labels[label]] += int(it.value)
        return counted


@dataclass
class TrafficRun:
    """Three scrapes of a server, and what its client received meanwhile."""

    server: ServerProcess
    first: Scrape
    busy: Scrape
    last: Scrape
    answers: list[Any] = field(default_factory=list)  # complete ones, plain
    statuses: Counter[int] = field(default_factory=Counter)  # of what was sent under load


class TrafficClient:
    def __init__(self, server: ServerProcess) -> None:
        self.server = server
        self.headers = {"Authorization": "Bearer sk-1"}
        self.answers: list[Any] = []

    def ask(self, headers: dict[str, str] | None = None, **fields: Any) -> Any:
        body = self.server.chat_body(QUESTION, temperature=0, max_tokens=200) | fields
        url = self.server.url + CHAT
        response = httpx.post(url, json=body, headers=self.headers | (headers or {}), timeout=60)
        assert response.status_code == 200, response.text
        self.answers.append(response.json())
        return self.answers[-1]

    def status(self, headers: dict[str, str] | None = None, **fields: Any) -> int:
        body = self.server.chat_body(QUESTION) | fields
        response = httpx.post(self.server.url + CHAT, json=body, headers=headers, timeout=60)
        return response.status_code

    def leave(self) -> None:
        """Leaves a stream after its first line."""
        body = self.endless(stream=True, max_tokens=450)
        with httpx.stream("POST", self.server.url + CHAT, json=body, headers=self.headers) as it:
            next(it.iter_lines())

    def endless(self, **fields: Any) -> dict[str, Any]:
        long = {"reasoning_lambda": 0.5, "max_tokens": ENDLESS, "ignore_eos": True}
        return self.server.chat_body(QUESTION, **long | fields)


def send_every_input(client: TrafficClient) -> None:
    """Sends λ in every form, a budget that closes a block, and unknown routing classes."""
    client.ask(reasoning_lambda=0.6)
    client.ask(reasoning_lambda=0.6)  # finds its prompt, and its weights
    for value in (0.3, 0.35, 0.6, 1.0):  # more than the cache holds
        client.ask(reasoning_lambda=value)
    client.ask(reasoning_lambda=1.0, thinking_budget=4)  # too few
    client.ask(thinking_budget=60)
    client.ask(reasoning_effort="low")
    client.ask(enable_thinking=False)
    client.ask(model="pair@0.2")
    client.ask({"X-Reasoning-Lambda": "0.4"})
    for name in ("default", "x" * 64, "0.123456", 'a"b\nc', "λ"):
        client.ask(routing_class=name)


async def under_load(client: TrafficClient) -> tuple[Scrape, Counter[int]]:
    """Sends more requests than can run, then more than can wait."""
    server, url = client.server, client.server.url + CHAT
    async with httpx.AsyncClient(headers=client.headers, timeout=120) as http:
        sent = [
            asyncio.create_task(http.post(url, json=client.endless(stream=n % 2 == 0)))
            for n in range(8)
        ]
        await asyncio.to_thread(
            wait_until,
            lambda: (
                server.gauge("mi_num_requests_waiting") >= 3
                and server.gauge("mi_num_requests_running") >= 2
            ),
        )
        # This request names no λ, and so the elastic router gives it a cheaper one.
        body = server.chat_body(QUESTION, max_tokens=5, ignore_eos=True)
        sent.append(asyncio.create_task(http.post(url, json=body)))
        await asyncio.to_thread(
            wait_until, lambda: Scrape(server).total("mi_router_decisions_total", source="elastic")
        )
        busy = Scrape(server)
        sent += [asyncio.create_task(http.post(url, json=client.endless())) for _ in range(6)]
        statuses = Counter(response.status_code for response in await asyncio.gather(*sent))
    return busy, statuses


@pytest.fixture(scope="module")
def traffic(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrafficRun]:
    log = tmp_path_factory.mktemp("metrics") / "server.log"
    server = ServerProcess.of_embedded_pair(log, *FLAGS)
    try:
        server.wait_ready()
        first, client = Scrape(server), TrafficClient(server)
        send_every_input(client)
        busy, statuses = asyncio.run(under_load(client))
        client.leave()
        hurried = client.headers | {"X-Request-Timeout": "0.4"}
        assert client.status(hurried, **client.endless(n=4, max_tokens=450)) == 504
        assert client.status() == 401
        wait_until(lambda: server.gauge("mi_num_requests_running") == 0)
        wait_until(
            lambda: Scrape(server).total("mi_request_success_total", finished_reason="abort")
        )
        yield TrafficRun(server, first, busy, Scrape(server), client.answers, statuses)
    finally:
        server.stop()


def test_the_server_has_the_documented_metrics_and_no_other(traffic: TrafficRun) -> None:
    totals = {"counter": "_total"}
    scraped = {
        it.name + totals.get(it.type, ""): it.type
        for it in traffic.last.families
        if not it.name.endswith("_created")  # the client library's, of its counters
    }
    assert scraped == KINDS


@pytest.mark.parametrize("name", metrics_of_kind("counter"))
def test_every_counter_increases(traffic: TrafficRun, name: str) -> None:
    assert traffic.last.total(name) > traffic.first.total(name)
    assert traffic.first.total(name) <= traffic.busy.total(name) <= traffic.last.total(name)


@pytest.mark.parametrize("name", [*metrics_of_kind("histogram"), *metrics_of_kind("summary")])
def test_every_histogram_has_samples_in_several_lambda_buckets(
    traffic: TrafficRun, name: str
) -> None:
    assert traffic.first.total(f"{name}_count") == 0
    assert traffic.last.total(f"{name}_count") > 0
    assert traffic.last.total(f"{name}_sum") > 0
    assert len(traffic.last.by(f"{name}_count", "lambda_bucket")) > 1


def test_gauges_of_load_are_high_under_load_and_zero_before_and_after(traffic: TrafficRun) -> None:
    assert traffic.busy.total("mi_num_requests_running") >= 2
    assert traffic.busy.total("mi_num_requests_waiting") >= 2
    assert 0.1 < traffic.busy.total("mi_kv_cache_usage_ratio") <= 1
    assert traffic.busy.total("mi_elastic_active") == 1
    for scrape in (traffic.first, traffic.last):
        for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_ratio"):
            assert scrape.total(f"mi_{name}") == 0
        assert scrape.total("mi_elastic_active") == 0


def test_memory_and_lambda_gauges_report_current_values(traffic: TrafficRun) -> None:
    assert traffic.first.total("mi_blend_cache_bytes") == 0
    assert 0 < traffic.last.total("mi_blend_cache_bytes") <= 6_000_000
    shape = {"block_size": "16", "num_gpu_blocks": "48", "max_model_len": "512"}
    assert traffic.last.total("mi_cache_config_info", **shape) == 1
    running = traffic.busy.by("mi_lambda_blends_info", "running")
    assert all("pair@0.5" in names.split(",") and at > 1e9 for names, at in running.items())
    assert traffic.last.total("mi_lambda_blends_info", running="", waiting="") > 1e9


@pytest.mark.parametrize("name", metrics_of_kind("gauge"))
def test_every_gauge_except_info_changes(traffic: TrafficRun, name: str) -> None:
    values = [
        [(it.value, it.labels) for it in scrape.samples if it.name == name]
        for scrape in (traffic.first, traffic.busy, traffic.last)
    ]
    assert all(values)
    assert name.endswith("_info") or values[0] != values[1] or values[0] != values[2]


def test_finish_and_rejection_counters_match_responses(traffic: TrafficRun) -> None:
    finished = Counter(it["choices"][0]["finish_reason"] for it in traffic.answers)
    expected = finished + Counter(length=traffic.statuses[200], abort=1, deadline=4)
    assert traffic.last.by("mi_request_success_total", "finished_reason") == expected
    assert set(traffic.statuses) == {200, 503}
    assert traffic.last.by("mi_admission_rejections_total", "reason") == Counter(
        overloaded=traffic.statuses[503], invalid_api_key=1
    )


def test_token_counters_match_usage(traffic: TrafficRun) -> None:
    """The load's tokens count too, and so do those before an abort or a deadline."""
    usage = [it["usage"] for it in traffic.answers]
    answered = sum(it["completion_tokens"] for it in usage)
    loaded = ENDLESS * (traffic.statuses[200] - 1) + 5
    generated = traffic.last.total("mi_generation_tokens_total")
    assert answered + loaded <= generated <= answered + loaded + 7 * ENDLESS
    cached = sum(it["prompt_tokens_details"]["cached_tokens"] for it in usage)
    assert 0 < cached <= traffic.last.total("mi_prefix_cache_hits_total")
    prompts = traffic.last.total("mi_prompt_tokens_total")
    assert prompts == traffic.last.total("mi_request_prompt_tokens_sum")


def test_routing_decisions_are_counted_by_their_source(traffic: TrafficRun) -> None:
    sources = traffic.last.by("mi_router_decisions_total", "source")
    reported = Counter(it["routing"]["source"] for it in traffic.answers)
    assert set(reported) == {
        *("body", "budget", "effort", "enable_thinking", "model", "header", "default")
    }
    assert sources["elastic"] == 1
    for source in set(reported) - {"body"}:  # the load's
        assert sources[source] == reported[source]
    forced = sum(bool(it["routing"].get("forced_close")) for it in traffic.answers)
    assert forced == traffic.last.total("mi_forced_close_total") > 0


def test_label_values_are_bounded_whatever_clients_send(traffic: TrafficRun) -> None:
    key = {"Authorization": "Bearer sk-1"}
    classes = httpx.get(f"{traffic.server.url}/v1/profiles", headers=key).json()["classes"]
    allowed = {
        "model_name": {"pair"},
        "lambda_bucket": BUCKETS,
        "routing_class": set(classes),
        "finished_reason": {"stop", "length", "abort", "deadline", "error"},
        "way": {"endpoint", "blended", "pair"},
        "quantile": {"0.5", "0.9"},
    }
    for sample in traffic.last.samples:
        for label, value in sample.labels.items():
            assert value in allowed.get(label, {value}), sample
    free = {label for it in traffic.last.samples for label in it.labels} - set(allowed)
    engine = LABELS["mi_cache_config_info"] | LABELS["mi_lambda_blends_info"]
    assert free - engine == {"le", "source", "reason"}


def test_promtool_accepts_the_metrics(traffic: TrafficRun) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian: prometheus)")
    command = [promtool, "check", "metrics"]
    checked = subprocess.run(command, input=traffic.last.text, capture_output=True, text=True)
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")
