"""Fixtures that build samples of a sweep from the fields that a test names."""

from collections.abc import Callable

import pytest

from server.sweep.grid import Decoding, Setting
from server.sweep.samples import Sample

MakeSample = Callable[..., Sample]


@pytest.fixture(scope="session")
def setting() -> Setting:
    """Returns the setting of the samples that `make_sample` makes."""
    return Setting(0.5, "all", Decoding(0.7, 1.0))


@pytest.fixture(scope="session")
def make_sample(setting: Setting) -> MakeSample:
    """Makes a correct sample, but for the fields that are given."""

    def make(question: str = "q", sample: int = 0, **fields: object) -> Sample:
        defaults = {
            "setting": setting.label,
            "question": question,
            "sample": sample,
            "correct": True,
            "said": "7",
            "tokens": 10,
            "reasoning_tokens": 4,
            "thought": True,
            "malformed": False,
            "unfinished": False,
            "text": "Answer: 7",
        }
        return Sample(**(defaults | fields))  # type: ignore[arg-type]

    return make
