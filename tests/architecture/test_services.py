"""The table of services agrees with the services, their documentation and everything else that names them."""

import importlib
import re

import pytest

from libs.contracts.services import GATEWAY, SERVICES, Service, service_named
from libs.contracts.topics import OWNERS
from libs.process.settings import ServiceSettings
from libs.service.definition import ServiceDefinition
from tests.architecture.source import ROOT, services

EVERY_SERVICE = pytest.mark.parametrize("service", SERVICES, ids=lambda service: service.name)


def definition_of(service: Service) -> ServiceDefinition[ServiceSettings]:
    definition: ServiceDefinition[ServiceSettings] = importlib.import_module(f"services.{service.name}.app").SERVICE
    return definition


def test_every_service_has_a_row() -> None:
    assert sorted(service.name for service in SERVICES) == sorted(services())


def test_names_and_ports_are_unique() -> None:
    assert len({service.name for service in SERVICES}) == len(SERVICES)
    assert len({service.port for service in SERVICES}) == len(SERVICES)


@EVERY_SERVICE
def test_a_row_agrees_with_the_service_definition(service: Service) -> None:
    definition = definition_of(service)
    assert definition.name == service.name
    assert definition.uses_store == service.has_store
    assert not definition.topics or service.uses_event_log


@EVERY_SERVICE
def test_a_row_agrees_with_the_settings(service: Service) -> None:
    settings = definition_of(service).settings
    assert settings.model_fields["port"].default == service.port
    assert settings.public == (service.name == GATEWAY)
    assert set(service.secrets) <= settings.model_fields.keys()


def test_the_architecture_page_shows_the_table() -> None:
    """Name, what it owns, and port, in any order of rows."""
    page = (ROOT / "ARCHITECTURE.md").read_text()
    shown = re.findall(r"^\| `(\w+)` \| (.+) \| (\d+)(, public)? \|$", page, re.MULTILINE)
    assert sorted(shown) == sorted(
        (service.name, service.owns, str(service.port), ", public" if service.is_public else "") for service in SERVICES
    )


def test_every_topic_is_owned_by_a_service_with_a_store() -> None:
    with_store = {service.name for service in SERVICES if service.has_store}
    assert set(OWNERS.values()) <= with_store


def test_callers_and_calls_follow_from_the_internal_calls() -> None:
    assert service_named("auth").callers == {"gateway"}
    assert service_named("catalog").callers == {"gateway", "job_orchestrator", "worker"}
    assert service_named("worker").calls == {"catalog", "job_orchestrator"}
    assert service_named("gateway").callers == set()
    assert service_named("record_sync").calls == set()
