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
    """Send the usage in one more chunk at the end, which has no choices."""
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
    """The fields that chat and text completions share.

    None for a sampling setting means the pair's own default.
    """

    prompt_field: ClassVar[str]
    """The field that errors about the prompt name."""

    model: str
    """The served name, or an alias with a λ, such as `NAME@0.6`."""

    reasoning_lambda: RequestedLambda | None = None
    """λ as a number, by blend group, or as a list, which makes one choice for each number."""
    answer_lambda: float | None = None
    """λ from the end of the think block on; default: no change."""
    thinking_token_budget: Budget | None = None
    """vLLM's name of a budget of reasoning tokens: it chooses λ, and is a hard cap."""
    thinking_budget: Budget | None = None
    """Qwen's name of the same budget."""
    thinking: Thinking | None = None
    """Anthropic's form: a budget, or thinking on or off."""
    reasoning_effort: Effort | None = None
    """OpenAI's form: the share of the gain from reasoning, by the active profile."""
    reasoning: Reasoning | None = None
    """OpenRouter's form: effort or budget, on or off, shown or not."""
    enable_thinking: bool | None = None
    """Qwen's form: false is λ = 0; true is the server's default λ if that thinks, else medium
    effort."""
    chat_template_kwargs: TemplateOptions | None = None
    """vLLM's place of `enable_thinking`."""
    routing_class: Annotated[str, Field(min_length=1, max_length=64)] = "default"
    """Kind of work, whose curve in the profile is used; an unknown one counts as `default`."""

    max_tokens: Annotated[int, Field(ge=1)] | None = None
    """Most tokens of the answer; default: what the context holds."""
    min_tokens: Annotated[int, Field(ge=0)] = 0
    """Tokens before which the answer does not end by itself."""
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    """Sampling temperature; 0 takes the most probable token; default: the pair's own."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    """Draw from the most probable tokens with this total probability; default: the pair's own."""
    top_k: Annotated[int, Field(ge=-1)] | None = None
    """Draw from this many most probable tokens; -1 and 0: off; default: the pair's own."""
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    """Least probability of a token, relative to the most probable one; default: the pair's own."""
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] | None = None
    """Above 1, tokens of prompt and answer become less probable; default: the pair's own."""
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    """Subtracted from the logit of every token that is in the answer."""
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    """Subtracted from the same logits, once for each occurrence in the answer."""
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] = {}
    """Added to the logits of tokens, by token id."""
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    """Equal requests with equal seeds draw the same tokens; choices of one request differ."""
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    """Choices for each prompt; with a list of λ it must be the list's length, or left out."""
    stop: Annotated[
        Annotated[StopString, Tag("(one)")]
        | Annotated[list[StopString], Field(max_length=4), Tag("(many)")],
        Discriminator(_one_or_many),
    ] = []
    """Strings that end the answer; they are not part of it."""
    stop_token_ids: Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=64)] = []
    """Tokens that end the answer."""
    ignore_eos: bool = False
    """Continue after the tokens with which the model ends its answers."""

    stream: bool = False
    """Send the answer as server-sent events."""
    stream_options: StreamOptions | None = None
    """Needs `stream`."""
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] = 0
    """Requests with a lower value run earlier, equal ones in order of arrival; the one with the
    highest value is preempted first. A request may wait without limit while lower ones arrive."""
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
        """Most tokens of the answer; None where the client sets no limit."""
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
        raise InvalidRequest("`stream_options` needs `stream: true`", param="stream_options")
    if request.n not in (None, request.choices):
        raise InvalidRequest(
            f"`reasoning_lambda` lists {request.choices} values and `n` is {request.n}; leave `n` "
            "out or make them equal",
            param="n",
        )
