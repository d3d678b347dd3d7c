"""The base of every model of a request: it refuses unknown fields, and values of another type.

`null` means "not given" for every field that this server knows.
"""

from typing import Any, Final

from pydantic import BaseModel, ConfigDict, model_validator

NOT_IMPLEMENTED: Final = frozenset(
    (
        *("annotations", "audio", "function_call", "functions", "modalities", "moderation"),
        *("prediction", "prompt_cache_options", "prompt_cache_retention", "refusal", "suffix"),
        "web_search_options",
    )
)
"""Fields of OpenAI's clients that this server does not implement; they are refused by name."""


class WireModel(BaseModel):
    """A part of a request."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )

    @model_validator(mode="before")
    @classmethod
    def _null_is_not_given(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        known = cls.model_fields.keys() | NOT_IMPLEMENTED
        return {key: value for key, value in data.items() if value is not None or key not in known}
