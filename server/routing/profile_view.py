"""What `GET /v1/profiles` says: the active profile, and what the router makes of it."""

from typing import Any, Final

from server.routing.observations import QUANTILES, Digest
from server.routing.policy import RoutingPolicy
from server.routing.profiles import DEFAULT_CLASS, Point, Profile
from server.routing.reasoning_options import EFFORT_SHARES, NONE
from server.routing.table import Lengths, RoutingTable

_UNMEASURED: Final = (
    "Nobody measured this pair: an effort is a place along λ, a budget is a cap on the default λ."
)


def profile_view(policy: RoutingPolicy) -> dict[str, Any]:
    """One object. Without a profile of the pair its classes have no points."""
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
            for routing_class, bucket, digest in policy.observations.seen()
            if routing_class == name
        },
    }


def _points(points: tuple[Point, ...], table: RoutingTable) -> list[dict[str, Any]]:
    front = {stop.reasoning_lambda for stop in table.front}
    return [
        point.model_dump(by_alias=True)
        | {"on_front": point.reasoning_lambda in front, "router": _router(lengths)}
        for point, lengths in zip(points, table.lengths, strict=True)
    ]


def _router(lengths: Lengths) -> dict[str, Any]:
    """Reasoning tokens that the router goes by."""
    return {"mean": lengths.mean, "p90": lengths.p90, "p90_source": lengths.p90_source}


def _efforts(table: RoutingTable | None) -> dict[str, float]:
    """λ of every named effort."""
    shares: dict[str, float] = {
        name: share if table is None else table.by_effort(share).reasoning_lambda
        for name, share in EFFORT_SHARES.items()
    }
    return {NONE: 0.0, **shares}


def _observed(digest: Digest) -> dict[str, Any]:
    quantiles = {f"p{share * 100:g}": digest.quantile(share) for share in QUANTILES}
    return {
        "samples": digest.samples,
        "cut": digest.cut,
        "mean": digest.mean,
        **quantiles,
    }
