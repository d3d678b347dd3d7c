"""Makes the body of `GET /v1/profiles`: the active profile, and how the router uses it."""

from typing import Any, Final

from server.routing.observed_lengths import QUANTILES, LengthDigest
from server.routing.profiles import DEFAULT_CLASS, Point, Profile
from server.routing.reasoning_options import EFFORT_SHARES, NONE
from server.routing.routing_policy import RoutingPolicy
from server.routing.routing_table import ExpectedLengths, RoutingTable

_UNMEASURED: Final = (
    "This pair was not measured: an effort is a position along λ, and a budget is a cap at the "
    "default λ."
)


def profile_response(policy: RoutingPolicy) -> dict[str, Any]:
    """Returns the JSON object. Without a profile of the pair, its classes have no points."""
    profile, settings = policy.profile, policy.settings
    classes = profile.classes if profile else (DEFAULT_CLASS,)
    return {
        "object": "profile",
        "name": policy.name,
        **_origin(profile),
        "think_threshold": settings.think_threshold,
        "default_lambda": settings.default,
        "adapt": settings.adapt_min_samples is not None,
        "classes": {name: _class(name, policy) for name in classes},
    }


def _origin(profile: Profile | None) -> dict[str, Any]:
    if profile is None:
        return {"measured": False, "source": {"description": _UNMEASURED}}
    return {
        "measured": True,
        "version": profile.version,
        "pair": profile.pair.model_dump(),
        "source": profile.source.model_dump(),
    }


def _class(name: str, policy: RoutingPolicy) -> dict[str, Any]:
    table = policy.tables.get(name)
    points = policy.profile.classes[name].points if policy.profile else ()
    return {
        "points": [] if table is None else _points(points, table),
        "efforts": _efforts(table),
        "observed": {
            bucket: _observed(digest)
            for routing_class, bucket, digest in policy.observed_lengths.filled()
            if routing_class == name
        },
    }


def _points(points: tuple[Point, ...], table: RoutingTable) -> list[dict[str, Any]]:
    front = {candidate.reasoning_lambda for candidate in table.front}
    return [
        point.model_dump(by_alias=True)
        | {"on_front": point.reasoning_lambda in front, "router": _router(lengths)}
        for point, lengths in zip(points, table.lengths, strict=True)
    ]


def _router(lengths: ExpectedLengths) -> dict[str, Any]:
    """Returns the reasoning tokens that the router calculates with."""
    return {"mean": lengths.mean, "p90": lengths.p90, "p90_source": lengths.p90_source}


def _efforts(table: RoutingTable | None) -> dict[str, float]:
    """Returns the λ of every named effort."""
    shares: dict[str, float] = {
        name: share if table is None else table.by_effort(share).reasoning_lambda
        for name, share in EFFORT_SHARES.items()
    }
    return {NONE: 0.0, **shares}


def _observed(digest: LengthDigest) -> dict[str, Any]:
    quantiles = {f"p{share * 100:g}": digest.quantile(share) for share in QUANTILES}
    return {
        "samples": digest.samples,
        "cut": digest.cut,
        "mean": digest.mean,
        **quantiles,
    }
