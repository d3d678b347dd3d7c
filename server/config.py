"""Every setting of `mi-server serve`: its default, its unit, and where it is read from.

Flags win over the environment (`MI_PORT`), the environment over a YAML file (`--config`), the file
over the defaults below. Keys nobody knows are refused in all three. Nothing changes after start.
"""

import os
import ssl
from collections.abc import Sequence
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
"""Of the variables that Kubernetes sets in every pod beside a service named `mi-server`."""
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
"""Titles of the groups of settings, each with the first of its settings."""


def _listed(value: Any) -> Any:
    """Commas separate the values of a list in one flag or variable."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        return value
    return [part for text in texts for part in map(str.strip, text.split(",")) if part]


Listed = (NoDecode, BeforeValidator(_listed))


class ConfigError(CommandError):
    """Settings that cannot be used. The message is for the operator."""


class Settings(BaseSettings):
    """Serve an Instruct and a Thinking checkpoint at every λ between them."""

    model_config = SettingsConfigDict(
        env_prefix=ENVIRONMENT_PREFIX,
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        hide_input_in_errors=True,
    )

    config: Path | None = None
    """YAML file of settings, named as here with underscores."""

    # The pair
    instruct: str | None = None
    """Instruct endpoint: a directory or hub id; without it the embedded pair."""
    thinking: str | None = None
    """Thinking endpoint: a directory or hub id; without it the embedded pair."""
    device: Device = "auto"
    """Where the pair lies."""
    dtype: Dtype = "auto"
    """Number format of the weights."""
    delta_dtype: DeltaDtype = "none"
    """Keep of the Thinking endpoint only its difference to Instruct, rounded to this format: less
    memory, and λ = 1 is Thinking up to that rounding; none: both endpoints whole."""

    # The dial
    default_lambda: Annotated[float, Field(ge=0, le=1)] = 0.8
    """λ of requests that name none; 0 is Instruct, 1 is Thinking."""
    lambda_step: Annotated[float, Field(gt=0, le=1)] = 0.01
    """Grid that λ is rounded to; it divides 1."""
    reasoning_template: Literal["auto", "instruct", "thinking"] = "auto"
    """Chat template; auto: Thinking's above the think threshold, else Instruct's."""
    think_threshold: Annotated[float, Field(ge=0, le=1)] | None = None
    """Highest λ that takes Instruct's chat template; default: the profile's."""
    profile: Path | None = None
    """Measured profile of the pair (JSON); default: the built-in one of this pair, if there is
    one."""
    adapt: bool = False
    """Route by the reasoning tokens that answers had, where there are enough, instead of the
    profile's."""
    adapt_min_samples: Annotated[int, Field(ge=1)] = 200
    """Answers in a λ bucket that are enough for --adapt."""
    elastic: bool = False
    """Under load, route requests that name no λ to cheaper points of the profile."""
    elastic_effort: Annotated[float, Field(ge=0, le=1)] = 0.25
    """Effort, 0 to 1, that requests get at most under load."""
    elastic_waiting: Annotated[int, Field(ge=1)] = 32
    """Waiting requests that are load."""
    elastic_kv_usage: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Share of the KV cache in use that is load."""
    elastic_release: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Share of both limits at which the load is over."""
    elastic_dwell: Annotated[float, Field(ge=0)] = 5.0
    """Seconds between two changes into or out of load."""

    think_closing: Annotated[str, Field(min_length=1)] = "\n</think>\n\n"
    """Written where a cap closes a think block; holds the closing tag once."""
    think_soft_window: Annotated[int, Field(ge=0)] | None = None
    """Tokens before a cap in which a block closes at a sentence's or line's end; default: a tenth
    of the cap, at most 64."""

    # The engine
    max_model_len: Annotated[int, Field(ge=2)] | None = None
    """Tokens of prompt and answer together; default: what the pair can."""
    max_num_seqs: Annotated[int, Field(ge=1)] = 256
    """Sequences that run at once."""
    max_batched_tokens: Annotated[int, Field(ge=1)] = 2048
    """Tokens a step computes, prompts and answers together."""
    async_scheduling: bool | None = None
    """Launch a step before the results of the one before are read; default: on a GPU."""
    block_size: Annotated[int, Field(ge=1)] = 16
    """Tokens a KV block holds."""
    num_blocks: Annotated[int, Field(ge=1)] | None = None
    """KV blocks; default: from --kv-cache-bytes."""
    kv_cache_bytes: Annotated[int, Field(ge=1)] | None = None
    """Bytes of the KV cache; default: a share of the free memory, on a GPU what is left of it."""
    prefix_caching: bool = True
    """Keep the KV of prompts for later requests at the same λ."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Share of a GPU's memory that may be in use, by all processes together."""
    cuda_graphs: bool = True
    """Record decode steps at start and replay them, on a GPU."""
    cuda_graph_sizes: Annotated[list[int], *Listed] = []
    """Numbers of sequences that decode steps are recorded for, ascending; a step takes the next
    larger one, and larger steps are not replayed; default: from 2 up to --max-num-seqs."""
    torch_compile: bool = True
    """Compile what is recorded, at the first start for a minute or more."""
    attention_backend: AttentionName = "auto"
    """Who computes attention; auto: on a GPU the fastest that works, measured at start."""
    blend_policy: BlendPolicy = "auto"
    """How weights at λ are had: pair product, blended weights, or the cheaper one."""
    blend_cache_bytes: Annotated[int, Field(ge=0)] | None = None
    """Bytes of blended weights kept, of whole λ values; default: a share of the free memory."""
    threads: Annotated[int, Field(ge=1)] | None = None
    """CPU threads of the engine; default: all cores but one."""

    # The server
    host: str = "127.0.0.1"
    """Address to listen on."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """TCP port to listen on; 0 takes a free one."""
    served_model_name: Annotated[str, Field(min_length=1)] | None = None
    """Name that requests call the pair by; default: the Thinking endpoint's."""
    root_path: Annotated[str, Field(pattern=r"^(/[^/]+)*$")] = ""
    """Path under which a gateway serves this server, and which it strips: `/mi`."""
    forwarded_allow_ips: str | None = None
    """Addresses of proxies, separated by commas, whose X-Forwarded-For and -Proto are believed;
    `*`: everybody's; default: nobody's."""
    keep_alive: Annotated[float, Field(gt=0)] = 15.0
    """Seconds of silence in a stream before a comment is sent."""
    drain_timeout: Annotated[float, Field(ge=0)] = 30.0
    """Seconds that running requests may take after SIGTERM."""

    # Limits
    max_waiting: Annotated[int, Field(ge=0)] = 1024
    """Requests that may wait for the engine; more get a 503."""
    max_waiting_tokens: Annotated[int, Field(ge=1)] | None = None
    """Prompt tokens that may wait for their first token; more get a 503; default: no limit."""
    max_body_bytes: Annotated[int, Field(ge=1)] = 8 * 2**20
    """Bytes of a request's body; more get a 413."""
    request_timeout: Annotated[float, Field(gt=0)] | None = None
    """Seconds a request may take, queue included; more get a 504. Requests may ask for less by the
    header X-Request-Timeout; default: no limit."""
    engine_timeout: Annotated[float, Field(gt=0)] = 300.0
    """Seconds without a word from an engine that has work, after which it counts as hung and the
    server ends. Longer than the longest step."""
    rate_limit_requests: Annotated[int, Field(ge=1)] | None = None
    """Requests a minute for each API key, or each client address where there are no keys; more get
    a 429; default: no limit."""
    rate_limit_tokens: Annotated[int, Field(ge=1)] | None = None
    """Tokens a minute, prompts and answers, for each API key or client address; default: no
    limit."""

    # Security
    api_key: Annotated[list[SecretStr], *Listed] = []
    """Key that requests must bring as `Authorization: Bearer KEY`; may be repeated. A flag can be
    read by every user of the machine: prefer a file or the environment."""
    api_key_file: Path | None = None
    """File of keys, one a line, each with an optional name behind it for the log; # begins a
    comment."""
    cors_origin: Annotated[list[str], *Listed] = []
    """Origin whose web pages may send requests, as `https://example.org`, or `*`; may be
    repeated; default: none."""
    ssl_certfile: Path | None = None
    """Certificate chain in PEM; with it the server speaks TLS."""
    ssl_keyfile: Path | None = None
    """Private key in PEM; default: in the file of the certificate."""
    ssl_keyfile_password: SecretStr | None = None
    """Password of the private key."""
    ssl_ca_certs: Path | None = None
    """Authorities in PEM; with them only clients that show a certificate of theirs are served."""

    # Observability
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severity that is logged."""
    log_format: Literal["text", "json"] = "text"
    """Lines to read, or one JSON object a line."""
    otlp_traces_endpoint: str | None = None
    """URL that OpenTelemetry spans are sent to over HTTP, as `http://collector:4318/v1/traces`;
    needs `pip install 'mi-server[otel]'`; default: no traces."""

    @model_validator(mode="after")
    def _whole_pair(self) -> "Settings":
        if (self.instruct is None) != (self.thinking is None):
            raise ValueError("--instruct and --thinking belong together; give both or neither")
        return self

    @model_validator(mode="after")
    def _whole_certificate(self) -> "Settings":
        others = (self.ssl_keyfile, self.ssl_keyfile_password, self.ssl_ca_certs)
        if self.ssl_certfile is None and any(other is not None for other in others):
            raise ValueError("--ssl-keyfile, its password and --ssl-ca-certs need --ssl-certfile")
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
        """Of the certificate's private key."""
        secret = self.ssl_keyfile_password
        return None if secret is None else secret.get_secret_value()

    @property
    def instruct_endpoint(self) -> str:
        return self.instruct or str(INSTRUCT_DIRECTORY)

    @property
    def thinking_endpoint(self) -> str:
        return self.thinking or str(THINKING_DIRECTORY)

    @property
    def model_name(self) -> str:
        if self.served_model_name is not None:
            return self.served_model_name
        return EMBEDDED_NAME if self.thinking is None else Path(self.thinking).name

    def engine_config(self, *, instruct: Path, thinking: Path) -> EngineConfig:
        """The engine's part, with the endpoints as local directories."""
        try:
            return EngineConfig(
                instruct=str(instruct),
                thinking=str(thinking),
                device=self.device,
                dtype=self.dtype,
                delta_dtype=self.delta_dtype,
                block_size=self.block_size,
                num_blocks=self.num_blocks,
                kv_cache_bytes=self.kv_cache_bytes,
                max_model_len=self.max_model_len,
                max_num_seqs=self.max_num_seqs,
                max_batched_tokens=self.max_batched_tokens,
                async_scheduling=self.async_scheduling,
                prefix_caching=self.prefix_caching,
                lambda_step=self.lambda_step,
                gpu_memory_utilization=self.gpu_memory_utilization,
                cuda_graphs=self.cuda_graphs,
                cuda_graph_sizes=tuple(self.cuda_graph_sizes),
                torch_compile=self.torch_compile,
                attention_backend=self.attention_backend,
                blend_policy=self.blend_policy,
                blend_cache_bytes=self.blend_cache_bytes,
                threads=self.threads,
            )
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
        """Best first; the file is the one given as `config`. The flags stand before all these."""
        assert isinstance(init_settings, InitSettingsSource)
        file = init_settings.init_kwargs.get("config")
        if file is None:
            return init_settings, env_settings
        return init_settings, env_settings, YamlConfigSettingsSource(settings_cls, yaml_file=file)


def load_settings(arguments: Sequence[str]) -> Settings:
    """The settings from flags, environment and file. Raises `ConfigError`; `--help` exits."""
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
        raise ConfigError("\n".join(_said(detail) for detail in error.errors())) from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{file}: not readable as YAML: {error}") from None


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


def _said(detail: Any) -> str:
    name = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        return f"{name}: no such setting"
    return f"{name}: {detail['msg']}" if name else str(detail["msg"]).removeprefix("Value error, ")
