"""The form that a request requires of its answer: text, JSON, or JSON of a schema."""

from typing import Annotated, Literal

from pydantic import Field

from server.wire.errors import InvalidRequest
from server.wire.tools import Name, Schema
from server.wire.wire_model import WireModel


class JsonSchemaFormat(WireModel):
    """The JSON schema of the answer."""

    name: Name
    """Accepted and ignored."""
    description: str | None = None
    """Accepted and ignored."""
    schema_: Annotated[Schema, Field(alias="schema")]
    """The schema that the content follows."""
    strict: bool = False
    """Refuse a schema with keywords that cannot be enforced; without it, they are ignored."""


class ResponseFormat(WireModel):
    """The form of the content."""

    type: Literal["text", "json_object", "json_schema"]
    """Plain text, any JSON object, or JSON that follows the schema."""
    json_schema: JsonSchemaFormat | None = None
    """Required for type `json_schema`, not allowed for other types."""


def check_response_format(form: ResponseFormat | None) -> None:
    """Raises `InvalidRequest` if type and schema do not belong together."""
    if form is not None and (form.type == "json_schema") is not (form.json_schema is not None):
        raise InvalidRequest(
            "`response_format.json_schema` is required for type `json_schema` and not allowed for other "
            "types",
            param="response_format.json_schema",
        )
