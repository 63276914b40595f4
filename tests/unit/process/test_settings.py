"""Settings: environment over file over defaults, and what is bad is named."""

from pathlib import Path
from typing import ClassVar

import pytest
from pydantic import Field, SecretStr, ValidationError

from libs.process.setting_types import Seconds
from libs.process.settings import ServiceSettings, load_settings, settings_without_effect
from libs.process.signing_keys import new_signing_key
from libs.suite.settings import SuiteSettings
from services.gateway.config import GatewaySettings
from services.worker.config import WorkerSettings


class PublicSettings(ServiceSettings):
    """A service of its own making."""

    public: ClassVar[bool] = True
    port: int = 8080
    server_timeout: Seconds = 30.0
    api_key: SecretStr | None = Field(default=None, min_length=8)


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that settings are read from."""
    path = tmp_path / "datasync.yaml"
    path.write_text("")
    monkeypatch.setenv("DATASYNC_CONFIG", str(path))
    return path


def test_defaults_hold_where_nothing_is_said(file: Path) -> None:
    settings = load_settings(ServiceSettings)
    assert settings.kafka_bootstrap_servers is None
    assert settings.urls_of("catalog") == "http://127.0.0.1:8082"


def test_the_file_counts_over_defaults_and_the_environment_over_the_file(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.write_text("server: {port: 9000, timeout: 45s}\nlog: {level: debug}\n")
    monkeypatch.setenv("LOG_LEVEL", "WARN")
    settings = load_settings(PublicSettings)
    assert (settings.port, settings.server_timeout, settings.log_level.value) == (9000, 45.0, "WARN")


def test_the_public_address_of_the_file_is_not_taken_by_inner_services(file: Path) -> None:
    file.write_text("server: {port: 9000, host: 0.0.0.0}\n")
    settings = load_settings(ServiceSettings)
    assert (settings.port, settings.host) == (0, "127.0.0.1")


def test_the_file_of_the_documentation_is_accepted_by_every_service(file: Path) -> None:
    file.write_text(
        """
server:
  port: 8080
  timeout: 30s

database:
  url: postgresql://localhost/datasync
  pool:
    min: 5
    max: 20

sync:
  interval: 30s
  maxRetries: 3
  backoff: exponential

webhook:
  timeout: 30s
  retries: 3
"""
    )
    settings = load_settings(PublicSettings)
    assert settings.db_url is not None
    assert settings.db_url.get_secret_value() == "postgresql://localhost/datasync"
    assert settings.mongodb_url == "mongodb://localhost:27017/?replicaSet=datasync"


def test_a_mongodb_url_in_db_url_is_the_state_store(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DB_URL", "mongodb://store/?replicaSet=a")
    settings = load_settings(ServiceSettings)
    assert settings.mongodb_url == "mongodb://store/?replicaSet=a"
    assert settings.db_url is None


def test_the_state_store_that_is_named_by_its_own_setting_decides(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DB_URL", "mongodb://other")
    monkeypatch.setenv("MONGODB_URL", "mongodb://store")
    assert load_settings(ServiceSettings).mongodb_url == "mongodb://store"


def test_unknown_keys_of_the_file_are_named(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file.write_text("servers: {port: 1}\nsync: {maxretries: 3}\n")
    said = _refused(capsys)
    assert "servers.port" in said
    assert "sync.maxretries" in said


@pytest.mark.parametrize("text", ["a: [", "just text", "- a\n- b\n"])
def test_a_file_that_is_no_mapping_is_refused(file: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    file.write_text(text)
    assert str(file) in _refused(capsys)


def test_a_file_that_was_named_and_is_not_there_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DATASYNC_CONFIG", "/nowhere/datasync.yaml")
    assert "/nowhere/datasync.yaml" in _refused(capsys)


def test_every_bad_setting_is_listed_without_its_value(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PORT", "eighty")
    monkeypatch.setenv("API_KEY", "hunter2")
    monkeypatch.setenv("LOG_LEVEL", "LOUD")
    said = _refused(capsys)
    for name in ("PORT (in datasync.yaml: server.port)", "API_KEY", "LOG_LEVEL"):
        assert name in said
    assert "hunter2" not in said


@pytest.mark.parametrize(
    ("settings", "name", "value"),
    [
        *(
            (ServiceSettings, "HOST", value)
            for value in ("http://x", "a b", "x:80", "x/y", "256.1.1.1", "1.2.3", "a\n")
        ),
        *((ServiceSettings, "HOST", value) for value in ("[::1]", "-x", "x" * 254, "*")),
        *((ServiceSettings, "OTLP_ENDPOINT", value) for value in ("collector:4318", "http://x:70000", "http://x:y")),
        *((ServiceSettings, "AUTH_URL", value) for value in ("http://", "http://x:0", "ftp://x", "http://x?y")),
        *(
            (ServiceSettings, "KAFKA_BOOTSTRAP_SERVERS", value)
            for value in ("x", "x:0", "x:70000", "x:1,y", "x:1,y:99999")
        ),
        *((ServiceSettings, name, "a\nb") for name in ("INSTANCE", "DATABASE_PREFIX", "KAFKA_TOPIC_PREFIX")),
        *(
            (GatewaySettings, "ALLOWED_ORIGINS", value)
            for value in ("*", "null", "x.example", "http://x/y", "http://*.x")
        ),
        *(
            (GatewaySettings, "ALLOWED_ORIGINS", value)
            for value in ("http://a http://b", "http://a:99999", '["http://a"')
        ),
        *((GatewaySettings, "TRUSTED_PROXIES", value) for value in ("10.0.0.1/8", "all", "10.0.0.0/33")),
        (WorkerSettings, "WORKER_ID", "a\nb"),
        (WorkerSettings, "PARQUET_ROOTS", "data"),
        *((SuiteSettings, "HOST", value) for value in ("http://x", "a b")),
    ],
)
def test_a_text_that_can_not_be_used_is_one_line_that_names_its_setting(
    file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    settings: type[ServiceSettings],
    name: str,
    value: str,
) -> None:
    monkeypatch.setenv(name, value)
    monkeypatch.setenv("SIGNING_KEY", new_signing_key()[0])
    with pytest.raises(SystemExit) as ended:
        load_settings(settings)
    assert ended.value.code == 2
    first, *lines = capsys.readouterr().err.splitlines()
    assert first == "datasync: bad settings"
    assert [line.split()[0].rstrip(":") for line in lines] == [name]


def test_every_way_to_say_where_to_listen_and_who_may_call_is_taken(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SIGNING_KEY", new_signing_key()[0])
    for host in (
        "127.0.0.1",
        "0.0.0.0",
        "::",
        "::1",
        "fe80::1%eth0",
        "localhost",
        "my-host.example",
        "a_b",
        "1.example",
    ):
        monkeypatch.setenv("HOST", host)
        assert load_settings(ServiceSettings).host == host
    origins = ("http://a", "https://a.example:8443", "http://[::1]:3000", "capacitor://localhost")
    monkeypatch.setenv("ALLOWED_ORIGINS", ", ".join(f"{origin}/" for origin in origins))
    assert load_settings(GatewaySettings).allowed_origins.value == origins


def test_settings_can_not_be_changed(file: Path) -> None:
    settings = load_settings(ServiceSettings)
    with pytest.raises(ValidationError):
        settings.port = 1  # type: ignore[misc]


def test_secrets_are_not_in_the_text_of_settings(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_KEY", "hunter22")
    monkeypatch.setenv("MONGODB_URL", "mongodb://user:hunter22@store")
    assert "hunter22" not in repr(load_settings(PublicSettings))


@pytest.mark.parametrize(
    ("written", "seconds"), [("30", 30), ("30s", 30), ("1m30s", 90), ("500ms", 0.5), ("2 h", 7200), ("1d", 86400)]
)
def test_durations_may_have_units(file: Path, monkeypatch: pytest.MonkeyPatch, written: str, seconds: float) -> None:
    monkeypatch.setenv("SERVER_TIMEOUT", written)
    assert load_settings(PublicSettings).server_timeout == seconds


@pytest.mark.parametrize("written", ["soon", "30 parsecs", "-1"])
def test_what_is_no_duration_is_refused(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], written: str
) -> None:
    monkeypatch.setenv("SERVER_TIMEOUT", written)
    assert "SERVER_TIMEOUT (in datasync.yaml: server.timeout)" in _refused(capsys)


def _refused(capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stopped:
        load_settings(PublicSettings)
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_an_empty_value_means_the_default_and_an_unknown_key_is_refused_with_and_without_one(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file.write_text("server: {port: , timeout: }\nkafka:\nsync: {interval: }\n")
    settings = load_settings(PublicSettings)
    assert (settings.port, settings.server_timeout) == (8080, 30.0)
    assert settings_without_effect(settings) == {}
    file.write_text("server: {prot: }\n")
    with pytest.raises(SystemExit):
        load_settings(PublicSettings)
    assert "unknown keys: server.prot" in capsys.readouterr().err


def test_errors_name_what_may_be_written(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file.write_text("log: {level: loud}\nparquet: {roots: 7}\n")
    with pytest.raises(SystemExit):
        load_settings(WorkerSettings)
    told = capsys.readouterr().err
    assert "'DEBUG', 'INFO', 'WARN' or 'ERROR'" in told
    assert "PARQUET_ROOTS (in datasync.yaml: parquet.roots): must be a list" in told
    for level in ("WARN", "warning"):
        file.write_text(f"log: {{level: {level}}}\n")
        assert load_settings(WorkerSettings).log_level.value == "WARN"
