"""The parts of one running server, and whether it accepts requests."""

import itertools
import logging
import time
from functools import cached_property
from typing import TYPE_CHECKING

from mi_runtime.request import EngineInfo
from server.access.callers import KeyRing
from server.access.rate_limits import RateLimits
from server.config import Settings
from server.engine.client import EngineClient
from server.engine.sampling import SamplingPolicy
from server.ops.metrics import EngineState, Metrics
from server.ops.routing_metrics import RoutingCollector, RoutingState
from server.routing.elastic import ElasticLimits, ElasticSwitch, Pressure
from server.routing.profiles import Profile, find_builtin_profile, load_profile
from server.routing.requested_lambda import LambdaReader
from server.routing.routing_policy import RoutingPolicy, RoutingSettings
from server.text.checkpoint import EndpointText
from server.text.grammar_builder import GrammarBuilder
from server.text.prompt import PromptBuilder
from server.text.think_blocks import ThinkBlocks
from server.wire.errors import ApiError, Draining, EngineDead, Loading

if TYPE_CHECKING:
    from server.ops.tracing import Tracing

logger = logging.getLogger(__name__)


class Service:
    """The parts of one server. `serve` builds it once, and handlers read it.

    Of its own attributes only `draining` changes. What depends on the identity of the pair is built
    when it is first used, after the pair is loaded.
    """

    def __init__(
        self,
        settings: Settings,
        instruct: EndpointText,
        thinking: EndpointText,
        engine: EngineClient,
        tracing: "Tracing | None" = None,
    ) -> None:
        self.settings = settings
        self.tracing = tracing
        self.engine = engine
        self.created = int(time.time())
        self._profile = None if settings.profile is None else load_profile(settings.profile)
        self.draining = False
        self.request_numbers = itertools.count()  # unique, unlike the X-Request-Id of a client
        self.lambda_reader = LambdaReader(
            settings.model_name, settings.lambda_step, settings.default_lambda
        )
        self.prompt_builder = PromptBuilder(
            instruct,
            thinking,
            template=settings.reasoning_template,
            think_threshold=lambda: self.think_threshold,
        )
        vocabulary = self.prompt_builder.vocabulary
        self.think_blocks = ThinkBlocks.of(
            vocabulary,
            closing=settings.think_closing,
            soft_window=settings.think_soft_window,
        )
        self.grammar_builder = GrammarBuilder(vocabulary)
        self.sampling_policy = SamplingPolicy.of(instruct, thinking, vocabulary)
        engine.add_vocabulary(
            vocabulary.marks,
            vocabulary.grammar_vocabulary(thinking.directory, self.sampling_policy.eos_token_ids),
        )
        self.metrics = Metrics(settings.model_name)
        self.metrics.follow_engine(self._engine_state)
        self.elastic = ElasticSwitch(_elastic_limits(settings)) if settings.elastic else None
        self.metrics.registry.register(RoutingCollector(settings.model_name, self._routing_state))
        self.keys = KeyRing.of(settings.api_key, settings.api_key_file)
        self.rate_limits = RateLimits(
            requests=settings.rate_limit_requests, tokens=settings.rate_limit_tokens
        )

    @property
    def refusal(self) -> ApiError | None:
        """Why requests are refused now; None if they are accepted."""
        if self.engine.ended is not None:
            return EngineDead(str(self.engine.ended))
        if self.draining:
            return Draining("The server is shutting down")
        if self.engine.info is None:
            return Loading("The model is still loading")
        return None

    def admit(self) -> EngineInfo:
        """Returns what the engine reported about itself. Raises `refusal` if there is one."""
        refusal = self.refusal
        if refusal is not None:
            raise refusal
        assert self.engine.info is not None
        return self.engine.info

    @cached_property
    def profile(self) -> Profile | None:
        """The profile that the operator configured, or else the built-in one of the loaded pair."""
        info, settings = self.engine.info, self.settings
        assert info is not None
        profile = self._profile or find_builtin_profile(
            info.pair_identity, settings.instruct_endpoint, settings.thinking_endpoint
        )
        if profile is None:
            logger.warning(
                "This pair has no profile: an effort is used as λ, a budget is only a cap, and "
                "--adapt and --elastic have no effect"
            )
        elif profile.pair.identity not in (None, info.pair_identity):
            logger.warning("The profile %r was measured on another pair", profile.name)
        return profile

    @property
    def think_threshold(self) -> float:
        """The highest λ that uses Instruct's chat template."""
        if self.settings.think_threshold is not None:
            return self.settings.think_threshold
        return 0.0 if self.profile is None else self.profile.think_threshold

    @cached_property
    def router(self) -> RoutingPolicy:
        """The policy that chooses λ for the loaded pair."""
        settings = self.settings
        return RoutingPolicy(
            self.profile,
            RoutingSettings(
                default=settings.default_lambda,
                step=settings.lambda_step,
                think_threshold=self.think_threshold,
                elastic_effort=settings.elastic_effort,
                adapt_min_samples=settings.adapt_min_samples if settings.adapt else None,
            ),
        )

    def update_load(self) -> bool:
        """Takes the engine's load into account for the request that is being routed.

        Returns whether requests without a λ are routed to a cheaper one now.
        """
        return self.elastic is not None and self.elastic.update(self._pressure)

    @property
    def _pressure(self) -> Pressure:
        return Pressure(self.engine.waiting, self.engine.kv_usage)

    def _routing_state(self) -> RoutingState:
        """Returns what a scrape reports. It changes nothing."""
        lengths = None if self.engine.info is None else self.router.observed_lengths
        elastic = self.elastic is not None and self.elastic.active_under(self._pressure)
        return RoutingState(lengths, elastic=elastic)

    def _engine_state(self) -> EngineState:
        engine = self.engine
        return EngineState(engine.stats, engine.info, self.settings.max_num_seqs)


def _elastic_limits(settings: Settings) -> ElasticLimits:
    return ElasticLimits(
        waiting=settings.elastic_waiting,
        kv_usage=settings.elastic_kv_usage,
        release=settings.elastic_release,
        dwell=settings.elastic_dwell,
    )
