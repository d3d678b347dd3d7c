"""A measured profile with round numbers."""

from typing import Any, Final

from server.routing.profiles import Profile

IDENTITY: Final = "1" * 32  # of the fake engine's pair


def measured_profile(**fields: Any) -> Profile:
    """Returns a profile of the fake engine's pair, whose class `default` is best at λ = 0.8."""
    return Profile.model_validate(
        {
            "name": "measured",
            "pair": {"identity": IDENTITY, "instruct": "I", "thinking": "T"},
            "think_threshold": 0.3,
            "classes": {
                "default": {
                    "points": [
                        point(0.0, 0.40, 0, 0),
                        point(0.2, 0.30, 50, 90),
                        point(0.4, 0.60, 100, 200),
                        point(0.6, 0.80, 200, 300),
                        point(0.8, 0.90, 400, 600),
                        point(1.0, 0.88, 900, 1500),
                    ]
                },
                "math": {"points": [point(0.5, 0.50, 1000, 2000), point(0.9, 0.70, 3000, 5000)]},
            },
            "source": {"description": "made up"},
        }
        | fields
    )


def point(value: float, score: float, mean: float, p90: float) -> dict[str, Any]:
    return {
        "lambda": value,
        "score": score,
        "reasoning_tokens": {"mean": mean, "p50": mean, "p90": p90},
        "think_rate": 1.0,
    }
