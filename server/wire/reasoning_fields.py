"""The fields that choose λ: λ itself, budgets and efforts, in the forms that clients know."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from server.wire.wire_model import WireModel


class LayerLambdas(WireModel):
    """λ for each part of a layer."""

    attn: float | None = None
    """λ of the attention."""
    mlp: float | None = None
    """λ of the FFN."""


def _number_or_parts(value: Any) -> str:
    return "(parts)" if isinstance(value, dict | LayerLambdas) else "(number)"


OfLayers = Annotated[
    Annotated[float, Tag("(number)")] | Annotated[LayerLambdas, Tag("(parts)")],
    Discriminator(_number_or_parts),
]


class GroupLambdas(WireModel):
    """λ by blend group; `server.routing.group_lambdas` checks its ranges and values."""

    default: float | None = None
    """λ of every group that is not named; required unless all of them are."""
    attn: float | None = None
    """λ of the attention in every layer that `layers` does not name."""
    mlp: float | None = None
    """λ of the FFN in every layer that `layers` does not name."""
    embed: float | None = None
    """λ of the embeddings."""
    head: float | None = None
    """λ of the head and of the norm before it."""
    layers: dict[str, OfLayers] = {}
    """λ by range of layers, such as `"0-11"` or `"3"`: a number, or one for each part."""


Budget = Annotated[int, Field(ge=-1, lt=2**31)]
"""Reasoning tokens; -1 sets no budget."""


EffortName = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


def _name_or_number(value: Any) -> str:
    return "(name)" if isinstance(value, str) else "(number)"


Effort = Annotated[
    Annotated[EffortName, Tag("(name)")] | Annotated[float, Field(ge=0, le=1), Tag("(number)")],
    Discriminator(_name_or_number),
]
"""OpenAI's names, or a position between the cheapest (0) and the best (1) point of the profile."""


class Thinking(WireModel):
    """Anthropic's form: whether to think, and with `enabled` a budget."""

    type: Literal["enabled", "disabled", "adaptive"]
    """Whether to think; `adaptive` means the same as `enabled`, without a budget."""
    budget_tokens: Budget | None = None
    """Budget of reasoning tokens; allowed only with `enabled`."""


class Reasoning(WireModel):
    """OpenRouter's form."""

    effort: Effort | None = None
    """The same as `reasoning_effort`."""
    max_tokens: Budget | None = None
    """Budget of reasoning tokens, in place of an effort."""
    enabled: bool | None = None
    """The same as `enable_thinking`."""
    exclude: bool | None = None
    """true: think, but do not return the reasoning."""


class TemplateOptions(WireModel):
    """The options of `chat_template_kwargs` that this server knows; no template gets them."""

    enable_thinking: bool | None = None
    """The same as the field `enable_thinking` of the request."""
