"""The body of `POST /v1/completions`: text or token ids in, without template or think block."""

from collections.abc import Sequence
from typing import Annotated, Any, Final

from pydantic import Discriminator, Field, Tag

from server.wire.errors import InvalidRequest
from server.wire.generation_request import MOST_CHOICES, GenerationRequest, check_shared_rules
from server.wire.validation import validate_json

MOST_CHOICES_OF_PROMPTS: Final = 1024
"""Maximum number of choices of a request: its prompts times the choices of each."""
MOST_PROMPT_TOKENS: Final = 2**20

TokenIds = Annotated[
    list[Annotated[int, Field(ge=0, lt=2**31)]],
    Field(min_length=1, max_length=MOST_PROMPT_TOKENS),
]


def _form_of_prompt(value: Any) -> str:
    if not isinstance(value, list):
        return "(text)"
    if value and isinstance(value[0], list):
        return "(lists of token ids)"
    return "(token ids)" if value and isinstance(value[0], int) else "(texts)"


class CompletionRequest(GenerationRequest):
    """The body of `POST /v1/completions`: raw prompts, without chat template or think block."""

    prompt_field = "prompt"

    prompt: Annotated[
        Annotated[str, Tag("(text)")]
        | Annotated[
            list[str], Field(min_length=1, max_length=MOST_CHOICES_OF_PROMPTS), Tag("(texts)")
        ]
        | Annotated[TokenIds, Tag("(token ids)")]
        | Annotated[
            list[TokenIds],
            Field(min_length=1, max_length=MOST_CHOICES_OF_PROMPTS),
            Tag("(lists of token ids)"),
        ],
        Discriminator(_form_of_prompt),
    ]
    """One prompt or several, as text or as token ids. Choices are numbered prompt by prompt."""
    add_special_tokens: bool = True
    """Whether the tokenizer adds its special tokens, such as a start of sequence, to a text."""
    max_tokens: Annotated[int, Field(ge=0)] = 16
    """Maximum number of tokens of the answer; 0 with `echo` only scores the prompt."""
    echo: bool = False
    """Start every choice with its prompt."""
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    """Return the log-probability of each token and of this many most probable ones; with `echo`,
    also for the prompt's tokens, of which the first has none."""
    best_of: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    """Must equal the number of choices; default: that number."""

    @property
    def prompts(self) -> Sequence[str | Sequence[int]]:
        """Every prompt, as text or as token ids."""
        prompt: Any = self.prompt
        return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt

    @property
    def alternatives(self) -> int | None:
        return self.logprobs

    @property
    def prompt_alternatives(self) -> int | None:
        return self.logprobs if self.echo else None


def parse_completion_request(body: bytes) -> CompletionRequest:
    """Returns the request. Raises `InvalidRequest` that names the first bad field."""
    request = validate_json(CompletionRequest, body)
    if request.best_of not in (None, request.choices):
        raise InvalidRequest(
            f"`best_of` ({request.best_of}) must equal the number of choices ({request.choices})",
            param="best_of",
        )
    if len(request.prompts) * request.choices > MOST_CHOICES_OF_PROMPTS:
        raise InvalidRequest(
            f"{len(request.prompts)} prompts with {request.choices} choices each exceed the "
            f"limit of {MOST_CHOICES_OF_PROMPTS} choices",
            param="prompt",
        )
    if request.reasoning is not None and request.reasoning.exclude is not None:
        raise InvalidRequest(
            "`reasoning.exclude` is not allowed in /v1/completions", param="reasoning.exclude"
        )
    check_shared_rules(request)
    return request
