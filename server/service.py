"""What one running server consists of, and whether it takes requests."""

import itertools
import time
from collections.abc import Sequence

from mi_runtime.request import EngineInfo
from server.checkpoint import Endpoint
from server.config import Settings
from server.constraint import Constraint
from server.dial import DialPolicy
from server.engine_client import EngineClient
from server.errors import ApiError, Draining, EngineDead, Loading
from server.metrics import EngineState, Metrics
from server.prompt import Prompts
from server.sampling import SamplingPolicy
from server.thinking import ThinkBlocks


class Service:
    """Built once by `serve`; the app's routes read it, and only `draining` ever changes."""

    def __init__(
        self, settings: Settings, instruct: Endpoint, thinking: Endpoint, engine: EngineClient
    ) -> None:
        self.settings = settings
        self.engine = engine
        self.created = int(time.time())
        self.draining = False
        self._request_numbers = itertools.count()
        self.dials = DialPolicy(settings.model_name, settings.lambda_step, settings.default_lambda)
        self.prompts = Prompts(
            instruct,
            thinking,
            template=settings.reasoning_template,
            think_threshold=settings.think_threshold,
        )
        self.think_blocks = ThinkBlocks.of(
            self.prompts.vocabulary,
            closing=settings.think_closing,
            soft_window=settings.think_soft_window,
        )
        self.constraint = Constraint(self.prompts.vocabulary)
        eos_token_ids = self._eos_token_ids((instruct, thinking))
        self.sampling = SamplingPolicy(thinking.sampling_defaults, eos_token_ids)
        engine.tell(
            self.prompts.vocabulary.marks,
            self.prompts.vocabulary.for_grammars(thinking.directory, eos_token_ids),
        )
        self.metrics = Metrics(settings.model_name)
        self.metrics.follow_engine(self._engine_state)

    @property
    def refusal(self) -> ApiError | None:
        """Why no request is taken now; None: welcome."""
        if self.engine.ended is not None:
            return EngineDead(str(self.engine.ended))
        if self.draining:
            return Draining("The server is shutting down")
        if self.engine.info is None:
            return Loading("The model is still loading")
        return None

    def admitted(self) -> EngineInfo:
        """Facts of the engine, which is there and takes requests; else raises the refusal."""
        refusal = self.refusal
        if refusal is not None:
            raise refusal
        assert self.engine.info is not None
        return self.engine.info

    def next_request_number(self) -> int:
        """Unlike a client's X-Request-Id, never the same twice."""
        return next(self._request_numbers)

    def _eos_token_ids(self, endpoints: Sequence[Endpoint]) -> frozenset[int]:
        """Tokens that end an answer: what either endpoint's files say."""
        ids = {token_id for endpoint in endpoints for token_id in endpoint.eos_token_ids}
        for endpoint in endpoints:
            token = endpoint.special_tokens.get("eos_token", "")
            token_id = self.prompts.vocabulary.tokenizer.token_to_id(token)
            ids |= set() if token_id is None else {token_id}
        return frozenset(ids)

    def _engine_state(self) -> EngineState:
        engine = self.engine
        return EngineState(engine.stats, engine.info, self.settings.max_num_seqs)
