"""Runs requests to their end, checking the engine's state after every step."""

from collections import defaultdict

from mi_runtime.engine import Engine
from mi_runtime.request import EngineRequest, TokenEvent

Events = dict[str, list[TokenEvent]]


def checked_step(engine: Engine) -> list[TokenEvent]:
    """Returns the events of one step, after checking blocks and blended weights."""
    events = engine.step()
    engine.scheduler.check_integrity()
    engine._groups.cache.check_integrity()
    return events


def run_to_end(engine: Engine, *requests: EngineRequest) -> Events:
    """Submits the requests, runs the engine until it is idle, and returns the events by request."""
    events: Events = defaultdict(list)
    for request in requests:
        events[request.request_id] = []
        engine.submit(request)
    while not engine.idle:
        for event in checked_step(engine):
            events[event.request_id].append(event)
    return events


def tokens_of(events: list[TokenEvent]) -> list[int]:
    """Returns the tokens of a request's events."""
    return [event.token_id for event in events if event.token_id is not None]
