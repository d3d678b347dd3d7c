"""The flags of `sweep` and `calibrate` are read, and those that do not fit are refused."""

from pathlib import Path

import pytest

from server.sweep.arguments import calibrate_parser, parse_arguments, sweep_parser, without_api_keys
from server.sweep.errors import BadParameters
from server.sweep.grid import Decoding


def test_a_sweep_needs_only_the_flag_out() -> None:
    flags = parse_arguments(sweep_parser(), ["--out", "d"])
    assert flags.out == Path("d")
    assert flags.lambdas == [value / 10 for value in range(11)]
    assert (flags.temperature, flags.top_p, flags.top_k) == ([0.7], [1.0], 0)
    assert (flags.task, flags.grader, flags.samples, flags.seed) == ("embedded", "embedded", 8, 0)
    assert (flags.dials, flags.serve) == (["all"], [])


def test_lists_are_read_without_duplicates() -> None:
    words = "--out d --lambdas 0,0.5,0.50 --temperature 0.6,0.7 --dials all,mlp,all"
    flags = parse_arguments(sweep_parser(), words.split())
    assert (flags.lambdas, flags.temperature) == ([0, 0.5], [0.6, 0.7])
    assert flags.dials == ["all", "mlp"]


def test_flags_of_the_pair_and_those_after_two_dashes_go_to_the_server() -> None:
    words = "--out d --thinking B --instruct A --delta-dtype int8 -- --threads 2 --not-ours 3"
    flags = parse_arguments(sweep_parser(), words.split())
    assert flags.serve == [
        "--instruct=A", "--thinking=B", "--delta-dtype=int8",
        "--threads", "2", "--not-ours", "3",
    ]  # fmt: skip


def test_the_decoding_of_instruct_is_three_numbers() -> None:
    flags = parse_arguments(calibrate_parser(), ["--out", "p", "--instruct-decoding", "0.7,0.8,20"])
    assert flags.instruct_decoding == Decoding(0.7, 0.8, 20)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("--url http://x --device cpu", "--device=cpu cannot be combined with --url"),
        ("--url http://x -- --threads 2", "--threads cannot be combined with --url"),
        ("-- --port=1", "--port is set by this command"),
        ("-- --log-format json", "--log-format is set by this command"),
        ("--ablate --dials mlp", "--ablate and --dials cannot be combined"),
        ("--task sums.jsonl", "--task sums.jsonl requires --grader"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(words: str, reason: str) -> None:
    with pytest.raises(BadParameters, match=reason):
        parse_arguments(sweep_parser(), ["--out", "d", *words.split()])


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("--lambdas 0,1.1", "1.1 is not between 0 and 1"),
        ("--lambdas nan", "nan is not between 0 and 1"),
        ("--lambdas 0,x", "'0,x' is not a list of numbers separated by commas"),
        ("--samples 0", "must be at least 1"),
        ("--samples x", "'x' is not a whole number"),
        ("--temperature 2.1", "2.1 is not between 0 and 2"),
        ("--top-p 0", "0 is not between 1e-06 and 1"),
        ("--timeout inf", "inf is not between 1 and inf"),
        ("--timeout x", "'x' is not a number"),
        ("--instruct-decoding 0.7,0.8", "must be T,TOP_P,TOP_K, for example 0.7,0.8,20"),
        ("--grader guess", "invalid choice: 'guess'"),
        ("--lambda 0", "unrecognized arguments: --lambda 0"),  # an abbreviation may be a typo
    ],
)
def test_a_bad_value_is_refused_with_exit_code_two(
    words: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_arguments(sweep_parser(), ["--out", "d", *words.split()])
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert "mi-server sweep: error:" in message
    assert reason in message


def test_a_calibration_needs_at_least_two_samples() -> None:
    with pytest.raises(SystemExit):
        parse_arguments(calibrate_parser(), ["--out", "p", "--samples", "1"])


def test_a_command_is_recorded_without_its_api_keys() -> None:
    words = ["--api-key", "s1", "--out", "p", "--api-key=s2", "--", "--api-key", "s3"]
    assert without_api_keys(words) == [
        "--api-key",
        "…",
        "--out",
        "p",
        "--api-key=…",
        "--",
        "--api-key",
        "…",
    ]
    assert without_api_keys([]) == []


def test_the_help_of_both_commands_names_the_default_task(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for parser in (sweep_parser(), calibrate_parser()):
        with pytest.raises(SystemExit):
            parser.parse_args(["--help"])
        assert "embedded" in capsys.readouterr().out
