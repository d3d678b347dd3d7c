"""Reads and writes profiles: score and tokens of a pair at each measured λ, for each kind of work.

A profile is a JSON file, `version` 1. It names the pair it was measured on, and lists for each
routing class the measured points in order of λ. Built-in profiles are found by their pair. Nothing
here chooses a λ; `server.routing.routing_table` does.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from server.exit_codes import CommandError

VERSION: Final = 1
DEFAULT_CLASS: Final = "default"
BUILTIN: Final = Path(__file__).with_name("builtin_profiles")

Share = Annotated[float, Field(ge=0, le=1)]
TokenCount = Annotated[float, Field(ge=0)]
ClassName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")]


class ProfileError(CommandError):
    """A profile that cannot be used."""


class _ProfileModel(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        validate_by_name=True,
        validate_by_alias=True,
        use_attribute_docstrings=True,
    )


class MeasuredLengths(_ProfileModel):
    """Tokens of the think block over the samples of a point; an answer without one counts as 0."""

    mean: TokenCount
    p50: TokenCount | None = None
    p90: TokenCount | None = None
    """Quantiles; null where only means were published."""


class Point(_ProfileModel):
    """What was measured at one λ."""

    reasoning_lambda: Annotated[Share, Field(alias="lambda")]
    score: Share
    """Mean score of an answer."""
    score_interval: tuple[Share, Share] | None = None
    """95 % confidence interval of `score`."""
    reasoning_tokens: MeasuredLengths
    answer_tokens: TokenCount | None = None
    """Mean tokens after the think block; null where they were counted with the reasoning."""
    think_rate: Share
    """Share of answers that closed a think block."""
    samples: Annotated[int, Field(ge=1)] | None = None


class RoutingClass(_ProfileModel):
    """The measured curve of one kind of work."""

    points: Annotated[tuple[Point, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _ascending(self) -> Self:
        lambdas = [point.reasoning_lambda for point in self.points]
        if lambdas != sorted(set(lambdas)):
            raise ValueError("points must be in ascending order of lambda, each λ once")
        return self


class MeasuredPair(_ProfileModel):
    """The measured pair, by content, or by the endpoints' names if the content is unknown."""

    identity: str | None = None
    """The engine's `pair_identity`: a digest of both endpoints."""
    instruct: str
    """The last part of the Instruct endpoint's name, such as `Qwen3-4B-Instruct-2507`."""
    thinking: str
    """The last part of the Thinking endpoint's name."""


class Source(_ProfileModel):
    """Where the measurements come from."""

    description: str
    command: str | None = None
    """The command of this project that measured them."""
    date: str | None = None


class Profile(_ProfileModel):
    """The measured curves of one pair."""

    version: Literal[1] = VERSION
    name: Annotated[str, Field(min_length=1, max_length=128)]
    pair: MeasuredPair
    think_threshold: Share
    """Highest λ that takes Instruct's chat template."""
    classes: dict[ClassName, RoutingClass]
    source: Source

    @model_validator(mode="after")
    def _has_default(self) -> Self:
        if DEFAULT_CLASS not in self.classes:
            raise ValueError(f"classes must hold `{DEFAULT_CLASS}`, which others fall back to")
        return self

    def save(self, path: Path) -> None:
        """Writes the profile as a JSON file."""
        path.write_text(self.model_dump_json(indent=1, by_alias=True) + "\n", encoding="utf-8")


def load_profile(path: Path) -> Profile:
    """Reads a profile file. Raises `ProfileError` that names the file and the first violation."""
    try:
        return Profile.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ProfileError(f"{path}: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ProfileError(f"{path}: {where + ': ' if where else ''}{first['msg']}") from None
    except UnicodeDecodeError:
        raise ProfileError(f"{path}: not UTF-8 text") from None


def builtin_profiles() -> list[Profile]:
    return [load_profile(path) for path in sorted(BUILTIN.glob("*.json"))]


def find_builtin_profile(
    identity: str, instruct: str, thinking: str, profiles: Iterable[Profile] | None = None
) -> Profile | None:
    """Returns the built-in profile of a pair, or None.

    A profile matches by content, or if it has no `identity`, by the last parts of the endpoints'
    names.
    """
    names = (Path(instruct).name, Path(thinking).name)
    by_name = None
    for profile in builtin_profiles() if profiles is None else profiles:
        if profile.pair.identity == identity:
            return profile
        if (
            profile.pair.identity is None
            and (profile.pair.instruct, profile.pair.thinking) == names
        ):
            by_name = profile
    return by_name
