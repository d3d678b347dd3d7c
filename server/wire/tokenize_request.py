"""The bodies of `POST /tokenize` and `POST /detokenize`."""

from typing import Annotated, Final

from pydantic import Field

from server.wire.errors import InvalidRequest
from server.wire.messages import MOST_MESSAGES, Message, check_continuation, check_message
from server.wire.validation import validate_json
from server.wire.wire_model import WireModel

_FIELDS_OF_MESSAGES: Final = ("reasoning_lambda", "add_generation_prompt", "continue_final_message")


class TokenizeRequest(WireModel):
    """The body of `POST /tokenize`: a text, or messages for the chat template."""

    model: str | None = None
    """The served name, or an alias whose λ chooses the template."""
    prompt: str | None = None
    """A text. Set exactly one of `prompt` and `messages`."""
    messages: Annotated[list[Message], Field(min_length=1, max_length=MOST_MESSAGES)] | None = None
    """Messages, which are formatted with the chat template of the λ."""
    reasoning_lambda: float | None = None
    """λ that chooses the template of `messages`; default: the server's default λ."""
    add_special_tokens: bool = True
    """Whether the tokenizer adds its special tokens to `prompt`; a template writes them itself."""
    add_generation_prompt: bool | None = None
    """Whether the prompt begins a new turn of the assistant; default: true unless
    `continue_final_message`."""
    continue_final_message: bool = False
    """Leave the end of the last message open, which must be the assistant's."""
    return_token_strs: bool = False
    """Whether the response contains the text of every token."""


class DetokenizeRequest(WireModel):
    """The body of `POST /detokenize`."""

    model: str | None = None
    """The served name or an alias."""
    tokens: Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(max_length=2**20)]
    """Token ids."""


def parse_tokenize_request(body: bytes) -> TokenizeRequest:
    """Returns the request. Raises `InvalidRequest` that names the first bad field."""
    request = validate_json(TokenizeRequest, body)
    if (request.prompt is None) == (request.messages is None):
        raise InvalidRequest("Set exactly one of `prompt` and `messages`", param="prompt")
    if request.prompt is not None:
        _refuse_fields(request, "messages", *_FIELDS_OF_MESSAGES)
    else:
        _refuse_fields(request, "prompt", "add_special_tokens")
    check_continuation(request)
    for index, message in enumerate(request.messages or []):
        check_message(message, f"messages[{index}]")
    return request


def _refuse_fields(request: TokenizeRequest, other: str, *names: str) -> None:
    for name in names:
        if name in request.model_fields_set:
            raise InvalidRequest(f"`{name}` is allowed only with `{other}`", param=name)


def parse_detokenize_request(body: bytes) -> DetokenizeRequest:
    """Returns the request. Raises `InvalidRequest` that names the first bad field."""
    return validate_json(DetokenizeRequest, body)
