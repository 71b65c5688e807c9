"""Every setting, its default and its bounds; read from `ONEBASE_*` variables and from the flags of `onebase serve`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, ValidationInfo, field_serializer, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

MIB = 1024**2
GIB = 1024**3
_PASSWORD = re.compile(r"(://[^/@:]*:).*@")  # of a URL: what --print-config does not show
LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})


class Settings(BaseSettings):
    """The server's settings. Sizes are bytes, lengths are tokens, times are seconds."""

    model_config = SettingsConfigDict(
        env_prefix="ONEBASE_", extra="ignore", validate_default=True, hide_input_in_errors=True
    )

    base: str = Field("smollm2-135m", description="smollm2-135m, org/name[@revision], a directory, or a .gguf file")
    base_names: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="comma list: further model names under which adapters for this base may be uploaded"
    )
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="auto: float32 on CPU, bfloat16 on CUDA"
    )
    threads: int = Field(0, ge=0, le=1024, description="CPU threads of the engine; 0: one a core")
    kernels: bool = Field(True, description="compile and use the C++ kernels for the CPU (needs g++); off: torch only")
    data_dir: Path = Field(Path("~/.local/share/onebase"), description="adapters and converted models")
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    auth: Literal["off", "on"] = Field("off", description="on: calls need keys; off: all is the default tenant's")
    database_url: str = Field(
        "", description="of tenants, keys and the ledger: sqlite:///file or postgresql://…; empty: SQLite in DATA_DIR"
    )
    insecure: bool = Field(False, description="allow AUTH=off on an address that others can reach")
    events_url: str = Field("", description="http(s) address that gets an event of every request; empty: no events")
    events_format: Literal["cloudevents", "stripe", "lago", "openmeter"] = Field(
        "cloudevents", description="what EVENTS_URL takes; the meter (Stripe) or metric (Lago) is called llm_usage"
    )
    events_token: SecretStr = Field(SecretStr(""), description="sent to EVENTS_URL as a bearer token; never shown")
    events_source: str = Field(
        "onebase",
        min_length=1,
        max_length=128,
        pattern=r"^[!-~]+$",
        description="the events' CloudEvents source: one of its own for each database, and always the same",
    )

    ram_cache_bytes: int = Field(2 * GIB, ge=0, description="adapters kept in RAM")
    adapter_slots: int = Field(32, ge=1, le=4096, description="adapters on the device at once")
    eviction: Literal["lru", "cost"] = Field(
        "cost", description="which goes first, in RAM and on the device: lru, or by use, size and reload cost"
    )
    merged_bytes: int = Field(GIB, ge=0, description="merged copies of the base's linears, for lanes of their own")
    merged_share: float = Field(
        0.45, ge=0.05, le=0.95, description="of the device's time, for all merged lanes while the shared one has work"
    )
    auto_merge: bool = Field(
        False, description="give adapters lanes of their own where measured step times say that it pays"
    )
    max_rank: int = Field(64, ge=1, le=4096, description="largest LoRA rank an upload may have")
    preload: Path | None = Field(
        None, description="directory of adapter directories, registered and published at start"
    )
    max_upload_bytes: int = Field(512 * MIB, ge=1, description="largest adapter upload")
    adapter_sources: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="comma list of URL prefixes that PUT {source} may read, e.g. hf://acme/,file:///srv/adapters/"
    )

    max_batch_tokens: int = Field(
        0, ge=0, le=1 << 20, description="tokens of one step; 0: 256 on the CPU, 2048 on CUDA"
    )
    max_running: int = Field(64, ge=1, le=4096, description="sequences in the batch at once")
    kv_cache_tokens: int = Field(0, ge=0, description="tokens the KV cache holds; 0: sized from free memory")
    max_queue_requests: int = Field(1024, ge=1, description="requests waiting or running; more are answered 503")
    max_queue_tokens: int = Field(2_000_000, ge=1, description="prompt + max_tokens of all of them")
    max_context: int = Field(0, ge=0, description="longest prompt + max_tokens; 0: what the base allows")
    prefix_cache: bool = True
    metrics_top: int = Field(
        50, ge=0, le=1000, description="tenants and adapters that metrics name, by traffic; the rest are `other`"
    )
    vllm_metrics: bool = Field(False, description="add the `vllm:` metrics that the Kubernetes inference gateway reads")
    drain_seconds: float = Field(30.0, ge=0, le=3600, description="how long SIGTERM waits for running requests")

    log_format: Literal["auto", "json", "text"] = Field("auto", description="auto: text on a terminal, else JSON")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="the least that is logged; debug shows probes too"
    )
    log_prompts: bool = Field(False, description="log the first 4,000 characters of each prompt")
    otlp_endpoint: str = Field(
        "", description="http(s) address of an OpenTelemetry collector that gets traces (needs onebase[otel])"
    )

    @field_validator("base_names", "adapter_sources", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @field_validator("data_dir", "preload")
    @classmethod
    def _absolute(cls, value: Path | None) -> Path | None:
        try:
            return value.expanduser().absolute() if value else None
        except RuntimeError as fault:  # a user without a home
            raise ValueError(f"{value}: {fault}") from fault

    @field_validator("events_url", "otlp_endpoint")
    @classmethod
    def _address(cls, value: str, info: ValidationInfo) -> str:
        parts = urlsplit(value)
        if value and (parts.scheme not in ("http", "https") or not parts.hostname):
            raise ValueError("an address is http:// or https://")
        if parts.username is not None or parts.password is not None:
            place = "EVENTS_TOKEN" if info.field_name == "events_url" else "OTEL_EXPORTER_OTLP_HEADERS"
            raise ValueError(f"a secret belongs into {place}, not into the address")
        return value

    @field_validator("events_token")
    @classmethod
    def _one_header(cls, value: SecretStr) -> SecretStr:
        token = value.get_secret_value()
        if not (token.isascii() and (token.isprintable() or not token)):
            raise ValueError("a token is printable ASCII")
        return value

    @field_serializer("database_url")
    def _without_password(self, url: str) -> str:
        return _PASSWORD.sub(r"\1***@", url)

    @property
    def database(self) -> str:
        """The URL of the database."""
        return self.database_url or f"sqlite:///{self.data_dir / 'onebase.db'}"

    @model_validator(mode="after")
    def _refuse_open_server(self) -> Self:
        if self.auth == "off" and self.host not in LOOPBACK and not self.insecure:
            raise ValueError(
                f"AUTH=off on {self.host} would let anyone who reaches it upload and use adapters; "
                "bind 127.0.0.1, or say --insecure"
            )
        return self
