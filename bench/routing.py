"""Measures the time that choosing λ takes: reading, checking and routing a request's inputs.

    python -m bench.routing

Reports the median of many decisions for each built-in profile and each kind of input. The request
is parsed already; a decision calls `read_reasoning_options` and then `RoutingPolicy.route`.
"""

import json
import time
from typing import Any

from bench.measuring.publishing import publish
from server.routing.profiles import builtin_profiles
from server.routing.reasoning_options import read_reasoning_options
from server.routing.requested_lambda import LambdaReader
from server.routing.routing_policy import RoutingPolicy, RoutingSettings
from server.wire.chat_request import ChatRequest, parse_chat_request

DECISIONS = 2000
WAYS: dict[str, dict[str, Any]] = {
    "explicit λ": {"reasoning_lambda": 0.6},
    "effort": {"reasoning_effort": "medium"},
    "budget": {"thinking_token_budget": 5000},
    "nothing said": {},
}


def main() -> None:
    rows = {}
    for profile in builtin_profiles():
        policy = RoutingPolicy(profile, RoutingSettings(default=0.8, step=0.01, think_threshold=0))
        for way, fields in WAYS.items():
            rows[f"{profile.name}, {way}"] = microseconds(policy, request(fields))
    publish("routing", "µs", rows, {})


def request(fields: dict[str, Any]) -> ChatRequest:
    messages = [{"role": "user", "content": "Hello"}]
    return parse_chat_request(json.dumps({"model": "m", "messages": messages} | fields).encode())


def microseconds(policy: RoutingPolicy, wire: ChatRequest) -> list[float]:
    reader = LambdaReader("m", step=0.01, default=0.8)
    spent = []
    for _ in range(DECISIONS):
        started = time.perf_counter()
        requested = reader.read(model="m", body=wire.reasoning_lambda, header=None)
        policy.decide(requested, read_reasoning_options(wire))
        spent.append((time.perf_counter() - started) * 1e6)
    return spent


if __name__ == "__main__":
    main()
