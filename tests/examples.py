"""How many examples property tests try, which is more in `make test-long`."""

from typing import Final

from hypothesis import settings

MORE_WHEN_LONG: Final = 10


def is_long_run() -> bool:
    """Returns whether `make test-long` runs the tests."""
    return settings.get_current_profile_name() == "long"


def examples(few: int) -> int:
    """Returns `few`, or ten times as many in `make test-long`."""
    return few * (MORE_WHEN_LONG if is_long_run() else 1)
