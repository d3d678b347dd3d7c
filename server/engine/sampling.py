"""Turns the wire's sampling fields into the engine's, with defaults, limits and checks."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mi_runtime.request import EngineInfo, SamplingParams
from server.text.checkpoint import EndpointText
from server.text.vocabulary import Vocabulary
from server.wire.errors import ContextTooLong, InvalidRequest, bounded
from server.wire.generation_request import GenerationRequest


@dataclass(frozen=True, slots=True)
class SamplingPolicy:
    """The pair's sampling defaults, and the tokens that end an answer."""

    defaults: Mapping[str, Any]  # generation_config.json
    eos_token_ids: frozenset[int]

    @classmethod
    def of(
        cls, instruct: EndpointText, thinking: EndpointText, vocabulary: Vocabulary
    ) -> "SamplingPolicy":
        """Returns the Thinking endpoint's defaults, with the end tokens of both endpoints."""
        ids = set(instruct.eos_token_ids) | set(thinking.eos_token_ids)
        for endpoint in (instruct, thinking):
            token = endpoint.special_tokens.get("eos_token", "")
            token_id = vocabulary.tokenizer.token_to_id(token)
            ids |= set() if token_id is None else {token_id}
        return cls(thinking.generation_config, frozenset(ids))

    def resolve(
        self, request: GenerationRequest, *, prompt_tokens: int, info: EngineInfo
    ) -> SamplingParams:
        """Returns the engine's parameters for one prompt.

        Raises `ContextTooLong`, or `InvalidRequest` for token ids that do not exist.
        """
        room = info.max_model_len - prompt_tokens
        if room < 1:
            raise ContextTooLong(
                prompt_tokens=prompt_tokens,
                max_model_len=info.max_model_len,
                param=request.prompt_field,
            )
        limit = request.answer_limit
        max_tokens = room if limit is None else min(limit, room)
        if request.min_tokens > max_tokens:
            raise InvalidRequest(
                f"`min_tokens` ({request.min_tokens}) exceeds the maximum answer length of "
                f"{max_tokens} tokens",
                param="min_tokens",
            )
        return SamplingParams(
            max_tokens=max_tokens,
            min_tokens=request.min_tokens,
            temperature=self._default("temperature", request.temperature, 1.0),
            top_p=self._default("top_p", request.top_p, 1.0),
            top_k=max(0, int(self._default("top_k", request.top_k, 0))),
            min_p=self._default("min_p", request.min_p, 0.0),
            repetition_penalty=self._default("repetition_penalty", request.repetition_penalty, 1.0),
            presence_penalty=request.presence_penalty,
            frequency_penalty=request.frequency_penalty,
            logit_bias=_logit_bias(request, info.vocab_size),
            seed=request.seed,
            stop_token_ids=_stop_token_ids(request, info.vocab_size),
            eos_token_ids=self.eos_token_ids,
            ignore_eos=request.ignore_eos,
            logprobs=request.alternatives,
            prompt_logprobs=request.prompt_alternatives,
        )

    def _default(self, name: str, given: float | None, neutral: float) -> float:
        """Returns the value that is given, or else the pair's, or else the neutral one."""
        values = (given, self.defaults.get(name), neutral)
        return next(value for value in values if value is not None)


def seed_of_choice(seed: int | None, index: int) -> int | None:
    """Returns different seeds for the choices of a request, and the same ones each time."""
    return None if seed is None else (seed + index) % 2**63


def _logit_bias(request: GenerationRequest, vocab_size: int) -> tuple[tuple[int, float], ...]:
    return tuple(
        (_token_id(key, vocab_size, f"logit_bias.{key}"), bias)
        for key, bias in request.logit_bias.items()
    )


def _stop_token_ids(request: GenerationRequest, vocab_size: int) -> frozenset[int]:
    return frozenset(
        _token_id(str(token_id), vocab_size, f"stop_token_ids[{index}]")
        for index, token_id in enumerate(request.stop_token_ids)
    )


def _token_id(text: str, vocab_size: int, param: str) -> int:
    token_id = int(text) if text.isascii() and text.isdigit() and len(text) < 10 else -1
    if not 0 <= token_id < vocab_size:
        raise InvalidRequest(
            f"`{param}` has the invalid token id {bounded(text, 40)!r}; valid ids are 0 to "
            f"{vocab_size - 1}",
            param=param,
        )
    return token_id
