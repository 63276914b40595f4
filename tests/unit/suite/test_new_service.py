"""One more row in the table of services is all that settings, suite and reference need."""

from pathlib import Path

import pytest

from libs.contracts.services import SERVICES, Service
from libs.process.settings import ServiceSettings, with_url_settings
from libs.process.settings_reference import markdown, settings_of
from libs.suite.child_process import free_port
from libs.suite.settings import SuiteSettings, load_keys, service_environment, with_port_settings
from libs.suite.supervisor import opened_listeners

REPORTS = Service("reports", 8099, "reports", stop_stage=3, is_forwarded_to=True, has_store=True)
ROWS = (*SERVICES, REPORTS)

Settings = with_url_settings(ROWS)(ServiceSettings)
Suite = with_port_settings(ROWS)(SuiteSettings)


@pytest.fixture(autouse=True)
def _no_settings_of_ours(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def test_every_service_knows_where_it_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Settings().urls_of("reports") == "http://127.0.0.1:8099"
    monkeypatch.setenv("REPORTS_URL", "http://reports.example/")
    assert Settings().urls_of("reports") == "http://reports.example"


def test_the_suite_gives_it_a_port_keys_and_the_addresses_of_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("REPORTS_PORT", "9099")
    suite = Suite()
    keys = load_keys(tmp_path, suite)
    own = service_environment(REPORTS, suite, keys, "mongodb://store")
    other = service_environment(SERVICES[0], suite, keys, "mongodb://store")
    assert (own["HOST"], own["PORT"], own["CATALOG_URL"]) == ("127.0.0.1", "9099", "http://127.0.0.1:8082")
    assert own["SIGNING_KEY"] == keys.signing_keys["reports"]
    assert "reports" in other["TRUSTED_KEYS"]
    assert other["REPORTS_URL"] == "http://127.0.0.1:9099"


def test_the_suite_listens_for_it() -> None:
    ports = {service.port_setting: free_port() for service in ROWS}
    suite = Suite.model_validate({"mongodb_url": "mongodb://store", **ports})
    with opened_listeners(suite) as listeners:
        assert listeners["reports"].descriptors


def test_the_reference_describes_it() -> None:
    page = markdown(settings_of({"reports": Settings, "suite": Suite}))
    assert "| `REPORTS_URL` |  | text | `http://127.0.0.1:8099` |" in page
    assert "| `REPORTS_PORT` |  | integer ≥ 1, ≤ 65535 | `8099` |" in page
