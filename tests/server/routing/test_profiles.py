"""A profile is read from a file, and a pair gets the one measured on its weights or its names."""

from pathlib import Path

import pytest

from mi_runtime.embedded_pair import INSTRUCT_DIRECTORY, THINKING_DIRECTORY
from server.routing.profiles import (
    BUILTIN,
    DEFAULT_CLASS,
    Profile,
    ProfileError,
    builtin_profiles,
    find_builtin_profile,
    load_profile,
)
from tests.server.measured_profile import IDENTITY, measured_profile

TEXT = measured_profile().model_dump_json(by_alias=True)
QWEN = {
    "Qwen3-4B-2507": ("Qwen3-4B-Instruct-2507", "Qwen3-4B-Thinking-2507"),
    "Qwen3-30B-A3B-2507": ("Qwen3-30B-A3B-Instruct-2507", "Qwen3-30B-A3B-Thinking-2507"),
}


def test_a_saved_profile_is_loaded_as_it_was(tmp_path: Path) -> None:
    measured_profile().save(tmp_path / "p.json")
    assert load_profile(tmp_path / "p.json") == measured_profile()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "Invalid JSON"),
        ("[]", "object"),
        ("{}", "Field required"),
        ("\xff", "not UTF-8"),
        (TEXT.replace('"version":1', '"version":2'), "version"),
        (TEXT.replace('"default"', '"other"'), "default"),
        (TEXT.replace('"lambda":0.4', '"lambda":0.9'), "order"),
        (TEXT.replace('"score":0.4', '"score":40'), "score"),
        (TEXT.replace('"date"', '"dote"'), "dote"),
    ],
)
def test_a_bad_file_is_named_with_what_is_wrong(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "p.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(ProfileError, match=problem) as caught:
        load_profile(path)
    assert str(caught.value).startswith(str(path))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match=r"none\.json: No such file"):
        load_profile(tmp_path / "none.json")


# --- the profile of a pair ---


@pytest.mark.parametrize("name", QWEN)
def test_the_papers_pairs_are_found_by_the_last_part_of_their_names(name: str) -> None:
    instruct, thinking = QWEN[name]
    for prefix in ("Qwen/", "/models/", ""):
        found = find_builtin_profile("0" * 32, prefix + instruct, f"{prefix}{thinking}")
        assert found is not None
        assert found.name == name
    assert find_builtin_profile("0" * 32, instruct, "another") is None


def test_a_pair_measured_by_content_is_found_whatever_its_name() -> None:
    known = [measured_profile()]
    assert find_builtin_profile(IDENTITY, "a", "b", known) == measured_profile()
    assert find_builtin_profile("2" * 32, "I", "T", known) is None  # the same name, other weights


def test_a_profile_by_content_is_preferred_to_one_by_name() -> None:
    by_name = measured_profile(name="by name", pair={"instruct": "I", "thinking": "T"})
    for known in ([by_name, measured_profile()], [measured_profile(), by_name]):
        assert find_builtin_profile(IDENTITY, "I", "T", known) == measured_profile()
        assert find_builtin_profile("2" * 32, "I", "T", known) == by_name


# --- built-in profiles ---


def test_the_embedded_pair_and_the_papers_two_pairs_have_built_in_profiles() -> None:
    assert len(builtin_profiles()) == 3
    assert {it.name for it in builtin_profiles()} >= QWEN.keys()
    (own,) = [it for it in builtin_profiles() if it.pair.identity is not None]
    embedded = find_builtin_profile(
        str(own.pair.identity), str(INSTRUCT_DIRECTORY), str(THINKING_DIRECTORY)
    )
    assert embedded == own


@pytest.mark.parametrize("path", sorted(BUILTIN.glob("*.json")), ids=lambda path: path.stem)
def test_a_built_in_profile_spans_all_of_lambda(path: Path) -> None:
    for measured in load_profile(path).classes.values():
        lambdas = [it.reasoning_lambda for it in measured.points]
        assert (lambdas[0], lambdas[-1]) == (0.0, 1.0)
        assert len(lambdas) >= 5


@pytest.mark.parametrize("name", QWEN)
def test_the_default_of_the_papers_pairs_is_the_mean_of_their_three_benchmarks(name: str) -> None:
    found = find_builtin_profile("", *QWEN[name])
    assert found is not None
    assert found.classes.keys() == {DEFAULT_CLASS, "math", "instructions", "science"}
    own = [measured for key, measured in found.classes.items() if key != DEFAULT_CLASS]
    for index, mean in enumerate(found.classes[DEFAULT_CLASS].points):
        points = [measured.points[index] for measured in own]
        assert {it.reasoning_lambda for it in points} == {mean.reasoning_lambda}
        assert mean.score == pytest.approx(sum(it.score for it in points) / 3, abs=1e-5)
        tokens = sum(it.reasoning_tokens.mean for it in points) / 3
        assert mean.reasoning_tokens.mean == pytest.approx(tokens, abs=0.1)
        assert mean.reasoning_tokens.p90 is None


def test_the_papers_best_result_is_in_its_profile() -> None:
    found = find_builtin_profile("", *QWEN["Qwen3-4B-2507"])
    assert isinstance(found, Profile)
    best = max(found.classes["math"].points, key=lambda it: it.score)
    assert (best.reasoning_lambda, best.score, best.reasoning_tokens.mean) == (0.8, 0.805, 17574)
