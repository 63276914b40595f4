"""What each process of the suite is given, and what is kept for the next start."""

import base64
import io
import json
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from libs.contracts.services import SERVICES
from libs.process.version import installed_version
from libs.suite.installation import Installation
from libs.suite.output import Output
from libs.suite.settings import CannotStart, SuiteSettings, load_keys, locked_data_dir, service_environment

URL = "mongodb://127.0.0.1:1/?replicaSet=datasync"


@pytest.fixture(autouse=True)
def _no_settings_of_ours(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("API_KEY", "PORT", "DB_URL", "MONGODB_URL", "ENCRYPTION_KEYS"):
        monkeypatch.delenv(name, raising=False)


def environments(settings: SuiteSettings, directory: Path) -> dict[str, dict[str, str]]:
    keys = load_keys(directory, settings)
    return {service.name: service_environment(service, settings, keys, URL) for service in SERVICES}


def test_a_secret_goes_to_the_service_that_needs_it_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_KEY", "a-key-of-ours")
    given = environments(SuiteSettings(), tmp_path)
    assert given["auth"]["API_KEY"] == "a-key-of-ours"
    assert [name for name, environment in given.items() if "API_KEY" in environment] == ["auth"]
    assert [name for name, environment in given.items() if "ENCRYPTION_KEYS" in environment] == ["catalog"]
    assert len({environment["SIGNING_KEY"] for environment in given.values()}) == len(SERVICES)


def test_every_service_trusts_the_public_halves_of_the_others(tmp_path: Path) -> None:
    given = environments(SuiteSettings(), tmp_path)
    for name, environment in given.items():
        signature = Ed25519PrivateKey.from_private_bytes(base64.b64decode(environment["SIGNING_KEY"])).sign(b"x")
        for other in given.values():
            trusted = json.loads(other["TRUSTED_KEYS"])
            Ed25519PublicKey.from_public_bytes(base64.b64decode(trusted[name])).verify(signature, b"x")


def test_the_keys_are_the_same_at_the_next_start(tmp_path: Path) -> None:
    assert load_keys(tmp_path, SuiteSettings()) == load_keys(tmp_path, SuiteSettings())


def test_only_the_gateway_listens_where_the_public_is(tmp_path: Path) -> None:
    given = environments(SuiteSettings(host="0.0.0.0", port=9000), tmp_path)
    assert {name: environment["HOST"] for name, environment in given.items() if environment["HOST"] != "127.0.0.1"} == {
        "gateway": "0.0.0.0"
    }
    assert given["gateway"]["PORT"] == "9000"


def test_a_mongodb_url_in_db_url_is_the_state_store_and_another_scheme_is_not() -> None:
    assert SuiteSettings.model_validate({"db_url": "mongodb://db/?replicaSet=r"}).external_mongodb_url is not None
    assert SuiteSettings.model_validate({"db_url": "postgresql://db/sync"}).external_mongodb_url is None


def test_a_data_directory_is_held_by_one(tmp_path: Path) -> None:
    settings = SuiteSettings(data_dir=tmp_path / "data")
    with locked_data_dir(settings), pytest.raises(CannotStart, match="already running"), locked_data_dir(settings):
        pass
    with locked_data_dir(settings):
        pass


def test_the_data_of_a_newer_version_are_refused_and_those_of_an_older_taken(tmp_path: Path) -> None:
    first = Installation.of(tmp_path, SuiteSettings())
    path = tmp_path / "installation.json"
    assert path.stat().st_mode & 0o077 == 0
    for version in ("0.0.0", installed_version()):
        path.write_text(json.dumps({"id": first.id, "version": version}))
        assert Installation.of(tmp_path, SuiteSettings()).id == first.id
    path.write_text(json.dumps({"id": first.id, "version": "999.10.0"}))
    with pytest.raises(CannotStart, match=r"999\.10\.0"):
        Installation.of(tmp_path, SuiteSettings())


def test_output_for_programs_is_json_line_by_line() -> None:
    stream = io.StringIO()
    output = Output(stream, readable=False)
    output.relay("auth", '{"event": "x"}')
    output.relay("auth", "Traceback (most recent call last):")
    output.say("ready", "ready at last", url="http://localhost")
    output.say("process_died", "auth was killed", process="auth")
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert lines[0] == {"event": "x"}
    assert (lines[1]["service"], lines[1]["event"]) == ("auth", "output")
    assert lines[1]["line"] == "Traceback (most recent call last):"
    assert [(line["event"], line["level"]) for line in lines[2:]] == [("ready", "info"), ("process_died", "error")]
    assert all(line["timestamp"].endswith("Z") and line["service"] for line in lines[1:])


def test_output_for_people_names_who_speaks() -> None:
    stream = io.StringIO()
    Output(stream, readable=True).relay("auth", "hello")
    assert stream.getvalue() == "auth             | hello\n"
