"""Fixtures of checkpoints without weights, and of apps whose engine process is the fake worker."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from mi_runtime.embedded_pair.tokenizer import CHAT_TEMPLATE, save_tokenizer
from server.api.app import create_app
from server.config import Settings
from server.engine.client import EngineClient
from server.ops.tracing import Tracing
from server.service import Service
from server.text.checkpoint import EndpointText
from server.text.vocabulary import Vocabulary

FAKE_WORKER = Path(__file__).with_name("fake_worker.py")
OPENING_TEMPLATE = CHAT_TEMPLATE.replace(
    "{{- '<|im_start|>assistant\\n' -}}{%- endif -%}",
    "{{- '<|im_start|>assistant\\n<think>\\n' -}}{%- endif -%}",
)
assert OPENING_TEMPLATE != CHAT_TEMPLATE


@pytest.fixture(scope="session")
def instruct_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the directory of an endpoint whose prompt opens no think block."""
    directory = tmp_path_factory.mktemp("instruct")
    save_tokenizer(directory)
    sampling = {"temperature": 0.7, "top_k": 20, "eos_token_id": [315, 317]}
    (directory / "generation_config.json").write_text(json.dumps(sampling))
    return directory


@pytest.fixture(scope="session")
def opening_directory(instruct_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns an endpoint whose prompt ends inside `<think>`, as Qwen3-Thinking-2507's does."""
    directory = tmp_path_factory.mktemp("thinking")
    save_tokenizer(directory)
    (directory / "chat_template.jinja").write_text(OPENING_TEMPLATE)
    sampling = (instruct_directory / "generation_config.json").read_text()
    (directory / "generation_config.json").write_text(sampling)
    return directory


@pytest.fixture(scope="session")
def vocabulary(instruct_directory: Path) -> Vocabulary:
    return Vocabulary.load(instruct_directory)


ServiceFactory = Callable[..., Service]


@pytest.fixture(scope="session")
def make_service(instruct_directory: Path, opening_directory: Path) -> ServiceFactory:
    """Makes services on the fake worker: `make_service("--fail-load", "why", max_waiting=0)`."""

    def make(
        *worker_flags: str, opening: bool = False, thinking: str | None = None, **settings: object
    ) -> Service:
        endpoint = opening_directory if opening else Path(thinking or instruct_directory)
        parsed = Settings.model_validate(
            {
                "instruct": str(instruct_directory),
                "thinking": str(endpoint),
                "served_model_name": "pair",
                **settings,
            }
        )
        engine = EngineClient(
            parsed.engine_config(instruct=instruct_directory, thinking=endpoint),
            max_waiting=parsed.max_waiting,
            max_waiting_tokens=parsed.max_waiting_tokens,
            timeout=parsed.engine_timeout,
            command=[sys.executable, str(FAKE_WORKER), *worker_flags],
            stop_grace=0.5,
        )
        engine.start()
        tracing = Tracing(parsed.otlp_traces_endpoint) if parsed.otlp_traces_endpoint else None
        endpoints = EndpointText.read(instruct_directory), EndpointText.read(endpoint)
        return Service(parsed, *endpoints, engine, tracing)

    return make


ClientFactory = Callable[..., TestClient]


@pytest.fixture
def wait_until() -> Callable[..., None]:
    return _wait_until


@contextmanager
def open_client(service: Service, wait: bool = True) -> Iterator[TestClient]:
    """Opens a client of an app on this service, and waits until it is loaded if `wait`."""
    with TestClient(create_app(service), raise_server_exceptions=False) as client:
        client.app_state["service"] = service
        if wait:
            _wait_until(lambda: service.engine.info is not None)
        yield client


@pytest.fixture
def make_client(make_service: ServiceFactory) -> Iterator[ClientFactory]:
    """Opens apps on the fake worker: `make_client("--context", "64", max_waiting=0)`."""
    with ExitStack() as stack:
        yield lambda *worker_flags, wait=True, **settings: stack.enter_context(
            open_client(make_service(*worker_flags, **settings), wait)
        )


@pytest.fixture(scope="session")
def shared_client(make_service: ServiceFactory) -> Iterator[TestClient]:
    with open_client(make_service()) as client:
        yield client


@pytest.fixture
def client(shared_client: TestClient) -> Iterator[TestClient]:
    """Returns a client of an app without settings, which a test must leave as it found it."""
    yield shared_client
    service = shared_client.app_state["service"]
    assert service.refusal is None, "this test needs a client of its own: `make_client()`"
    _wait_until(lambda: service.engine.open_requests == 0)
    _wait_until(lambda: service.engine.stats.running + service.engine.stats.waiting == 0)


def _wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition never came true"
        time.sleep(0.005)
