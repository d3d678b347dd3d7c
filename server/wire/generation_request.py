"""What every request for an answer may give, however its prompt is given."""

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
    """What a stream has beside its text."""

    include_usage: bool = False
    """One more chunk at the end, without choices, has the usage."""
    include_obfuscation: bool = True
    """Without effect."""


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
    """What every request for an answer may say, however its prompt is given.

    None as a sampling default: the pair's own.
    """

    prompt_field: ClassVar[str]
    """What errors about the prompt name."""

    model: str
    """The served name, or an alias that names λ, as `NAME@0.6`."""

    reasoning_lambda: RequestedLambda | None = None
    """λ: a number, one for each blend group, or a list with a choice for each of its numbers."""
    answer_lambda: float | None = None
    """λ from the end of the think block on; default: unchanged."""
    thinking_token_budget: Budget | None = None
    """vLLM's name for a budget of reasoning tokens: it chooses λ, and is a hard cap."""
    thinking_budget: Budget | None = None
    """Qwen's name for the same budget."""
    thinking: Thinking | None = None
    """Anthropic's form: a budget, or thinking on or off."""
    reasoning_effort: Effort | None = None
    """OpenAI's form: how much of what reasoning gains, by the active profile."""
    reasoning: Reasoning | None = None
    """OpenRouter's form: effort or budget, on or off, shown or not."""
    enable_thinking: bool | None = None
    """Qwen's form: false is λ = 0, true the server's default where that thinks."""
    chat_template_kwargs: TemplateOptions | None = None
    """vLLM's place for `enable_thinking`."""
    routing_class: Annotated[str, Field(min_length=1, max_length=64)] = "default"
    """Kind of work, whose curve of the profile applies; `default` where the profile has no such."""

    max_tokens: Annotated[int, Field(ge=1)] | None = None
    """Tokens the answer may have; default: what the context holds."""
    min_tokens: Annotated[int, Field(ge=0)] = 0
    """Tokens before which the answer does not end by itself."""
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    """0 takes the most probable token; default: the pair's own."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    """Draw from the most probable tokens that have this share together; default: the pair's own."""
    top_k: Annotated[int, Field(ge=-1)] | None = None
    """Draw from so many most probable tokens; -1 and 0: off; default: the pair's own."""
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    """Least probability, as a share of the most probable token's; default: the pair's own."""
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] | None = None
    """Above 1, tokens of prompt and answer become less probable; default: the pair's own."""
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    """Taken from the logit of every token that the answer has."""
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    """The same, times how often it has it."""
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] = {}
    """Added to the logits of tokens, by token id."""
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    """Equal requests with equal seeds draw equally; choices of one request draw apart."""
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    """Choices for each prompt; in a fan-out its length, or left out."""
    stop: Annotated[
        Annotated[StopString, Tag("(one)")]
        | Annotated[list[StopString], Field(max_length=4), Tag("(many)")],
        Discriminator(_one_or_many),
    ] = []
    """Strings that end the answer; they are not part of it."""
    stop_token_ids: Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=64)] = []
    """Tokens that end the answer."""
    ignore_eos: bool = False
    """Go on behind the tokens with which the model ends its answers."""

    stream: bool = False
    """Send the answer as server-sent events."""
    stream_options: StreamOptions | None = None
    """Needs `stream`."""
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] = 0
    """Lower ones run earlier, equal ones in order of arrival; the last by priority is preempted
    first. Nothing keeps a request from waiting behind an endless line of lower ones."""
    cache_salt: Annotated[str, Field(max_length=256)] = ""
    """Requests of different salts share no KV."""
    user: Annotated[str, Field(max_length=512)] | None = None
    """Stands in the server's log."""
    metadata: Annotated[
        dict[
            Annotated[str, Field(max_length=64)],
            Annotated[str, Field(max_length=512)],
        ],
        Field(max_length=16),
    ] = {}
    """Stands in the server's log."""

    @property
    def stop_strings(self) -> Sequence[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop

    @property
    def answer_limit(self) -> int | None:
        """Tokens the answer may have, if the client set a limit."""
        return self.max_tokens

    @property
    @abstractmethod
    def alternatives(self) -> int | None:
        """How many most probable tokens come with each token's log-probability.

        None asks for no log-probabilities.
        """

    @property
    def prompt_alternatives(self) -> int | None:
        """The same for the tokens of the prompt."""
        return None

    @property
    def choices(self) -> int:
        if isinstance(self.reasoning_lambda, list):
            return len(self.reasoning_lambda)
        return 1 if self.n is None else self.n

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


def check_shared_rules(request: GenerationRequest) -> None:
    """The rules between fields that all requests share."""
    if request.stream_options is not None and not request.stream:
        raise InvalidRequest("`stream_options` needs `stream: true`", param="stream_options")
    if request.n not in (None, request.choices):
        raise InvalidRequest(
            f"`reasoning_lambda` lists {request.choices} values and `n` is {request.n}; leave `n` "
            "out or make them equal",
            param="n",
        )
