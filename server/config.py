"""Every setting of `mi-server serve`: its default, its unit, and where it is read from.

Flags override the environment (`MI_PORT`), which overrides a YAML file (`--config`), which
overrides the defaults below. Unknown keys are refused in all three. Settings never change after
the start.
"""

import os
import ssl
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import yaml  # type: ignore[import-untyped]
from pydantic import BeforeValidator, Field, SecretStr, ValidationError, model_validator
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    YamlConfigSettingsSource,
)

from mi_runtime.config import (
    AttentionName,
    BlendPolicy,
    DeltaDtype,
    Device,
    Dtype,
    EngineConfig,
)
from mi_runtime.embedded_pair import INSTRUCT_DIRECTORY, THINKING_DIRECTORY
from server import flags
from server.exit_codes import CommandError

ENVIRONMENT_PREFIX: Final = "MI_"
KUBERNETES_PREFIX: Final = "MI_SERVER_"
"""Prefix of the variables that Kubernetes sets in pods near a service named `mi-server`."""
EMBEDDED_NAME: Final = "mi-embedded"
SECTIONS: Final = {
    "Configuration": "config",
    "The pair": "instruct",
    "The dial": "default_lambda",
    "The engine": "max_model_len",
    "The server": "host",
    "Limits": "max_waiting",
    "Security": "api_key",
    "Observability": "log_level",
}
"""Titles of the groups of settings, each with its first setting."""


def _listed(value: Any) -> Any:
    """Splits the values of a list at the commas of a flag or variable."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        return value
    return [part for text in texts for part in map(str.strip, text.split(",")) if part]


Listed = (NoDecode, BeforeValidator(_listed))


class ConfigError(CommandError):
    """The settings cannot be used."""


class Settings(BaseSettings):
    """Serves an Instruct and a Thinking checkpoint at every λ between them."""

    model_config = SettingsConfigDict(
        env_prefix=ENVIRONMENT_PREFIX,
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        hide_input_in_errors=True,
    )

    config: Path | None = None
    """YAML file of settings, whose keys are the names here with underscores."""

    # The pair
    instruct: str | None = None
    """Instruct endpoint: a directory or hub id; default: that of the embedded pair."""
    thinking: str | None = None
    """Thinking endpoint: a directory or hub id; default: that of the embedded pair."""
    device: Device = "auto"
    """Device that holds the pair; auto: a GPU if there is one."""
    dtype: Dtype = "auto"
    """Number format of the weights; auto: float32 on a CPU, that of Instruct on a GPU."""
    delta_dtype: DeltaDtype = "none"
    """Store Thinking as its difference from Instruct, rounded to this format. It takes less memory,
    and λ = 1 is Thinking up to that rounding. none: store both endpoints in full."""

    # The dial
    default_lambda: Annotated[float, Field(ge=0, le=1)] = 0.8
    """λ of requests that do not set one; 0 is Instruct, 1 is Thinking."""
    lambda_step: Annotated[float, Field(gt=0, le=1)] = 0.01
    """Step of the grid that λ is rounded to; it must divide 1."""
    reasoning_template: Literal["auto", "instruct", "thinking"] = "auto"
    """Chat template; auto: Thinking's above the think threshold, otherwise Instruct's."""
    think_threshold: Annotated[float, Field(ge=0, le=1)] | None = None
    """Highest λ that uses Instruct's chat template; default: the profile's."""
    profile: Path | None = None
    """Measured profile of the pair (JSON); default: the built-in profile of this pair, if any."""
    adapt: bool = False
    """Choose λ by the reasoning tokens of this server's own answers instead of the profile's, where
    there are enough answers."""
    adapt_min_samples: Annotated[int, Field(ge=1)] = 200
    """Minimum number of answers in a λ bucket before --adapt uses them."""
    elastic: bool = False
    """Under load, give requests that do not set λ a cheaper point of the profile."""
    elastic_effort: Annotated[float, Field(ge=0, le=1)] = 0.25
    """Highest effort, from 0 to 1, for requests that do not set λ, under load."""
    elastic_waiting: Annotated[int, Field(ge=1)] = 32
    """Number of waiting requests that counts as load."""
    elastic_kv_usage: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Share of the KV cache in use that counts as load."""
    elastic_release: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Load ends when queue and KV cache are at or below this share of --elastic-waiting and
    --elastic-kv-usage."""
    elastic_dwell: Annotated[float, Field(ge=0)] = 5.0
    """Minimum seconds between switching elastic routing on and off."""

    think_closing: Annotated[str, Field(min_length=1)] = "\n</think>\n\n"
    """Closing sequence: the text that closes a think block at its cap. It must contain the closing
    tag exactly once."""
    think_soft_window: Annotated[int, Field(ge=0)] | None = None
    """Soft window: the last tokens before a cap, in which the block is closed at the end of a
    sentence or line; default: a tenth of the cap, at most 64."""

    # The engine
    max_model_len: Annotated[int, Field(ge=2)] | None = None
    """Maximum number of tokens of prompt and answer together; default: the pair's own limit."""
    max_num_seqs: Annotated[int, Field(ge=1)] = 256
    """Maximum number of sequences that run at once."""
    max_batched_tokens: Annotated[int, Field(ge=1)] = 2048
    """Maximum number of tokens that one step computes, of prompts and answers together."""
    async_scheduling: bool | None = None
    """Launch a step before the results of the previous one are read; default: on for a
    GPU, off for a CPU."""
    block_size: Annotated[int, Field(ge=1)] = 16
    """Tokens that a KV block holds."""
    num_blocks: Annotated[int, Field(ge=1)] | None = None
    """Number of KV blocks; default: as many as fit into --kv-cache-bytes."""
    kv_cache_bytes: Annotated[int, Field(ge=1)] | None = None
    """Bytes of the KV cache; default: a share of the free memory, or on a GPU all that is left."""
    prefix_caching: bool = True
    """Keep the KV of prompts for later requests at the same λ."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Share of a GPU's memory that may be used, by all processes together."""
    cuda_graphs: bool = True
    """On a GPU, capture decode steps as CUDA graphs at start and replay them."""
    cuda_graph_sizes: Annotated[list[int], *Listed] = []
    """Numbers of sequences for which CUDA graphs are captured, ascending. A step uses the next
    larger number; a step that is larger than all of them is not replayed. Default: from 2 up to
    --max-num-seqs."""
    torch_compile: bool = True
    """Compile the captured steps; the first start then takes a minute or more longer."""
    attention_backend: AttentionName = "auto"
    """Implementation of attention; auto: on a GPU the fastest that works, measured at start."""
    blend_policy: BlendPolicy = "auto"
    """How layers are computed at λ: by the pair product, with blended weights, or (auto) in the
    cheaper way."""
    blend_cache_bytes: Annotated[int, Field(ge=0)] | None = None
    """Memory for cached blended weights in bytes; each λ takes one copy of the model; default: a
    share of the free memory."""
    threads: Annotated[int, Field(ge=1)] | None = None
    """CPU threads of the engine; default: all cores but one."""

    # The server
    host: str = "127.0.0.1"
    """Address to listen on."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """TCP port to listen on; 0 takes a free one."""
    served_model_name: Annotated[str, Field(min_length=1)] | None = None
    """Model name in requests; default: the Thinking endpoint's name."""
    root_path: Annotated[str, Field(pattern=r"^(/[^/]+)*$")] = ""
    """Path prefix that a gateway strips before it forwards a request, such as `/mi`."""
    forwarded_allow_ips: str | None = None
    """Addresses of proxies, separated by commas, whose headers X-Forwarded-For and
    X-Forwarded-Proto are trusted; `*`: all; default: none."""
    keep_alive: Annotated[float, Field(gt=0)] = 15.0
    """Seconds without events in a stream, after which a comment is sent."""
    drain_timeout: Annotated[float, Field(ge=0)] = 30.0
    """Seconds that running requests may take after SIGTERM."""

    # Limits
    max_waiting: Annotated[int, Field(ge=0)] = 1024
    """Maximum number of requests that wait for the engine; further requests get a 503."""
    max_waiting_tokens: Annotated[int, Field(ge=1)] | None = None
    """Maximum number of prompt tokens of all requests without a first token; further requests get a
    503; default: no limit."""
    max_body_bytes: Annotated[int, Field(ge=1)] = 8 * 2**20
    """Maximum number of bytes of a request's body; a longer one gets a 413."""
    request_timeout: Annotated[float, Field(gt=0)] | None = None
    """Seconds that a request may take, including its time in the queue; after them it gets a 504. A
    request may set a shorter time with the header X-Request-Timeout; default: no limit."""
    engine_timeout: Annotated[float, Field(gt=0)] = 300.0
    """Seconds without a report from an engine that has work, after which it counts as hung and the
    server exits. They must be longer than the longest step."""
    rate_limit_requests: Annotated[int, Field(ge=1)] | None = None
    """Requests per minute for each API key, or for each client address if there are no keys;
    further requests get a 429; default: no limit."""
    rate_limit_tokens: Annotated[int, Field(ge=1)] | None = None
    """Tokens of prompts and answers per minute, for each API key or client address; default: no
    limit."""

    # Security
    api_key: Annotated[list[SecretStr], *Listed] = []
    """Key that requests must send as `Authorization: Bearer KEY`; may be repeated. Every user of
    the machine can read flags, so prefer a file or the environment."""
    api_key_file: Path | None = None
    """File of keys, one per line, each optionally followed by a name for the log; # begins a
    comment."""
    cors_origin: Annotated[list[str], *Listed] = []
    """Origin whose web pages may send requests, such as `https://example.org`, or `*`; may be
    repeated; default: none."""
    ssl_certfile: Path | None = None
    """Certificate chain in PEM; turns TLS on."""
    ssl_keyfile: Path | None = None
    """Private key in PEM; default: the key in --ssl-certfile."""
    ssl_keyfile_password: SecretStr | None = None
    """Password of the private key."""
    ssl_ca_certs: Path | None = None
    """Certificate authorities in PEM; if given, clients must send a certificate that one of them
    signed."""

    # Observability
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Lowest severity that is logged."""
    log_format: Literal["text", "json"] = "text"
    """Readable lines, or one JSON object per line."""
    otlp_traces_endpoint: str | None = None
    """URL to which OpenTelemetry spans are sent over HTTP, such as
    `http://collector:4318/v1/traces`; requires `pip install 'mi-server[otel]'`; default: no
    traces."""

    @model_validator(mode="after")
    def _check_pair(self) -> "Settings":
        if (self.instruct is None) != (self.thinking is None):
            raise ValueError("--instruct and --thinking must be set together")
        return self

    @model_validator(mode="after")
    def _check_certificate_flags(self) -> "Settings":
        others = (self.ssl_keyfile, self.ssl_keyfile_password, self.ssl_ca_certs)
        if self.ssl_certfile is None and any(other is not None for other in others):
            raise ValueError(
                "--ssl-keyfile, --ssl-keyfile-password and --ssl-ca-certs require --ssl-certfile"
            )
        return self

    def check_certificate(self) -> None:
        """Raises `ConfigError` where the files for TLS cannot be used."""
        if self.ssl_certfile is None:
            return
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            # Never None: OpenSSL would ask for the password on the terminal.
            context.load_cert_chain(self.ssl_certfile, self.ssl_keyfile, self.key_password or "")
            if self.ssl_ca_certs is not None:
                context.load_verify_locations(self.ssl_ca_certs)
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(f"The files of --ssl-… cannot be used: {error}") from None

    @property
    def key_password(self) -> str | None:
        """The password of the certificate's private key."""
        secret = self.ssl_keyfile_password
        return None if secret is None else secret.get_secret_value()

    @property
    def instruct_endpoint(self) -> str:
        """Directory or hub id."""
        return self.instruct or str(INSTRUCT_DIRECTORY)

    @property
    def thinking_endpoint(self) -> str:
        """Directory or hub id."""
        return self.thinking or str(THINKING_DIRECTORY)

    @property
    def model_name(self) -> str:
        """The served name."""
        if self.served_model_name is not None:
            return self.served_model_name
        return EMBEDDED_NAME if self.thinking is None else Path(self.thinking).name

    def engine_config(self, *, instruct: Path, thinking: Path) -> EngineConfig:
        """Returns the engine's settings: those of the same name, and the endpoints as directories.

        Raises `ConfigError` for values that do not go together.
        """
        names = [each.name for each in fields(EngineConfig) if each.name in type(self).model_fields]
        given = {name: getattr(self, name) for name in names}
        given |= {"instruct": str(instruct), "thinking": str(thinking)}
        given["cuda_graph_sizes"] = tuple(self.cuda_graph_sizes)
        try:
            return EngineConfig(**given)
        except ValueError as error:
            raise ConfigError(str(error)) from error

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The sources by falling priority: flags, environment, and the file named by `config`."""
        assert isinstance(init_settings, InitSettingsSource)
        file = init_settings.init_kwargs.get("config")
        if file is None:
            return init_settings, env_settings
        return init_settings, env_settings, YamlConfigSettingsSource(settings_cls, yaml_file=file)


def load_settings(arguments: Sequence[str]) -> Settings:
    """Reads the settings from flags, environment and file. Raises `ConfigError`; `--help` exits."""
    _refuse_unknown_environment()
    given = flags.parse(Settings, SECTIONS, arguments)
    file = given.get("config", os.environ.get(f"{ENVIRONMENT_PREFIX}CONFIG"))
    if file is not None:
        if not Path(file).is_file():
            raise ConfigError(f"{file}: no such file (--config)")
        given["config"] = file
    try:
        return Settings(**given)
    except ValidationError as error:
        raise ConfigError("\n".join(_message(detail) for detail in error.errors())) from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{file}: not valid YAML: {error}") from None


def _refuse_unknown_environment() -> None:
    known = {ENVIRONMENT_PREFIX + name.upper() for name in Settings.model_fields}
    unknown = sorted(
        name
        for name in os.environ
        if name.startswith(ENVIRONMENT_PREFIX)
        and not name.startswith(KUBERNETES_PREFIX)
        and name not in known
    )
    if unknown:
        raise ConfigError(f"Unknown settings in the environment: {', '.join(unknown)}")


def _message(detail: Any) -> str:
    name = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        return f"{name}: no such setting"
    flag = "--" + name.replace("_", "-")
    return f"{flag}: {detail['msg']}" if name else str(detail["msg"]).removeprefix("Value error, ")
