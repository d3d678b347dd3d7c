"""The fields that every request for an answer shares, whatever the form of its prompt."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Final

from pydantic import Discriminator, Field, Tag

from server.wire.errors import InvalidRequest
from server.wire.reasoning_fields import (
    Budget,
    Effort,
    GroupLambdas,
    Reasoning,
    TemplateOptions,
    Thinking,
)
from server.wire.wire_model import WireModel

MOST_CHOICES: Final = 128

StopString = Annotated[str, Field(min_length=1, max_length=1000)]


class StreamOptions(WireModel):
    """What a stream contains in addition to its text."""

    include_usage: bool = False
    """Send one more chunk at the end, which has the usage and no choices."""
    include_obfuscation: bool = True
    """Accepted and ignored."""


def _one_or_many(value: Any) -> str:
    return "(many)" if isinstance(value, list) else "(one)"


def _form_of_lambda(value: Any) -> str:
    if isinstance(value, list):
        return "(fan-out)"
    return "(groups)" if isinstance(value, dict | GroupLambdas) else "(number)"


RequestedLambda = Annotated[
    Annotated[float, Tag("(number)")]
    | Annotated[GroupLambdas, Tag("(groups)")]
    | Annotated[list[float], Field(min_length=1, max_length=MOST_CHOICES), Tag("(fan-out)")],
    Discriminator(_form_of_lambda),
]


class GenerationRequest(WireModel, ABC):
    """The fields that chat and text completions share.

    None for a sampling setting means the pair's own default.
    """

    prompt_field: ClassVar[str]
    """The field that errors about the prompt name."""

    model: str
    """The served name, or an alias with a λ, such as `NAME@0.6`."""

    reasoning_lambda: RequestedLambda | None = None
    """λ: a number, an object by blend group, or a list that returns one choice for each number."""
    answer_lambda: float | None = None
    """λ of the tokens after the think block; default: the same λ."""
    thinking_token_budget: Budget | None = None
    """Budget of reasoning tokens (vLLM's name): it chooses λ, and is a hard cap."""
    thinking_budget: Budget | None = None
    """The same budget (Qwen's name)."""
    thinking: Thinking | None = None
    """Anthropic's form: a budget, or thinking on or off."""
    reasoning_effort: Effort | None = None
    """Effort (OpenAI's name): the cheapest λ that reaches this share of the score that reasoning
    gains in the profile."""
    reasoning: Reasoning | None = None
    """OpenRouter's form: an effort or a budget, reasoning on or off, shown or not."""
    enable_thinking: bool | None = None
    """Qwen's form: false means λ = 0; true means the server's default λ if the model thinks there,
    otherwise effort `medium`."""
    chat_template_kwargs: TemplateOptions | None = None
    """Template options as in vLLM; only `enable_thinking` is supported."""
    routing_class: Annotated[str, Field(min_length=1, max_length=64)] = "default"
    """Kind of work, which selects a curve of the profile; an unknown one counts as `default`."""

    max_tokens: Annotated[int, Field(ge=1)] | None = None
    """Maximum number of tokens of the answer; default: as many as fit into the context."""
    min_tokens: Annotated[int, Field(ge=0)] = 0
    """Minimum number of tokens before the model may end the answer."""
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    """Sampling temperature; 0 takes the most probable token; default: the pair's own."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    """Sample from the most probable tokens, which have this total probability; default: the pair's
    own."""
    top_k: Annotated[int, Field(ge=-1)] | None = None
    """Sample from this many most probable tokens; -1 and 0: off; default: the pair's own."""
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    """Minimum probability, as a share of the most probable token's; default: the pair's own."""
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] | None = None
    """A value above 1 makes tokens of prompt and answer less probable; default: the pair's own."""
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    """Subtracted from the logit of every token that the answer contains."""
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    """Subtracted from the same logits, once for each occurrence in the answer."""
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] = {}
    """Added to the logits of tokens, by token id."""
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    """Equal requests with equal seeds sample the same tokens; the choices of one request differ."""
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    """Number of choices for each prompt; with a list of λ, the length of the list or left out."""
    stop: Annotated[
        Annotated[StopString, Tag("(one)")]
        | Annotated[list[StopString], Field(max_length=4), Tag("(many)")],
        Discriminator(_one_or_many),
    ] = []
    """Strings that end the answer, and are not part of it."""
    stop_token_ids: Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=64)] = []
    """Tokens that end the answer."""
    ignore_eos: bool = False
    """Continue after the tokens with which the model ends its answers."""

    stream: bool = False
    """Send the answer as server-sent events."""
    stream_options: StreamOptions | None = None
    """Allowed only with `stream`."""
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] = 0
    """Requests with a lower value run earlier, and those with the same value in order of arrival;
    the highest value is preempted first. A request may wait forever if requests with lower values
    keep arriving."""
    cache_salt: Annotated[str, Field(max_length=256)] = ""
    """Requests with different salts share no cached KV."""
    user: Annotated[str, Field(max_length=512)] | None = None
    """Written to the server's log."""
    metadata: Annotated[
        dict[
            Annotated[str, Field(max_length=64)],
            Annotated[str, Field(max_length=512)],
        ],
        Field(max_length=16),
    ] = {}
    """Written to the server's log."""

    @property
    def stop_strings(self) -> Sequence[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop

    @property
    def answer_limit(self) -> int | None:
        """Maximum number of tokens of the answer; None if the client sets no limit."""
        return self.max_tokens

    @property
    @abstractmethod
    def alternatives(self) -> int | None:
        """How many most probable tokens come with each token's log-probability.

        None asks for no log-probabilities.
        """

    @property
    def prompt_alternatives(self) -> int | None:
        """The same as `alternatives`, for the tokens of the prompt."""
        return None

    @property
    def choices(self) -> int:
        """Number of choices for each prompt."""
        if isinstance(self.reasoning_lambda, list):
            return len(self.reasoning_lambda)
        return 1 if self.n is None else self.n

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


def check_shared_rules(request: GenerationRequest) -> None:
    """Raises `InvalidRequest` for a contradiction between fields that all requests share."""
    if request.stream_options is not None and not request.stream:
        raise InvalidRequest(
            "`stream_options` is allowed only with `stream: true`", param="stream_options"
        )
    if request.n not in (None, request.choices):
        raise InvalidRequest(
            f"`reasoning_lambda` has {request.choices} values, but `n` is {request.n}; omit `n` or "
            "make them equal",
            param="n",
        )
