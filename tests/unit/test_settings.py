"""Settings: from variables and arguments, within their bounds, and no open server by accident."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from server.settings import GIB, MIB, Settings


@pytest.fixture(autouse=True)
def _bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in list(os.environ):
        if name.upper().startswith("ONEBASE_"):
            monkeypatch.delenv(name)


def test_defaults_serve_the_bundled_base_on_loopback() -> None:
    settings = Settings()
    assert (settings.base, settings.host, settings.port, settings.auth) == ("smollm2-135m", "127.0.0.1", 8000, "off")
    assert (settings.adapter_slots, settings.max_rank, settings.ram_cache_bytes) == (32, 64, 2 * GIB)
    assert settings.eviction == "cost"
    assert settings.max_upload_bytes == 512 * MIB
    assert (settings.base_names, settings.adapter_sources, settings.preload) == ((), (), None)
    assert settings.data_dir.is_absolute()


def test_variables_are_read_and_arguments_win(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEBASE_PORT", "9001")
    monkeypatch.setenv("ONEBASE_MAX_RUNNING", "7")
    monkeypatch.setenv("ONEBASE_PREFIX_CACHE", "false")
    monkeypatch.setenv("ONEBASE_DTYPE", "bfloat16")
    monkeypatch.setenv("ONEBASE_SOMETHING_ELSE", "ignored")
    settings = Settings(port=9002)
    assert (settings.port, settings.max_running, settings.prefix_cache, settings.dtype) == (9002, 7, False, "bfloat16")


def test_a_variable_without_the_prefix_is_none_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PORT", "9001")
    assert Settings().port == 8000


@pytest.mark.parametrize("field", ["base_names", "adapter_sources"])
@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ()),
        (" , ,", ()),
        ("acme/one", ("acme/one",)),
        ("acme/one, acme/two ,,three", ("acme/one", "acme/two", "three")),
        ("hf://acme/,file:///srv/adapters/", ("hf://acme/", "file:///srv/adapters/")),
    ],
)
def test_comma_lists(field: str, text: str, parts: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    assert getattr(Settings(**{field: text}), field) == parts
    assert getattr(Settings(**{field: parts}), field) == parts
    monkeypatch.setenv(f"ONEBASE_{field.upper()}", text)
    assert getattr(Settings(), field) == parts


def test_paths_become_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    settings = Settings(data_dir=Path("data"), preload=Path("~/adapters"))
    assert settings.data_dir == tmp_path / "data"
    assert settings.preload == tmp_path / "home" / "adapters"


BOUNDS: list[tuple[str, Any, Any]] = [  # field, the last values allowed, the first ones refused
    ("threads", (0, 1024), (-1, 1025)),
    ("port", (0, 65535), (-1, 65536)),
    ("ram_cache_bytes", (0,), (-1,)),
    ("adapter_slots", (1, 4096), (0, 4097)),
    ("max_rank", (1, 4096), (0, 4097)),
    ("max_upload_bytes", (1,), (0,)),
    ("max_batch_tokens", (0, 1 << 20), (-1, (1 << 20) + 1)),
    ("max_running", (1, 4096), (0, 4097)),
    ("kv_cache_tokens", (0,), (-1,)),
    ("max_queue_requests", (1,), (0,)),
    ("max_queue_tokens", (1,), (0,)),
    ("max_context", (0,), (-1,)),
    ("drain_seconds", (0, 3600), (-0.1, 3600.1)),
    ("device", ("auto", "cpu", "cuda"), ("tpu",)),
    ("dtype", ("float16",), ("int8",)),
    ("auth", ("off", "on"), ("maybe",)),
    ("events_url", ("", "https://example.org/events"), ("ftp://example.org", "example.org", "https://a:b@example.org")),
    ("events_format", ("cloudevents", "stripe", "lago", "openmeter"), ("fax",)),
    ("events_source", ("/onebase/eu", "x" * 128), ("", "two words", "x" * 129)),
]


@pytest.mark.parametrize(("field", "allowed", "refused"), BOUNDS, ids=[field for field, _, _ in BOUNDS])
def test_bounds(field: str, allowed: Any, refused: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for value in allowed:
        assert getattr(Settings(**{field: value}), field) == value
    for value in refused:
        with pytest.raises(ValidationError, match=field):
            Settings(**{field: value})
        monkeypatch.setenv(f"ONEBASE_{field.upper()}", str(value))
        with pytest.raises(ValidationError, match=field):
            Settings()


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_loopback_needs_no_permission(host: str) -> None:
    assert Settings(host=host).host == host


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "192.168.1.4", "example.org", "127.0.0.1.example.org"])
def test_an_open_address_is_refused_without_insecure(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValidationError, match="insecure"):
        Settings(host=host)
    assert Settings(host=host, insecure=True).host == host
    monkeypatch.setenv("ONEBASE_HOST", host)
    if host:
        with pytest.raises(ValidationError, match="insecure"):
            Settings()
    monkeypatch.setenv("ONEBASE_INSECURE", "1")
    assert Settings().insecure


def test_the_events_token_is_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEBASE_EVENTS_TOKEN", "sk_live_123")
    settings = Settings()
    assert settings.events_token.get_secret_value() == "sk_live_123"
    assert "sk_live" not in f"{settings!r} {settings} {settings.model_dump_json()} {settings.model_dump()}"
    monkeypatch.setenv("ONEBASE_EVENTS_TOKEN", "sk_live_123\nHost: x")
    with pytest.raises(ValidationError, match="events_token") as refused:
        Settings()
    assert "sk_live" not in str(refused.value)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://one:p@ss:w/rd@db.example/bill", "postgresql://one:***@db.example/bill"),
        ("postgresql://one@db.example/bill", "postgresql://one@db.example/bill"),
        ("sqlite:////srv/a:b@c.db", "sqlite:////srv/a:b@c.db"),
    ],
)
def test_the_databases_password_is_not_shown(url: str, shown: str) -> None:
    settings = Settings(database_url=url)
    assert settings.database == url
    assert settings.model_dump(mode="json")["database_url"] == shown
