"""What Prometheus reads of a real server that met everything: each metric moved, and is honest.

Which metrics there are is read from docs/operations.md: a new one fails here until the traffic
below makes it move.
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


def named(kind: str) -> list[str]:
    return [name for name, it in KINDS.items() if it == kind]


class Scrape:
    """The samples of one scrape, by name and labels."""

    def __init__(self, server: ServerProcess) -> None:
        self.text = server.get("/metrics").text
        self.families = list(text_string_to_metric_families(self.text))
        self.samples = [sample for family in self.families for sample in family.samples]

    def total(self, name: str, **labels: str) -> float:
        """Over all label values that are not given."""
        return sum(
            it.value
            for it in self.samples
            if it.name == name and labels.items() <= it.labels.items()
        )

    def by(self, name: str, label: str) -> Counter[str]:
        counted = Counter[str]()
        for it in self.samples:
            if it.name == name:
                counted[it.labels[label]] += int(it.value)
        return counted


@dataclass
class Story:
    """A server from its start through all that happened to it, as scraped and as its client saw."""

    server: ServerProcess
    first: Scrape
    busy: Scrape
    last: Scrape
    answers: list[Any] = field(default_factory=list)  # complete ones, plain
    statuses: Counter[int] = field(default_factory=Counter)  # of what was sent under load


class Caller:
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
        """A stream, after its first events."""
        body = self.endless(stream=True, max_tokens=450)
        with httpx.stream("POST", self.server.url + CHAT, json=body, headers=self.headers) as it:
            next(it.iter_lines())

    def endless(self, **fields: Any) -> dict[str, Any]:
        long = {"reasoning_lambda": 0.5, "max_tokens": ENDLESS, "ignore_eos": True}
        return self.server.chat_body(QUESTION, **long | fields)


def by_every_input(caller: Caller) -> None:
    """Each way to say λ, a cap that closes a block, and names that nobody measured."""
    caller.ask(reasoning_lambda=0.6)
    caller.ask(reasoning_lambda=0.6)  # finds its prompt, and its weights
    for value in (0.3, 0.35, 0.6, 1.0):  # more than the cache holds
        caller.ask(reasoning_lambda=value)
    caller.ask(reasoning_lambda=1.0, thinking_budget=4)  # too few
    caller.ask(thinking_budget=60)
    caller.ask(reasoning_effort="low")
    caller.ask(enable_thinking=False)
    caller.ask(model="pair@0.2")
    caller.ask({"X-Reasoning-Lambda": "0.4"})
    for name in ("default", "x" * 64, "0.123456", 'a"b\nc', "λ"):
        caller.ask(routing_class=name)


async def under_load(caller: Caller) -> tuple[Scrape, Counter[int]]:
    """More than runs, then more than waits."""
    server, url = caller.server, caller.server.url + CHAT
    async with httpx.AsyncClient(headers=caller.headers, timeout=120) as client:
        sent = [
            asyncio.create_task(client.post(url, json=caller.endless(stream=n % 2 == 0)))
            for n in range(8)
        ]
        await asyncio.to_thread(
            wait_until,
            lambda: (
                server.gauge("mi_num_requests_waiting") >= 3
                and server.gauge("mi_num_requests_running") >= 2
            ),
        )
        # Says no λ, and so goes cheaper.
        body = server.chat_body(QUESTION, max_tokens=5, ignore_eos=True)
        sent.append(asyncio.create_task(client.post(url, json=body)))
        await asyncio.to_thread(
            wait_until, lambda: Scrape(server).total("mi_router_decisions_total", source="elastic")
        )
        busy = Scrape(server)
        sent += [asyncio.create_task(client.post(url, json=caller.endless())) for _ in range(6)]
        statuses = Counter(response.status_code for response in await asyncio.gather(*sent))
    return busy, statuses


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    log = tmp_path_factory.mktemp("metrics") / "server.log"
    server = ServerProcess.of_embedded_pair(log, *FLAGS)
    try:
        server.wait_ready()
        first, caller = Scrape(server), Caller(server)
        by_every_input(caller)
        busy, statuses = asyncio.run(under_load(caller))
        caller.leave()
        hurried = caller.headers | {"X-Request-Timeout": "0.4"}
        assert caller.status(hurried, **caller.endless(n=4, max_tokens=450)) == 504
        assert caller.status() == 401
        wait_until(lambda: server.gauge("mi_num_requests_running") == 0)
        wait_until(
            lambda: Scrape(server).total("mi_request_success_total", finished_reason="abort")
        )
        yield Story(server, first, busy, Scrape(server), caller.answers, statuses)
    finally:
        server.stop()


def test_every_documented_metric_is_there_and_no_other_one(story: Story) -> None:
    totals = {"counter": "_total"}
    scraped = {
        it.name + totals.get(it.type, ""): it.type
        for it in story.last.families
        if not it.name.endswith("_created")  # the client library's, of its counters
    }
    assert scraped == KINDS


@pytest.mark.parametrize("name", named("counter"))
def test_a_counter_moved_and_never_backwards(story: Story, name: str) -> None:
    assert story.last.total(name) > story.first.total(name)
    assert story.first.total(name) <= story.busy.total(name) <= story.last.total(name)


@pytest.mark.parametrize("name", [*named("histogram"), *named("summary")])
def test_a_distribution_moved_in_more_than_one_bucket_of_lambda(story: Story, name: str) -> None:
    assert story.first.total(f"{name}_count") == 0
    assert story.last.total(f"{name}_count") > 0
    assert story.last.total(f"{name}_sum") > 0
    assert len(story.last.by(f"{name}_count", "lambda_bucket")) > 1


def test_gauges_tell_of_load_while_it_lasts(story: Story) -> None:
    assert story.busy.total("mi_num_requests_running") >= 2
    assert story.busy.total("mi_num_requests_waiting") >= 2
    assert 0.1 < story.busy.total("mi_kv_cache_usage_ratio") <= 1
    assert story.busy.total("mi_elastic_active") == 1
    for scrape in (story.first, story.last):
        for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_ratio"):
            assert scrape.total(f"mi_{name}") == 0
        assert scrape.total("mi_elastic_active") == 0


def test_gauges_of_what_is_held_tell_it(story: Story) -> None:
    assert story.first.total("mi_blend_cache_bytes") == 0
    assert 0 < story.last.total("mi_blend_cache_bytes") <= 6_000_000
    shape = {"block_size": "16", "num_gpu_blocks": "48", "max_model_len": "512"}
    assert story.last.total("mi_cache_config_info", **shape) == 1
    running = story.busy.by("mi_lambda_blends_info", "running")
    assert all("pair@0.5" in names.split(",") and at > 1e9 for names, at in running.items())
    assert story.last.total("mi_lambda_blends_info", running="", waiting="") > 1e9


@pytest.mark.parametrize("name", named("gauge"))
def test_a_gauge_moved_or_states_facts_in_its_labels(story: Story, name: str) -> None:
    values = [
        [(it.value, it.labels) for it in scrape.samples if it.name == name]
        for scrape in (story.first, story.busy, story.last)
    ]
    assert all(values)
    assert name.endswith("_info") or values[0] != values[1] or values[0] != values[2]


def test_endings_and_refusals_are_those_that_clients_saw(story: Story) -> None:
    finished = Counter(it["choices"][0]["finish_reason"] for it in story.answers)
    expected = finished + Counter(length=story.statuses[200], abort=1, deadline=4)
    assert story.last.by("mi_request_success_total", "finished_reason") == expected
    assert set(story.statuses) == {200, 503}
    assert story.last.by("mi_admission_rejections_total", "reason") == Counter(
        overloaded=story.statuses[503], invalid_api_key=1
    )


def test_tokens_are_those_that_usage_told(story: Story) -> None:
    """Those of the load are there too, and what the abort and the deadline left undone is not."""
    usage = [it["usage"] for it in story.answers]
    answered = sum(it["completion_tokens"] for it in usage)
    loaded = ENDLESS * (story.statuses[200] - 1) + 5
    generated = story.last.total("mi_generation_tokens_total")
    assert answered + loaded <= generated <= answered + loaded + 7 * ENDLESS
    cached = sum(it["prompt_tokens_details"]["cached_tokens"] for it in usage)
    assert 0 < cached <= story.last.total("mi_prefix_cache_hits_total")
    prompts = story.last.total("mi_prompt_tokens_total")
    assert prompts == story.last.total("mi_request_prompt_tokens_sum")


def test_decisions_are_counted_by_what_decided(story: Story) -> None:
    sources = story.last.by("mi_router_decisions_total", "source")
    told = Counter(it["routing"]["source"] for it in story.answers)
    assert set(told) == {
        *("body", "budget", "effort", "enable_thinking", "model", "header", "default")
    }
    assert sources["elastic"] == 1
    for source in set(told) - {"body"}:  # the load's
        assert sources[source] == told[source]
    forced = sum(bool(it["routing"].get("forced_close")) for it in story.answers)
    assert forced == story.last.total("mi_forced_close_total") > 0


def test_labels_have_few_values_whatever_clients_send(story: Story) -> None:
    key = {"Authorization": "Bearer sk-1"}
    classes = httpx.get(f"{story.server.url}/v1/profiles", headers=key).json()["classes"]
    allowed = {
        "model_name": {"pair"},
        "lambda_bucket": BUCKETS,
        "routing_class": set(classes),
        "finished_reason": {"stop", "length", "abort", "deadline", "error"},
        "way": {"endpoint", "blended", "pair"},
        "quantile": {"0.5", "0.9"},
    }
    for sample in story.last.samples:
        for label, value in sample.labels.items():
            assert value in allowed.get(label, {value}), sample
    free = {label for it in story.last.samples for label in it.labels} - set(allowed)
    engine = LABELS["mi_cache_config_info"] | LABELS["mi_lambda_blends_info"]
    assert free - engine == {"le", "source", "reason"}


def test_promtool_finds_nothing_to_complain_about(story: Story) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian: prometheus)")
    command = [promtool, "check", "metrics"]
    checked = subprocess.run(command, input=story.last.text, capture_output=True, text=True)
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")
