"""Settings come from flags, the environment and a file, in this order, and bad ones are named."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from mi_runtime.config import EngineConfig
from server import flags
from server.config import SECTIONS, ConfigError, Settings, load_settings

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _unset_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(f"MI_{name.upper()}", raising=False)


def test_by_default_the_embedded_pair_is_served_on_loopback() -> None:
    settings = load_settings([])
    assert (settings.host, settings.port) == ("127.0.0.1", 8000)
    assert settings.instruct_endpoint.endswith("instruct")
    assert settings.model_name == "mi-embedded"


def test_a_flag_overrides_the_environment_which_overrides_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "mi.yaml"
    file.write_text("port: 1\nmax_waiting: 1\nthreads: 1\n")
    monkeypatch.setenv("MI_PORT", "2")
    monkeypatch.setenv("MI_MAX_WAITING", "2")
    settings = load_settings(["--config", str(file), "--port", "3"])
    assert (settings.port, settings.max_waiting, settings.threads) == (3, 2, 1)


def test_the_file_may_be_named_in_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "mi.yaml"
    file.write_text("default_lambda: 0.5\n")
    monkeypatch.setenv("MI_CONFIG", str(file))
    assert load_settings([]).default_lambda == 0.5


def test_an_unknown_key_of_the_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "mi.yaml"
    file.write_text("prot: 1\n")
    with pytest.raises(ConfigError, match="prot: no such setting"):
        load_settings(["--config", str(file)])


def test_an_unknown_variable_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MI_PROT", "1")
    with pytest.raises(ConfigError, match="MI_PROT"):
        load_settings([])


def test_an_unknown_flag_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        load_settings(["--prot", "1"])
    assert caught.value.code == 2
    assert "--prot" in capsys.readouterr().err


def test_a_file_that_is_missing_or_no_yaml_is_named(tmp_path: Path) -> None:
    file = tmp_path / "mi.yaml"
    file.write_text("port: [\n")
    with pytest.raises(ConfigError, match=r"mi\.yaml"):
        load_settings(["--config", str(file)])
    with pytest.raises(ConfigError, match="no such file"):
        load_settings(["--config", str(tmp_path / "none.yaml")])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--port", "70000"], "--port"),
        (["--default-lambda", "1.5"], "--default-lambda"),
        (["--default-lambda", "nan"], "--default-lambda"),
        (["--max-num-seqs", "0"], "--max-num-seqs"),
        (["--blend-policy", "fast"], "--blend-policy"),
        (["--attention-backend", "fast"], "--attention-backend"),
        (["--think-soft-window", "-1"], "--think-soft-window"),
        (["--instruct", "a"], "--instruct and --thinking must be set together"),
    ],
)
def test_a_bad_value_names_its_setting(flags: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_settings(flags)


def test_a_grid_that_does_not_divide_one_is_refused() -> None:
    settings = load_settings(["--lambda-step", "0.03"])
    with pytest.raises(ConfigError, match="--lambda-step"):
        settings.engine_config(instruct=Path("a"), thinking=Path("b"))


def test_a_pair_is_named_after_its_thinking_endpoint_or_by_the_setting() -> None:
    flags = ["--instruct", "o/Instruct", "--thinking", "o/Thinking"]
    assert load_settings(flags).model_name == "Thinking"
    assert load_settings([*flags, "--served-model-name", "mine"]).model_name == "mine"


def test_a_setting_reaches_the_engine_under_its_name() -> None:
    flags = ["--threads", "3", "--no-prefix-caching", "--max-model-len", "99", "--num-blocks", "7"]
    flags += ["--blend-policy", "pair", "--blend-cache-bytes", "1000", "--delta-dtype", "int4"]
    config = load_settings(flags).engine_config(instruct=Path("a"), thinking=Path("b"))
    assert (config.instruct, config.thinking) == ("a", "b")
    assert (config.threads, config.prefix_caching) == (3, False)
    assert (config.max_model_len, config.num_blocks) == (99, 7)
    assert (config.blend_policy, config.blend_cache_bytes) == ("pair", 1000)
    assert config.delta_dtype == "int4"


def source_of(package: str) -> str:
    return "\n".join(file.read_text() for file in (ROOT / package).rglob("*.py"))


def test_no_setting_is_ignored() -> None:
    """The code of the server reads it, or the engine has one of the same name and reads that."""
    engines = {field.name for field in fields(EngineConfig)}
    server, engine = source_of("server"), source_of("mi_runtime")
    for name in Settings.model_fields.keys() - engines:
        assert re.search(rf"\b(settings|self)\.{name}\b", server), f"nothing reads {name}"
    for name in engines:
        assert re.search(rf"\bconfig\.{name}\b", engine), f"nothing reads {name}"


@pytest.mark.parametrize("flags", ["1,8,32", "1, 8", ""])
def test_cuda_graph_sizes_reach_the_engine_as_numbers(flags: str) -> None:
    settings = load_settings(["--cuda-graph-sizes", flags])
    config = settings.engine_config(instruct=Path("a"), thinking=Path("b"))
    assert config.cuda_graph_sizes == tuple(int(size) for size in flags.split(",") if size)


@pytest.mark.parametrize("sizes", ["8,4", "8,8", "0", "-1,2", ",".join(map(str, range(1, 66)))])
def test_cuda_graph_sizes_that_do_not_ascend_are_refused(sizes: str) -> None:
    with pytest.raises(ConfigError, match="at most 64 ascending numbers above 0"):
        load_settings([f"--cuda-graph-sizes={sizes}"]).engine_config(
            instruct=Path("a"), thinking=Path("b")
        )


def test_cuda_graph_sizes_that_are_no_numbers_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="--cuda-graph-sizes"):
        load_settings(["--cuda-graph-sizes", "4,many"])


def test_a_list_is_a_repeated_flag_a_variable_with_commas_or_a_list_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "mi.yaml"
    file.write_text("cors_origin: [https://a, https://b]\n")
    assert load_settings(["--config", str(file)]).cors_origin == ["https://a", "https://b"]
    monkeypatch.setenv("MI_CORS_ORIGIN", "https://c, https://d")
    assert load_settings(["--config", str(file)]).cors_origin == ["https://c", "https://d"]
    flags = ["--cors-origin", "https://e", "--cors-origin", "https://f"]
    assert load_settings(flags).cors_origin == ["https://e", "https://f"]


def test_an_api_key_is_printed_nowhere(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("MI_API_KEY", "sk-one,sk-two")
    settings = load_settings([])
    assert [key.get_secret_value() for key in settings.api_key] == ["sk-one", "sk-two"]
    assert "sk-" not in repr(settings) + str(settings) + str(settings.model_dump())
    with pytest.raises(SystemExit):
        load_settings(["--help"])
    assert "sk-" not in capsys.readouterr().out
    file = tmp_path / "mi.yaml"
    file.write_text("api_key: {sk-three: 1}\n")
    monkeypatch.delenv("MI_API_KEY")
    with pytest.raises(ConfigError, match="--api-key") as caught:
        load_settings(["--config", str(file)])
    assert "sk-" not in str(caught.value)


def test_a_key_file_without_a_certificate_is_refused() -> None:
    with pytest.raises(ConfigError, match="--ssl-certfile"):
        load_settings(["--ssl-keyfile", "key.pem"])


def test_a_certificate_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cert.pem").write_text("no certificate")
    for name in ("cert.pem", "none.pem"):
        with pytest.raises(ConfigError, match="--ssl-"):
            load_settings(["--ssl-certfile", str(tmp_path / name)]).check_certificate()


def test_the_help_has_a_section_for_each_group(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        load_settings(["--port", "1", "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    titles = [line[:-1] for line in text.splitlines() if line.endswith(":") and line[0] != " "]
    assert titles == ["options", *SECTIONS]
    limits = text.partition("\nLimits:\n")[2].partition("\n\n")[0]
    assert "--max-waiting N " in limits
    assert "[1024]" in limits
    assert "--port" not in limits


def test_every_setting_is_in_one_section() -> None:
    listed = [name for _, group in flags.sections(Settings, SECTIONS) for name in group]
    assert listed == list(Settings.model_fields)


def test_the_help_describes_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        load_settings(["--help"])
    text = capsys.readouterr().out
    for name in Settings.model_fields:
        assert f"--{name.replace('_', '-')}" in text
    assert "null" not in text
    assert all(field.description for field in Settings.model_fields.values())
