"""What the command line refuses, prints, and takes from where."""

import base64
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from libs.contracts.services import SERVICES
from libs.mongodb import client as mongo_module
from libs.process.kept_settings import OtherInstallation, keep_settings, settings_of_installation
from libs.process.settings import StoreSettings, load_settings
from libs.process.signing_keys import new_signing_key, public_key_of
from libs.process.version import installed_version
from libs.service.operations import RewrapSettings
from libs.suite.child_process import free_port
from libs.suite.cli import main
from libs.suite.installation import Installation
from libs.suite.settings import SuiteSettings

pytestmark = pytest.mark.usefixtures("logs_put_back")

ANY_TEXT = {"host", "instance", "worker_id", "db_url", "data_dir", "allowed_origins"}
"""Settings that no text is bad for by itself."""

BAD: dict[str, tuple[str, ...]] = {
    "mongodb_url": ("nonsense", "mongodb://", "mongodb://u:p@ss@host", "mongodb://host:99999"),
    "database_prefix": ("a/b",),
    "kafka_bootstrap_servers": ("nonsense", "host", "host:9092,"),
    "kafka_topic_prefix": ("a b",),
    "signing_key": ("nonsense", base64.b64encode(b"x" * 31).decode()),
    "trusted_keys": ("{", '{"gateway": "nonsense"}', '["gateway"]'),
    "encryption_keys": ("{", "{}", '{"k1": "nonsense"}'),
    "api_key": ("short",),
    "parquet_roots": ("relative/path",),
    "inherited_sockets": ("1", "x"),
}


def bad_settings() -> list[tuple[str, str, str]]:
    """Service, setting and a value, for everything that a service can be told."""
    found = []
    for service in SERVICES:
        settings = importlib.import_module(f"services.{service.name}.app").SERVICE.settings
        for name in settings.model_fields:
            values = () if name in ANY_TEXT else BAD.get(name, ("nonsense ://",))
            found += [(service.name, name, value) for value in values]
    return found


@pytest.fixture(autouse=True)
def _no_settings_of_ours(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for name in os.environ:
        if name not in ("PATH", "HOME"):
            monkeypatch.delenv(name)


@pytest.mark.parametrize(("service", "name", "value"), bad_settings())
def test_a_bad_value_is_one_line_that_names_the_setting_and_not_the_value(
    service: str, name: str, value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SIGNING_KEY", new_signing_key()[0])
    monkeypatch.setenv("ENCRYPTION_KEYS", json.dumps({"k1": base64.b64encode(b"x" * 32).decode()}))
    monkeypatch.setenv(name.upper(), value)
    with pytest.raises(SystemExit) as refused:
        load_settings(importlib.import_module(f"services.{service}.app").SERVICE.settings)
    assert refused.value.code == 2
    title, line, *more = capsys.readouterr().err.splitlines()
    assert (title, more) == ("datasync: bad settings", [])
    assert name.upper() in line
    assert "nonsense" not in line


@pytest.mark.parametrize("name", ["PORT", "MONGODB_PORT", "API_KEY", "LOG_FORMAT"])
def test_a_bad_setting_of_the_suite_is_one_line(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(name, "bad")
    assert main(["up"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_a_data_directory_that_can_not_be_used_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "file"))
    assert main(["up"]) == 2
    assert "DATA_DIR" in capsys.readouterr().err


def test_a_service_that_can_not_listen_says_so_in_one_line(mongod: str, database_prefix: str) -> None:
    environment = {**os.environ, "MONGODB_URL": mongod, "DATABASE_PREFIX": database_prefix, "HOST": "203.0.113.1"}
    ended = subprocess.run(
        [sys.executable, "-P", "-m", "services.record_sync"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 1
    (line,) = ended.stderr.splitlines()
    assert "can't listen on 203.0.113.1" in line


def test_new_keys_can_be_used_as_printed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["keys", "new"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("#")]
    printed = {name: value.strip("'") for name, _, value in (line.partition("=") for line in lines)}
    assert public_key_of(printed["SIGNING_KEY"]) == printed["TRUSTED_KEY"]
    monkeypatch.setenv("ENCRYPTION_KEYS", printed["ENCRYPTION_KEYS"])
    assert len(RewrapSettings().encryption_keys) == 1


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.strip() == f"datasync {installed_version()}"


def kept(directory: Path, **values: Any) -> StoreSettings:
    """The settings that a command gets after a service ran with those."""
    keep_settings("catalog", StoreSettings(**values), directory)
    return settings_of_installation(StoreSettings, "catalog", directory)


def test_commands_have_the_settings_of_the_service_and_not_those_of_the_shell(tmp_path: Path) -> None:
    values: dict[str, Any] = {"mongodb_url": "mongodb://store/?replicaSet=r", "kafka_bootstrap_servers": "kafka:9092"}
    assert kept(tmp_path, **values) == StoreSettings(**values)
    assert (tmp_path / "settings" / "catalog.json").stat().st_mode & 0o077 == 0


def test_a_shell_that_names_another_log_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep_settings("catalog", StoreSettings(), tmp_path)
    monkeypatch.setenv("KAFKA_BOOTSTRAP_SERVERS", "other:9092")
    with pytest.raises(OtherInstallation, match="KAFKA_BOOTSTRAP_SERVERS"):
        settings_of_installation(StoreSettings, "catalog", tmp_path)


def test_a_password_is_not_kept_and_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = "mongodb://ann:hunter22@store/?replicaSet=r"
    with pytest.raises(OtherInstallation, match="MONGODB_URL must be set"):
        kept(tmp_path, mongodb_url=url)
    assert "hunter22" not in (tmp_path / "settings" / "catalog.json").read_text()
    monkeypatch.setenv("MONGODB_URL", url)
    assert settings_of_installation(StoreSettings, "catalog", tmp_path).mongodb_url == url


def test_a_setting_that_every_service_refuses_is_named_once_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("LOG_LEVEL", "LOUD")
    monkeypatch.setenv("WORKER_RUNS_MAX", "no")
    assert main(["up"]) == 2
    title, *lines = capsys.readouterr().err.splitlines()
    assert title == "datasync: bad settings"
    assert [line.split()[0].rstrip(":") for line in lines] == ["LOG_LEVEL", "WORKER_RUNS_MAX"]
    assert list(tmp_path.iterdir()) == []


def test_a_command_outside_an_installation_says_what_is_missing_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(mongo_module, "SELECT_SERVER_MS", 100)
    port = free_port()
    monkeypatch.setenv("MONGODB_URL", f"mongodb://ann:hunter22@localhost:{port}/?replicaSet=datasync")
    for command in (["parked", "catalog"], ["rebuild", "catalog"], ["restored", "catalog"]):
        assert main(command) == 1
        assert capsys.readouterr().err == (
            f"datasync: no installation in {tmp_path / '.datasync'}, and no MongoDB at localhost:{port}: "
            "set DATA_DIR, or MONGODB_URL\n"
        )


def test_a_command_needs_no_secret_that_it_does_not_use(
    mongod: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And makes no database where there is none."""
    monkeypatch.setenv("MONGODB_URL", mongod)
    monkeypatch.setenv("DATABASE_PREFIX", "nowhere_")
    monkeypatch.setenv("TRUSTED_KEYS", "not even JSON")
    for command in (["parked", "catalog"], ["rebuild", "catalog", "--compare"], ["restored", "catalog"]):
        assert main(command) == 1
        assert "there is no data of catalog here" in capsys.readouterr().err
    assert main(["keys", "rewrap"]) == 2
    assert "ENCRYPTION_KEYS" in capsys.readouterr().err


def test_an_installation_names_its_processes_alike_at_every_start(tmp_path: Path) -> None:
    assert Installation.of(tmp_path, SuiteSettings()).instance == Installation.of(tmp_path, SuiteSettings()).instance
