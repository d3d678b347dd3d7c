"""Reads a JSON body into its model, and turns the first violation into an error naming the field.

Unknown fields are refused, and so are the fields of OpenAI's API in `NOT_IMPLEMENTED`, so that a
typo or a missing feature is not ignored. The few fields that are accepted without effect, because
clients always send them, say so in their descriptions.
"""

import difflib
from collections.abc import Sequence
from typing import TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from server.wire.errors import InvalidRequest, bounded
from server.wire.reasoning_fields import GroupLambdas
from server.wire.wire_model import NOT_IMPLEMENTED, WireModel

_T = TypeVar("_T", bound=WireModel)


def validate_json(kind: type[_T], body: bytes) -> _T:
    """Returns the model in a JSON body. Raises `InvalidRequest` that names the first bad field."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        details = error.errors(include_url=False, include_input=False, include_context=False)
        raise _invalid(details[0], kind) from None


def _invalid(error: ErrorDetails, kind: type[WireModel]) -> InvalidRequest:
    if error["type"] == "json_invalid":
        return InvalidRequest(f"The body is not JSON: {error['msg']}")
    path = _path(error)
    param = _dotted(path)
    if error["type"] == "extra_forbidden":
        return InvalidRequest(_unknown(str(path[-1]), param, kind), param=param)
    if not param:
        return InvalidRequest(f"The body must be an object: {error['msg']}")
    return InvalidRequest(f"`{param}`: {error['msg']}", param=param)


def _unknown(name: str, param: str, kind: type[WireModel]) -> str:
    if name in NOT_IMPLEMENTED:
        return f"`{param}` is not implemented by this server"
    known = [*kind.model_fields, *GroupLambdas.model_fields]
    similar = difflib.get_close_matches(bounded(name, 64), known, n=1)
    hint = f"; did you mean `{similar[0]}`?" if similar else ""
    return f"Unknown field `{param}`{hint}"


def _path(error: ErrorDetails) -> list[int | str]:
    """Returns the path of the field, without union tags, which are names in parentheses.

    The name of an unknown field is kept whatever it is.
    """
    location = error["loc"]
    end = len(location) - (error["type"] == "extra_forbidden")
    return [*(part for part in location[:end] if not _is_union_tag(part)), *location[end:]]


def _is_union_tag(part: int | str) -> bool:
    return isinstance(part, str) and part.startswith("(") and part.endswith(")")


def _dotted(path: Sequence[int | str]) -> str:
    """Returns the path as text: `messages[0].content` for ("messages", 0, "content")."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{bounded(part, 64)}"
    return bounded(text.removeprefix("."), 200)
